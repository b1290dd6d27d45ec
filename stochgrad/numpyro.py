"""What numpyro users meet: kernels for ``MCMC``, an objective and a guide for ``SVI``, MCMC-EM."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stochgrad.interop.numpyro import PSGLD as PSGLD
from stochgrad.interop.numpyro import SGHMC as SGHMC
from stochgrad.interop.numpyro import SGLD as SGLD
from stochgrad.interop.numpyro import SGNHT as SGNHT
from stochgrad.interop.numpyro import Cyclical as Cyclical
from stochgrad.interop.numpyro import GradientVariances as GradientVariances
from stochgrad.interop.numpyro import PathGradientELBO as PathGradientELBO
from stochgrad.interop.numpyro import ReplicaExchange as ReplicaExchange
from stochgrad.interop.numpyro import all_rows as all_rows
from stochgrad.interop.numpyro import latent_guide as latent_guide
from stochgrad.interop.numpyro import latent_model as latent_model
from stochgrad.interop.numpyro import to_draws as to_draws

if TYPE_CHECKING:
    from stochgrad.interop.numpyro.auto_flow import AutoFlow as AutoFlow
    from stochgrad.interop.numpyro.flow_adapter import as_flow as as_flow


_WITH_FLOWJAX = {
    "AutoFlow": "stochgrad.interop.numpyro.auto_flow",
    "as_flow": "stochgrad.interop.numpyro.flow_adapter",
}


def __getattr__(name: str) -> Any:
    """Import what needs flowjax on first use."""
    if name in _WITH_FLOWJAX:
        try:
            return getattr(import_module(_WITH_FLOWJAX[name]), name)
        except ModuleNotFoundError as error:
            raise ImportError(f"{name} needs flowjax: pip install 'stochgrad[flows]'.") from error
    raise AttributeError(f"module 'stochgrad.numpyro' has no attribute {name!r}")


__all__ = [
    "AutoFlow",
    "Cyclical",
    "GradientVariances",
    "PSGLD",
    "PathGradientELBO",
    "ReplicaExchange",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "all_rows",
    "as_flow",
    "latent_guide",
    "latent_model",
    "to_draws",
]


def __dir__() -> list[str]:
    return sorted(__all__)
