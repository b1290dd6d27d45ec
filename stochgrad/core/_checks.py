"""Checks of what a user hands in: one clear sentence each, before anything compiles."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

StepSize: TypeAlias = float | Callable[[Any], Any]
"""A step size: a positive number, or an optax-style schedule ``step -> float``."""


def check_key(key: Any) -> None:
    """Raise unless ``key`` is one typed PRNG key."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"key must be a typed PRNG key as jax.random.key(seed) makes it, got {_describe(key)}."
        )
    if key.shape != ():
        raise ValueError(f"key must be a single key, got keys of shape {key.shape}.")


def check_number(name: str, value: Any, *, zero: bool = False) -> float:
    """The value as a float, if it is a positive (or, with ``zero``, non-negative) number."""
    wanted = "a non-negative number" if zero else "a positive number"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be {wanted}, got {_describe(value)}.") from None
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} must be {wanted}, got {number:g}.")
    return number


def check_count(name: str, value: Any, *, least: int = 1) -> int:
    """The value as an int, if it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
    return int(value)


def as_schedule(
    value: StepSize, name: str = "step_size", *, zero: bool = False
) -> tuple[Callable[[Any], Any], float]:
    """A schedule ``step -> float`` and its value at step zero.

    Args:
        value: A positive number, or a schedule.
        name: What it is called.
        zero: Whether a schedule may begin with zero.

    Raises:
        ValueError: the number, or the schedule's first value, is not positive.
    """
    if not callable(value):
        constant = check_number(name, value)
        return (lambda step: constant), constant
    return value, check_number(f"{name} at step 0", value(0), zero=zero)


def data_rows(data: PyTree, *, finite: bool = True) -> int:
    """Number of rows of a pytree of arrays with one leading axis.

    Args:
        data: The arrays.
        finite: Whether to look at their values.

    Raises:
        ValueError: there are no arrays, or no rows, the leading axes differ, or a leaf holds NaN
            or infinity.
    """
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError("data must hold at least one array, got an empty tree.")
    sizes: dict[str, int] = {}
    for path, leaf in leaves:
        name = "data" + jax.tree_util.keystr(path)
        shape = leaf.shape if hasattr(leaf, "shape") else np.shape(leaf)
        if len(shape) == 0:
            raise ValueError(f"{name} must have a leading axis of rows, got a scalar.")
        sizes[name] = shape[0]
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"all arrays of data must have the same number of rows, but {listed}.")
    for path, leaf in leaves if finite else ():
        check_finite("data" + jax.tree_util.keystr(path), leaf)
    size = next(iter(sizes.values()))
    if size == 0:
        raise ValueError("data must hold at least one row, got none.")
    return size


def check_finite(name: str, array: Any) -> None:
    """Raise a ValueError that names the first row in which a concrete array is not finite."""
    if isinstance(array, Tracer) or not jnp.issubdtype(
        getattr(array, "dtype", np.asarray(array).dtype), jnp.inexact
    ):
        return
    with jax.ensure_compile_time_eval():
        finite = np.isfinite(array) if isinstance(array, np.ndarray) else jnp.isfinite(array)
        if not finite.all():
            row = int(np.argwhere(~np.asarray(finite).reshape(len(finite), -1).all(axis=1))[0, 0])
            raise ValueError(f"{name} must be finite, but row {row} holds NaN or infinity.")


def check_position(position: PyTree, name: str = "init") -> None:
    """Raise unless every leaf of a position is a finite array of floating-point numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(position)
    if not leaves:
        raise ValueError(f"{name} must hold at least one array, got an empty tree.")
    for path, leaf in leaves:
        where = name + jax.tree_util.keystr(path)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{where} must be a floating-point array, got dtype {jnp.result_type(leaf)}."
            )
        if not jnp.all(jnp.isfinite(leaf)):
            raise ValueError(f"{where} must be finite, but holds NaN or infinity.")


def _describe(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of dtype {value.dtype} and shape {value.shape}"
    return repr(value)
