"""Names of earlier versions, which work for one version more."""

import functools
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")


def renamed(module: str, **names: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module whose names have changed.

    Args:
        module: The module's name.
        names: The present name of each former one, with its module if that is another.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, present = names[name].rpartition(".")
        place = place or module
        warnings.warn(
            f"{module}.{name} is now {place}.{present}.", DeprecationWarning, stacklevel=2
        )
        return getattr(import_module(place), present)

    return __getattr__


def key_first(function: Callable[P, T]) -> Callable[P, T]:
    """Take the arguments in the order of version 0.1 as well, in which the key came later."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        place = next((i for i, argument in enumerate(args) if _is_key(argument)), 0)
        if "key" in kwargs:
            args = (kwargs.pop("key"), *args)
        elif place:
            warnings.warn(
                f"the key is the first argument of {function.__name__} now.",
                DeprecationWarning,
                stacklevel=2,
            )
            args = (args[place], *args[:place], *args[place + 1 :])
        return function(*args, **kwargs)

    return call


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
