"""Draws on disk: one zarr group that grows while the run goes on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from stochgrad.core._checks import check_choice, check_path, first_line
from stochgrad.core._datatree import Group
from stochgrad.core._fingerprint import check_same_run
from stochgrad.core._lock import LOCK, Lock
from stochgrad.core._stored_draws import (
    check_chunks,
    damaged_store,
    quiet,
    whole_draws,
    zarr_library,
)
from stochgrad.core._stream import step_aside

_CHUNK_BYTES = 2**20
_MOST_DRAWS = 2**14
_SECONDS_BETWEEN_WRITES = 1.0
_REST = 80
"""Minimum ratio of idle time to write time."""
_RUN = "stochgrad_run"
_ALL_CHUNKS = {"write_empty_chunks": True}
"""Chunks of nothing but the fill value are written too, so that a missing file is a loss."""


@dataclass(frozen=True)
class Store:
    """Where draws go, and in which precision.

    Attributes:
        path: A directory, made by the run: a zarr group that ``xarray.open_datatree`` and ArviZ
            read, while the run goes on as well. Kept as an absolute path.
        dtype: None keeps the type of the draws. ``"float16"`` halves them, and raises for values
            above its maximum, 65504. ``"bfloat16"`` rounds to eight leading bits and stores the
            result in single precision, whose zeros compress away, so that every reader knows it.

    Raises:
        TypeError: the path is none.
        ValueError: the dtype is another.
    """

    path: str | Path
    dtype: Literal["float16", "bfloat16"] | None = None

    def __post_init__(self):
        object.__setattr__(self, "path", check_path("path", self.path))
        if self.dtype is not None:
            check_choice("dtype", self.dtype, ["float16", "bfloat16"])


class Writer:
    """Appends to a store in a thread of its own, so that the device does not wait for the disk.

    What has been handed over is written within some seconds, so that writing takes one core an
    eightieth of its time at most. Data go first, then the lengths of all arrays at once (the
    group's consolidated metadata): a reader sees whole draws only, and a process that dies leaves a
    store that can be read and gone on with.

    Args:
        store: Where to.
        run: What tells this run from others.
        num_draws: Draws that the run will have, per chain.
        resume: Whether to go on with a store of this run.

    Raises:
        ImportError: zarr is not installed.
        OSError: the path cannot be written, or another run writes there.
        ValueError: the path holds something else, or another run; it is damaged.
    """

    def __init__(self, store: Store, run: dict[str, Any], num_draws: int, resume: bool):
        self.path = Path(store.path)
        self._round = _ROUNDINGS[store.dtype]
        self._num_draws = max(num_draws, 1)
        self._root, self._lock = _open(self.path, {**run, "store dtype": str(store.dtype)}, resume)
        self._thread = ThreadPoolExecutor(1, "stochgrad-store", step_aside)
        self._writing: Future | None = None
        self._pending: list[Callable[[], dict[str, Group]]] = []
        self._arrays: dict[str, Any] = {}
        self._begun: set[str] = set()
        self._next, self._took = 0.0, 0.0
        self._failed = False
        self.draws = 0
        """Draws per chain that are on disk."""

    def start_at(self, draw: int) -> None:
        """The draw that comes next; what the store holds from it on is written once more."""
        self.draws = draw

    def append(self, groups: Callable[[], dict[str, Group]]) -> None:
        """Hand over draws: a function that gives the groups, with arrays (chain, draw, ...)."""
        self._pending.append(groups)
        busy = self._writing is not None and not self._writing.done()
        if not busy and time.monotonic() > self._next:
            self._begin()

    def flush(self) -> None:
        """Write what is left, and wait for it."""
        self._begin()
        self._begin()

    def close(self) -> None:
        """Write what is left, and stop."""
        try:
            self.flush()
        finally:
            self._thread.shutdown()
            self._lock.release()

    def _begin(self) -> None:
        """Finish the last write, and begin the next."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except Exception as error:  # what came after it would lie in the wrong place
                self._failed, self._pending = True, []
                raise OSError(
                    f"cannot write draws to store={str(self.path)!r}: "
                    f"{getattr(error, 'strerror', None) or first_line(error)}. It holds "
                    f"{self.draws} draws per chain."
                ) from error
        if self._pending and not self._failed:
            pending, self._pending = self._pending, []
            self._writing = self._thread.submit(self._write, pending)
        self._next = time.monotonic() + max(_SECONDS_BETWEEN_WRITES, _REST * self._took)

    def _write(self, pending: list[Callable[[], dict[str, Group]]]) -> None:
        begun = time.monotonic()
        pieces = [groups() for groups in pending]
        last = self.draws
        for name in pieces[0]:
            last = self._append_to(name, Group.joined([piece[name] for piece in pieces]))
        with quiet():
            zarr_library().consolidate_metadata(self._root.store)
        self.draws = last
        self._took = time.monotonic() - begun

    def _append_to(self, name: str, group: Group) -> int:
        last = self.draws + next(iter(group.variables.values()))[1].shape[1]
        for variable, (dims, values) in group.variables.items():
            if name != "sample_stats":
                values = self._round(variable, values)
            self._put(f"{name}/{variable}", dims, values, 1, last)
        self._put(f"{name}/draw", ("draw",), np.arange(self.draws, last), 0, last)
        if name not in self._begun:
            self._begun.add(name)
            target = self._root[name]
            target.attrs.update(group.attrs)
            for dim, values in group.coords.items():
                if dim != "draw":
                    self._put_coordinate(name, dim, values)
        return last

    def _put(self, path: str, dims: tuple[str, ...], values: np.ndarray, axis: int, last: int):
        """Write draws up to ``last``; an array never gets shorter than the run is long."""
        if path not in self._arrays:
            exists = path in self._root
            self._arrays[path] = (
                self._root[path].with_config(_ALL_CHUNKS)
                if exists
                else self._create(path, dims, values, axis)
            )
        array = self._arrays[path]
        length = min(max(array.shape[axis], last), self._num_draws)
        array.resize((*array.shape[:axis], length, *array.shape[axis + 1 :]))
        array[(*(slice(None),) * axis, slice(self.draws, last))] = values

    def _put_coordinate(self, group: str, dim: str, values: Any) -> None:
        path = f"{group}/{dim}"
        if path in self._root:
            with suppress(OSError):  # a process may have died before it had written the values
                check_chunks(self.path, self._root[path])
                return
        values = np.asarray(values)
        with quiet():
            self._root.create_array(
                path,
                data=values.astype(str) if values.dtype.kind == "O" else values,
                dimension_names=(dim,),
                compressors=_compressors(),
                config=_ALL_CHUNKS,
                overwrite=True,
            )

    def _create(self, path: str, dims: tuple[str, ...], values: np.ndarray, axis: int) -> Any:
        row = max(values.nbytes // max(values.shape[axis], 1), 1)
        chunks = [max(n, 1) for n in values.shape]
        chunks[axis] = int(np.clip(_CHUNK_BYTES // row, 1, _MOST_DRAWS))
        return self._root.create_array(
            path,
            shape=(*values.shape[:axis], 0, *values.shape[axis + 1 :]),
            chunks=tuple(chunks),
            dtype=values.dtype,
            fill_value=_missing(path, values.dtype),
            dimension_names=dims,
            compressors=_compressors(),
            config=_ALL_CHUNKS,
        )


def _missing(path: str, dtype: np.dtype) -> Any:
    """What stands where nothing was written."""
    if dtype.kind in "fc":
        return np.array(np.nan, dtype)[()]
    return dtype.type(path == "sample_stats/diverging")


def _compressors() -> list:
    from zarr.codecs import Crc32cCodec, ZstdCodec

    return [ZstdCodec(), Crc32cCodec()]


def _to_half(name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "f":
        return values
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if np.any(np.isinf(half) & np.isfinite(values)):
        raise OSError(f"{name!r} is beyond what float16 holds, 65504: take dtype='bfloat16'")
    return half


def _to_bfloat16(name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "f":
        return values
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def _as_is(name: str, values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) if values.dtype == ml_dtypes.bfloat16 else values


_ROUNDINGS = {None: _as_is, "float16": _to_half, "bfloat16": _to_bfloat16}


def _open(path: Path, run: dict[str, Any], resume: bool) -> tuple[Any, Lock]:
    """A new store or one to go on with, held against other writers."""
    zarr = zarr_library()
    name = f"store={str(path)!r}"
    if path.exists() and not path.is_dir():
        raise ValueError(f"{name} exists but is not a zarr group: choose another path.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = any(
            not file.name.startswith(LOCK) and not file.name.endswith(".partial")
            for file in path.iterdir()
        )
        if others and not (path / "zarr.json").exists():
            raise ValueError(f"{name} exists but is not a zarr group: choose another path.")
        lock = Lock(path, name)
    except OSError as error:
        if not error.strerror:
            raise
        raise OSError(f"{name} cannot be written: {error.strerror}.") from error
    try:
        with quiet():
            if (path / "zarr.json").exists():
                return _go_on(path, name, run, resume), lock
            root = zarr.create_group(path, attributes={_RUN: run})
            zarr.consolidate_metadata(root.store)
            return root, lock
    except BaseException as error:
        lock.release()
        if isinstance(error, OSError) and error.strerror:
            raise OSError(f"{name} cannot be written: {error.strerror}.") from error
        raise


def _go_on(path: Path, name: str, run: dict[str, Any], resume: bool) -> Any:
    """Open the store of a run, without what its readers do not see yet."""
    whole = whole_draws(path)
    try:
        root = zarr_library().open_group(path, mode="r+", use_consolidated=False)
    except Exception as error:
        raise ValueError(f"{name} exists but is not a zarr group: choose another path.") from error
    check_same_run(name, root.attrs.get(_RUN), run, resume)
    for group in root.group_keys():
        for variable in root[group].array_keys():
            array = root[f"{group}/{variable}"]
            dims = array.metadata.dimension_names or ()
            if "draw" not in dims:
                continue
            axis = dims.index("draw")
            if array.shape[axis] < whole:
                raise OSError(damaged_store(path, array.path, f"it has {array.shape[axis]} draws"))
            if array.shape[axis] > whole:
                array.resize((*array.shape[:axis], whole, *array.shape[axis + 1 :]))
            last = slice(max(whole - 1, 0), None)  # what will be added to
            check_chunks(path, array)
            check_chunks(
                path, array, draws=slice(None) if group == "sample_stats" else last, read=True
            )
    return root
