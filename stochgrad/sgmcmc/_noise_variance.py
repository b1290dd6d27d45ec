"""Gradient noise estimated on line, and what is left to inject."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import Position, number
from stochgrad.integrators import over

_MEMORY = 1000


def following_variance(variance: Position, gradient: Position, previous: Position, count):
    r"""The running estimate of the gradient noise's variance after one more step.

    Two successive estimates are taken at nearly one position, so half their squared difference
    estimates V; the first 1,000 are averaged, later ones forgotten at that rate.
    """
    weight = 1 / jnp.clip(jnp.asarray(count, float), 1, _MEMORY)
    weight = jnp.where(count > 0, weight, 0)

    def follow(v, g, before):
        return v + weight.astype(v.dtype) * ((g - before) ** 2 / 2 - v)

    return jax.tree.map(follow, variance, gradient, previous)


def effective_temperature(temperature: Any, friction: Any, noise: Any) -> Any:
    r"""$\max(T - \hat B / C, 0)$: the temperature of the noise still to inject."""
    if any(isinstance(x, jax.Array) for x in (temperature, friction, noise)):
        dtype = jnp.result_type(noise) if isinstance(noise, jax.Array) else float
        return jnp.maximum(number(temperature, dtype) - over(number(noise, dtype), friction), 0)
    return np.maximum(temperature - noise / np.asarray(friction), 0.0)
