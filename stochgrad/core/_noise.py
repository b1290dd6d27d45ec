r"""Unit-variance noise for a whole position in one draw, and several draws under one key.

The bits are those of ``jax.random.bits``, Threefry-2x32 with twenty rounds on a counter (Salmon,
Moraes, Dror & Shaw, SC 2011), and ``normal`` equals ``jax.random.normal`` to the bit. On CPU jax
rolls the rounds into a loop; written out, they fuse with the update that uses them, which makes the
draw twice as cheap and, for a small model, the whole step three times.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree, UInt32

from stochgrad.core._checks import check_choice
from stochgrad.core._protocols import PRNGKey

NoiseName: TypeAlias = Literal["normal", "discrete"]
Noise: TypeAlias = NoiseName | Callable[[PRNGKey, PyTree], PyTree]
"""Which unit-variance noise a kernel injects: a name, or a function ``(key, tree) -> tree``."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def key_words(key: PRNGKey) -> UInt32[Array, "2"]:
    """Two words that stand for a key of any implementation."""
    if jax.random.key_impl(key) == "threefry2x32":
        return jax.random.key_data(key)
    return jax.random.bits(key, (2,), jnp.uint32)


def numbered(key: PRNGKey, draw: int) -> PRNGKey:
    """The key of a draw: the key itself for the first."""
    return key if draw == 0 else jax.random.fold_in(key, draw)


def threefry(words: UInt32[Array, "2"], high: Array, low: Array) -> tuple[Array, Array]:
    """Threefry-2x32-20 of the counters ``(high, low)`` under the key ``words``."""
    schedule = (words[0], words[1], words[0] ^ words[1] ^ _PARITY)
    x, y = high + schedule[0], low + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def normal(key: PRNGKey, size: int, dtype=jnp.float32, draw: int = 0) -> Float[Array, " size"]:
    """Standard normal variables; draw 0 is ``jax.random.normal(key, (size,), dtype)`` to the bit.

    A draw's number is the high word of the counter. A hash has two words and a variable in single
    precision takes one, so draws 2n and 2n + 1 share their hashes.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.float64):
        return normal(key, size, jnp.float32, draw).astype(dtype)
    if jax.random.key_impl(key) != "threefry2x32":
        return jax.random.normal(numbered(key, draw), (size,), dtype)
    double = dtype == jnp.float64
    low = lax.iota(np.uint32, size)
    high, low = threefry(key_words(key), jnp.full_like(low, draw if double else draw // 2), low)
    if double:
        bits = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        mantissa = (bits >> np.uint64(12)) | np.float64(1).view(np.uint64)
    else:
        word = high if draw % 2 else high ^ low
        mantissa = (word >> np.uint32(9)) | np.float32(1).view(np.uint32)
    one, least = dtype.type(1), np.nextafter(dtype.type(-1), dtype.type(0))
    unit = lax.bitcast_convert_type(mantissa, dtype) - one
    uniform = lax.max(least, unit * (one - least) + least)
    return dtype.type(np.sqrt(2)) * lax.erf_inv(uniform)


_SMALL = 1 - np.sqrt(2 / 7)
_LARGE = 8 - 7 * _SMALL


def mix(word: Array) -> Array:
    """A 32-bit integer hash (the 'lowbias32' constants of C. Wellons)."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x7FEB352D)
    word = (word ^ (word >> np.uint32(15))) * np.uint32(0x846CA68B)
    return word ^ (word >> np.uint32(16))


def discrete(key: PRNGKey, size: int, dtype=jnp.float32, draw: int = 0) -> Float[Array, " size"]:
    r"""Four-point variables with the first five moments of a standard normal.

    $$P(\xi = \pm\sqrt{a}) = \tfrac{7}{16}, \quad P(\xi = \pm\sqrt{8 - 7a}) = \tfrac1{16},
      \qquad a = 1 - \sqrt{2/7},$$

    so that $E\xi^2 = 1$ and $E\xi^4 = 3$ exactly: what a scheme of weak order two needs of its
    noise. A variable takes four bits of a keyed hash of its number, a quarter of what a normal
    variable costs; eight draws share a hash.
    """
    dtype = jnp.dtype(dtype)
    words = key_words(key)
    group, place = divmod(draw, 8)
    bits = mix(mix(lax.iota(np.uint32, size) ^ words[0]) + (words[1] + np.uint32(group)))
    large, small = dtype.type(np.sqrt(_LARGE)), dtype.type(np.sqrt(_SMALL))
    is_large = (bits >> np.uint32(29 - 3 * place)) & np.uint32(7) == 0
    magnitude = jnp.where(is_large, large, small)
    return jnp.where(bits & np.uint32(1 << place) == 0, magnitude, -magnitude)


_GENERATORS: dict[str, Callable[..., Array]] = {"normal": normal, "discrete": discrete}


def noise_like(kind: Noise) -> Callable[..., PyTree]:
    """A function ``(key, tree, draw=0) -> tree`` of unit-variance noise, one draw for all leaves.

    Draws of other numbers under one key are independent.

    Raises:
        ValueError: ``kind`` is not one of ``"normal"`` and ``"discrete"``.
    """
    if callable(kind):
        return lambda key, tree, draw=0: kind(numbered(key, draw), tree)
    return partial(_noise_like, _GENERATORS[check_choice("noise", kind, get_args(NoiseName))])


def _noise_like(generator, key, tree, draw=0):
    leaves, structure = jax.tree.flatten(tree)
    sizes = [leaf.size for leaf in leaves]
    double = any(leaf.dtype == jnp.float64 for leaf in leaves)
    flat = generator(key, sum(sizes), jnp.float64 if double else jnp.float32, draw)
    ends = np.cumsum(sizes)
    noise = [
        flat[end - leaf.size : end].reshape(leaf.shape).astype(leaf.dtype)
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)
