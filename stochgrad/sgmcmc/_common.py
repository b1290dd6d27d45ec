"""What the SG-MCMC kernels share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from stochgrad.core import (
    Position,
    Posterior,
    PRNGKey,
    Shared,
    StepSize,
    check_number,
    tree_dot,
    tree_size,
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
    their squared difference estimates V. NaN at the first step, which has no precursor.

    Args:
        gradient: The estimate of this step.
        previous: The estimate of the step before.
        count: Number of this step.
        step_size: h.
        diffusion: D, a number or an array for each leaf.
    """
    difference = jax.tree.map(jnp.subtract, gradient, previous)
    weighted = jax.tree.map(lambda d, x: x / jnp.asarray(d, x.dtype), diffusion, difference)
    variance = tree_dot(difference, weighted) / (2 * tree_size(gradient))
    return jnp.where(count > 0, step_size.astype(variance.dtype) * variance / 2, jnp.nan)


def check_positive(name: str, value: PyTree, *, zero: bool = False) -> None:
    """Raise unless all numbers of a hyper-parameter are positive (of a matrix, its diagonal)."""
    for leaf in jax.tree.leaves(value):
        array = np.asarray(leaf)
        if array.dtype.kind not in "fiu" or array.size == 0:
            check_number(name, leaf, zero=zero)
        square = array.ndim == 2 and array.shape[0] == array.shape[1]
        check_number(name, np.min(np.diag(array) if square else array), zero=zero)


def setting(value: StepSize) -> Any:
    """A number or a schedule as a result's attributes show it."""
    return value if callable(value) else float(value)


def describe(posterior: Posterior | None) -> tuple[tuple[str, int | str], ...]:
    """Size and order of the minibatches, for a result's attributes."""
    if posterior is None:
        return ()
    batches = posterior.batches
    return (
        ("batch_size", batches.batch_size),
        ("data_size", batches.size),
        ("order", batches.order),
    )
