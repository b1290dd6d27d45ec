"""The bits of the quantized noise, endlessly to standard output, for a battery of tests.

``python benchmarks/bits.py chain | dieharder -a -g 200``. Four orders in which a run uses them:

- ``chain``: step after step of one chain, 79,510 numbers each;
- ``chains``: a number of 1,024 chains, then the next, as they stand side by side;
- ``steps``: a number at 1,024 steps of a chain, then the next number;
- ``keys``: a number under 1,024 keys whose words are neighbors, then the next.
"""

import sys

import jax
import jax.numpy as jnp
from jax import lax

from stochgrad.core import hashed

ROWS = 1024


def side_by_side(keys, size):
    """Words of many keys, those of one number next to each other."""
    return jax.vmap(lambda key: hashed(key, size), out_axes=1)(keys)


def chain(key, i):
    return hashed(jax.random.fold_in(key, i), 79_510)


def chains(key, i):
    own = jax.random.split(key, ROWS)
    return side_by_side(jax.vmap(lambda k: jax.random.fold_in(k, i))(own), ROWS)


def steps(key, i):
    numbers = i * ROWS + jnp.arange(ROWS)
    return side_by_side(jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers), ROWS)


def neighbors(key, i):
    low = i * ROWS + lax.iota(jnp.uint32, ROWS)
    words = jnp.stack([jnp.zeros_like(low), low], axis=1)
    return side_by_side(jax.random.wrap_key_data(words), ROWS)


ORDERS = {"chain": chain, "chains": chains, "steps": steps, "keys": neighbors}


def main():
    block = jax.jit(ORDERS[sys.argv[1]])
    key = jax.random.key(2026)
    i = 0
    while True:
        try:
            sys.stdout.buffer.write(jax.device_get(block(key, jnp.uint32(i))).tobytes())
        except BrokenPipeError:
            return
        i += 1


if __name__ == "__main__":
    main()
