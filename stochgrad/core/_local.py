"""Functions of one client's data, and of none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from stochgrad.core._clients import clients_of
from stochgrad.core._jit import hoisted_jit
from stochgrad.core._protocols import Posterior


def likelihood_sum(posterior: Posterior, function: Callable[..., Any]) -> Callable[..., Any]:
    """``(client, *args) -> function(*args, batch)`` summed over a client's rows, without the prior.

    The function must be affine in the rows' weights, as a log density and its derivatives are.
    """
    clients = clients_of(posterior)

    def run(client, *args):
        count = jnp.asarray(clients.blocks)[client]

        def add(block, total):
            batch = clients.at(client, block, jnp.float32(1))
            return jax.tree.map(jnp.add, total, function(*args, batch))

        prior = of_prior(posterior, function)(*args)
        zeros = jax.tree.map(jnp.zeros_like, prior)
        total = lax.fori_loop(jnp.zeros_like(count), count, add, zeros)
        return jax.tree.map(lambda x, p: x - count.astype(x.dtype) * p, total, prior)

    return run


def of_prior(posterior: Posterior, function: Callable[..., Any]) -> Callable[..., Any]:
    """``(*args) -> function(*args, batch)`` with the prior alone."""
    none = clients_of(posterior).at(np.int32(0), np.int32(0), np.float32(0))
    return lambda *args: function(*args, none)


def for_each_client(posterior: Posterior, function: Callable[..., Any], *args: Any) -> PyTree:
    """``function(client, *args)`` for each client, one after the other, as arrays over clients."""
    numbers = np.arange(clients_of(posterior).count, dtype=np.int32)
    return hoisted_jit(lambda *args: lax.map(lambda s: function(s, *args), numbers))(*args)
