"""Functions as bytes, for a process that has the same packages, but not this one's state."""

import dis
import functools
import importlib
import io
import marshal
import pickle
import re
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

from stochgrad.em._process import fill_function, make_function

_LIBRARIES = [
    str(Path(path).resolve())
    for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
]
_HERE = ("logging", "warnings", "threading", "__main__")  # modules that are about this process
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, type(...), re.Pattern)


def pickle_function(function: Any) -> bytes:
    """A function as bytes: functions of a script or of a user's module by their code.

    Raises:
        TypeError: it refers to what no other process can have.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(function)
    except Exception as error:
        raise TypeError(str(error)) from error
    return buffer.getvalue()


def is_pure(value: Any, seen: set[int] | None = None) -> bool:
    """Whether a copy of a function in another process does all that the function does here.

    That is so where it keeps no state, prints and logs nothing, and refers to constants, functions
    of the kind, and installed packages. False where one cannot tell. ``seen`` holds ids.
    """
    seen = set() if seen is None else seen
    if id(value) in seen or type(value) in _CONSTANTS:
        return True
    seen.add(id(value))
    if type(value) in (tuple, frozenset):
        return all(is_pure(part, seen) for part in value)
    if isinstance(value, types.ModuleType):
        return _in_library(value.__name__) and value.__name__ not in _HERE
    if isinstance(value, types.BuiltinFunctionType):
        owner = value.__self__
        return value is not print and (owner is None or isinstance(owner, types.ModuleType))
    if isinstance(value, type):
        return _in_library(value.__module__)
    if type(value) is functools.partial:
        return is_pure((value.func, *value.args, *value.keywords.values()), seen)
    if not isinstance(value, types.FunctionType):
        return False
    if _by_name(value):
        return True
    if value.__dict__ or any(_keeps_state(code) for code in _codes(value.__code__)):
        return False
    cells = (cell for cells in _closure_of(value) for cell in cells)
    defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    parts = (*_globals_of(value).values(), *cells, *defaults)
    return all(is_pure(part, seen) for part in parts)


def _keeps_state(code: types.CodeType) -> bool:
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR"):
            return True
        if name == "STORE_DEREF" and instruction.argval in code.co_freevars:
            return True
    return "print" in code.co_names


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """A function's code, and that of the functions inside it."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return [code, *(deeper for part in inner for deeper in _codes(part))]


def _names_of(function: types.FunctionType) -> set[str]:
    return {name for code in _codes(function.__code__) for name in code.co_names}


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    names = _names_of(function)
    return {name: value for name, value in function.__globals__.items() if name in names}


def _closure_of(function: types.FunctionType) -> list[tuple]:
    """Contents of each cell: a tuple of one, or of none where it is empty."""
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append((cell.cell_contents,))
        except ValueError:
            contents.append(())
    return contents


def _in_library(name: str | None) -> bool:
    """Whether a module comes with Python or is installed."""
    if name is None or name == "__main__":
        return False
    root = name.split(".")[0]
    if root in sys.builtin_module_names or root in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and any(
        str(Path(file).resolve()).startswith(library) for library in _LIBRARIES
    )


def _by_name(function: types.FunctionType) -> bool:
    """Whether a function is an installed module's, and found there."""
    if not _in_library(function.__module__):
        return False
    value: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        value = getattr(value, name, None)
    return value is function


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, types.ModuleType):
            if obj.__name__ == "__main__":
                raise pickle.PicklingError("it refers to the main script itself")
            return importlib.import_module, (obj.__name__,)
        if isinstance(obj, type) and obj.__module__ == "__main__":
            raise pickle.PicklingError(
                f"it refers to the class {obj.__name__} of the main script: put that into a module"
            )
        if not isinstance(obj, types.FunctionType) or _by_name(obj):
            return NotImplemented
        if obj in (make_function, fill_function):
            return NotImplemented
        names, values = _names_of(obj), _globals_of(obj)
        modules = [value.__name__ for value in values.values() if type(value) is types.ModuleType]
        inner = {f"{module}.{name}" for module in modules for name in names}
        state = {
            "imports": sorted(inner & sys.modules.keys()),
            "globals": values,
            "closure": _closure_of(obj),
            "defaults": obj.__defaults__,
            "kwdefaults": obj.__kwdefaults__,
            "attributes": obj.__dict__,
        }
        code = marshal.dumps(obj.__code__)
        arguments = (code, obj.__name__, obj.__module__, len(obj.__closure__ or ()))
        return make_function, arguments, state, None, None, fill_function
