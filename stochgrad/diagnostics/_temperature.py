"""Temperatures: what a run's temperature came out as, two ways."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Draws,
    PRNGKey,
    Target,
    check_flag,
    check_key,
    hoisted_jit,
    resident_block,
    tree_dot,
)
from stochgrad.diagnostics._errors import error_of_mean
from stochgrad.diagnostics._inputs import check_fit, gradient_of, positions_of


class Temperatures(NamedTuple):
    r"""Temperatures with their Monte Carlo standard errors: numbers, or arrays over chains.

    Attributes:
        kinetic: Mean of $p^T M^{-1} p / d$; NaN for a kernel without momentum.
        kinetic_error: Its standard error.
        configurational: Mean of $-(q - \bar q)^T \nabla\log\pi(q) / d$.
        configurational_error: Its standard error.
    """

    kinetic: Any
    kinetic_error: Any
    configurational: Any
    configurational_error: Any


@key_first
def temperatures(
    key: PRNGKey, draws: Any, target: Target, *, per_chain: bool = False
) -> Temperatures:
    r"""Kinetic and configurational temperature of a run.

    Both equal the kernel's ``temperature`` in a faithful run:

    $$T_{\mathrm{kin}} = \frac1d E\,p^\top M^{-1}p, \qquad
      T_{\mathrm{conf}} = -\frac1d E\,(q - \bar q)^\top \nabla\log\pi(q).$$

    The second holds for any target whose density vanishes at infinity, by partial integration. Both
    read about $1 + hV/2C$ where independent gradient noise of variance V heats the chain, so that
    their excess over one is the relative error of the posterior variances. The gradients at the
    draws are taken afresh, from minibatches that the chains have not seen (of streamed data, from
    those of one super-block).

    Args:
        key: A typed PRNG key, for the minibatches.
        draws: Draws of positions (not of a ``collect`` of yours), all finite, or an ArviZ object.
        target: The posterior or the gradient that was sampled.
        per_chain: Whether to give each chain's own: one that is hotter than the others has not
            settled, or has left for where the step is too large.

    Raises:
        ValueError: the draws were collected by a function of the caller's, or are not finite.
    """
    check_key(key)
    per_chain = check_flag("per_chain", per_chain)
    gradient = gradient_of(target)
    positions = positions_of(draws, gradient.posterior)
    check_fit(gradient, positions)

    def at(x):
        key, position, centered = x
        state_key, next_key = jax.random.split(key)
        score, _ = gradient.next(next_key, position, gradient.init(state_key, position))
        return -tree_dot(centered, score(position)[1])

    chains, length = jax.tree.leaves(positions)[0].shape[:2]
    flat = jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, *x.shape[2:])), positions)
    centered = jax.tree.map(lambda x: x - x.mean(axis=0, keepdims=True), flat)
    dimension = sum(leaf[0].size for leaf in jax.tree.leaves(flat))
    keys = jax.random.split(key, chains * length)
    with resident_block(gradient.posterior):
        virial = hoisted_jit(lambda *x: jax.lax.map(at, x, batch_size=64))(keys, flat, centered)
    virial = np.asarray(virial).reshape(chains, length) / dimension
    kinetic = _kinetic(draws)
    if kinetic is None:
        kinetic = np.full_like(virial, np.nan)
    if not per_chain:
        return Temperatures(*_mean_and_error(kinetic), *_mean_and_error(virial))
    each = [
        np.array([_mean_and_error(chain[None]) for chain in values]).T
        for values in (kinetic, virial)
    ]
    return Temperatures(*each[0], *each[1])


def _kinetic(draws: Any) -> np.ndarray | None:
    if isinstance(draws, Draws):
        return draws.stats.get("kinetic_temperature")
    try:
        stats = draws["sample_stats"]
    except Exception:  # an object of draws alone
        return None
    return np.asarray(stats["kinetic_temperature"]) if "kinetic_temperature" in stats else None


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    if not np.isfinite(values).all():
        return np.nan, np.nan
    return float(values.mean()), float(error_of_mean(values))
