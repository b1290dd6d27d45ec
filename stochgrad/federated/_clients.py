"""Data that several clients own, and its minibatches."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, PyTree, UInt32

from stochgrad.core import (
    Batch,
    Batches,
    Order,
    Partition,
    Posterior,
    Rows,
    block_of,
    check_instance,
    is_balanced,
)
from stochgrad.federated._layout import Layout, client_layout, lay_out_clients, whole_weights


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
    layout = client_layout(sizes, batch_size, order)
    partition = Partition(layout.order(), sum(sizes), layout.rows)

    def at(client, block, weight):
        number = layout.block(client, block)
        return Rows(number, partition.rows(number), layout.weights(client, block, weight))

    full = Rows(None, np.arange(sum(sizes), dtype=np.int32), np.float32(1))  # pyright: ignore
    take = lambda index: full._replace(index=np.asarray(index, np.int32))
    return _batches_of(layout, at, full, take, order), partition


def client_batches(clients: Sequence[PyTree], batch_size: int | None, order: Order) -> Batches:
    """A stream of ``Batch`` over the clients' arrays.

    Raises:
        ValueError: there are no clients, one has no rows or values that are not finite, or their
            arrays differ in structure, dtype or trailing shape; the batch size does not fit.
    """
    data, layout = lay_out_clients(clients, batch_size, order)
    full = Batch(data, whole_weights(layout))

    def at(client, block, weight):
        number = layout.block(client, block)
        rows = jax.tree.map(lambda x: block_of(x, number, layout.rows), data)
        return Batch(rows, layout.weights(client, block, weight))

    @cache
    def take_rows():
        return Partition(layout.order(), int(layout.sizes.sum()), layout.rows).take(data)

    return _batches_of(layout, at, full, lambda index: take_rows()(index), order)


def _batches_of(
    layout: Layout, at: Callable[..., Any], full: Any, take: Callable[..., Any], order: Order
) -> Batches:
    """Batches of a layout, of clients that are not visited yet."""
    none = np.ones(0)
    owners = Clients(
        layout.sizes, layout.counts, at, "iid" if order == "full" else order, none, None, none
    )
    return Batches(
        init=lambda key: None,
        next=lambda state: (full, state),
        full=full,
        size=int(layout.sizes.sum()),
        batch_size=layout.rows,
        order=order,
        balanced=is_balanced(order),
        take=take,
        owners=owners,
    )


def map_batches(batches: Batches, of: Callable[[Rows], Any], full: Any) -> Batches:
    """A stream of clients' rows with each minibatch in another form."""
    at = batches.owners.at
    clients = batches.owners._replace(at=lambda *which: of(at(*which)))
    return batches._replace(full=full, owners=clients)
