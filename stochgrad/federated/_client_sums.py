"""Functions of one client's data, and of none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from stochgrad.core import (
    Anchored,
    Batch,
    Position,
    Posterior,
    full_data_mean_traceable,
    hoisted_jit,
)
from stochgrad.federated._clients import current_visit, require_clients

MANY_ROWS, _TOGETHER = 10**6, 2**16


def likelihood_sum(posterior: Posterior, function: Callable[..., Any]) -> Callable[..., Any]:
    """``(client, *args) -> function(*args, batch)`` summed over a client's rows, without the prior.

    The function must be affine in the rows' weights, as a log density and its derivatives are.
    """
    clients = require_clients(posterior)

    def run(client, *args):
        count = jnp.asarray(clients.blocks)[client]

        def add(block, total):
            batch = clients.at(client, block, jnp.float32(1))
            return jax.tree.map(jnp.add, total, function(*args, batch))

        prior = prior_only(posterior, function)(*args)
        zeros = jax.tree.map(jnp.zeros_like, prior)
        total = lax.fori_loop(jnp.zeros_like(count), count, add, zeros)
        return jax.tree.map(lambda x, p: x - count.astype(x.dtype) * p, total, prior)

    return run


def all_likelihoods(posterior: Posterior, function: Callable[..., Any]) -> Callable[..., Any]:
    """``(*args) -> function(*args, batch)`` on all clients' rows, without the prior.

    Of a million rows and more it goes over parts of them one after the other, so that what the
    function makes of each row is never there of all rows at once.
    """
    full, none = posterior.batches.full, prior_only(posterior, function)
    rows = full.weight.shape[0] if isinstance(full, Batch) else 0
    if rows < MANY_ROWS:
        whole = full_data_mean_traceable(posterior, function)
        return lambda *args: jax.tree.map(jnp.subtract, whole(*args), none(*args))

    def part(start, size, *args):
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, size)
        found = function(*args, jax.tree.map(cut, full))
        return jax.tree.map(jnp.subtract, found, none(*args))

    def run(*args):
        add = lambda i, total: jax.tree.map(
            jnp.add, total, part(i * np.int32(_TOGETHER), _TOGETHER, *args)
        )
        zeros = jax.tree.map(jnp.zeros_like, none(*args))
        total = lax.fori_loop(np.int32(0), np.int32(rows // _TOGETHER), add, zeros)
        if not rows % _TOGETHER:
            return total
        rest = part(np.int32(rows - rows % _TOGETHER), rows % _TOGETHER, *args)
        return jax.tree.map(jnp.add, total, rest)

    return run


def prior_only(posterior: Posterior, function: Callable[..., Any]) -> Callable[..., Any]:
    """``(*args) -> function(*args, batch)`` with the prior alone."""
    none = require_clients(posterior).at(np.int32(0), np.int32(0), np.float32(0))
    return lambda *args: function(*args, none)


def for_each_client(posterior: Posterior, function: Callable[..., Any], *args: Any) -> PyTree:
    """``function(client, *args)`` for each client, one after the other, as arrays over clients."""
    numbers = np.arange(require_clients(posterior).count, dtype=np.int32)
    return hoisted_jit(lambda *args: lax.map(lambda s: function(s, *args), numbers))(*args)


def anchored_by_client(posterior: Posterior, function: Callable, point: Position) -> Anchored:
    """A function of a batch at a point, on the prior and all data of the client that is visited.

    A client knows its own part only, over its share of the steps.
    """
    shares = require_clients(posterior).shares.astype(np.float32)
    own = for_each_client(posterior, likelihood_sum(posterior, function), point)
    prior = prior_only(posterior, function)(point)

    def together(own, prior):
        over = jnp.asarray(shares.reshape(-1, *(1,) * (own.ndim - 1)), own.dtype)
        return prior[None] + own / over

    values = jax.tree.map(together, own, prior)
    return Anchored(
        values, lambda state: jax.tree.map(lambda x: x[current_visit(state).client], values)
    )
