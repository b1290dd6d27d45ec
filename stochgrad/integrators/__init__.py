"""Integrators of underdamped Langevin dynamics."""

from stochgrad.integrators._protocol import Coefficients as Coefficients
from stochgrad.integrators._protocol import Integrator as Integrator
from stochgrad.integrators._protocol import Stage as Stage
from stochgrad.integrators._protocol import axpy as axpy
from stochgrad.integrators._protocol import over as over
from stochgrad.integrators._protocol import scaled as scaled
from stochgrad.integrators._protocol import velocity as velocity
from stochgrad.integrators._splitting import splitting as splitting
from stochgrad.integrators._table import INTEGRATORS as INTEGRATORS
from stochgrad.integrators._table import integrator_of as integrator_of

__all__ = [
    "Coefficients",
    "Integrator",
    "Stage",
    "axpy",
    "over",
    "scaled",
    "splitting",
    "velocity",
]


def __dir__() -> list[str]:
    return sorted(__all__)
