"""What all objectives share: a value of a flow becomes a gradient in its trainable arrays."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.distributions import AbstractDistribution
from jax import lax
from jaxtyping import Array, Scalar

from stochgrad.core import (
    Batches,
    Gradient,
    Position,
    Posterior,
    check_callable,
    describe,
    first_line,
)
from stochgrad.flows._draw import check_flow, one_draw, split_flow, unwrap_flow
from stochgrad.flows._strata import one_weighted
from stochgrad.gradients import beyond_the_path, depends, freeze

LogDensity = Callable[[Array], Scalar]
"""``x -> scalar``: an unnormalized log density at one point."""


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
    params, static = split_flow(flow)

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


def check_density(flow, log_density, condition) -> Any:
    """The condition, if a log density takes a point of the flow and returns a number."""
    condition = check_flow(flow, condition)
    plain = unwrap_flow(flow)
    check_callable("log_density", log_density, "a function of a point")
    point = jax.eval_shape(lambda: plain.sample(jax.random.key(0), condition=freeze(condition)))
    try:
        out = jax.eval_shape(log_density, point)
    except Exception as error:
        raise ValueError(
            f"log_density fails on a point of the flow's shape {plain.shape}: do flow and target "
            f"have the same dimension? ({first_line(error)})"
        ) from error
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise TypeError(f"log_density must return a scalar for one point, got {describe(out)}.")
    if out.shape != ():
        raise ValueError(f"log_density must return a scalar for one point, got shape {out.shape}.")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"log_density must return a floating-point number, got {out.dtype}.")
    return condition


def check_path(flow, condition) -> None:
    """Raise unless the path of a draw reaches all that is trained of a flow."""
    _refuse(beyond_reach(flow, condition))


def check_stratified_path(flow, condition) -> None:
    """Raise unless the path of a draw, or a stratum's weight, reaches all that is trained."""
    _refuse(beyond_reach(flow, condition, by_strata=True))


def _refuse(beyond: list[str]) -> None:
    if beyond:
        raise ValueError(
            f"flow: {' and '.join(beyond)} cannot be trained along the path of a draw. As the "
            "weights of a mixture, they decide what is drawn, and only reverse_kl, "
            "alpha_divergence and jensen_shannon reach those, of a VmapMixture that is the flow or "
            "its base: take stochgrad.flows.reverse_kl, with estimator='score' for any other, or "
            "hold them fixed with paramax.non_trainable."
        )


def beyond_reach(flow, condition, by_strata: bool = False) -> list[str]:
    """Names of a flow's arrays that are trained, move its density and not its draws."""
    arrays, rest = eqx.partition(unwrap_flow(flow), eqx.is_inexact_array)

    def draw(arrays):
        flow, key = eqx.combine(arrays, rest), jax.random.key(0)
        if by_strata:
            weights, draws = one_weighted(flow, key, condition)
            return (weights, draws.value), draws.log_density
        x, log_density, _ = one_draw(flow, key, condition)
        return x, log_density

    try:
        names = beyond_the_path(draw, arrays)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"flow cannot be drawn from with a gradient: {first_line(error)}."
        ) from error
    if not names:
        return []
    params, static = split_flow(flow)

    def of(name):
        def leaf(params):
            plain = eqx.filter(unwrap_flow(eqx.combine(params, static)), eqx.is_inexact_array)
            leaves = jax.tree_util.tree_leaves_with_path(plain)
            return [leaf for path, leaf in leaves if jax.tree_util.keystr(path) == name]

        return leaf

    return [name for name in sorted(names) if depends(of(name), params)]
