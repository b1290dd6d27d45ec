r"""Batch orders: which minibatch comes when.

An order maps the number t of a minibatch, and the number K of minibatches in an epoch, to the
random permutation in force and to the slot of that permutation which is visited. All else, laying
out, fetching and weighting the rows, is the same for every order. To add an order, write such a
function and enter it in ``ORDERS``.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, UInt32

from stochgrad.core._noise import mix, threefry

_ROUNDS = 8


class Visit(NamedTuple):
    """Which permutation, and which slot of it."""

    permutation: UInt32[Array, ""]
    slot: UInt32[Array, ""]


Order: TypeAlias = Callable[[Array, int], Visit]


def iid(t: UInt32[Array, ""], num_batches: int) -> Visit:
    """A fresh draw each step, independent of all before."""
    return Visit(t, jnp.zeros_like(t))


def reshuffled(t: UInt32[Array, ""], num_batches: int) -> Visit:
    """Each minibatch once an epoch, in a new random order each epoch."""
    k = np.uint32(num_batches)
    return Visit(t // k, t % k)


def symmetric(t: UInt32[Array, ""], num_batches: int) -> Visit:
    """A sweep in random order, then the same sweep backwards; a new order every two sweeps.

    The minibatch at a turning point is visited twice in a row.
    """
    k = np.uint32(num_batches)
    i = t % (k + k)
    return Visit(t // (k + k), jnp.where(i < k, i, k + k - np.uint32(1) - i))


ORDERS: dict[str, Order] = {"iid": iid, "reshuffled": reshuffled, "symmetric": symmetric}


def permuted(
    words: UInt32[Array, "2"],
    permutation: UInt32[Array, ""],
    index: Int[Array, "*s"],
    size: int,
    stream: int = 0,
    limit: UInt32[Array, ""] | None = None,
) -> Int[Array, "*s"]:
    """Where a random permutation of ``range(size)`` sends ``index``.

    The permutation is a function of the key's ``words`` and of a counter, evaluated only where it
    is asked for: time and memory do not depend on ``size``. It is a Feistel network on two digits
    in mixed radix (Black & Rogaway, CT-RSA 2002), eight rounds, walked until it falls in range.
    Permutations of different ``stream`` are independent. With a ``limit``, at most ``size``, it is
    a permutation of ``range(limit)``.
    """
    rows = int(np.ceil(np.sqrt(size)))
    columns = -(-size // rows)
    counter = lax.iota(np.uint32, _ROUNDS) + np.uint32(_ROUNDS * stream)
    left_keys, right_keys = threefry(words, jnp.broadcast_to(permutation, counter.shape), counter)

    def once(x):
        left, right = x // np.uint32(columns), x % np.uint32(columns)
        for r in range(_ROUNDS):
            left = _add_modulo(left, mix(right ^ left_keys[r]), rows)
            right = _add_modulo(right, mix(left ^ right_keys[r]), columns)
        return left * np.uint32(columns) + right

    x = once(index.astype(np.uint32))
    if rows * columns > size or limit is not None:
        end = np.uint32(size) if limit is None else limit
        x = lax.while_loop(
            lambda x: jnp.any(x >= end), lambda x: jnp.where(x >= end, once(x), x), x
        )
    return x.astype(jnp.int32)


def _add_modulo(digit: Array, word: Array, base: int) -> Array:
    """``digit`` plus a uniform digit made of ``word``, modulo ``base``."""
    unit = (word >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-24)
    total = digit + (unit * np.float32(base)).astype(np.uint32)
    return jnp.where(total >= np.uint32(base), total - np.uint32(base), total)
