"""Checks of what SG-MCMC kernels and the searches before them are given."""

from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import (
    Kernel,
    Position,
    Target,
    check_callable,
    check_number,
    check_position,
    describe,
    first_line,
    is_function,
)
from stochgrad.gradients import check_center
from stochgrad.sgmcmc._precision import Precision


def check_positive(name: str, value: PyTree, *, zero: bool = False) -> None:
    """Raise unless all numbers of a hyper-parameter are positive (of a matrix, its diagonal)."""
    if isinstance(value, Precision):
        return
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
