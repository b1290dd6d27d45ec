r"""Data larger than memory: a super-block at a time, the next one read while this one is used.

The rows are cut into segments of consecutive rows. An epoch takes the segments in random order, a
few at a time; those few are a super-block, whose rows are mixed and cut into minibatches. Every row
comes once an epoch. What is in the n-th super-block follows from a key and n alone.
"""

import math
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from stochgrad.core._checks import check_count, describe, first_line
from stochgrad.core._distributed import to_host
from stochgrad.core._noise import key_words
from stochgrad.core._orders import permuted
from stochgrad.core._trees import HostProvided, Shared

_SEGMENTS = 16
_NICE = 10
_SHARE = 7 / 8


class Resident(NamedTuple):
    """A super-block in memory.

    Attributes:
        data: Its rows, mixed, along each array's own axis; padded at the end to whole minibatches.
        index: Number of each row in the source, int32 of shape (rows,).
        weight: What each row counts for: the number of minibatches in an epoch, zero for padding;
            float32 of shape (rows,).
        first: Number of the stream's first minibatch in it, uint32.
        batches: How many minibatches it holds, uint32.
        number: Its own number, counted from the beginning of the run, uint32.
    """

    data: PyTree
    index: Any
    weight: Any
    first: Any
    batches: Any
    number: Any


class StreamState(NamedTuple):
    """State of a stream: a chain's own key, the minibatches handed out, and what is in memory."""

    words: Shared
    count: Shared
    resident: HostProvided


class Source(NamedTuple):
    """One array of a stream.

    Attributes:
        array: Anything with ``shape`` and ``dtype`` that slices give rows of: a memory-mapped numpy
            array, a zarr array, an HDF5 data set, ``stochgrad.ParquetColumns``.
        axis: The axis of the rows, counted from the front.
        name: What it is called.
    """

    array: Any
    axis: int
    name: str

    def sample(self, count: int) -> np.ndarray:
        """Rows at places evenly spread over the array."""
        size = self.array.shape[self.axis]
        places = np.unique(np.linspace(0, size - 1, count).astype(int)).tolist()
        rows = [self.read(i, i + 1, self.array.dtype) for i in places]
        return np.concatenate(rows, axis=self.axis)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """The rows with these numbers, those that follow each other read together."""
        dtype = jax.dtypes.canonicalize_dtype(self.array.dtype)
        runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
        parts = [self.read(int(run[0]), int(run[-1]) + 1, dtype) for run in runs]
        return np.concatenate(parts, axis=self.axis)

    def length(self) -> int:
        """How many rows it has now."""
        try:
            return self.array.shape[self.axis]
        except Exception as error:  # a file that has been closed, say
            raise ValueError(f"{self.name} cannot be read: {first_line(error)}.") from error

    def read(self, first: int, last: int, dtype: Any) -> np.ndarray:
        """Some rows.

        Raises:
            ValueError: they cannot be read; they do not fit the type.
        """
        where = f"{self.name} cannot be read, rows {first} to {last}"
        if _is_cut_off(self.array):
            raise ValueError(f"{where}: its file has become shorter or is gone.")
        try:
            rows = np.asarray(self.array[(*(slice(None),) * self.axis, slice(first, last))])
        except Exception as error:  # of a library that reads files: whatever befalls them
            raise ValueError(f"{where}: {first_line(error)}.") from error
        if not _is_number(rows.dtype):
            raise ValueError(f"{where}: they have dtype {rows.dtype}, and numbers are needed.")
        if rows.dtype == dtype:
            return rows
        with np.errstate(over="ignore", invalid="ignore"):
            cast = rows.astype(dtype)
            same = cast.astype(rows.dtype) == rows if rows.dtype.kind in "iu" else True
        if dtype != np.bool_ and np.dtype(dtype).kind in "iu" and not np.all(same):
            raise ValueError(f"{self.name} holds integers beyond what {dtype} holds: divide them.")
        if rows.dtype.kind in "fc" and np.any(np.isinf(cast) & np.isfinite(rows)):
            raise ValueError(f"{self.name} holds numbers beyond what {dtype} holds: divide them.")
        return cast

    def check(self) -> None:
        """Raise unless it gives rows of numbers for a slice."""
        array, wanted = self.array, "must be an array on disk, with shape, dtype and rows by slice"
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{self.name} {wanted}, got a masked array: fill or drop its gaps.")
        shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
        if isinstance(array, type) or not isinstance(shape, tuple) or dtype is None:
            raise TypeError(f"{self.name} {wanted}, got {describe(array)}.")
        if hasattr(array, "toarray") or hasattr(array, "iloc") or not _is_number(dtype):
            raise TypeError(
                f"{self.name} {wanted}, of plain numbers, got {type(array).__name__} of "
                f"dtype {dtype}."
            )
        if len(shape) <= self.axis:
            raise ValueError(f"{self.name} must have an axis of rows, got shape {shape}.")
        row = self.read(0, 1, jax.dtypes.canonicalize_dtype(dtype))
        expected = _with(shape, self.axis, min(1, shape[self.axis]))
        if row.shape != expected:
            raise ValueError(
                f"{self.name} gives an array of shape {row.shape} for its first row, and not "
                f"{expected}: a slice must give rows."
            )


class Stream:
    """The host's side of a stream of minibatches.

    Args:
        sources: The arrays, as a tree.
        size: Number of rows.
        batch_size: Rows of a minibatch.
        resident_bytes: Memory for one super-block; two are held.
    """

    def __init__(self, sources: PyTree, size: int, batch_size: int, resident_bytes: int):
        leaves, self._structure = jax.tree.flatten(
            sources, is_leaf=lambda node: isinstance(node, Source)
        )
        self.sources: list[Source] = leaves
        resident_bytes = check_count("resident_bytes", resident_bytes)
        for source in leaves:
            source.check()
        self.size, self.batch_size = size, batch_size
        self.num_batches = -(-size // batch_size)
        self._types = [jax.dtypes.canonicalize_dtype(s.array.dtype) for s in leaves]
        self._shapes = [s.array.shape for s in leaves]
        row = sum(
            math.prod(s.array.shape) // size * t.itemsize
            for s, t in zip(leaves, self._types, strict=True)
        )
        rows = int(resident_bytes * _SHARE / (row + 8))
        if rows < batch_size:
            raise ValueError(
                f"resident_bytes={resident_bytes:,} holds {rows} rows of {row} bytes, less than "
                f"one minibatch of {batch_size}: take more, or a smaller batch_size."
            )
        per_segment = max(rows // batch_size // _SEGMENTS, 1)
        self._segment = per_segment * batch_size
        self._together = min(rows // self._segment, -(-size // self._segment))
        self.rows = self._together * self._segment
        """Rows of a super-block."""
        self._segments = -(-size // self._segment)
        self._per_epoch = -(-self._segments // self._together)
        self._checked: set[int] = set()

    def shapes(self) -> Resident:
        """Shapes of a super-block."""
        data = [
            jax.ShapeDtypeStruct(_with(shape, s.axis, self.rows), t)
            for s, shape, t in zip(self.sources, self._shapes, self._types, strict=True)
        ]
        word = jax.ShapeDtypeStruct((), jnp.uint32)
        return Resident(
            jax.tree.unflatten(self._structure, data),
            jax.ShapeDtypeStruct((self.rows,), jnp.int32),
            jax.ShapeDtypeStruct((self.rows,), jnp.float32),
            word,
            word,
            word,
        )

    def blank(self) -> Resident:
        """Memory for a super-block, where a CPU device can use it as it is."""
        return jax.tree.map(lambda s: _aligned(s.shape, s.dtype), self.shapes())

    def load(self, words: Sequence[int], number: int, into: Resident | None = None) -> Resident:
        """Read a super-block, into the memory of another if that is given.

        Raises:
            ValueError: a row holds NaN or infinity, or a source has changed its length.
        """
        block = self.blank() if into is None else into
        epoch, turn = divmod(number, self._per_epoch)
        order = np.random.default_rng([*words, epoch]).permutation(self._segments)
        end = turn * self._together
        chosen = order[end : end + self._together]
        lengths = np.minimum(self._segment, self.size - chosen * self._segment)
        total = int(lengths.sum())
        mixed = np.random.default_rng([*words, epoch, turn]).permutation(total)
        data = jax.tree.leaves(block.data)
        at = 0
        for segment, length in zip(chosen.tolist(), lengths.tolist(), strict=True):
            first = segment * self._segment
            where = mixed[at : at + length]
            block.index[where] = np.arange(first, first + length)
            for source, target in zip(self.sources, data, strict=True):
                rows = self._read(source, first, first + length, target.dtype)
                target[(*(slice(None),) * source.axis, where)] = rows
            self._checked.add(segment)
            at += length
        block.index[total:] = block.index[0]
        for source, target in zip(self.sources, data, strict=True):
            lead = (slice(None),) * source.axis
            target[(*lead, slice(total, None))] = target[(*lead, slice(0, 1))]
        block.weight[:total], block.weight[total:] = self.num_batches, 0
        return block._replace(
            first=np.uint32((epoch * self.num_batches + self._batches(order[:end]).sum()) % 2**32),
            batches=np.uint32(self._batches(chosen).sum()),
            number=np.uint32(number),
        )

    def holding(self, minibatch: int, words: Sequence[int]) -> int:
        """Number of the super-block that holds a minibatch."""
        epoch, left = divmod(minibatch, self.num_batches)
        order = np.random.default_rng([*words, epoch]).permutation(self._segments)
        segment = int(np.searchsorted(np.cumsum(self._batches(order)), left, side="right"))
        return epoch * self._per_epoch + segment // self._together

    def _batches(self, segments: np.ndarray) -> np.ndarray:
        """How many minibatches each of some segments holds; a short one may end with a part."""
        lengths = np.minimum(self._segment, self.size - segments * self._segment)
        return -(-lengths // self.batch_size)

    @contextmanager
    def supplying(self, resident: Resident) -> Iterator[None]:
        """Within this, ``Batches.init`` finds a super-block."""
        self._supplied = resident
        try:
            yield
        finally:
            self._supplied = None

    _supplied: Resident | None = None

    def init(self, key) -> StreamState:
        if self._supplied is None:
            raise ValueError(
                "a streamed posterior runs in stochgrad.sample only: another loop does not bring "
                "the next rows into memory."
            )
        words = Shared(key_words(key), optional=True)
        first = jnp.asarray(self._supplied.first)
        return StreamState(words, Shared(first), HostProvided(self._supplied))

    def next(self, state: StreamState) -> tuple[tuple[Array, Resident], StreamState]:
        """Number of the next minibatch in the super-block, the super-block, and the state."""
        resident: Resident = state.resident.value
        count = state.count.value
        visit = (count - resident.first) % resident.batches
        slots = self.rows // self.batch_size
        slot = permuted(state.words.value, resident.number, visit, slots, limit=resident.batches)
        following = state._replace(count=Shared(count + np.uint32(1)))
        return (slot, resident), following

    def _read(self, source: Source, first: int, last: int, dtype: Any) -> np.ndarray:
        length = source.length()
        if length != self.size:
            raise ValueError(
                f"{source.name} had {self.size} rows and now has {length}: a source must keep its "
                "length while it is streamed."
            )
        rows = source.read(first, last, dtype)
        if rows.shape[source.axis] != last - first:
            raise ValueError(
                f"{source.name} gave {rows.shape[source.axis]} rows for rows {first} to {last}: a "
                "source must keep its length while it is streamed."
            )
        if rows.dtype.kind == "f" and first // self._segment not in self._checked:
            finite = np.isfinite(rows)
            if not finite.all():
                others = tuple(i for i in range(rows.ndim) if i != source.axis)
                row = first + int(np.argmin(finite.all(axis=others)))
                raise ValueError(
                    f"{source.name} must be finite, but row {row} holds NaN or infinity."
                )
        return rows


def _is_number(dtype: Any) -> bool:
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        return False
    return dtype.kind in "biufc" or jnp.issubdtype(dtype, jnp.floating)


def _is_cut_off(array: Any) -> bool:
    """Whether the file of a memory-mapped or of a zarr array has been cut off or removed."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(array, np.memmap) and mapped is not None and array.filename is not None:
        # to read beyond the end of a mapped file would kill the process
        start = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
        with suppress(OSError):  # a file that is removed stays until it is let go
            return os.path.getsize(array.filename) < start + len(mapped)
        return False
    folder = getattr(getattr(array, "store", None), "root", None)
    inside = getattr(array, "path", None)
    if isinstance(folder, os.PathLike) and isinstance(inside, str):
        return not os.path.isdir(os.path.join(folder, inside))
    return False


def step_aside() -> None:
    """Let the threads that compute go before this one, where the system knows of such things."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def minibatches_taken(state: PyTree) -> int:
    """How many minibatches a state has taken of a stream."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, StreamState))
    counts = (node.count.value for node in nodes if isinstance(node, StreamState))
    return int(to_host(next(counts, np.uint32(0))))


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Zeros that begin at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _with(shape: Sequence[int], axis: int, rows: int) -> tuple[int, ...]:
    return (*shape[:axis], rows, *shape[axis + 1 :])
