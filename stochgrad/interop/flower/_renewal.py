"""Slopes that are taken anew where chains are, by the server."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.interop.flower._likelihoods import Likelihoods
from stochgrad.interop.flower._network import Network, log
from stochgrad.interop.flower._wire import check_reply, tree_limit, unpack


class Anchors(NamedTuple):
    """Where slopes were taken last for each chain, and what they were.

    Attributes:
        period: Visits of each chain between two renewals.
        visits: Visits of each chain before the last renewal; zero before the first.
        positions: The anchor of each chain, along a leading axis.
        slopes: The slope of each client at each, along two leading axes, of clients and chains.
        kept: How often each client did not answer at a renewal, and kept its slope.
    """

    period: int
    visits: int
    positions: PyTree
    slopes: PyTree
    kept: dict[str, int]

    def of_visit(self, chain: int, client: int) -> dict[str, PyTree]:
        """What a visit of a chain to a client is sent of it."""
        slopes = jax.tree.map(lambda x: x[:, chain], self.slopes)
        return {
            "anchor": jax.tree.map(lambda x: x[chain], self.positions),
            "own": jax.tree.map(lambda x: x[client], slopes),
            "sum": jax.tree.map(lambda x: np.sum(x, axis=0), slopes),
        }

    def reason(self) -> str | None:
        """What is known against the draws: slopes that were not taken anew."""
        if not self.kept:
            return None
        times = ", ".join(f"{name} ({n} times)" for name, n in sorted(self.kept.items()))
        return (
            f"Clients did not answer when slopes were taken anew, and kept their last: {times}. "
            "Gradients are unbiased with these too, but visits follow the posterior less well."
        )


def first_anchors(period: int, num_chains: int, likelihoods: Likelihoods) -> Anchors:
    """The reference for all chains, and the slopes there."""

    def repeated(x, axis):
        return np.repeat(np.expand_dims(np.asarray(x), axis), num_chains, axis)

    positions = jax.tree.map(lambda x: repeated(x, 0), likelihoods.reference)
    return Anchors(
        period, 0, positions, jax.tree.map(lambda x: repeated(x, 1), likelihoods.slopes), {}
    )


def anchor_shapes(position: PyTree, num_chains: int, num_clients: int) -> tuple[PyTree, PyTree]:
    """Shapes of the positions and slopes of ``Anchors``."""
    shapes = lambda *lead: jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((*lead, *s.shape), s.dtype), position
    )
    return shapes(num_chains), shapes(num_clients, num_chains)


def renew(network: Network, anchors: Anchors, positions: list[PyTree]) -> Anchors:
    """The anchors at new positions, by the slopes of all clients that are there.

    Each is asked up to thrice; one that does not answer keeps its slope.

    Raises:
        PolicyError: a client declines.
    """
    whole = jax.tree.map(lambda *x: np.stack(x), *positions)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole)

    def request(name: str):
        return {"positions": whole}, {"count": len(positions)}

    def read(name: str, reply: Any):
        return unpack(check_reply(reply, "train.slopes", tree_limit(like)), "slopes", like)

    answers: dict[str, PyTree] = {}
    for _ in range(3):
        network.refresh_nodes()
        asked = [c for c in network.clients if c not in answers and c in network.nodes]
        answers |= network.ask_once(asked, "train.slopes", request, read)
        if len(answers) == len(network.clients):
            break
    kept = dict(anchors.kept)
    for name in [c for c in network.clients if c not in answers]:
        log.warning("client %s does not answer as slopes are taken anew, and keeps its last", name)
        kept[name] = kept.get(name, 0) + 1
    each = [
        answers.get(name, jax.tree.map(lambda x, s=s: x[s], anchors.slopes))
        for s, name in enumerate(network.clients)
    ]
    slopes = jax.tree.map(lambda *x: np.stack(x), *each)
    return Anchors(anchors.period, anchors.visits + anchors.period, whole, slopes, kept)
