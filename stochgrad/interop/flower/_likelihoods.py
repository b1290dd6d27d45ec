"""The clients' log likelihoods at the reference, which the server's preparations measure."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import Position
from stochgrad.federated import maximize_over_clients
from stochgrad.interop.flower._network import Network, log

_ROUNDING = 1e-4
"""Relative difference of log likelihoods and slopes from which on the data are others."""


class Likelihoods(NamedTuple):
    """The clients' log likelihoods at the reference.

    Attributes:
        reference: The reference.
        total: Slopes, and precisions, summed over clients.
        values: The value of each client.
        slopes: The slope of each client, along a leading axis.
        setup_bytes: Bytes that the clients sent for it.
    """

    reference: Position
    total: PyTree
    values: np.ndarray
    slopes: PyTree
    setup_bytes: int


def measure_likelihoods(
    network: Network, init: Position, like: PyTree, settings: dict[str, Any], max_rounds: int
) -> Likelihoods:
    """Find the reference, and each client's log likelihood there."""
    curvature = settings["curvature"]

    def score(position):
        answers = network.ask(position, like, "none", curvature, network.clients[0])
        value = sum(value for value, _ in answers.values())
        slopes = [tree["slope"] for _, tree in answers.values()]
        return value, jax.tree.map(lambda *x: np.sum(x, axis=0), *slopes)

    mode = maximize_over_clients(score, init, len(network.clients), max_rounds, 1e-3)
    reference = jax.tree.map(np.asarray, mode.position)
    answers = network.ask(reference, like, settings["form"], curvature)
    trees = [tree for _, tree in answers.values()]
    total = jax.tree.map(lambda *x: np.sum(x, axis=0), *trees)
    setup_bytes = mode.bytes_up + sum(x.nbytes for x in jax.tree.leaves(trees))
    values, slopes = _values_and_slopes(answers)
    return Likelihoods(
        reference=reference, total=total, values=values, slopes=slopes, setup_bytes=setup_bytes
    )


def measure_again(
    name: str, network: Network, like: PyTree, before: Likelihoods, curvature: str
) -> Likelihoods:
    """The likelihoods of a checkpoint with the clients' values and slopes of now.

    Raises:
        ValueError: they differ by more than rounding: a client has other data.
    """
    values, slopes = _values_and_slopes(network.ask(before.reference, like, "none", curvature))
    scale = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(before.slopes))
    leaves = list(zip(jax.tree.leaves(before.slopes), jax.tree.leaves(slopes), strict=True))
    for s, client in enumerate(network.clients):
        pairs = [(before.values[s], values[s], abs(before.values[s]))]
        pairs += [(old[s], new[s], scale) for old, new in leaves]
        gap = max(float(np.max(np.abs(a - b))) / max(size, 1.0) for a, b, size in pairs)
        if gap > _ROUNDING:
            raise ValueError(
                f"{name} was written by a different run: the data of client {client!r} are others, "
                f"for its log likelihood at the reference was {before.values[s]:.8g} and is now "
                f"{values[s]:.8g}, and its slope differs by {gap:.2g} of the largest."
            )
        if gap > 0:
            log.warning(
                "the log likelihood of client %s differs from that of before by %.1g of itself: "
                "by rounding, or a few rows",
                client,
                gap,
            )
    return before._replace(values=values, slopes=slopes)


def _values_and_slopes(answers: dict[str, tuple[float, PyTree]]) -> tuple[np.ndarray, PyTree]:
    slopes = [tree["slope"] for _, tree in answers.values()]
    values = np.array([value for value, _ in answers.values()])
    return values, jax.tree.map(lambda *x: np.stack(x), *slopes)
