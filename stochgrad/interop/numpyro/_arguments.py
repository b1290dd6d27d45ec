"""The arguments of a numpyro model: checked, and in a form that the model can compute with."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from stochgrad.core import as_data, check_finite, describe, first_line

Arguments = tuple[tuple, dict[str, Any]]


def check_call(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise a TypeError unless the model can be called with these arguments."""
    try:
        called = signature(model)
    except (TypeError, ValueError):
        return
    try:
        called.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"model{called} cannot be called with the {len(args)} positional arguments and the "
            f"keyword arguments {sorted(kwargs)} that it was given: {first_line(error)}."
        ) from error


def as_arguments(args: tuple, kwargs: dict[str, Any], streamed: bool) -> Arguments:
    """The arguments with their arrays and columns as numpy or jax arrays, all finite.

    What holds no numbers of the data (a size, a function, a list, None) stays as it is, and so do
    streamed arrays.

    Raises:
        TypeError: an argument is a data frame, or an array of objects, of text, or masked.
        ValueError: an argument holds NaN or infinity, or single precision does not hold its values.
    """

    def convert(name: str, value: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _as_argument(name + jax.tree_util.keystr(path), leaf, streamed),
            value,
            is_leaf=_is_frame,
        )

    return (
        tuple(convert(f"argument {i}", value) for i, value in enumerate(args)),
        {name: convert(f"argument {name!r}", value) for name, value in kwargs.items()},
    )


def names_of(arguments: Arguments) -> dict[int, tuple[str, Any]]:
    """Names of the arrays among the arguments, by identity."""
    args, kwargs = arguments
    named = {f"argument {i}": value for i, value in enumerate(args)}
    named.update({f"argument {name!r}": value for name, value in kwargs.items()})
    return {
        id(leaf): (name + jax.tree_util.keystr(path), leaf)
        for name, value in named.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(value)
        if hasattr(leaf, "shape")
    }


def on_device(arguments: PyTree, streamed: bool) -> PyTree:
    """The arguments with numpy arrays on the device; streamed ones are left where they are."""
    with jax.ensure_compile_time_eval():
        return jax.tree.map(
            lambda leaf: jnp.asarray(leaf) if _in_memory(leaf, streamed) else leaf, arguments
        )


def on_host(arguments: PyTree, streamed: bool) -> PyTree:
    """The arguments with their arrays in numpy, so that a model can count with their values."""

    def convert(leaf):
        if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            leaf = np.asarray(leaf)
        if not _in_memory(leaf, streamed):
            return leaf
        return leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False).view(HostArray)

    return jax.tree.map(convert, arguments)


class HostArray(np.ndarray):
    """A numpy array that traced indices can pick from, and that is put on the device once."""

    _device: jax.Array | None = None

    def __jax_array__(self) -> jax.Array:
        if self._device is None:
            with jax.ensure_compile_time_eval():
                self._device = jnp.asarray(np.asarray(self))
        return self._device

    def __getitem__(self, index: Any) -> Any:
        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(index)):
            return self.__jax_array__()[index]
        return super().__getitem__(index)

    def __array_wrap__(self, array, context=None, return_scalar=False) -> Any:
        """Sums and maxima over everything are numbers, as with arrays of numpy itself."""
        return array[()] if np.ndim(array) == 0 else array.view(type(self))


def _as_argument(name: str, leaf: Any, streamed: bool) -> Any:
    if isinstance(leaf, float | np.floating) and np.isnan(leaf):
        raise ValueError(f"{name} must be a number, got nan.")
    if isinstance(leaf, np.generic) or not (
        _is_frame(leaf)
        or isinstance(leaf, jax.Array | np.ndarray)
        or (hasattr(leaf, "__array__") and not streamed)
        or (hasattr(leaf, "toarray") and hasattr(leaf, "shape"))
    ):
        return leaf
    if streamed and not _is_frame(leaf) and not _in_memory(leaf, streamed):
        return leaf
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    if isinstance(leaf, Tracer):
        raise TypeError(
            f"{name} must be an array whose values are known, got {describe(leaf)}: call this "
            "outside of jax.jit, jax.vmap and jax.grad."
        )
    array = as_data(leaf, name)
    if np.ndim(array) > 0:
        check_finite(name, array)
    elif np.isnan(array):
        raise ValueError(f"{name} must be a number, got nan.")
    return array


def _is_frame(value: Any) -> bool:
    return hasattr(value, "columns") and hasattr(value, "shape")


def _in_memory(leaf: Any, streamed: bool) -> bool:
    return isinstance(leaf, np.ndarray) and not (streamed and isinstance(leaf, np.memmap))
