"""The latents of all examples, in arrays on the device or in a file, and what is known of each."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from stochgrad.core import PRNGKey, describe
from stochgrad.em._history import History
from stochgrad.em._model import Guide, LatentModel, Questions, Rationales, take


class LatentStore(NamedTuple):
    """A store of one latent for each example, as functions of what the state holds of it.

    Attributes:
        init: ``(key, count) -> content``.
        read: ``(content, index) -> (tokens, mask)``.
        write: ``(content, index, (tokens, mask), changed) -> content``; an index beyond the
            examples is left out, a row that has not changed may be.
    """

    init: Callable[[PRNGKey, int], tuple[Any, Any]]
    read: Callable[[tuple, Int[Array, " n"]], tuple[PyTree, Array]]
    write: Callable[[tuple, Int[Array, " n"], tuple, Bool[Array, " n"]], tuple[Any, Any]]


def latent_store(
    directory: Path | None, model: LatentModel, theta: Any, questions: Questions
) -> LatentStore:
    """Arrays in the state; a file in the directory, if there is one."""
    latent = latent_shapes(model, theta, questions)
    one = (latent.tokens, latent.mask)
    return _array_store(one) if directory is None else _file_store(directory, one)


def _array_store(one: PyTree) -> LatentStore:
    def init(key, count):
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


def _file_store(directory: Path, one: PyTree) -> LatentStore:
    """A file that only grows.

    A latent that changes is appended, and the state holds the place of each: a run resumed from an
    older state finds all its latents, and writes the later ones anew. Chains side by side have a
    file each, named by the key of their start.
    """
    leaves, structure = jax.tree.flatten(one)
    names = [f"leaf{n}" for n in range(len(leaves))]
    parts = zip(names, leaves, strict=True)
    record = np.dtype([(name, leaf.dtype, leaf.shape[1:]) for name, leaf in parts])

    def path(number) -> Path:
        return directory / ("latents-" + "".join(f"{int(part):08x}" for part in np.asarray(number)))

    def load(number, place, count):
        rows = [b""]
        if path(number).exists():
            file = os.open(path(number), os.O_RDONLY)
            size = record.itemsize
            rows = [os.pread(file, size, int(row) * size) for row in np.asarray(place)]
            os.close(file)
        if any(len(row) < record.itemsize for row in rows):
            raise FileNotFoundError(
                f"the latents of this run are no longer all in {directory}: a checkpoint needs the "
                "files that were written beside it."
            )
        table = np.frombuffer(b"".join(rows), record)
        return [np.ascontiguousarray(table[name]) for name in names]

    def append(number, count, changed, *rows):
        index = np.flatnonzero(changed)
        table = np.empty(len(index), record)
        for name, leaf in zip(names, rows, strict=True):
            table[name] = np.asarray(leaf)[index]
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(path(number), os.O_CREAT | os.O_WRONLY, 0o644)
        with os.fdopen(file, "wb") as stream:
            stream.seek(int(count) * record.itemsize)
            stream.write(table.tobytes())
        return np.int32(int(count) + len(index))

    def init(key, count):
        number = jax.random.bits(key, (2,), jnp.uint32)
        content = LatentFile(number, jnp.zeros(count, jnp.int32), jnp.int32(0))
        rows = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
        first, new = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
        # row 0, the empty latent, is the place of all
        return write((content, jnp.zeros((0, 0), bool)), first, rows, new)

    def read(content, index):
        file, _ = content
        shapes = [jax.ShapeDtypeStruct(index.shape + leaf.shape[1:], leaf.dtype) for leaf in leaves]
        arguments = file.file, jnp.take(file.place, index), file.count
        # pure: no row that a state refers to is written again
        rows = jax.pure_callback(load, shapes, *arguments, vmap_method="sequential")
        return structure.unflatten(rows)

    def write(content, index, rows, changed):
        file, mask = content
        size = file.place.shape[0]
        changed &= index < size
        place = file.count + jnp.cumsum(changed.astype(jnp.int32)) - 1
        into = jnp.where(changed, index, size)
        # An effect is neither dropped nor repeated. Ordered ones are refused under vmap, and not
        # needed: vmap calls once for each chain, whose file is its own, and the rows written at a
        # step come before the next step's reads and writes, which take the count returned here.
        shape, arguments = jax.ShapeDtypeStruct((), jnp.int32), jax.tree.leaves(rows)
        count = io_callback(append, shape, file.file, file.count, changed, *arguments)
        return LatentFile(file.file, file.place.at[into].set(place, mode="drop"), count), mask

    return LatentStore(init, read, write)


class Memory(NamedTuple):
    """One latent for each example, and what is known of each.

    Attributes:
        tokens: The latents; with ``memory_path``, their places in the file.
        mask: Their masks; empty with ``memory_path``.
        log_likelihood: Of the answer given the latent; minus infinity where none was right yet.
        tries: Proposals so far, decayed as the allocator says.
        successes: Those of them that had a likelihood, likewise.
        age: Visits since the latent last changed.
        history: What past visits say about the coefficient of a control variate.
    """

    tokens: PyTree
    mask: Bool[Array, "examples length"]
    log_likelihood: Float[Array, " examples"]
    tries: Float[Array, " examples"]
    successes: Float[Array, " examples"]
    age: Int[Array, " examples"]
    history: History


def latent_shapes(model: LatentModel, params: Any, questions: Questions) -> Rationales:
    """Shapes and dtypes of one example's latent, with a leading axis of one."""
    one = take(questions.prompts, jnp.zeros(1, jnp.int32))
    return jax.eval_shape(model.policy.sample, params, jax.random.key(0), one)


def initial_memory(
    key: PRNGKey,
    store: LatentStore,
    model: LatentModel,
    theta: Any,
    questions: Questions,
    guide: Guide | None,
    batch_size: int,
) -> Memory:
    """Latents that are all wrong, or a guide's draws, a minibatch at a time."""
    size = jax.tree.leaves(questions)[0].shape[0]
    dtype = latent_shapes(model, theta, questions).log_prob.dtype
    content = store.init(jax.random.fold_in(key, 0), size)
    zeros, ages = jnp.zeros(size), jnp.zeros(size, jnp.int32)
    empty = Memory(
        *content, jnp.full(size, -jnp.inf, dtype), zeros, zeros, ages, History.none(size)
    )
    if guide is None:
        return empty
    blocks = -(-size // batch_size)
    index = jnp.arange(blocks * batch_size, dtype=jnp.int32).reshape(blocks, batch_size)

    def block(memory: Memory, key_and_index):
        key, index = key_and_index
        rows = take(questions, index % size)
        latents = guide.policy.sample(theta, key, rows.hints)
        latent = latents.tokens, latents.mask
        log_likelihood = model.log_likelihood(theta, rows.prompts, *latent, rows.answers)
        zeros = jnp.zeros(batch_size)
        ages, history = jnp.zeros_like(index), History.none(batch_size)
        start = Memory(*latent, log_likelihood, zeros, zeros, ages, history)
        return write(store, memory, index, start, index < size), None

    return lax.scan(block, empty, (jax.random.split(key, blocks), index))[0]


def read(store: LatentStore, memory: Memory, index: Int[Array, " n"]) -> Memory:
    """Rows of the memory."""
    tokens, mask = store.read((memory.tokens, memory.mask), index)
    return Memory(tokens, mask, *take(memory[2:], index))


def write(store: LatentStore, memory: Memory, index: Array, rows: Memory, changed: Array) -> Memory:
    """The memory with other rows, of which those ``changed`` have new latents."""
    tokens, mask = store.write((memory.tokens, memory.mask), index, rows[:2], changed)
    rest = jax.tree.map(
        lambda all, rows: all.at[index].set(rows, mode="drop"), memory[2:], rows[2:]
    )
    return Memory(tokens, mask, *rest)


def unsolved(state: Any) -> Int[Array, " examples"]:
    """Numbers of the examples for which no latent was ever right.

    They are masked, and take no part in means.

    Args:
        state: The kernel's state, the gradient's, or a memory.

    Raises:
        TypeError: it is none of these.
    """
    memory = state
    while not isinstance(memory, Memory):
        memory = getattr(memory, "gradient_state", None) or getattr(memory, "memory", None)
        if memory is None:
            raise TypeError(
                "state must be a state of a kernel with mcmc_em, of the gradient, or a memory, got "
                f"{describe(state)}."
            )
    return jnp.flatnonzero(jnp.isneginf(memory.log_likelihood))
