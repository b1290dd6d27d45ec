"""What the SG-MCMC kernels share."""

from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from stochgrad.core import (
    Kernel,
    Position,
    Posterior,
    PRNGKey,
    Shared,
    StepSize,
    Target,
    check_callable,
    check_number,
    check_position,
    describe,
    first_line,
    is_function,
    tree_dot,
    tree_size,
)
from stochgrad.gradients import check_center
from stochgrad.integrators import over

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
    weighted = jax.tree.map(over, difference, diffusion)
    variance = tree_dot(difference, weighted) / (2 * tree_size(gradient))
    return jnp.where(count > 0, step_size.astype(variance.dtype) * variance / 2, jnp.nan)


def check_positive(name: str, value: PyTree, *, zero: bool = False) -> None:
    """Raise unless all numbers of a hyper-parameter are positive (of a matrix, its diagonal)."""
    leaves = jax.tree.leaves(value)
    if not leaves:
        raise ValueError(f"{name} must hold numbers, got {describe(value)}.")
    for leaf in leaves:
        array = np.asarray(leaf)
        if array.dtype.kind not in "fiu" or array.size == 0:
            check_number(name, leaf, zero=zero)
            raise ValueError(f"{name} must hold numbers, got {describe(leaf)}.")
        square = array.ndim == 2 and array.shape[0] == array.shape[1]
        if not np.all(np.isfinite(array)):
            bad = array[~np.isfinite(array)].flat[0]
            raise ValueError(f"{name} must be a positive number everywhere, got {bad:g}.")
        check_number(name, np.min(np.diag(array) if square else array), zero=zero)


def make_kernel(factory: Any, target: Target, step_size: Any, temperature: Any) -> Kernel:
    """The kernel of a factory ``(target, step_size, temperature=...)``.

    Raises:
        TypeError: it is no such function, or does not return a kernel.
    """
    form = "a function (target, step_size, temperature=...) -> Kernel, such as stochgrad.sgld"
    check_callable("kernel_factory", factory, form)
    try:
        signature(factory).bind(target, step_size, temperature=temperature)
    except TypeError as error:
        raise TypeError(f"kernel_factory must be {form}: {first_line(error)}.") from error
    kernel = factory(target, step_size, temperature=temperature)
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel_factory must be {form}; it returns {describe(kernel)}.")
    return kernel


def as_position(name: str, position: Any) -> Position:
    """A position, or that of a center near a mode, as finite arrays."""
    position = check_center(name, position)
    if is_function(position) or position is None:
        raise TypeError(f"{name} must be a position, got {describe(position)}.")
    check_position(position, name)
    return jax.tree.map(jnp.asarray, position)


def setting(value: StepSize) -> Any:
    """A number or a schedule as a result's attributes show it."""
    return value if callable(value) else float(value)


def batch_settings(posterior: Posterior | None) -> tuple[tuple[str, int | str], ...]:
    """Size and order of the minibatches, for a result's attributes."""
    if posterior is None:
        return ()
    batches = posterior.batches
    return (
        ("batch_size", batches.batch_size),
        ("data_size", batches.size),
        ("order", batches.order),
    )
