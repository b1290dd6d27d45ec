"""What the SG-MCMC kernels share."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from stochgrad.core import (
    Position,
    Posterior,
    PRNGKey,
    Shared,
    tree_dot,
    tree_size,
    tree_squared_distance,
)

_LAST_STEP = np.int32(2**31 - 1)


def step_counter() -> Shared:
    """A step count of zero, common to all chains."""
    return Shared(jnp.zeros((), jnp.int32))


def successor(count: Shared) -> Shared:
    """One step more, or the same at the largest number there is."""
    return Shared(jnp.where(count.value < _LAST_STEP, count.value + 1, count.value))


def gradient_key(rng_key: PRNGKey) -> PRNGKey:
    """A key for the gradient, apart from the counters that the noise uses of the same key."""
    return jax.random.fold_in(rng_key, np.uint32(2**32 - 1))


def gradient_norm(gradient: Position) -> Float[Array, ""]:
    """Euclidean norm."""
    return jnp.sqrt(tree_dot(gradient, gradient))


def noise_ratio(gradient, previous, count, step_size, diffusion) -> Float[Array, ""]:
    r"""Diffusion by gradient noise over the diffusion injected, $hV/2D$, averaged over coordinates.

    Two successive estimates are taken at nearly one position from different minibatches, so half
    their squared distance estimates the trace of V. NaN at the first step, which has no precursor.
    """
    trace = tree_squared_distance(gradient, previous) / 2
    ratio = step_size * trace / (2 * diffusion * tree_size(gradient))
    return jnp.where(count > 0, ratio, jnp.nan)


def describe(posterior: Posterior | None) -> tuple[tuple[str, int | str], ...]:
    """Size and order of the minibatches, for a result's attributes."""
    if posterior is None:
        return ()
    batches = posterior.batches
    return (("batch_size", batches.batch_size), ("data_size", batches.size), ("order", batches.order))
