"""Gradients that remember what each minibatch said last."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from stochgrad.core import Gradient, Position, Posterior, Shared, check_number, tree_bytes
from stochgrad.gradients._minibatch import check_posterior


class SAGAState(NamedTuple):
    """State of the gradient.

    Attributes:
        batch_state: The stream's state.
        table: The last value and gradient of each minibatch, with a leading axis of K.
        mean: Their means, taken afresh once an epoch, and followed in between.
        count: Number of steps taken.
    """

    batch_state: Any
    table: PyTree
    mean: PyTree
    count: Shared


def saga(posterior: Posterior, *, memory_limit: float = 1e9) -> Gradient:
    r"""The minibatch gradient, centered at what the same minibatch gave last time.

    With a table $\alpha$ of the last gradient of each of the K minibatches (Defazio, Bach &
    Lacoste-Julien, NeurIPS 2014; for sampling Dubey et al., NeurIPS 2016),

    $$\hat g(\theta) = \hat g_b(\theta) - \alpha_b + \frac1K\sum_j \alpha_j, \qquad
      \alpha_u \leftarrow \hat g_u(\theta_n),$$

    where b is the minibatch that the order visits and u one drawn afresh, uniformly. (With u = b,
    as usual, an order without replacement would always visit the entries that are older than the
    table is on average. What they lag behind acts as a force along the momentum; on a regression
    with epochs as long as the chain's memory it made variances a fifth too small.) Unbiased given
    the table. It needs no center, so that it helps where there is none: for several modes, or a
    chain that is still on its way. Its noise is larger than a control variate's, since each entry
    stems from a draw of its own. A step costs two minibatch gradients, starting one pass over the
    data a chain.

    Memory: $K = \lceil N/B \rceil$ gradients a chain, K(d + 1) numbers. One entry a minibatch and
    not one a row: the partition is fixed, and larger minibatches make the table smaller.

    Args:
        posterior: A posterior whose minibatches are blocks of a fixed partition.
        memory_limit: Bytes that the table of a chain may take.

    Raises:
        TypeError: ``posterior`` is not a posterior.
        ValueError: its minibatches are not a fixed few; on first use, the table is too large.
    """
    check_posterior("saga", posterior)
    memory_limit = check_number("memory_limit", memory_limit)
    blocks = posterior.batches.blocks
    if blocks is None:
        instead = "layout='blocks' and one subsampled plate, or svrg or control_variate"
        if posterior.batches.stream is not None:
            instead = "control_variate, which streamed data allow,"
        elif posterior.batches.anchored is not None:
            instead = "control_variate, which asks each owner of data once,"
        raise ValueError(
            "posterior: saga keeps a gradient for each minibatch, but this posterior has no fixed "
            "partition of minibatches: use "
            f"{instead} instead."
        )
    value_and_gradient = jax.value_and_grad(posterior.log_density)

    def init(key, position: Position) -> SAGAState:
        needed = blocks.count * (tree_bytes(jax.eval_shape(lambda p: p, position)) + 4)
        if needed > memory_limit:
            raise ValueError(
                f"saga's table of {blocks.count} minibatch gradients takes {needed:,.0f} bytes a "
                f"chain, more than memory_limit, {memory_limit:,.0f}: take a larger batch_size, or "
                "svrg or control_variate instead."
            )
        table = jax.lax.map(
            lambda block: value_and_gradient(position, blocks.at(block)),
            np.arange(blocks.count, dtype=np.int32),
        )
        count = Shared(jnp.zeros((), jnp.int32))
        return SAGAState(posterior.batches.init(key), table, _mean(table), count)

    def next(key, position: Position, state: SAGAState):
        block, batch_state = blocks.next(state.batch_state)
        batch = blocks.at(block)
        entry = jax.tree.map(lambda x: x[block], state.table)

        def score(position):
            return jax.tree.map(
                lambda g, a, mean: g - a + mean,
                value_and_gradient(position, batch),
                entry,
                state.mean,
            )

        renewed = jax.random.randint(key, (), 0, blocks.count).astype(jnp.int32)
        before = jax.tree.map(lambda x: x[renewed], state.table)
        now = value_and_gradient(position, blocks.at(renewed))
        table = jax.tree.map(lambda x, g: x.at[renewed].set(g), state.table, now)
        count = (state.count.value + 1) % blocks.count
        mean = lax.cond(
            count == 0,
            lambda: _mean(table),
            lambda: jax.tree.map(
                lambda m, g, a: m + (g - a) / blocks.count, state.mean, now, before
            ),
        )
        return score, SAGAState(batch_state, table, mean, Shared(count))

    return Gradient(init, next, posterior)


def _mean(table: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), table)
