"""One point for all clients to expand their likelihoods at."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from stochgrad.core import (
    Position,
    Posterior,
    check_count,
    check_number,
    full_data_mean,
    hoisted_jit,
)
from stochgrad.federated._checks import as_reference, check_federated
from stochgrad.federated._client_sums import MANY_ROWS, all_likelihoods, prior_only
from stochgrad.federated._clients import require_clients


class Reference(NamedTuple):
    r"""A point near the posterior's mode, found without moving data.

    Attributes:
        position: $\theta_*$.
        log_density: $\log\pi(\theta_*)$.
        gradient_norm: $|\nabla\log\pi(\theta_*)|$.
        rounds: How often all clients were asked for their gradient.
        bytes_up: What the clients sent for it, all together.
        bytes_down: What they were sent.
    """

    position: Position
    log_density: float
    gradient_norm: float
    rounds: int
    bytes_up: int
    bytes_down: int


def find_reference(
    posterior: Posterior, init: Position, *, max_rounds: int = 100, tolerance: float = 1e-3
) -> Reference:
    r"""The posterior's mode by L-BFGS, each of whose steps is a round over all clients.

    In a round the server sends a position, and every client the gradient of its own log likelihood
    there, on all of its data. The nearer the mode the better for what is expanded there, but any
    point is valid.

    Args:
        posterior: A posterior of data that clients own.
        init: Where to start.
        max_rounds: The most rounds.
        tolerance: Enough, when a round's log density rises by less than this.

    Raises:
        TypeError: the posterior's data are not federated.
        ValueError: ``init`` does not fit the model, or the log density is not finite there; a
            number is out of range.
    """
    check_federated(posterior)
    max_rounds = check_count("max_rounds", max_rounds)
    tolerance = check_number("tolerance", tolerance)
    init = as_reference(posterior, init, "init")
    clients = require_clients(posterior)
    score = _score_of_all(posterior)
    return maximize_over_clients(score, init, clients.count, max_rounds, tolerance)


def _score_of_all(posterior: Posterior) -> Callable[[Position], tuple[Any, Position]]:
    """Value and gradient of the log density on all clients' rows; of many rows, in parts."""
    score = jax.value_and_grad(posterior.log_density)
    if posterior.batches.size < MANY_ROWS:
        return full_data_mean(posterior, score)
    likelihood, prior = all_likelihoods(posterior, score), prior_only(posterior, score)
    return hoisted_jit(lambda x: jax.tree.map(jnp.add, likelihood(x), prior(x)))


def maximize_over_clients(
    score: Callable[[Position], tuple[Any, Position]],
    init: Position,
    count: int,
    max_rounds: int,
    tolerance: float,
) -> Reference:
    """The maximum of what ``count`` clients give value and gradient of."""
    from scipy.optimize import minimize

    init = jax.tree.map(jnp.asarray, getattr(init, "position", init))
    flat, unravel = ravel_pytree(init)
    answers: dict[bytes, tuple[float, np.ndarray]] = {}

    def descend(x):
        point = np.asarray(x, flat.dtype)
        if point.tobytes() not in answers:
            value, g = score(unravel(jnp.asarray(point)))
            answers[point.tobytes()] = (
                -float(value),
                -np.asarray(ravel_pytree(g)[0], np.float64),
            )
        return answers[point.tobytes()]

    start, _ = descend(flat)
    if not np.isfinite(start):
        raise ValueError(
            "the log density is not finite at init, where the search for a reference starts."
        )
    enough = tolerance / max(abs(start), 1.0)
    found = minimize(
        descend,
        np.asarray(flat, np.float64),
        jac=True,
        method="L-BFGS-B",
        options={"maxfun": max_rounds, "maxiter": max_rounds, "ftol": enough},
    )
    value, g = descend(found.x)
    rounds, size = len(answers), count * flat.nbytes
    position = unravel(jnp.asarray(found.x, flat.dtype))
    return Reference(
        position, -value, float(np.linalg.norm(g)), rounds, rounds * size, rounds * size
    )


def local_modes(posterior: Posterior, score: Any, init: Position, max_steps: int) -> list[Position]:
    """For each client the maximum of ``score``, ``(client, position) -> (value, gradient)``."""
    from scipy.optimize import minimize

    flat, unravel = ravel_pytree(init)

    def flat_score(client, x):
        value, g = score(client, unravel(x))
        return -value, -ravel_pytree(g)[0]

    run = hoisted_jit(flat_score)

    def one(client):
        def descend(x):
            value, g = run(np.int32(client), jnp.asarray(x, flat.dtype))
            return float(value), np.asarray(g, np.float64)

        start = np.asarray(flat, np.float64)
        options = {"maxiter": max_steps, "maxfun": 2 * max_steps}
        found = minimize(descend, start, jac=True, method="L-BFGS-B", options=options)
        return unravel(jnp.asarray(found.x, flat.dtype))

    return [one(client) for client in range(require_clients(posterior).count)]
