"""Draws read back from a store, with a sentence on what is damaged."""

import itertools
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stochgrad.core._checks import first_line


class Stored(NamedTuple):
    """Draws of a store: positions, read when indexed, and what goes with them in memory."""

    positions: list[Any]
    stats: list[np.ndarray]
    finite: np.ndarray


class StoredArray:
    """A zarr array of a store that says in a sentence what is damaged when it is read.

    It has all that the zarr array has, which is its attribute ``array``.
    """

    def __init__(self, array: Any, root: Path):
        self.array, self.root = array, root

    def __getattr__(self, name: str) -> Any:
        if name in ("array", "root"):  # not there yet: while it is unpickled
            raise AttributeError(name)
        return getattr(self.array, name)

    def __getitem__(self, index: Any) -> np.ndarray:
        draws = slice(None)
        if isinstance(index, tuple) and len(index) > 1 and isinstance(index[0], slice):
            draws = index[1] if isinstance(index[1], slice) else draws
        check_chunks(self.root, self.array, draws=draws)
        try:
            return self.array[index]
        except IndexError:
            raise
        except Exception as error:
            check_chunks(self.root, self.array, draws=draws, read=True)
            raise OSError(damaged_store(self.root, self.array.path, first_line(error))) from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self[...]
        return values if dtype is None else values.astype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return repr(self.array)


def open_root(path: Path) -> Any:
    """The zarr group of a store, to read."""
    return zarr_library().open_group(path, mode="r", use_consolidated=False)


def read_back(
    path: Path, names: list[str], stats: list[str], where: str | None = None
) -> Stored | None:
    """What a store holds under the names of positions and of stats; None if no draws yet.

    Args:
        path: The store.
        names: Variables of a group.
        stats: Numbers that go with each draw.
        where: The group; by default that of the positions as the sampler has them.

    Raises:
        OSError: a file of it is missing or damaged.
    """
    if not whole_draws(path):
        return None
    root = open_root(path)
    if where is None:
        where = "unconstrained_posterior" if "unconstrained_posterior" in root else "posterior"

    def array(name):
        try:
            found = StoredArray(root[name], path)
        except KeyError as error:
            raise OSError(damaged_store(path, name, "it is missing")) from error
        check_chunks(path, found.array)
        return found

    numbers = {name: array(f"sample_stats/{name}")[:] for name in (*stats, "diverging")}
    finite = ~numbers["diverging"]
    if "sample_stats/finite" in root:
        finite = array("sample_stats/finite")[:]
    return Stored(
        [array(f"{where}/{name}") for name in names], [numbers[name] for name in stats], finite
    )


def whole_draws(path: Path) -> int:
    """How many draws per chain a store holds whole, as its readers see it; 0 where there is none.

    Raises:
        OSError: its list of arrays is damaged.
    """
    listed = path / "zarr.json"
    try:
        metadata = json.loads(listed.read_text())
        arrays = (metadata.get("consolidated_metadata") or {}).get("metadata", {})
        lengths = [
            array["shape"][0]
            for name, array in arrays.items()
            if name.endswith("/draw") and array.get("node_type") == "array"
        ]
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise OSError(damaged_store(path, "zarr.json", first_line(error))) from error
    return min(lengths, default=0)


def check_chunks(root: Path, array: Any, *, draws: slice = slice(None), read: bool = False) -> None:
    """Raise an OSError that names the file unless every chunk of an array is there.

    Args:
        root: Where the store is.
        array: A zarr array.
        draws: Along the second axis, which of it is wanted.
        read: Whether to read the chunks, and with that to compare their checksums.
    """
    ranges = [range(-(-n // size)) for n, size in zip(array.shape, array.chunks, strict=True)]
    if array.ndim > 1:
        wanted = range(array.shape[1])[draws]
        size = array.chunks[1]
        ranges[1] = range(min(wanted) // size, max(wanted) // size + 1) if wanted else range(0)
    for index in itertools.product(*ranges):
        name = f"{array.path}/{array.metadata.encode_chunk_key(index)}"
        if not (root / name).is_file():
            raise OSError(damaged_store(root, name, "it is missing"))
        if read:
            where = (slice(i * n, (i + 1) * n) for i, n in zip(index, array.chunks, strict=True))
            try:
                array[tuple(where)]
            except Exception as error:
                raise OSError(damaged_store(root, name, first_line(error))) from error


def damaged_store(root: Path, name: str, reason: str) -> str:
    return (
        f"store={str(root)!r} is damaged: {name} ({reason}); put back a copy of the store, or "
        "remove it and the checkpoint beside it and run again, which gives the same draws."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without zarr's notes that consolidated metadata and strings are not in version 3 yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def zarr_library() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError("store needs zarr: pip install zarr.") from error
    return zarr
