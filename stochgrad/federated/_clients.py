"""Data that several clients own, and its minibatches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree, UInt32

from stochgrad.core import (
    Batch,
    Batches,
    Order,
    Partition,
    Posterior,
    Rows,
    as_data,
    check_batch_size,
    check_instance,
    check_order,
    data_rows,
    describe,
    is_balanced,
)

_PARTITION_SEED = 20130101


class Clients(NamedTuple):
    r"""The clients of a federation, and how a chain goes from one to the next.

    Attributes:
        sizes: Rows of each client, $N_s$.
        blocks: Minibatches of each, $K_s$.
        at: ``(client, block, weight) -> batch``: one of its minibatches, each row counting for
            ``weight`` and padding for nothing.
        order: The order of minibatches within a client.
        steps: Steps of a visit to each client, $T_s$.
        probabilities: With which each is visited next, $p_s$; None for one random permutation of
            all after the other.
        shares: The share of steps that a chain spends with each in the long run,
            $f_s = p_s T_s / \sum_t p_t T_t$.
    """

    sizes: np.ndarray
    blocks: np.ndarray
    at: Callable[[Any, Any, Any], Any]
    order: str
    steps: np.ndarray
    probabilities: np.ndarray | None
    shares: np.ndarray

    @property
    def count(self) -> int:
        return len(self.sizes)


class Visit(NamedTuple):
    """Where a chain is.

    Attributes:
        words: The stream's own key.
        number: Visits begun.
        client: The client that is visited, s.
        left: Steps that are left of the visit.
        handed_out: How many minibatches each client has given.
    """

    words: UInt32[Array, "2"]
    number: UInt32[Array, ""]
    client: Int[Array, ""]
    left: Int[Array, ""]
    handed_out: UInt32[Array, " clients"]


def current_visit(state: Any) -> Visit:
    """The visit that is somewhere in the state of a gradient or of a kernel.

    Raises:
        TypeError: there is none: the data are not those of clients.
    """
    found = [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Visit))
        if isinstance(node, Visit)
    ]
    if not found:
        raise TypeError(
            "the target is not federated: build it with stochgrad.federated.posterior, "
            "or with stochgrad.from_numpyro(model, clients=[...])."
        )
    return found[0]


def require_clients(posterior: Posterior | None) -> Clients:
    """The clients whose data a posterior has, or a TypeError."""
    if posterior is not None:
        wanted = "a Posterior of data that clients own, from stochgrad.federated.posterior"
        check_instance("posterior", posterior, Posterior, wanted)
    clients = None if posterior is None else posterior.batches.owners
    if clients is None:
        current_visit(())
    assert clients is not None
    return clients


def client_rows(
    sizes: Sequence[int], batch_size: int | None, order: Order
) -> tuple[Batches, Partition]:
    """A stream of ``Rows`` of clients whose rows lie one after the other, and their partition.

    Each client's rows are split at random into blocks; the last one of each is padded.
    """
    check_order(order)
    if order == "streamed":
        raise ValueError("order='streamed' is not for clients: their rows are held in memory.")
    if order == "full":
        rows = check_batch_size(None if batch_size is None else batch_size, max(sizes), order)
    else:
        rows = check_batch_size(batch_size, sum(sizes), order)
    counts = np.array([-(-size // rows) for size in sizes], np.int32)
    first, starts = np.cumsum(counts) - counts, np.cumsum(sizes) - sizes
    random = np.random.default_rng(_PARTITION_SEED)
    parts = [
        np.resize(start + random.permutation(size), count * rows)
        for start, size, count in zip(starts, sizes, counts, strict=True)
    ]
    partition = Partition(np.concatenate(parts).astype(np.int32), sum(sizes), rows)
    ragged = any(size % rows for size in sizes)
    sizes_of, first_of = np.array(sizes, np.int32), first.astype(np.int32)

    def at(client, block, weight):
        number = jnp.asarray(first_of)[client] + block
        weights = jnp.full((rows,), weight, jnp.float32)
        if ragged:
            place = block * rows + lax.iota(np.int32, rows)
            weights = jnp.where(place < jnp.asarray(sizes_of)[client], weights, jnp.float32(0))
        return Rows(number, partition.rows(number), weights)

    full = Rows(None, np.arange(sum(sizes), dtype=np.int32), np.float32(1))  # pyright: ignore
    none = np.ones(0)
    clients = Clients(sizes_of, counts, at, "iid" if order == "full" else order, none, None, none)
    batches = Batches(
        init=lambda key: None,
        next=lambda state: (full, state),
        full=full,
        size=sum(sizes),
        batch_size=rows,
        order=order,
        balanced=is_balanced(order),
        take=lambda index: full._replace(index=np.asarray(index, np.int32)),
    )
    return batches._replace(owners=clients), partition


def client_batches(clients: Sequence[PyTree], batch_size: int | None, order: Order) -> Batches:
    """A stream of ``Batch`` over the clients' arrays.

    Raises:
        ValueError: there are no clients, one has no rows or values that are not finite, or their
            arrays differ in structure, dtype or trailing shape; the batch size does not fit.
    """
    _check_list(clients)
    data, sizes = concatenate_clients(
        [as_data(client, f"clients[{s}]") for s, client in enumerate(clients)]
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if not _has_rows(leaf):
            name = "clients[...]" + jax.tree_util.keystr(path)
            raise ValueError(
                f"{name} must have a leading axis of rows, got a scalar: what is the same for all "
                "rows goes into log_likelihood itself."
            )
    batches, partition = client_rows(sizes, batch_size, order)
    data = jax.tree.map(partition.lay_out, data)
    with jax.ensure_compile_time_eval():
        weight = np.concatenate(
            [
                np.arange(count * partition.batch_size) < size
                for count, size in zip(batches.owners.blocks, sizes, strict=True)
            ]
        )
        full = Batch(data, jnp.asarray(weight, jnp.float32))

    def of(rows):
        return Batch(jax.tree.map(lambda x: partition.fetch(x, rows.block), data), rows.weight)

    return map_batches(batches, of, full)._replace(take=partition.take(data))


def map_batches(batches: Batches, of: Callable[[Rows], Any], full: Any) -> Batches:
    """A stream of clients' rows with each minibatch in another form."""
    at = batches.owners.at
    clients = batches.owners._replace(at=lambda *which: of(at(*which)))
    return batches._replace(full=full, owners=clients)


def concatenate_clients(clients: Sequence[PyTree]) -> tuple[PyTree, list[int]]:
    """The clients' arrays one after the other, and how many rows each has.

    What is not an array with rows must be the same for all.
    """
    _check_list(clients)
    structure = jax.tree.structure(clients[0])
    sizes = []
    for s, client in enumerate(clients):
        if jax.tree.structure(client) != structure:
            raise ValueError(
                f"the clients' data must have one structure: client 0 has {structure}, client {s} "
                f"has {jax.tree.structure(client)}."
            )
        try:
            arrays = [x for x in jax.tree.leaves(client) if _has_rows(x)]
            sizes.append(data_rows(arrays, name="clients"))
        except ValueError as error:
            raise ValueError(f"client {s}: {error}") from error
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(clients[0])]
    columns = zip(*(jax.tree.leaves(client) for client in clients), strict=True)
    leaves = [_joined(f"data{path}", parts) for path, parts in zip(paths, columns, strict=True)]
    return jax.tree.unflatten(structure, leaves), sizes


def _check_list(clients: Any) -> None:
    if isinstance(clients, Mapping):
        raise ValueError("clients must be a list, got a dict: list(clients.values()) is one.")
    if not isinstance(clients, Sequence) or isinstance(clients, str | bytes) or not clients:
        raise ValueError(
            f"clients must be a list with the data of at least one client, got {describe(clients)}."
        )


def _has_rows(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and len(leaf.shape) > 0


def _joined(name: str, parts: Sequence[Any]) -> Any:
    """One leaf of all clients as one array, or their common value."""
    if not _has_rows(parts[0]):
        for s, part in enumerate(parts):
            if _has_rows(part) or part != parts[0]:
                raise ValueError(
                    f"{name} is not an array with rows, so it must be the same for all clients: "
                    f"client 0 has {parts[0]!r:.40}, client {s} has {part!r:.40}. What "
                    "differs goes in as a column, np.full(rows, value)."
                )
        return parts[0]
    for s, part in enumerate(parts):
        here, there = (part.shape[1:], part.dtype), (parts[0].shape[1:], parts[0].dtype)
        if here != there:
            raise ValueError(
                f"the clients' data must have one structure: {name} has rows of shape {there[0]}, "
                f"{there[1]}, with client 0, and of shape {here[0]}, {here[1]}, with client {s}."
            )
    return np.concatenate([np.asarray(part) for part in parts])
