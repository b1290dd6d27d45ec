"""All clients at once, each at a position of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from stochgrad.core import (
    ORDERS,
    BatchState,
    Gradient,
    Position,
    Posterior,
    Shared,
    key_words,
    permuted,
)
from stochgrad.federated._clients import require_clients


def side_by_side(posterior: Posterior, *, prior: bool = True) -> Gradient:
    r"""The score of every client's own density, on one of its minibatches, at its own position.

    Positions have a leading axis of S clients, and so has the gradient; the value is the sum. With
    ``prior``, a client has the part $1/S$ of the prior, so that the densities multiply to the
    posterior; without, the likelihood alone.
    """
    clients = require_clients(posterior)
    minibatches = local_minibatches(posterior)

    def next(key, position, state):
        batches, state = minibatches(state)

        def score(position):
            value, g = jax.vmap(lambda p, b: local_score(posterior, prior, p, b))(position, batches)
            return jnp.sum(value), g

        return score, state

    def init(key, position):
        sizes = {x.shape[:1] for x in jax.tree.leaves(position)}
        if sizes != {(clients.count,)}:
            raise ValueError(f"positions must have a leading axis of {clients.count} clients.")
        return start(key)

    return Gradient(init, next)


def start(key: Any) -> BatchState:
    """The state of the clients' streams."""
    return BatchState(Shared(key_words(key), optional=True), Shared(jnp.zeros((), jnp.uint32)))


def local_minibatches(posterior: Posterior):
    """``state -> (batches, state)``: the next minibatch of each client, weighed for its S-th part.

    A row counts for $S K_s$, so that the log density over S has the client's likelihood whole.
    """
    clients = require_clients(posterior)
    order = ORDERS[clients.order]
    numbers = np.arange(clients.count, dtype=np.int32)
    sizes = clients.blocks.astype(np.uint32)
    weights = (clients.blocks * clients.count).astype(np.float32)

    def next(state: BatchState):
        def of(client, size, weight):
            where = order(state.count.value, size)
            stream = client.astype(np.uint32) + np.uint32(1)
            block = permuted(state.words.value, where.permutation, where.slot, size, stream)
            return clients.at(client, block, weight)

        batches = jax.vmap(of)(jnp.asarray(numbers), jnp.asarray(sizes), jnp.asarray(weights))
        return batches, state._replace(count=Shared(state.count.value + np.uint32(1)))

    return next


def local_score(posterior: Posterior, prior: bool, position: Position, batch: Any) -> tuple:
    """Value and gradient of a client's density on a batch that ``local_minibatches`` gave."""
    count = require_clients(posterior).count
    whole = jax.value_and_grad(posterior.log_density)(position, batch)
    if not prior:
        none = require_clients(posterior).at(np.int32(0), np.int32(0), np.float32(0))
        alone = jax.value_and_grad(posterior.log_density)(position, none)
        whole = jax.tree.map(jnp.subtract, whole, alone)
    return jax.tree.map(lambda x: x / count, whole)


def client_gradients(posterior: Posterior, position: PyTree) -> PyTree:
    """Gradient of every client's density (its part of the prior included) on all of its data."""
    clients = require_clients(posterior)

    def of(client, p):
        count = jnp.asarray(clients.blocks)[client]

        def add(block, total):
            batch = clients.at(client, block, jnp.float32(1))
            return jax.tree.map(jnp.add, total, jax.grad(posterior.log_density)(p, batch))

        none = clients.at(np.int32(0), np.int32(0), np.float32(0))
        prior = jax.grad(posterior.log_density)(p, none)
        total = lax.fori_loop(jnp.zeros_like(count), count, add, jax.tree.map(jnp.zeros_like, p))
        spare = count.astype(np.float32) - 1 / clients.count
        return jax.tree.map(lambda x, y: x - spare.astype(y.dtype) * y, total, prior)

    numbers = jnp.arange(clients.count, dtype=jnp.int32)
    return lax.map(lambda both: of(*both), (numbers, position))
