"""The clients' log likelihoods at the reference, which the server's preparations measure."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from stochgrad.core import Kernel, Position
from stochgrad.federated import maximize_over_clients, rim, warn_of_unstable_visits
from stochgrad.interop.flower._network import Network, log
from stochgrad.interop.flower._plausible import Answer, slope_reason

_MOST_DIMENSIONS = 100
_ROUNDING = 1e-4
"""Relative difference of log likelihoods and slopes from which on the data are others."""


class Likelihoods(NamedTuple):
    """The clients' log likelihoods at the reference.

    Attributes:
        reference: The reference.
        total: Slopes, and precisions, summed over clients.
        values: The value of each client.
        slopes: The slope of each client, along a leading axis.
        scales: What each client's curvature is multiplied with.
        setup_bytes: Bytes that the clients sent for it, and that they were sent.
    """

    reference: Position
    total: PyTree
    values: np.ndarray
    slopes: PyTree
    scales: np.ndarray
    setup_bytes: np.ndarray


def measure_likelihoods(
    network: Network, init: Position, like: PyTree, settings: dict[str, Any], max_rounds: int
) -> Likelihoods:
    """Find the reference, and each client's log likelihood there."""
    reference, told = search_reference(network, init, like, settings["curvature"], max_rounds)
    answers = expand_at(network, reference, like, settings["form"], settings["curvature"], told)
    return likelihoods_of(network, reference, answers)


def search_reference(
    network: Network, init: Position, like: PyTree, curvature: str, max_rounds: int
) -> tuple[Position, dict[str, list[Answer]]]:
    """The mode, in rounds over all clients, and what they answered on the way to it."""
    told: dict[str, list[Answer]] = {name: [] for name in network.clients}

    def listen(position, answers):
        flat = np.asarray(ravel_pytree(position)[0], np.float64)
        for name, (value, tree) in answers.items():
            slope = np.asarray(ravel_pytree(tree["slope"])[0], np.float64)
            told[name].append(Answer(flat, value, slope))

    def score(position):
        answers = network.ask(position, like, "none", curvature, network.clients[0])
        listen(position, answers)
        value = sum(value for value, _ in answers.values())
        slopes = [tree["slope"] for _, tree in answers.values()]
        return value, jax.tree.map(lambda *x: np.sum(x, axis=0), *slopes)

    reference = jax.tree.map(np.asarray, init)
    if max_rounds:
        mode = maximize_over_clients(score, init, len(network.clients), max_rounds, 1e-3)
        reference = jax.tree.map(np.asarray, mode.position)
    _check_slopes(told)
    return reference, told


def expand_at(
    network: Network,
    reference: Position,
    like: PyTree,
    form: str,
    curvature: str,
    told: dict[str, list[Answer]],
) -> dict[str, tuple[float, PyTree]]:
    """Each client's value, slope and curvature at the reference."""
    answers = network.ask(reference, like, form, curvature)
    _check_repeated(reference, answers, told)
    return answers


def likelihoods_of(
    network: Network, reference: Position, answers: dict[str, tuple[float, PyTree]]
) -> Likelihoods:
    """The likelihoods by the clients' answers at the reference."""
    trees = [tree for _, tree in answers.values()]
    values, slopes = _values_and_slopes(answers)
    return Likelihoods(
        reference=reference,
        total=jax.tree.map(lambda *x: np.sum(x, axis=0), *trees),
        values=values,
        slopes=slopes,
        scales=np.ones(len(answers)),
        setup_bytes=network.sent.copy(),
    )


def warn_of_runaways(
    network: Network,
    like: PyTree,
    found: Likelihoods,
    settings: dict[str, Any],
    shares: np.ndarray,
    kernel: Kernel,
) -> None:
    """Warn where visits run away, by each client's Hessian at the reference and at two points.

    For surrogates with full matrices, up to a hundred dimensions: the points are at three and ten
    times the distance of the rim of where draws are.
    """
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, found.reference))
    full = settings["form"] == "full" and flat.size <= _MOST_DIMENSIONS
    if not full or settings["steps"] == 1 or len(network.clients) == 1:
        return
    total = np.asarray(found.total["precision"].matrices, np.float64)
    points = [flat, *(jnp.asarray(x, flat.dtype) for x in rim(np.asarray(flat), total)[4::4])]

    def measured(x, curvature):
        position = jax.tree.map(np.asarray, unravel(x))
        answers = network.ask(position, like, "full", curvature)
        return np.stack([tree["precision"].matrices for _, tree in answers.values()])

    own = np.stack([measured(x, "hessian") for x in points]).astype(np.float64)
    fisher = settings["curvature"] == "fisher"
    precision = measured(points[0], "fisher").astype(np.float64) if fisher else own[0]
    warn_of_unstable_visits(network.clients, own, precision, shares, kernel, settings["steps"])


def _check_slopes(told: dict[str, list[Answer]]) -> None:
    """Raise a ValueError that names a client whose slopes are not of its log likelihood."""
    for name, answers in told.items():
        reason = slope_reason(answers)
        if reason is not None:
            raise ValueError(
                f"client {name!r} does not send slopes of a log likelihood: {reason}. Surrogates "
                "made of them would move the posterior: find out why, or leave it out of clients."
            )


def _check_repeated(reference: Position, answers: dict, told: dict[str, list[Answer]]) -> None:
    """The same for slopes at the reference, which the search has seen; with the prior at one."""
    flat = np.asarray(ravel_pytree(reference)[0], np.float64)
    for name, (_, tree) in list(answers.items())[1:]:
        before = [a for a in told[name] if np.array_equal(a.position, flat)]
        slope = np.asarray(ravel_pytree(tree["slope"])[0], np.float64)
        if not before:
            continue
        gap = float(np.max(np.abs(slope - before[-1].slope)))
        if gap > 1e-3 * max(float(np.max(np.abs(before[-1].slope))), 1.0):
            raise ValueError(
                f"client {name!r} does not send slopes of a log likelihood: at one position they "
                f"differ by {gap:.3g} the second time. Find out why, or leave it out of clients."
            )


def measure_again(
    name: str, network: Network, like: PyTree, before: Likelihoods, curvature: str
) -> Likelihoods:
    """The likelihoods of a checkpoint with the clients' values and slopes of now.

    Raises:
        ValueError: they differ by more than rounding: a client has other data.
    """
    answers = network.ask(before.reference, like, "none", curvature, of=network.exact())
    # what clients send who count privacy has noise: a comparison would see nothing else
    kept = network.gone.keys() | network.private
    for s in [s for s, name in enumerate(network.clients) if name in kept]:
        own = {"slope": jax.tree.map(lambda x: x[s], before.slopes)}
        answers[network.clients[s]] = (float(before.values[s]), own)
    values, slopes = _values_and_slopes({name: answers[name] for name in network.clients})
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
