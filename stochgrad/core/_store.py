"""Draws on disk: one zarr group that grows while the run goes on."""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from stochgrad.core._datatree import Group
from stochgrad.core._identity import refuse_other_run
from stochgrad.core._stream import step_aside

_CHUNK_BYTES = 2**20
_MOST_DRAWS = 2**14
_SECONDS_BETWEEN_WRITES = 1.0
_REST = 80
"""How much longer than a write the pause after it is."""
_RUN = "stochgrad_run"


class Store(NamedTuple):
    """Where draws go, and in which precision.

    Attributes:
        path: A directory, made by the run: a zarr group that ``xarray.open_datatree`` and ArviZ
            read, while the run goes on as well.
        dtype: None keeps the type of the draws. ``"float16"`` halves them, and refuses what is
            beyond its 65504. ``"bfloat16"`` rounds to eight leading bits and stores the result in
            single precision, whose zeros compress away, so that every reader knows it.
    """

    path: str | Path
    dtype: Literal["float16", "bfloat16"] | None = None


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
        OSError: the path cannot be written.
        ValueError: the path holds something else, or another run; the dtype is unknown.
    """

    def __init__(self, store: Store, run: dict[str, Any], num_draws: int, resume: bool):
        if store.dtype not in _ROUNDINGS:
            raise ValueError(
                f"a store's dtype must be one of {list(_ROUNDINGS)}, got {store.dtype!r}."
            )
        self.path = Path(store.path)
        self._round = _ROUNDINGS[store.dtype]
        self._num_draws = max(num_draws, 1)
        self._root = _open(self.path, {**run, "store dtype": str(store.dtype)}, resume)
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

    def _begin(self) -> None:
        """Finish the last write, and begin the next."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except Exception as error:  # what came after it would lie in the wrong place
                self._failed, self._pending = True, []
                if not isinstance(error, OSError):
                    raise
                raise OSError(
                    f"cannot write draws to {self.path}: {error.strerror or error}. It holds "
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
        with _quiet():
            _zarr().consolidate_metadata(self._root.store)
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
                if dim not in target:
                    values = np.asarray(values)
                    values = values.astype(str) if values.dtype.kind == "O" else values
                    with _quiet():
                        target.create_array(dim, data=values, dimension_names=(dim,))
        return last

    def _put(self, path: str, dims: tuple[str, ...], values: np.ndarray, axis: int, last: int):
        """Write draws up to ``last``; an array never gets shorter than the run is long."""
        if path not in self._arrays:
            exists = path in self._root
            self._arrays[path] = (
                self._root[path] if exists else self._create(path, dims, values, axis)
            )
        array = self._arrays[path]
        length = min(max(array.shape[axis], last), self._num_draws)
        array.resize((*array.shape[:axis], length, *array.shape[axis + 1 :]))
        array[(*(slice(None),) * axis, slice(self.draws, last))] = values

    def _create(self, path: str, dims: tuple[str, ...], values: np.ndarray, axis: int) -> Any:
        row = max(values.nbytes // max(values.shape[axis], 1), 1)
        chunks = [max(n, 1) for n in values.shape]
        chunks[axis] = int(np.clip(_CHUNK_BYTES // row, 1, _MOST_DRAWS))
        return self._root.create_array(
            path,
            shape=(*values.shape[:axis], 0, *values.shape[axis + 1 :]),
            chunks=tuple(chunks),
            dtype=values.dtype,
            dimension_names=dims,
        )


class Stored(NamedTuple):
    """Draws of a store: positions, read when indexed, and what goes with them in memory."""

    positions: list[Any]
    stats: list[np.ndarray]
    finite: np.ndarray


def read_back(path: str | Path, names: list[str], stats: list[str]) -> Stored | None:
    """What a store holds under the names of positions and of stats; None if no draws yet."""
    root = _zarr().open_group(Path(path), mode="r", use_consolidated=False)
    if "sample_stats" not in root:
        return None
    where = "unconstrained_posterior" if "unconstrained_posterior" in root else "posterior"
    numbers = root["sample_stats"]
    return Stored(
        [root[f"{where}/{name}"] for name in names],
        [numbers[name][:] for name in stats],
        ~numbers["diverging"][:],
    )


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
    return values


_ROUNDINGS = {None: _as_is, "float16": _to_half, "bfloat16": _to_bfloat16}


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError("store needs zarr: pip install 'stochgrad[store]'.") from error
    return zarr


def _open(path: Path, run: dict[str, Any], resume: bool) -> Any:
    zarr = _zarr()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not (path / "zarr.json").exists():
            raise ValueError(f"store={str(path)!r} exists and is no zarr group: name another path.")
        root = zarr.open_group(path, mode="r+", use_consolidated=False)
        refuse_other_run(f"store={str(path)!r}", root.attrs.get(_RUN), run, resume)
        return root
    try:
        root = zarr.open_group(path, mode="w")
    except OSError as error:
        raise OSError(f"store={str(path)!r} cannot be written: {error.strerror}.") from error
    root.attrs[_RUN] = run
    with _quiet():
        zarr.consolidate_metadata(root.store)
    return root


@contextmanager
def _quiet():
    """Without zarr's notes that consolidated metadata and strings are not in version 3 yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
