"""Sampling and learning with stochastic gradients."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stochgrad import em as em
from stochgrad import federated as federated
from stochgrad import gradients as gradients
from stochgrad.core import Batches as Batches
from stochgrad.core import CheckpointWarning as CheckpointWarning
from stochgrad.core import ConvergenceWarning as ConvergenceWarning
from stochgrad.core import DivergenceWarning as DivergenceWarning
from stochgrad.core import Draws as Draws
from stochgrad.core import Gradient as Gradient
from stochgrad.core import GradientNoiseWarning as GradientNoiseWarning
from stochgrad.core import InterruptWarning as InterruptWarning
from stochgrad.core import Kernel as Kernel
from stochgrad.core import Online as Online
from stochgrad.core import Posterior as Posterior
from stochgrad.core import PrecisionWarning as PrecisionWarning
from stochgrad.core import Store as Store
from stochgrad.core import open_draws as open_draws
from stochgrad.core import posterior as posterior
from stochgrad.core import sample as sample
from stochgrad.gradients import control_variate as control_variate
from stochgrad.gradients import mixed_precision as mixed_precision
from stochgrad.gradients import saga as saga
from stochgrad.gradients import svrg as svrg
from stochgrad.gradients import trainable as trainable
from stochgrad.kernels import Fit as Fit
from stochgrad.kernels import ascend as ascend
from stochgrad.kernels import fit as fit
from stochgrad.kernels import independence as independence
from stochgrad.kernels import mala as mala
from stochgrad.sgmcmc import Center as Center
from stochgrad.sgmcmc import Precision as Precision
from stochgrad.sgmcmc import StepSizeReport as StepSizeReport
from stochgrad.sgmcmc import WarmUp as WarmUp
from stochgrad.sgmcmc import cyclical as cyclical
from stochgrad.sgmcmc import find_center as find_center
from stochgrad.sgmcmc import find_mass as find_mass
from stochgrad.sgmcmc import find_step_size as find_step_size
from stochgrad.sgmcmc import mean_field as mean_field
from stochgrad.sgmcmc import moments as moments
from stochgrad.sgmcmc import pathfinder as pathfinder
from stochgrad.sgmcmc import psgld as psgld
from stochgrad.sgmcmc import replica_exchange as replica_exchange
from stochgrad.sgmcmc import sghmc as sghmc
from stochgrad.sgmcmc import sgld as sgld
from stochgrad.sgmcmc import sgnht as sgnht
from stochgrad.sgmcmc import swag as swag
from stochgrad.sgmcmc import warm_up as warm_up

if TYPE_CHECKING:
    from stochgrad import diagnostics as diagnostics
    from stochgrad import flower as flower
    from stochgrad import flows as flows
    from stochgrad import llm as llm
    from stochgrad import numpyro as numpyro
    from stochgrad import potentials as potentials
    from stochgrad.diagnostics import Verdict as Verdict
    from stochgrad.diagnostics import diagnose as diagnose
    from stochgrad.inference import infer as infer
    from stochgrad.inference import nuts as nuts
    from stochgrad.interop import ParquetColumns as ParquetColumns
    from stochgrad.interop import from_numpyro as from_numpyro

__version__ = "0.1.0"

_PLACES = {
    "from_numpyro": "stochgrad.interop",
    "ParquetColumns": "stochgrad.interop",
    "diagnose": "stochgrad.diagnostics",
    "Verdict": "stochgrad.diagnostics",
    "infer": "stochgrad.inference",
    "nuts": "stochgrad.inference",
}
_MODULES = ("diagnostics", "flower", "flows", "llm", "numpyro", "potentials")


__all__ = [
    "Batches",
    "Center",
    "CheckpointWarning",
    "ConvergenceWarning",
    "DivergenceWarning",
    "Draws",
    "Fit",
    "Gradient",
    "GradientNoiseWarning",
    "InterruptWarning",
    "Kernel",
    "Online",
    "ParquetColumns",
    "Posterior",
    "Precision",
    "PrecisionWarning",
    "StepSizeReport",
    "Store",
    "Verdict",
    "WarmUp",
    "ascend",
    "control_variate",
    "cyclical",
    "diagnose",
    "diagnostics",
    "em",
    "federated",
    "find_center",
    "find_mass",
    "find_step_size",
    "fit",
    "from_numpyro",
    "gradients",
    "independence",
    "infer",
    "mala",
    "mean_field",
    "mixed_precision",
    "moments",
    "numpyro",
    "nuts",
    "open_draws",
    "pathfinder",
    "posterior",
    "potentials",
    "psgld",
    "replica_exchange",
    "saga",
    "sample",
    "sghmc",
    "sgld",
    "sgnht",
    "svrg",
    "swag",
    "trainable",
    "warm_up",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})


def __getattr__(name: str) -> Any:
    """Import what needs numpyro or ArviZ on first use, so that importing stochgrad stays cheap."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name in _MODULES:
        try:
            return import_module(f"stochgrad.{name}")
        except ModuleNotFoundError as error:
            if name not in ("flower", "flows") or str(error.name).startswith("stochgrad"):
                raise
            missing = str(error.name).split(".")[0]
            raise ImportError(
                f"stochgrad.{name} needs {missing}: pip install 'stochgrad[{name}]'."
            ) from error
    raise AttributeError(f"module 'stochgrad' has no attribute {name!r}")
