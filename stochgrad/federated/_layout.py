"""Clients' rows in the blocks of their minibatches, in one array for all clients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from stochgrad.core import Order, as_data, check_batch_size, check_order, data_rows, describe

_PARTITION_SEED = 20130101
_MOST_PADDED_ROWS, _MOST_PADDING = 10**6, 4
_ALIGNMENT = 64
"""Bytes, at whose multiples jax takes an array of the host as it is."""


class Layout(NamedTuple):
    """Where clients' rows lie: each client's in whole blocks, the last one padded.

    Attributes:
        sizes: Rows of each client.
        counts: Blocks of each.
        rows: Rows of a block.
    """

    sizes: np.ndarray
    counts: np.ndarray
    rows: int

    def orders(self):
        """For each client the numbers of its rows in the order of its blocks, padded."""
        random = np.random.default_rng(_PARTITION_SEED)
        for size, count in zip(self.sizes.tolist(), self.counts.tolist(), strict=True):
            yield np.resize(random.permutation(size), count * self.rows)

    def order(self) -> np.ndarray:
        """The same of all clients, as numbers of their rows one client after the other."""
        starts = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        parts = [start + order for start, order in zip(starts, self.orders(), strict=True)]
        return np.concatenate(parts).astype(np.int32)

    def block(self, client: Any, block: Any) -> Array:
        """The number among all of a client's block."""
        first = np.cumsum(self.counts) - self.counts
        return jnp.asarray(first.astype(np.int32))[client] + block

    def weights(self, client: Any, block: Any, weight: Any) -> Array:
        """One weight for each row of a block, and zero for padding."""
        weights = jnp.full((self.rows,), weight, jnp.float32)
        if not np.any(self.sizes % self.rows):
            return weights
        place = block * self.rows + lax.iota(np.int32, self.rows)
        return jnp.where(place < jnp.asarray(self.sizes)[client], weights, jnp.float32(0))


def client_layout(sizes: Sequence[int], batch_size: int | None, order: Order) -> Layout:
    """The layout of clients of these sizes.

    Raises:
        ValueError: the batch size does not fit; blocks as large as the largest client would be
            padding for the most part.
    """
    check_order(order)
    if order == "streamed":
        raise ValueError("order='streamed' is not for clients: their rows are held in memory.")
    total, largest = sum(sizes), max(sizes)
    if order == "full":
        rows = check_batch_size(None if batch_size is None else batch_size, largest, order)
        padded = rows * len(sizes)
        if padded > max(_MOST_PADDED_ROWS, _MOST_PADDING * total):
            raise ValueError(
                f"order='full' pads the rows of {len(sizes):,} clients to those of the largest, "
                f"{padded:,} for {total:,} rows: give a batch_size, and leave order out."
            )
    else:
        rows = check_batch_size(batch_size, total, order)
    counts = np.array([-(-size // rows) for size in sizes], np.int32)
    return Layout(np.array(sizes, np.int32), counts, rows)


def lay_out_clients(
    clients: Sequence[PyTree], batch_size: int | None, order: Order
) -> tuple[PyTree, Layout]:
    """All clients' arrays in blocks, and where they lie.

    Each client is asked for twice, once for its size and once for its rows, and not held: of a
    sequence that reads or makes them when they are asked for there is one copy in memory.
    """
    structure, forms, sizes = _measured(clients)
    for path, form in zip(_paths(clients), forms, strict=True):
        if not _has_rows(form):
            raise ValueError(
                f"clients[...]{path} must have a leading axis of rows, got a scalar: what is the "
                "same for all rows goes into log_likelihood itself."
            )
    layout = client_layout(sizes, batch_size, order)
    blocks = int(layout.counts.sum(dtype=np.int64))
    arrays = [
        _aligned((blocks * layout.rows, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype))
        for x in forms
    ]
    at = 0
    for s, rows in enumerate(layout.orders()):
        leaves = jax.tree.leaves(as_data(clients[s], f"clients[{s}]"))
        if [np.shape(x)[:1] for x in leaves] != [(sizes[s],)] * len(leaves):
            raise ValueError(f"client {s} has other rows when it is asked for them again.")
        for array, leaf in zip(arrays, leaves, strict=True):
            np.take(np.asarray(leaf, array.dtype), rows, axis=0, out=array[at : at + len(rows)])
        at += len(rows)
    with jax.ensure_compile_time_eval():
        placed = [jax.device_put(array, may_alias=True) for array in arrays]
    return jax.tree.unflatten(structure, placed), layout


def concatenate_clients(clients: Sequence[PyTree]) -> tuple[PyTree, list[int]]:
    """The clients' arrays one after the other, and how many rows each has.

    What is not an array with rows must be the same for all.
    """
    check_list(clients)
    structure = jax.tree.structure(clients[0])
    sizes = []
    for s, client in enumerate(clients):
        sizes.append(_rows_of(client, s, structure))
    columns = list(zip(*(jax.tree.leaves(client) for client in clients), strict=True))
    for path, parts in zip(_paths(clients), columns, strict=True):
        _check_parts(f"data{path}", parts)
    leaves = [
        np.concatenate([np.asarray(part) for part in parts]) if _has_rows(parts[0]) else parts[0]
        for parts in columns
    ]
    return jax.tree.unflatten(structure, leaves), sizes


def check_list(clients: Any) -> None:
    """Raise a ValueError unless it is a list of at least one client's data."""
    if isinstance(clients, Mapping):
        raise ValueError("clients must be a list, got a dict: list(clients.values()) is one.")
    if not isinstance(clients, Sequence) or isinstance(clients, str | bytes) or not clients:
        raise ValueError(
            f"clients must be a list with the data of at least one client, got {describe(clients)}."
        )


def whole_weights(layout: Layout) -> Array:
    """One for each row of all clients' blocks, and zero for padding."""
    padded = _aligned((int(layout.counts.sum(dtype=np.int64)) * layout.rows,), np.float32)
    padded[:] = 1
    end = np.cumsum(layout.counts.astype(np.int64) * layout.rows)
    for last, size, count in zip(end, layout.sizes, layout.counts, strict=True):
        padded[last - (count * layout.rows - size) : last] = 0
    with jax.ensure_compile_time_eval():
        return jax.device_put(padded, may_alias=True)


def _measured(clients: Sequence[PyTree]) -> tuple[Any, list[Any], list[int]]:
    """Structure, and the shape and type of each array, of all clients; rows of each client."""
    check_list(clients)
    structure, sizes, columns = None, [], []
    for s in range(len(clients)):
        client = as_data(clients[s], f"clients[{s}]")
        structure = jax.tree.structure(client) if structure is None else structure
        sizes.append(_rows_of(client, s, structure))
        columns.append([_form(x) for x in jax.tree.leaves(client)])
    by_leaf = list(zip(*columns, strict=True))
    for path, parts in zip(_paths(clients), by_leaf, strict=True):
        _check_parts(f"data{path}", parts)
    return structure, [parts[0] for parts in by_leaf], sizes


def _form(leaf: Any) -> Any:
    if not _has_rows(leaf):
        return leaf
    return np.broadcast_to(np.empty((), leaf.dtype), leaf.shape)  # shape and type alone


def _rows_of(client: PyTree, s: int, structure: Any) -> int:
    if jax.tree.structure(client) != structure:
        raise ValueError(
            f"the clients' data must have one structure: client 0 has {structure}, client {s} "
            f"has {jax.tree.structure(client)}."
        )
    try:
        arrays = [x for x in jax.tree.leaves(client) if _has_rows(x)]
        return data_rows(arrays, name="clients")
    except ValueError as error:
        raise ValueError(f"client {s}: {error}") from error


def _paths(clients: Sequence[PyTree]) -> list[str]:
    first = as_data(clients[0], "clients[0]")
    return [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(first)]


def _has_rows(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and len(leaf.shape) > 0


def _check_parts(name: str, parts: Sequence[Any]) -> None:
    """Raise a ValueError unless one leaf of all clients makes one array, or is the same for all."""
    if not _has_rows(parts[0]):
        for s, part in enumerate(parts):
            if _has_rows(part) or part != parts[0]:
                raise ValueError(
                    f"{name} is not an array with rows, so it must be the same for all clients: "
                    f"client 0 has {parts[0]!r:.40}, client {s} has {part!r:.40}. What "
                    "differs goes in as a column, np.full(rows, value)."
                )
        return
    for s, part in enumerate(parts):
        here, there = (part.shape[1:], part.dtype), (parts[0].shape[1:], parts[0].dtype)
        if here != there:
            raise ValueError(
                f"the clients' data must have one structure: {name} has rows of shape {there[0]}, "
                f"{there[1]}, with client 0, and of shape {here[0]}, {here[1]}, with client {s}."
            )


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of the host that jax can take as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
