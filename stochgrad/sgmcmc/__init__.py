"""Samplers driven by stochastic gradients."""

from stochgrad._deprecations import renamed as _renamed
from stochgrad.sgmcmc._center import Center as Center
from stochgrad.sgmcmc._center import center_at as center_at
from stochgrad.sgmcmc._center import find_center as find_center
from stochgrad.sgmcmc._common import as_position as as_position
from stochgrad.sgmcmc._curvature import find_mass as find_mass
from stochgrad.sgmcmc._cyclical import CyclicalState as CyclicalState
from stochgrad.sgmcmc._cyclical import cyclical as cyclical
from stochgrad.sgmcmc._kernel import StepInfo as StepInfo
from stochgrad.sgmcmc._mean_field import mean_field as mean_field
from stochgrad.sgmcmc._normal import EQUALS as EQUALS
from stochgrad.sgmcmc._normal import Normal as Normal
from stochgrad.sgmcmc._normal import NormalApproximation as NormalApproximation
from stochgrad.sgmcmc._online import SWAG as SWAG
from stochgrad.sgmcmc._online import Moments as Moments
from stochgrad.sgmcmc._online import moments as moments
from stochgrad.sgmcmc._online import swag as swag
from stochgrad.sgmcmc._pathfinder import evidence_bound as evidence_bound
from stochgrad.sgmcmc._pathfinder import pathfinder as pathfinder
from stochgrad.sgmcmc._precision import DENSE_DIMENSION as DENSE_DIMENSION
from stochgrad.sgmcmc._precision import Precision as Precision
from stochgrad.sgmcmc._precision import precision_of as precision_of
from stochgrad.sgmcmc._preconditioner import whitenings as whitenings
from stochgrad.sgmcmc._psgld import PSGLDState as PSGLDState
from stochgrad.sgmcmc._psgld import psgld as psgld
from stochgrad.sgmcmc._registry import KERNELS as KERNELS
from stochgrad.sgmcmc._replica_exchange import ReplicaState as ReplicaState
from stochgrad.sgmcmc._replica_exchange import replica_exchange as replica_exchange
from stochgrad.sgmcmc._sghmc import SGHMCState as SGHMCState
from stochgrad.sgmcmc._sghmc import sghmc as sghmc
from stochgrad.sgmcmc._sgld import SGLDState as SGLDState
from stochgrad.sgmcmc._sgld import sgld as sgld
from stochgrad.sgmcmc._sgnht import SGNHTState as SGNHTState
from stochgrad.sgmcmc._sgnht import sgnht as sgnht
from stochgrad.sgmcmc._step_size import StepSizeReport as StepSizeReport
from stochgrad.sgmcmc._step_size import find_step_size as find_step_size
from stochgrad.sgmcmc._warm_up import WarmUp as WarmUp
from stochgrad.sgmcmc._warm_up import langevin_at as langevin_at
from stochgrad.sgmcmc._warm_up import warm_up as warm_up
from stochgrad.sgmcmc._windows import KernelAt as KernelAt
from stochgrad.sgmcmc._windows import Place as Place
from stochgrad.sgmcmc._windows import TunedKernel as TunedKernel
from stochgrad.sgmcmc._windows import Window as Window

__getattr__ = _renamed(
    __name__,
    SGLDInfo="StepInfo",
    SGHMCInfo="StepInfo",
    SGNHTInfo="StepInfo",
    CyclicalInfo="StepInfo",
    ReplicaInfo="StepInfo",
)

__all__ = [
    "Center",
    "Moments",
    "Normal",
    "NormalApproximation",
    "Place",
    "Precision",
    "StepSizeReport",
    "SWAG",
    "TunedKernel",
    "WarmUp",
    "Window",
    "cyclical",
    "find_center",
    "find_mass",
    "find_step_size",
    "mean_field",
    "moments",
    "pathfinder",
    "psgld",
    "replica_exchange",
    "sghmc",
    "sgld",
    "sgnht",
    "swag",
    "warm_up",
]


def __dir__() -> list[str]:
    return sorted(__all__)
