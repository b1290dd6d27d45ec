"""Systematic resampling."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from stochgrad.core import PRNGKey, check_array, check_count, check_key


def systematic(key: PRNGKey, weights: Float[Array, " n"], count: int) -> Int[Array, " count"]:
    r"""Numbers in proportion to weights, from one uniform draw u.

    The cumulative weights are read off at $(i + u)/m$ of their sum, so that a number with the share
    w of all weights comes $\lfloor mw\rfloor$ or $\lceil mw\rceil$ times [Kitagawa 1996].

    Args:
        key: A PRNG key.
        weights: Non-negative, of any sum; where all are zero, the last number comes.
        count: How many numbers to draw, m.

    Raises:
        TypeError: the key is not a typed PRNG key, or weights are no array of numbers.
        ValueError: a weight is negative or not finite, there are none, or ``count`` is not
            positive.
    """
    check_key(key)
    count = check_count("count", count)
    if not isinstance(weights, Tracer):
        array = check_array("weights", weights, shape=(None,))
        if array.size == 0 or array.min() < 0:
            raise ValueError("weights must be one or more non-negative numbers.")
        weights = jnp.asarray(weights, jnp.result_type(float) if array.dtype.kind in "iu" else None)
    ends = jnp.cumsum(weights)
    uniform = jax.random.uniform(key, dtype=ends.dtype)
    places = (uniform + jnp.arange(count, dtype=ends.dtype)) / count * ends[-1]
    return jnp.minimum(jnp.searchsorted(ends, places, side="right"), weights.shape[0] - 1)
