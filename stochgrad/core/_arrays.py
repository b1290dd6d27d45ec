"""Checks of arrays and of data, and their conversion from what people hold them in."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from stochgrad.core._checks import describe, first_line

_KINDS = {"number": "iuf", "integer": "iu", "boolean": "b", "complex": "iufc"}
_ROUNDING = 1e-2
"""Rounding error, in standard deviations of a column, from which on a cast is refused."""


def check_array(
    name: str,
    value: Any,
    *,
    shape: Sequence[int | None] | None = None,
    kind: str = "number",
    finite: bool = True,
) -> np.ndarray:
    """The value as a numpy array of real numbers, of integers or of booleans.

    Args:
        name: What it is called.
        value: An array, or what numpy makes one of: numbers, nested lists, columns of a data frame.
        shape: Its shape; None in the place of any length, ``...`` first for any axes before.
        kind: ``"number"``, ``"integer"``, ``"boolean"`` or ``"complex"`` (also real).
        finite: Whether NaN and infinity are refused.

    Raises:
        TypeError: it is no such array; it is masked, ragged, of text or of objects.
        ValueError: its shape is another, or it is not finite.
    """
    wanted = {"number": "an array of numbers", "complex": "an array of numbers"}.get(
        kind, f"an array of {kind}s"
    )
    array = _as_numpy(name, value, wanted)
    if array.dtype.kind not in _KINDS[kind] and not (
        "f" in _KINDS[kind] and jnp.issubdtype(array.dtype, jnp.floating)
    ):
        raise TypeError(f"{name} must be {wanted}, got dtype {array.dtype}.")
    if shape is not None and not _fits(array.shape, tuple(shape)):
        sizes = ", ".join("any" if n is None else "..." if n is ... else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({sizes}), got {array.shape}.")
    if finite and array.ndim == 0 and not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite, got {array}.")
    if finite and array.ndim:
        check_finite(name, array)
    return array


def as_data(data: PyTree, name: str = "data") -> PyTree:
    """Data as a tree of numpy and jax arrays that a device can hold as they are.

    A list of numbers, nested or not, is one array; a column of a data frame (a pandas ``Series``,
    whatever has ``__array__``) becomes one. Values must survive the cast to the widths that jax
    works with: integers beyond 32 bits, and numbers whose differences single precision rounds
    away (dates in seconds, coordinates in meters), are refused while ``jax_enable_x64`` is off.

    Raises:
        TypeError: an array is of objects, text or dates, is masked, or is a whole data frame.
        ValueError: values do not survive the cast.
    """
    if _is_list_of_numbers(data):
        return _one_array(name, data)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _one_array(name + jax.tree_util.keystr(path), leaf),
        data,
        is_leaf=_is_list_of_numbers,
    )


def data_rows(data: PyTree, *, finite: bool = True, name: str = "data") -> int:
    """Number of rows of a pytree of arrays with one leading axis.

    Args:
        data: The arrays.
        finite: Whether to look at their values.
        name: What they are called.

    Raises:
        ValueError: there are no arrays, or no rows, the leading axes differ, or a leaf holds NaN
            or infinity.
    """
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(f"{name} must hold at least one array, got an empty tree.")
    sizes: dict[str, int] = {}
    for path, leaf in leaves:
        where = name + jax.tree_util.keystr(path)
        shape = leaf.shape if hasattr(leaf, "shape") else np.shape(leaf)
        if len(shape) == 0:
            raise ValueError(f"{where} must have a leading axis of rows, got a scalar.")
        sizes[where] = shape[0]
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{where} has {size}" for where, size in sizes.items())
        raise ValueError(f"all arrays of {name} must have the same number of rows, but {listed}.")
    size = next(iter(sizes.values()))
    if size == 0:
        raise ValueError(f"{name} must hold at least one row, got none.")
    for path, leaf in leaves if finite else ():
        check_finite(name + jax.tree_util.keystr(path), leaf)
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


def check_cast(name: str, array: np.ndarray) -> None:
    """Raise unless a numpy array's values survive the cast to the widths that jax works with."""
    target = jax.dtypes.canonicalize_dtype(array.dtype)
    if target == array.dtype or not array.size:
        return
    remedy = "subtract what all have in common or divide, or set jax_enable_x64"
    if array.dtype.kind in "iu":
        limits = np.iinfo(target)
        if array.min() < limits.min or array.max() > limits.max:
            worst = max((array.min(), array.max()), key=lambda x: abs(int(x)))
            raise ValueError(
                f"{name} holds {worst}, beyond what {target} holds, {limits.max}: {remedy}."
            )
        return
    with np.errstate(over="ignore", invalid="ignore"):
        after = array.astype(target).astype(array.dtype)
        if np.any(np.isinf(after) & np.isfinite(array)):
            raise ValueError(
                f"{name} holds {np.max(np.abs(array)):g}, beyond what {target} holds: {remedy}."
            )
        if array.ndim == 0 or array.dtype.kind == "c":
            return
        spread = np.nan_to_num(array.std(axis=0))
        error = np.nan_to_num(np.abs(after - array).max(axis=0))
    varied = array.max(axis=0) > array.min(axis=0)
    if np.any(varied & (error > _ROUNDING * spread)):
        raise ValueError(
            f"{name} has differences that {target} rounds away (values up to "
            f"{np.nanmax(np.abs(array)):g}, rounded by up to {np.max(error):.2g}): {remedy}."
        )


def _one_array(name: str, value: Any) -> Any:
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} must be an array of numbers, got {describe(value)}.")
        return value
    if hasattr(value, "columns") or type(value).__name__ in ("DataFrame", "Table", "Dataset"):
        raise TypeError(
            f"{name} is a {type(value).__name__}: pass its columns as arrays, for example "
            "{column: frame[column].to_numpy() for column in frame}, or one matrix."
        )
    array = _as_numpy(name, value, "an array of numbers")
    if array.dtype.kind not in "biufc" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be an array of numbers, got dtype {array.dtype}: encode categories as "
            "integers and dates as numbers."
        )
    if array.ndim:
        check_cast(name, array)
    return array


def _as_numpy(name: str, value: Any, wanted: str) -> np.ndarray:
    if value is None or isinstance(value, str | bytes | dict | set) or callable(value):
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}.")
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} must be {wanted} whose values are known, got {describe(value)}: call this "
            "outside of jax.jit, jax.vmap and jax.grad."
        )
    if hasattr(value, "toarray"):
        raise TypeError(f"{name} is sparse ({type(value).__name__}): pass {name}.toarray().")
    if isinstance(value, np.ma.MaskedArray) or np.ma.isMaskedArray(value):
        if np.ma.is_masked(value):
            raise TypeError(
                f"{name} is a masked array with masked entries, whose values would be used all "
                "the same: drop or fill them."
            )
        return np.asarray(value)
    try:
        array = np.asarray(value)
    except Exception as error:
        raise TypeError(
            f"{name} must be {wanted}, got {describe(value)} ({first_line(error)})."
        ) from error
    if array.dtype.kind == "O":
        try:  # nullable columns of pandas, lists of jax's scalars
            numbers = array.astype(np.float64)
        except (TypeError, ValueError):
            numbers = None
        if numbers is None or np.isnan(numbers).any() or _holds_none(array):
            raise TypeError(
                f"{name} must be {wanted}, got dtype object, of values such as "
                f"{describe(array.flat[0]) if array.size else 'none'}."
            )
        whole = all(isinstance(x, int | np.integer) for x in array.flat)
        array = array.astype(np.int64) if whole else numbers
    return array


def _holds_none(array: np.ndarray) -> bool:
    return any(x is None or isinstance(x, str | bool) for x in array.flat)


def _is_list_of_numbers(value: Any) -> bool:
    """Whether a value is a list, nested or not, of plain numbers; a list of arrays is a tree."""
    if not isinstance(value, list) or not value:
        return False
    return all(
        _is_list_of_numbers(x)
        or isinstance(x, bool | int | float | complex | np.generic | str)
        or x is None
        for x in value
    )


def _fits(shape: tuple[int, ...], wanted: tuple[Any, ...]) -> bool:
    if wanted and wanted[0] is ...:
        wanted = wanted[1:]
        if len(shape) < len(wanted):
            return False
        shape = shape[len(shape) - len(wanted) :]
    return len(shape) == len(wanted) and all(
        n is None or n == m for n, m in zip(wanted, shape, strict=True)
    )
