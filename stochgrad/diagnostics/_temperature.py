"""Temperatures: what a run's temperature came out as, two ways."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import Draws, PRNGKey, Target, check_key, compiled, tree_dot
from stochgrad.diagnostics._errors import error_of_mean, finite
from stochgrad.gradients import as_gradient


class Temperatures(NamedTuple):
    r"""Temperatures with their Monte Carlo standard errors.

    Attributes:
        kinetic: Mean of $p^T M^{-1} p / d$; NaN for a kernel without momentum.
        kinetic_error: Its standard error.
        configurational: Mean of $-(q - \bar q)^T \nabla\log\pi(q) / d$.
        configurational_error: Its standard error.
    """

    kinetic: float
    kinetic_error: float
    configurational: float
    configurational_error: float


def temperatures(draws: Draws, target: Target, key: PRNGKey) -> Temperatures:
    r"""Kinetic and configurational temperature of a run.

    Both equal the kernel's ``temperature`` in a faithful run:

    $$T_{\mathrm{kin}} = \frac1d E\,p^\top M^{-1}p, \qquad
      T_{\mathrm{conf}} = -\frac1d E\,(q - \bar q)^\top \nabla\log\pi(q).$$

    The second holds for any target whose density vanishes at infinity, by partial integration. Both
    read about $1 + hV/2C$ where independent gradient noise of variance V heats the chain, so that
    their excess over one is the relative error of the posterior variances. The gradients at the
    draws are taken afresh, from minibatches that the chains have not seen.

    Args:
        draws: Draws of positions (not of a ``collect`` of yours), all finite.
        target: The posterior or the gradient that was sampled.
        key: A typed PRNG key, for the minibatches.

    Raises:
        ValueError: the draws were collected by a function of the caller's, or are not finite.
    """
    check_key(key)
    if draws.collected:
        raise ValueError("temperatures needs draws of positions, not those of a collect function.")
    finite(draws)
    gradient = as_gradient(target)

    def at(x):
        key, position, centered = x
        state_key, next_key = jax.random.split(key)
        score, _ = gradient.next(next_key, position, gradient.init(state_key, position))
        return -tree_dot(centered, score(position)[1])

    flat = jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, *x.shape[2:])), draws.positions)
    centered = jax.tree.map(lambda x: x - x.mean(axis=0, keepdims=True), flat)
    dimension = sum(leaf[0].size for leaf in jax.tree.leaves(flat))
    keys = jax.random.split(key, draws.num_chains * draws.num_draws)
    virial = compiled(lambda *x: jax.lax.map(at, x, batch_size=64))(keys, flat, centered)
    virial = np.asarray(virial).reshape(draws.num_chains, draws.num_draws) / dimension
    kinetic = draws.stats.get("kinetic_temperature")
    return Temperatures(
        *((np.nan, np.nan) if kinetic is None else _mean_and_error(kinetic)),
        *_mean_and_error(virial),
    )


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(error_of_mean(values))
