"""What tells one run from another, so that only a run's own files are gone on with."""

import hashlib
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np

from stochgrad.core._stream import Stream
from stochgrad.core._trace import Traced

_SAMPLED_BYTES = 2**20
_PLACES = 64
_DIGESTS = ("program", "values of the data")


def identity(
    traced: Traced, attrs: Mapping[str, Any], example: Any, stream: Stream | None
) -> dict[str, Any]:
    """Names and values, as JSON has them, of all that decides a run's draws.

    The program is told by a digest of its trace; the data by their shapes and a digest of some of
    their rows, so that a terabyte is not read twice.
    """
    sources = [] if stream is None else stream.sources
    arrays = [*traced.constants, *(source.array for source in sources)]
    some = [*map(_sample, traced.constants), *(source.sample(_PLACES) for source in sources)]
    text = re.sub(r"0x[0-9a-f]+|<function [^>]*>", "", str(traced.jaxpr))
    structure, leaves, key_type = example
    shapes = jax.tree.unflatten(structure, [f"{dtype}{list(shape)}" for shape, dtype in leaves])
    return {
        **{name: _plain(value) for name, value in attrs.items()},
        "position": _describe(shapes),
        "generator of keys": str(key_type),
        "program": hashlib.sha256(text.encode()).hexdigest()[:16],
        "data": [f"{array.dtype}{list(array.shape)}" for array in arrays if array.shape],
        "values of the data": _digest(some),
        "device": jax.default_backend(),
        **{f"version of {name}": package_version(name) for name in ("stochgrad", "jax", "jaxlib")},
    }


def check_same_run(
    name: str, found: Mapping[str, Any] | None, wanted: Mapping[str, Any], resume: bool
) -> None:
    """Raise a ValueError unless what was found is of this very run, and is to be gone on with."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} holds something other than a run of stochgrad.")
    wanted = {key: _plain(value) for key, value in wanted.items()}
    differing = [
        key for key in dict.fromkeys([*wanted, *found]) if found.get(key) != wanted.get(key)
    ]
    told = [key for key in differing if key not in _DIGESTS] or differing
    if told:
        changes = [
            f"{key} was {_short(found.get(key))} and is now {_short(wanted.get(key))}"
            for key in told
        ]
        raise ValueError(f"{name} was written by a different run: {'; '.join(changes)}.")
    if not resume:
        raise ValueError(
            f"{name} holds this run already: pass resume=True to go on with it, or remove it."
        )


def package_version(package: str) -> str:
    """The installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _describe(shapes: Any) -> Any:
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {jax.tree_util.keystr(path) or "x": shape for path, shape in leaves}


def _sample(constant: Any) -> np.ndarray:
    """A constant, or some of the rows of a large one."""
    if jax.dtypes.issubdtype(constant.dtype, jax.dtypes.prng_key):
        constant = jax.random.key_data(constant)
    rows = len(constant) if constant.shape else 1
    row_bytes = max(constant.size * constant.dtype.itemsize // max(rows, 1), 1)
    every = max(rows * row_bytes // _SAMPLED_BYTES, 1)
    return np.asarray(constant[::every] if constant.shape else constant)


def _digest(arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """What JSON gives back of a value."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return re.sub(r"0x[0-9a-f]+", "", repr(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
