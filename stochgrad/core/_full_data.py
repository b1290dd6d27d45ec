"""Functions of a minibatch on all data, wherever they are."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochgrad.core._jit import hoisted_jit
from stochgrad.core._protocols import Batches, Posterior
from stochgrad.core._supply import Supply
from stochgrad.core._trees import insert_resident, remove_resident

_WORDS = (0, 0)
_AT_ONCE, _MANY_ROWS = 8, 10**6


def full_data_mean(posterior: Posterior, function: Callable[..., Any]) -> Callable[..., Any]:
    """``(*args) -> function(*args, batch)`` with the whole data for the batch, compiled.

    Of streamed data it is the mean over an epoch's minibatches, one pass through the source; the
    function must be as good for that as an unbiased log density is.
    """
    stream = posterior.batches.stream
    if stream is None:
        return hoisted_jit(full_data_mean_traceable(posterior, function))
    over_block = jax.jit(lambda resident, *args: _sum(posterior, function, resident, *args))

    def run(*args):
        supply = Supply(stream, _WORDS)
        try:
            at, total = 0, None
            while at < stream.num_batches:
                at += supply.left(at)
                # done with the rows, before the next ones take their place
                part = jax.block_until_ready(over_block(supply.resident, *args))
                total = part if total is None else jax.tree.map(jnp.add, total, part)
        finally:
            supply.close()
        return jax.tree.map(lambda x: x / stream.num_batches, total)

    return run


def log_densities(posterior: Posterior) -> Callable[[Any], Any]:
    """``positions -> values`` on all data, of positions with a leading axis; compiled."""
    together = _AT_ONCE if posterior.batches.size < _MANY_ROWS else None

    def each(positions, batch):
        one = lambda position: posterior.log_density(position, batch)
        return lax.map(one, positions, batch_size=together)

    return full_data_mean(posterior, each)


def resident_block(posterior: Posterior | None) -> AbstractContextManager:
    """Within this, streamed data give the minibatches of one super-block, over and over."""
    stream = None if posterior is None else posterior.batches.stream
    if stream is None:
        return nullcontext()
    return stream.supplying(jax.tree.map(jnp.asarray, stream.load(_WORDS, 0)))


def full_data_mean_traceable(
    posterior: Posterior, function: Callable[..., Any]
) -> Callable[..., Any]:
    """``(*args) -> function(*args, batch)`` on all data, to be called within functions of jax.

    Of streamed data it is the mean over the minibatches of one super-block.
    """
    stream = posterior.batches.stream
    if posterior.batches.mesh is not None:
        return lambda *args: _mean_over_blocks(posterior.batches, function, *args)
    if stream is None:
        return lambda *args: function(*args, posterior.batches.full)
    resident = jax.tree.map(jnp.asarray, stream.load(_WORDS, 0))

    def run(*args):
        total = _sum(posterior, function, resident, *args)
        return jax.tree.map(lambda x: x / resident.batches.astype(x.dtype), total)

    return run


def _mean_over_blocks(batches: Batches, function: Callable, *args: Any) -> Any:
    """The function's mean over all minibatches, spread over devices as each of them is."""
    assert batches.blocks is not None
    count, at = batches.blocks.count, batches.blocks.at

    def add(i, total):
        return jax.tree.map(jnp.add, total, function(*args, at(i)))

    zeros = _zeros(lambda: function(*args, at(np.int32(0))))
    total = lax.fori_loop(np.int32(0), np.int32(count), add, zeros)
    return jax.tree.map(lambda x: x / jnp.asarray(count, x.dtype), total)


def _sum(posterior: Posterior, function: Callable, resident: Any, *args: Any) -> Any:
    """The function's sum over the minibatches of a super-block."""
    batches = posterior.batches
    with batches.stream.supplying(resident):
        state = remove_resident(batches.init(jax.random.key(0)))

    def add(_, both):
        total, state = both
        batch, state = batches.next(insert_resident(state, resident))
        return jax.tree.map(jnp.add, total, function(*args, batch)), remove_resident(state)

    zeros = _zeros(lambda: function(*args, batches.next(insert_resident(state, resident))[0]))
    return lax.fori_loop(np.int32(0), resident.batches.astype(np.int32), add, (zeros, state))[0]


def _zeros(function: Callable[[], Any]) -> Any:
    """Zeros in the shapes of what a function returns."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function))
