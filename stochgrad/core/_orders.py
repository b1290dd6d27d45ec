r"""Batch orders: which minibatch comes when.

An order maps the number t of a minibatch, and the number K of minibatches in an epoch, to the
random permutation in force and to the slot of that permutation which is visited. All else, laying
out, fetching and weighting the rows, is the same for every order. To add an order, write such a
function and enter it in ``ORDERS``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, UInt32

from stochgrad.core._noise import mix, threefry

_ROUNDS = 8
_MOST_ASTRAY = 4


class Slot(NamedTuple):
    """Which permutation, and which slot of it."""

    permutation: UInt32[Array, ""]
    slot: UInt32[Array, ""]


Size: TypeAlias = int | UInt32[Array, ""]

OrderFunction: TypeAlias = Callable[[Array, Size], Slot]


def iid(t: UInt32[Array, ""], num_batches: Size) -> Slot:
    """A fresh draw each step, independent of all before."""
    return Slot(t, jnp.zeros_like(t))


def reshuffled(t: UInt32[Array, ""], num_batches: Size) -> Slot:
    """Each minibatch once an epoch, in a new random order each epoch."""
    k = jnp.asarray(num_batches, np.uint32)
    return Slot(t // k, t % k)


def symmetric(t: UInt32[Array, ""], num_batches: Size) -> Slot:
    """A sweep in random order, then the same sweep backwards; a new order every two sweeps.

    The minibatch at a turning point is visited twice in a row.
    """
    k = jnp.asarray(num_batches, np.uint32)
    i = t % (k + k)
    return Slot(t // (k + k), jnp.where(i < k, i, k + k - np.uint32(1) - i))


class BatchOrder(NamedTuple):
    """An order of minibatches.

    Attributes:
        slot: ``(t, num_batches) -> Slot``.
        balanced: Whether it visits each minibatch equally often in an epoch or two, so that the
            noise of minibatches cancels over them.
    """

    slot: OrderFunction
    balanced: bool

    def __call__(self, t: UInt32[Array, ""], num_batches: Size) -> Slot:
        return self.slot(t, num_batches)


ORDERS: dict[str, BatchOrder] = {
    "iid": BatchOrder(iid, balanced=False),
    "reshuffled": BatchOrder(reshuffled, balanced=True),
    "symmetric": BatchOrder(symmetric, balanced=True),
}


def is_balanced(order: str) -> bool:
    """Whether the noise of minibatches in an order cancels over an epoch."""
    return order in ORDERS and ORDERS[order].balanced


def permuted(
    words: UInt32[Array, "2"],
    permutation: UInt32[Array, ""],
    index: Int[Array, "*s"],
    size: Size,
    stream: Size = 0,
    limit: UInt32[Array, ""] | None = None,
) -> Int[Array, "*s"]:
    """Where a random permutation of ``range(size)`` sends ``index``.

    The permutation is a function of the key's ``words`` and of a counter, evaluated only where it
    is asked for: time and memory do not depend on ``size``. It is a Feistel network on two digits
    in mixed radix (Black & Rogaway, CT-RSA 2002), eight rounds, walked until it falls in range.
    Permutations of different ``stream`` are independent. With a ``limit``, at most ``size``, it is
    a permutation of ``range(limit)``; the closer to ``size`` the cheaper.
    """
    stream = jnp.asarray(stream, np.uint32)
    if isinstance(size, int | np.integer):
        return _permuted_among(words, permutation, index, int(size), stream, limit)
    return _permuted(words, permutation, index, size, stream, limit)


def _permuted(words, permutation, index, size, stream, limit) -> Int[Array, "*s"]:
    rows, columns = _digits(size)
    counter = lax.iota(np.uint32, _ROUNDS) + np.uint32(_ROUNDS) * stream
    left_keys, right_keys = threefry(words, jnp.broadcast_to(permutation, counter.shape), counter)

    def once(x):
        left, right = x // columns, x % columns
        for r in range(_ROUNDS):
            left = _add_modulo(left, mix(right ^ left_keys[r]), rows)
            right = _add_modulo(right, mix(left ^ right_keys[r]), columns)
        return left * columns + right

    end = jnp.asarray(size, np.uint32) if limit is None else limit

    def walk(both):
        x, astray = both
        x = jnp.where(astray, once(x), x)
        return x, x >= end

    if jax.default_backend() != "cpu" and isinstance(size, int | np.integer) and limit is None:
        # a cycle leaves the range at most once for each number out of it; a loop would wait for
        # the host at each step
        astray = int(rows) * int(columns) - int(size)
        if astray <= _MOST_ASTRAY:
            x = once(index.astype(np.uint32))
            for _ in range(astray):
                x = jnp.where(x >= end, once(x), x)
            return lax.optimization_barrier(x.astype(jnp.int32))
    # outside a loop the compiler copies the rounds into what reads the index; newer ones then do
    # not come back
    both = index.astype(np.uint32), jnp.ones(index.shape, bool)
    x, _ = lax.while_loop(lambda both: jnp.any(both[1]), walk, both)
    return x.astype(jnp.int32)


_permuted_among = jax.jit(_permuted, static_argnums=3)
"""The same for a known size, traced once: it is some hundred operations."""


def _digits(size: Size) -> tuple[Any, Any]:
    """Two bases, one at most about four times the other, whose product is at least ``size``.

    For a size that is known it is as little above as can be: seldom by more than four.
    """
    if isinstance(size, int | np.integer):
        most = int(np.ceil(np.sqrt(size)))
        least = max((most + 1) // 2, min(2, most))
        rows = min(range(most, least - 1, -1), key=lambda rows: rows * -(-size // rows))
        return np.uint32(rows), np.uint32(-(-size // rows))
    rows = jnp.ceil(jnp.sqrt(size.astype(np.float32))).astype(np.uint32)
    return rows, (size + rows - np.uint32(1)) // rows


def _add_modulo(digit: Array, word: Array, base: Array) -> Array:
    """``digit`` plus a uniform digit made of ``word``, modulo ``base``."""
    unit = (word >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-24)
    total = digit + (unit * base.astype(np.float32)).astype(np.uint32)
    return jnp.where(total >= base, total - base, total)
