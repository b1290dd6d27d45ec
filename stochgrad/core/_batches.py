"""Minibatches: streams of rows in the orders that visit them, and how they are weighted."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree, UInt32

from stochgrad.core._arrays import as_data, data_rows
from stochgrad.core._checks import check_choice, check_instance, describe
from stochgrad.core._noise import key_words
from stochgrad.core._orders import ORDERS, is_balanced, permuted
from stochgrad.core._partition import Batch, Partition, Rows, numbered_rows, taken
from stochgrad.core._protocols import Batches, Blocks, PRNGKey
from stochgrad.core._stream import Source, Stream
from stochgrad.core._trees import Shared, block_of

Order: TypeAlias = Literal["iid", "reshuffled", "symmetric", "full", "streamed"]
Layout: TypeAlias = Literal["blocks", "rows"]


class BatchState(NamedTuple):
    """The state of a stream: its own key, and how many minibatches it has handed out."""

    words: Shared  # of a UInt32[Array, "2"], optional: chains may hold one each
    count: Shared  # of a UInt32[Array, ""]


def row_batches(
    size: int,
    batch_size: int,
    order: Order = "reshuffled",
    layout: Layout = "blocks",
    mesh: Mesh | None = None,
) -> tuple[Batches, Partition | None]:
    """A stream of ``Rows``, and the partition that its blocks refer to."""
    check_order(order, layout)
    full: Any = numbered_rows(np.arange(size))
    if mesh is None and (order == "full" or batch_size == size):
        return _whole(full, size, numbered_rows), None
    mesh = _checked(mesh, batch_size, layout)
    num_batches = -(-size // batch_size)
    visit = partial(_visit, ORDERS["reshuffled" if order == "full" else order], num_batches)

    def weight(block):
        if size % batch_size == 0:
            return jnp.float32(num_batches)
        place = block * batch_size + lax.iota(np.int32, batch_size)
        return jnp.where(place < size, jnp.float32(num_batches), jnp.float32(0))

    if layout == "blocks":
        partition = Partition.random(size, batch_size, mesh)

        def at(block):
            return Rows(block, partition.rows(block), weight(block))

        def next_block(state):
            block, _, following = visit(state)
            return block, following

        blocks = Blocks(num_batches, next_block, at)
        return _numbered(full, size, batch_size, order, blocks, numbered_rows, mesh), partition

    def next_rows(state):
        block, permutation, following = visit(state)
        place = block * batch_size + lax.iota(np.int32, batch_size)
        inside = jnp.minimum(place, size - 1)
        index = permuted(state.words.value, permutation, inside, size, stream=1)
        return Rows(None, index, weight(block)), following

    return Batches(
        init=_init,
        next=next_rows,
        full=full,
        size=size,
        batch_size=batch_size,
        order=order,
        balanced=is_balanced(order),
        take=numbered_rows,
    ), None


def data_batches(
    data: PyTree,
    batch_size: int | None,
    order: Order = "reshuffled",
    layout: Layout = "blocks",
    mesh: Mesh | None = None,
) -> Batches:
    """A stream of ``Batch`` over a pytree of arrays with one leading axis.

    Raises:
        ValueError: the leaves have no common leading axis, hold NaN or infinity, or are none; the
            batch size is missing, below 1 or above the number of rows; the order or the layout is
            unknown.
    """
    data = as_data(data)
    size = data_rows(data)
    check_order(order, layout)
    batch_size = check_batch_size(batch_size, size, order)
    rows, partition = row_batches(size, batch_size, order, layout, mesh)
    if rows.mesh is not None:
        assert partition is not None
        data = jax.tree.map(partition.lay_out, data)
        return _blocks_of(data, partition, rows, None)
    with jax.ensure_compile_time_eval():
        full = Batch(jax.tree.map(jnp.asarray, data), jnp.float32(1))
    data = full.data
    take = partial(taken, data)
    if rows.batch_size == size:
        return _whole(full, size, take)
    if partition is not None:
        data = jax.tree.map(partition.lay_out, data)
        with jax.ensure_compile_time_eval():
            weight = (np.arange(len(partition.order)) < size).astype(np.float32)
            full = Batch(data, jnp.asarray(weight) if len(weight) > size else jnp.float32(1))

    if partition is not None:
        return _blocks_of(data, partition, rows, full)

    def next_batch(state):
        chosen, state = rows.next(state)
        parts = jax.tree.map(lambda leaf: leaf.at[chosen.index].get(mode="promise_in_bounds"), data)
        return Batch(parts, chosen.weight), state

    return rows._replace(next=next_batch, full=full, take=take)


def streamed_batches(data: PyTree, batch_size: int | None, resident_bytes: int) -> Batches:
    """A stream of ``Batch`` over a pytree of arrays that are not in memory.

    Raises:
        ValueError: the arrays have no common leading axis; the batch size is missing or does not
            fit; a minibatch needs more than ``resident_bytes``.
    """
    size = data_rows(data, finite=False)
    batch_size = check_batch_size(batch_size, size, "streamed")
    leaves, structure = jax.tree_util.tree_flatten_with_path(data)
    sources = [Source(leaf, 0, "data" + jax.tree_util.keystr(path)) for path, leaf in leaves]
    rows = streamed_rows(jax.tree.unflatten(structure, sources), size, batch_size, resident_bytes)

    def next(state):
        chosen, state = rows.next(state)
        fetch = partial(block_of, block=chosen.block, size=batch_size)
        return Batch(jax.tree.map(fetch, chosen.resident), chosen.weight), state

    def take(index):
        resident = rows.take(index).resident  # pyright: ignore
        return Batch(resident, np.float32(1))  # pyright: ignore

    return rows._replace(next=next, take=take)


def _blocks_of(data: PyTree, partition: Partition, rows: Batches, full: Any) -> Batches:
    """A stream of ``Batch`` over arrays that are laid out in blocks."""
    numbered = rows.blocks
    assert numbered is not None  # a partition comes with them

    def at(block):
        parts = jax.tree.map(lambda leaf: partition.fetch(leaf, block), data)
        return Batch(parts, numbered.at(block).weight)

    blocks, take = numbered._replace(at=at), partition.take(data)
    return _numbered(full, rows.size, rows.batch_size, rows.order, blocks, take, rows.mesh)


def streamed_rows(sources: PyTree, size: int, batch_size: int, resident_bytes: int) -> Batches:
    """A stream of ``Rows`` of arrays that are not in memory, given as a tree of ``Source``."""
    stream = Stream(sources, size, batch_size, resident_bytes)

    def next(state):
        (slot, resident), state = stream.next(state)
        rows = partial(block_of, block=slot, size=batch_size)
        return Rows(slot, rows(resident.index), rows(resident.weight), resident.data), state

    def take(index):
        read = jax.tree.map(lambda s: s.rows(index), sources, is_leaf=lambda x: type(x) is Source)
        return numbered_rows(index, read)

    return Batches(
        init=stream.init,
        next=next,
        full=None,
        size=size,
        batch_size=batch_size,
        order="streamed",
        balanced=True,
        stream=stream,
        take=take,
    )


def check_no_mesh(mesh: Mesh | None) -> None:
    """Raise a ValueError if there is a mesh, which streamed data do not know what to do with."""
    if mesh is not None:
        raise ValueError(
            "mesh cannot be combined with order='streamed': every device holds a whole super-block."
        )


def _checked(mesh: Mesh | None, batch_size: int, layout: str) -> Mesh | None:
    """The mesh, its axes left to the compiler, or a ValueError where it cannot hold minibatches."""
    if mesh is None:
        return None
    check_instance("mesh", mesh, Mesh, "a jax.sharding.Mesh")
    if "data" not in mesh.axis_names or set(mesh.axis_names) - {"chain", "data"}:
        raise ValueError(
            "mesh must have an axis 'data', and may have an axis 'chain', got "
            f"{list(mesh.axis_names)}."
        )
    if layout != "blocks":
        raise ValueError(f"a mesh needs layout='blocks', got {layout!r}.")
    if batch_size % mesh.shape["data"]:
        raise ValueError(
            f"batch_size must be a multiple of the {mesh.shape['data']} devices along 'data', got "
            f"{batch_size}."
        )
    return Mesh(mesh.devices, mesh.axis_names)


def check_order(order: str, layout: str = "blocks") -> None:
    """Raise a ValueError unless the order and the layout are known."""
    check_choice("order", order, get_args(Order))
    check_choice("layout", layout, get_args(Layout))


def check_batch_size(batch_size: int | None, size: int, order: str) -> int:
    """The batch size as an int between 1 and the number of rows, or a ValueError."""
    if order == "full":
        if batch_size is not None and not (
            isinstance(batch_size, int | np.integer) and batch_size == size
        ):
            raise ValueError(
                f"order='full' uses all {size} rows at every step: leave batch_size out "
                f"or set it to {size}, got {describe(batch_size)}."
            )
        return size
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise ValueError(
            f"batch_size must be an integer from 1 to {size}, got {describe(batch_size)}."
        )
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size must be from 1 to the number of rows, {size}, got {batch_size}."
        )
    return int(batch_size)


def _init(key: PRNGKey) -> BatchState:
    return BatchState(Shared(key_words(key), optional=True), Shared(jnp.zeros((), jnp.uint32)))


def _visit(order, num_batches: int, state: BatchState):
    """Number of the minibatch that comes next, the permutation it is of, and the state after it."""
    words: UInt32[Array, 2] = state.words.value
    count: UInt32[Array, ""] = state.count.value
    visit = order(count, num_batches)
    block = permuted(words, visit.permutation, visit.slot, num_batches)
    return block, visit.permutation, state._replace(count=Shared(count + np.uint32(1)))


def _numbered(
    full: Any,
    size: int,
    batch_size: int,
    order: str,
    blocks: Blocks,
    take: Callable[[np.ndarray], Any],
    mesh: Mesh | None = None,
) -> Batches:
    """A stream of numbered minibatches."""

    def next(state):
        block, following = blocks.next(state)
        return blocks.at(block), following

    full = full if mesh is None else None
    return Batches(
        init=_init,
        next=next,
        full=full,
        size=size,
        batch_size=batch_size,
        order=order,
        balanced=is_balanced(order),
        blocks=blocks,
        mesh=mesh,
        take=take,
    )


def _whole(full: Any, size: int, take: Callable[[np.ndarray], Any]) -> Batches:
    """A stream of one minibatch, the whole data."""
    blocks = Blocks(1, lambda state: (np.int32(0), state), lambda block: full)
    return Batches(
        init=lambda key: None,
        next=lambda state: (full, state),
        full=full,
        size=size,
        batch_size=size,
        blocks=blocks,
        take=take,
    )
