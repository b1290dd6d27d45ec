"""What all objectives share: a value of a flow becomes a gradient in its trainable arrays."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.distributions import AbstractDistribution
from jax import lax
from jaxtyping import Array, Scalar

from stochgrad.core import Batches, Gradient, Position, Posterior
from stochgrad.flows._draw import split, unwrapped
from stochgrad.gradients import freeze

LogDensity = Callable[[Array], Scalar]
"""``x -> scalar``: an unnormalised log density at one point."""


def objective(
    flow: AbstractDistribution,
    value: Callable[[Any, Any], Scalar],
    batches: Batches | None = None,
) -> Gradient:
    """A value to climb as a gradient in a flow's trainable arrays.

    Args:
        flow: Where to start.
        value: ``(flow, key) -> scalar``, or ``(flow, batch) -> scalar`` where batches are given.
        batches: A stream of minibatches.
    """
    params, static = split(flow)

    def climb(position, drawn):
        return value(eqx.combine(position, static), drawn)

    def next(key, position, state):
        drawn, state = (key, state) if batches is None else batches.next(state)

        def score(position):
            return jax.value_and_grad(climb)(position, drawn)

        return score, state

    def initial(key):
        return params

    def init(key, position):
        return () if batches is None else batches.init(key)

    def model(position: Position):
        return eqx.combine(position, static)

    posterior = None if batches is None else Posterior(climb, batches, initial)
    return Gradient(init, next, posterior, initial, model)


def valued(surrogate, value):
    """The gradient of one and the value of the other."""
    return surrogate + lax.stop_gradient(value - surrogate)


def check_density(flow, log_density, condition) -> None:
    """Raise unless a log density takes a point of a flow and returns a number."""
    plain = unwrapped(flow)
    if not callable(log_density):
        raise TypeError(f"log_density must be a function of a point, got {log_density!r}.")
    given = None if condition is None else jnp.shape(condition)
    if plain.cond_shape is not None and given != plain.cond_shape:
        raise ValueError(f"condition must have shape {plain.cond_shape}, got {given}.")
    point = jax.eval_shape(lambda: plain.sample(jax.random.key(0), condition=freeze(condition)))
    try:
        out = jax.eval_shape(log_density, point)
    except (TypeError, ValueError, IndexError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"log_density fails on a point of the flow's shape {plain.shape}: do flow and target "
            f"have the same dimension? ({reason})"
        ) from error
    if getattr(out, "shape", None) != ():
        raise ValueError(
            "log_density must return a scalar for one point, got shape "
            f"{getattr(out, 'shape', type(out).__name__)}."
        )
