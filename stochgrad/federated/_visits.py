"""Which client a step visits."""

from typing import Any, NamedTuple

from jaxtyping import Array, Int, UInt32

from stochgrad.core import Kernel, describe
from stochgrad.federated._clients import current_visit


class VisitInfo(NamedTuple):
    """What a step among clients reports.

    Attributes:
        step: What the kernel reports.
        client: Number of the client that was visited.
        visits: Visits begun until now.
        left: Steps that are left of this visit.
    """

    step: Any
    client: Int[Array, ""]
    visits: UInt32[Array, ""]
    left: Int[Array, ""]


def with_visits(kernel: Any) -> Kernel:
    """A kernel that also reports which client it visits.

    Args:
        kernel: A kernel of data that clients own, or any object with its ``init`` and ``step``.

    Raises:
        TypeError: it is no kernel; on use, its data are not federated.
    """
    if isinstance(kernel, type) or not (
        callable(getattr(kernel, "init", None)) and callable(getattr(kernel, "step", None))
    ):
        raise TypeError(f"kernel must have init and step, got {describe(kernel)}.")

    def step(rng_key, state):
        state, info = kernel.step(rng_key, state)
        visit = current_visit(state)
        return state, VisitInfo(info, visit.client, visit.number, visit.left)

    if isinstance(kernel, Kernel):
        return kernel._replace(step=step)
    return Kernel(kernel.init, step)
