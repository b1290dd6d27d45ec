"""Where the latents of all examples lie: in arrays on the device, or in a file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Int, PyTree, UInt32

from stochgrad.core import PRNGKey
from stochgrad.em._model import take


class LatentStore(NamedTuple):
    """A store of one latent for each example, as functions of what the state holds of it.

    Attributes:
        init: ``(key, one, count) -> content``, from the shapes of one example's tokens and mask.
        read: ``(content, index) -> (tokens, mask)``.
        write: ``(content, index, (tokens, mask), changed) -> content``; an index beyond the
            examples is left out, a row that has not changed may be.
    """

    init: Callable[[PRNGKey, PyTree, int], tuple[Any, Any]]
    read: Callable[[tuple, Int[Array, " n"]], tuple[PyTree, Array]]
    write: Callable[[tuple, Int[Array, " n"], tuple, Bool[Array, " n"]], tuple[Any, Any]]


def device_store() -> LatentStore:
    """Arrays in the state."""

    def init(key, one, count):
        return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape[1:]), leaf.dtype), one)

    def write(content, index, rows, changed):
        return jax.tree.map(lambda all, rows: all.at[index].set(rows, mode="drop"), content, rows)

    return LatentStore(init, take, write)


class LatentFile(NamedTuple):
    """What the state holds of latents in a file.

    Attributes:
        file: Number of the file.
        place: Row of the file that each example's latent is in.
        count: Rows of the file.
    """

    file: UInt32[Array, "2"]
    place: Int[Array, " examples"]
    count: Int[Array, ""]


def file_store(directory: str | Path, one: PyTree) -> LatentStore:
    """A file that only grows.

    A latent that changes is appended, and the state holds the place of each: a run resumed from an
    older state finds all its latents, and writes the later ones anew. Chains side by side have a
    file each, named by their key.

    Args:
        directory: Where files lie.
        one: Shapes and dtypes of one example's latent, with a leading axis of one.
    """
    directory = Path(directory)
    leaves, structure = jax.tree.flatten(one)
    kinds = [(leaf.shape[1:], np.dtype(leaf.dtype)) for leaf in leaves]
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in kinds]
    width = sum(sizes)

    def path(number) -> Path:
        return directory / ("latents-" + "".join(f"{int(part):08x}" for part in np.asarray(number)))

    def load(number, place, count):
        rows = [b""]
        if path(number).exists():
            file = os.open(path(number), os.O_RDONLY)
            rows = [os.pread(file, width, int(row) * width) for row in np.asarray(place)]
            os.close(file)
        if any(len(row) < width for row in rows):
            raise FileNotFoundError(
                f"the latents of this run are no longer all in {directory}: a checkpoint needs the "
                "files that were written beside it."
            )
        table = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), width)
        parts = np.split(table, np.cumsum(sizes)[:-1], axis=1)
        return [
            np.frombuffer(part.tobytes(), dtype).reshape(len(rows), *shape)
            for part, (shape, dtype) in zip(parts, kinds, strict=True)
        ]

    def append(number, count, changed, *rows):
        index = np.flatnonzero(changed)
        parts = [
            np.frombuffer(np.asarray(leaf)[index].tobytes(), np.uint8).reshape(-1, size)
            for leaf, size in zip(rows, sizes, strict=True)
        ]
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(path(number), os.O_CREAT | os.O_WRONLY, 0o644)
        os.pwrite(file, np.concatenate(parts, axis=1).tobytes(), int(count) * width)
        os.close(file)
        return np.int32(int(count) + len(index))

    def init(key, one, count):
        number = jax.random.bits(key, (2,), jnp.uint32)
        content = LatentFile(number, jnp.zeros(count, jnp.int32), jnp.int32(0))
        rows = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), one)
        # row 0, the empty latent, is the place of all
        return write(
            (content, jnp.zeros((0, 0), bool)), jnp.zeros(1, jnp.int32), rows, jnp.ones(1, bool)
        )

    def read(content, index):
        file, _ = content
        shapes = [jax.ShapeDtypeStruct((*index.shape, *shape), dtype) for shape, dtype in kinds]
        arguments = file.file, jnp.take(file.place, index), file.count
        # pure: no row that a state refers to is written again
        return structure.unflatten(
            jax.pure_callback(load, shapes, *arguments, vmap_method="sequential")
        )

    def write(content, index, rows, changed):
        file, mask = content
        size = file.place.shape[0]
        changed &= index < size
        place = file.count + jnp.cumsum(changed.astype(jnp.int32)) - 1
        into = jnp.where(changed, index, size)
        # An effect is neither dropped nor repeated. Ordered ones are refused under vmap, and not
        # needed: vmap calls once for each chain, whose file is its own, and the rows written at a
        # step come before the next step's reads and writes, which take the count returned here.
        count = io_callback(
            append,
            jax.ShapeDtypeStruct((), jnp.int32),
            file.file,
            file.count,
            changed,
            *jax.tree.leaves(rows),
            ordered=False,
        )
        return LatentFile(file.file, file.place.at[into].set(place, mode="drop"), count), mask

    return LatentStore(init, read, write)
