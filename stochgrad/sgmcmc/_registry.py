"""The kernels by name, each with a small example. To add one, write its file and enter it here.

Every kernel that is entered goes through all tests of ``tests/sgmcmc/test_contract.py``.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from stochgrad.core import Kernel, Target
from stochgrad.sgmcmc._cyclical import cyclical
from stochgrad.sgmcmc._psgld import psgld
from stochgrad.sgmcmc._replica_exchange import replica_exchange
from stochgrad.sgmcmc._sghmc import sghmc
from stochgrad.sgmcmc._sgld import sgld
from stochgrad.sgmcmc._sgnht import sgnht


class Entry(NamedTuple):
    """A factory of kernels and arguments that suit a target of unit scale.

    Attributes:
        factory: ``(target, **arguments) -> Kernel``.
        arguments: An example of what it takes beside the target.
    """

    factory: Callable[..., Kernel]
    arguments: Mapping[str, Any]

    def __call__(self, target: Target) -> Kernel:
        """The example's kernel for a target."""
        return self.factory(target, **self.arguments)


KERNELS: dict[str, Entry] = {
    "sgld": Entry(sgld, {"step_size": 0.01}),
    "sghmc": Entry(sghmc, {"step_size": 0.05, "friction": 2.0}),
    "psgld": Entry(psgld, {"step_size": 0.01, "regularizer": 0.1}),
    "sgnht": Entry(sgnht, {"step_size": 0.05, "diffusion": 1.0}),
    "cyclical": Entry(
        partial(cyclical, partial(sghmc, friction=2.0, integrator="OBABO")),
        {"step_size": 0.05, "steps_per_cycle": 8, "exploration": 0.5},
    ),
    "replica exchange": Entry(
        partial(replica_exchange, partial(sghmc, friction=2.0, integrator="BAOAB")),
        {
            "step_size": 0.05,
            "temperatures": (1.0, 2.0, 4.0),
            "swap_every": 3,
            "energy_batches": 2,
        },
    ),
}
