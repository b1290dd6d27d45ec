"""Checks of arguments: one clear sentence each, before anything compiles."""

import math
import os
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

_PACKAGE = Path(__file__).parents[1]

StepSize: TypeAlias = float | Callable[[Any], Any]
"""A step size: a positive number, or an optax-style schedule ``step -> float``."""


def check_key(key: Any, name: str = "key") -> None:
    """Raise unless ``key`` is one typed PRNG key."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"{name} must be a typed PRNG key as jax.random.key(seed) makes it, got "
            f"{describe(key)}."
        )
    if key.shape != ():
        raise ValueError(f"{name} must be a single key, got keys of shape {key.shape}.")


def check_number(name: str, value: Any, *, zero: bool = False, most: float = math.inf) -> float:
    """The value as a float, if it is a positive (or, with ``zero``, non-negative) number.

    Booleans and text are no numbers, and arrays only if they hold a single one.
    """
    wanted = "a non-negative number" if zero else "a positive number"
    if most < math.inf:
        wanted += f" of at most {most:g}"
    number = _as_float(value)
    if number is None:
        raise ValueError(f"{name} must be {wanted}, got {describe(value)}.")
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero) or number > most:
        raise ValueError(f"{name} must be {wanted}, got {number:g}.")
    return number


def check_real(name: str, value: Any) -> float:
    """The value as a float, if it is a finite number of either sign."""
    number = _as_float(value)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {describe(value)}.")
    return number


def check_count(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """The value as an int, if it is an integer from ``least`` to ``most``."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {wanted}, got {describe(value)}.")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """The value as a bool, if it is one."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {describe(value)}.")
    return bool(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """The value, if it is one of some names."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {describe(value)}.")
    return value


def check_callable(name: str, value: Any, wanted: str = "a function") -> Any:
    """The value, if it can be called; ``wanted`` says of what."""
    if not callable(value):
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}.")
    return value


def check_instance(name: str, value: Any, types: type | tuple[type, ...], wanted: str) -> Any:
    """The value, if it is of a type; ``wanted`` says in words what it is and what makes it."""
    if not isinstance(value, types) or isinstance(value, type):
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}.")
    return value


def check_path(name: str, value: Any) -> Path:
    """The value as an absolute path, which a change of directory does not move."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise TypeError(f"{name} must be a path, got {describe(value)}.")
    path = os.fspath(value)
    if not isinstance(path, str) or "\0" in path:
        raise ValueError(f"{name} must be a path of text, got {describe(value)}.")
    return Path(path).expanduser().resolve()


def check_file_path(name: str, value: Any) -> Path:
    """The path of a file that may not be there yet, but whose directory must."""
    path = check_path(name, value)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name}={str(path)!r}: its directory is not there.")
    if path.is_dir():
        raise IsADirectoryError(f"{name}={str(path)!r} is a directory: name a file in it.")
    return path


def as_schedule(
    value: StepSize, name: str = "step_size", *, zero: bool = False
) -> tuple[Callable[[Any], Any], float]:
    """A schedule ``step -> float`` and its value at step zero.

    Args:
        value: A positive number, or a schedule.
        name: What it is called.
        zero: Whether a schedule may begin with zero.

    Raises:
        ValueError: the number, or the schedule's first value, is not positive; the schedule fails.
    """
    if not callable(value):
        constant = check_number(name, value)
        return (lambda step: constant), constant
    try:
        first = value(0)
    except Exception as error:
        raise ValueError(
            f"{name} must be a number or a schedule step -> number, and fails at step 0: "
            f"{first_line(error)}."
        ) from error
    return value, check_number(f"{name} at step 0", first, zero=zero)


def check_position(position: PyTree, name: str = "init") -> None:
    """Raise unless every leaf of a position is a finite array of floating-point numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(position)
    if not leaves:
        raise ValueError(f"{name} must hold at least one array, got an empty tree.")
    shapes = [np.shape(leaf) for _, leaf in leaves if hasattr(leaf, "shape")]
    if len(shapes) == len(leaves) and all(0 in shape for shape in shapes):
        raise ValueError(f"{name} must hold at least one number, got shapes {shapes}.")
    for path, leaf in leaves:
        where = name + jax.tree_util.keystr(path)
        try:
            dtype = jnp.result_type(leaf)
        except (TypeError, ValueError):
            raise TypeError(
                f"{where} must be a floating-point array, got {describe(leaf)}."
            ) from None
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{where} must be a floating-point array, got dtype {dtype}.")
        if isinstance(leaf, Tracer):
            continue
        with jax.ensure_compile_time_eval():  # also within the trace of something else
            finite = bool(jnp.all(jnp.isfinite(leaf)))
        if not finite:
            raise ValueError(f"{where} must be finite, but holds NaN or infinity.")


def is_function(value: Any) -> bool:
    """Whether a value is called, and not a tree of arrays that can also be called (a network)."""
    return callable(value) and not any(hasattr(x, "dtype") for x in jax.tree.leaves(value))


def describe(value: Any) -> str:
    """A value as a sentence shows it: short, and arrays by type and shape."""
    if isinstance(value, Tracer):
        return f"a traced value of type {value.aval.str_short()}"
    if isinstance(value, jax.Array | np.ndarray):
        kind = "a masked array" if isinstance(value, np.ma.MaskedArray) else "an array"
        return f"{kind} of dtype {value.dtype} and shape {value.shape}"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    if isinstance(value, list | tuple | dict | set):
        text = repr(value)
        return text if len(text) <= 60 else f"a {type(value).__name__} of {len(value)} items"
    named = getattr(value, "__name__", None)
    return f"the function {named}" if named else f"a {type(value).__name__}"


def is_ours(error: BaseException) -> bool:
    """Whether this library raised an error, in words of its own."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not Path(frames[-1].filename).is_relative_to(_PACKAGE):
        return False
    return (frames[-1].line or "").startswith("raise")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().split("\n")
    return lines[0].rstrip(".") or type(error).__name__


def _as_float(value: Any) -> float | None:
    """A real number as a float; None for what is none, and for booleans and text."""
    if isinstance(value, bool | str | bytes) or getattr(value, "dtype", None) in (bool, object):
        return None
    if np.ma.is_masked(value) or getattr(value, "size", 1) != 1:
        return None
    try:
        number = complex(value)
    except (TypeError, ValueError, OverflowError, ArithmeticError):
        return None
    return number.real if number.imag == 0 and not isinstance(value, complex) else None
