"""The gradients of a visit, with slopes at the reference or where its chain was."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import RecordDict
from jaxtyping import PyTree

from stochgrad.core import Gradient, Posterior
from stochgrad.federated import Surrogates, add_conducive, conducive_parameters, with_conducive
from stochgrad.gradients import control_variate
from stochgrad.interop.flower._privacy import Declined
from stochgrad.interop.flower._wire import Refused, metadata, unpack


class Anchor(NamedTuple):
    """Where slopes were taken last for a chain.

    Attributes:
        anchor: The position.
        own: The client's slope there.
        sum: The sum of all clients' slopes there.
    """

    anchor: PyTree
    own: PyTree
    sum: PyTree

    def parameters(self, share: float) -> tuple[PyTree, PyTree]:
        """The anchor, and slopes of the conducive gradient there."""
        at, own, total = jax.tree.map(jnp.asarray, tuple(self))
        slope = jax.tree.map(lambda mine, all: jnp.stack([mine, all - mine]), own, total)
        shares = np.array([share, 1.0])
        return at, conducive_parameters(Surrogates(at, slope, None), shares)[0]


def anchor_of(content: RecordDict, position: PyTree) -> Anchor | None:
    """The anchor that a visit is sent, if it is."""
    if "anchor" not in content:
        return None
    return Anchor(*(unpack(content, name, position) for name in Anchor._fields))


def positions_of(content: RecordDict, position: PyTree) -> list[PyTree]:
    """The positions at which a server asks for slopes."""
    count = metadata(content, count=int)["count"]
    if count < 1:
        raise Refused("count should be positive")
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), position)
    whole = unpack(content, "positions", like)
    return [jax.tree.map(lambda x, n=n: np.asarray(x[n]), whole) for n in range(count)]


def gradient_of_visit(
    target: Posterior,
    own: Surrogates,
    sums: dict[str, Any],
    share: float,
    strength: float,
    centered: bool,
    plain: Callable[[Posterior], Gradient],
    anchored: bool,
) -> tuple[Gradient, Callable[..., None]]:
    """The gradient of a visit, and what it needs to be told while it is traced.

    Nothing; where it is anchored, the anchor and the slopes there. The kernel is made of it before,
    outside of any trace, in which its settings could not be checked.
    """
    both = jax.tree.map(
        lambda mine, total: jnp.concatenate([mine, total[None] - mine]),
        {"slope": own.slope, "precision": own.precision},
        sums,
    )
    surrogates, shares = Surrogates(own.origin, **both), np.array([share, 1.0])
    if not anchored:
        gradient = control_variate(target, own.origin) if centered else plain(target)
        gradient = with_conducive(gradient, surrogates, shares, strength)
        return gradient, lambda: None
    precision = conducive_parameters(surrogates, shares)[1]

    traced: dict[str, Gradient] = {}

    def bind(anchor, slope):
        gradient = control_variate(target, anchor) if centered else plain(target)
        traced["now"] = add_conducive(gradient, anchor, slope, precision, strength)

    def init(key, position):
        return traced["now"].init(key, position)

    def next(key, position, state):
        return traced["now"].next(key, position, state)

    return plain(target)._replace(init=init, next=next), bind


def check_not_counted(counts: bool) -> None:
    """Raise ``Declined`` where privacy is counted: such slopes have no noise."""
    if counts:
        raise Declined("surrogate_period=None")
