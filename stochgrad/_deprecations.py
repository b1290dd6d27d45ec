"""Names of earlier versions, which work for one version more."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


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
