"""Names of earlier versions, which work for one version more."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def renamed(module: str, **names: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module whose names have changed.

    Args:
        module: The module's name.
        names: The present name of each former one.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is now {module}.{names[name]}.", DeprecationWarning, stacklevel=2
        )
        return getattr(import_module(module), names[name])

    return __getattr__
