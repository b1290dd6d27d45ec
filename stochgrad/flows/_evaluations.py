"""A density without data as a target of kernels, and how often a kernel evaluates it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from stochgrad.core import Kernel, Posterior, hoisted_jit, posterior
from stochgrad.flows._objective import LogDensity


def full_target(log_density: LogDensity, places: Float[Array, "n ..."]) -> Posterior:
    """A density without data as a posterior of one row that says nothing."""
    dtype = jax.eval_shape(log_density, places[0]).dtype
    return posterior(
        log_density, lambda x, row: jnp.zeros_like(row), jnp.zeros(1, dtype), order="full"
    )


def evaluations_per_step(
    chains: Callable[[Posterior], Kernel],
    log_density: LogDensity,
    places: Float[Array, "n ..."],
    steps: int,
) -> float:
    """Evaluations of a log density in a step of a kernel, counted over some steps of a chain."""
    count = 0

    def seen(_):
        nonlocal count
        count += 1

    def counted(x):
        jax.debug.callback(seen, x.reshape(-1)[0])
        return log_density(x)

    kernel = chains(full_target(counted, places))

    def many(key, position):
        state = kernel.init(position, key)
        keys = jax.random.split(key, steps)
        return lax.scan(lambda state, key: (kernel.step(key, state)[0], None), state, keys)[0]

    count = 0  # not what was seen while tracing
    jax.block_until_ready(hoisted_jit(many)(jax.random.key(0), places[0]).position)
    jax.effects_barrier()
    return count / steps
