"""Draws of a flow with their log densities and scores, in one forward pass."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from flowjax.distributions import AbstractDistribution, AbstractTransformed
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from stochgrad._deprecations import key_first
from stochgrad.core import (
    PRNGKey,
    check_array,
    check_count,
    check_finite,
    check_instance,
    check_key,
)
from stochgrad.gradients import freeze, push_score


class FlowDraws(NamedTuple):
    r"""Draws of a flow.

    Attributes:
        value: The draws, of shape (n, \*shape).
        log_density: Log density of the flow at each, of shape (n,).
        score: Its gradient in the draw, of the shape of ``value``; constant for differentiation.
    """

    value: Float[Array, "n ..."]
    log_density: Float[Array, " n"]
    score: Float[Array, "n ..."]


@key_first
def draw_with_score(
    key: PRNGKey, flow: AbstractDistribution, num_samples: int, condition: Any = None
) -> FlowDraws:
    r"""Draw from a flow, with log density and score, without inverting it.

    The score is carried along the forward pass, layer by layer, as ``push_score`` says.

    Args:
        key: A PRNG key.
        flow: A flowjax distribution.
        num_samples: How many draws.
        condition: The condition of a conditional flow, one for all draws.

    Raises:
        TypeError: the key is not a typed PRNG key, or ``flow`` not a flowjax distribution.
        ValueError: the flow holds NaN, or the condition does not fit it.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> from flowjax.distributions import Normal
        >>> draws = stochgrad.flows.draw_with_score(jax.random.key(1), Normal(jnp.ones(3), 2.0), 5)
        >>> bool(jnp.allclose(draws.score, (1.0 - draws.value) / 4.0, atol=1e-5))
        True
    """
    check_key(key)
    count = check_count("num_samples", num_samples)
    condition = check_flow(flow, condition)
    return draws_of(flow, key, count, condition)


def draws_of(flow, key, count: int, condition) -> FlowDraws:
    """The same of a flow that has been looked at."""
    flow = unwrap_flow(flow)

    def one(key):
        return one_draw(flow, key, condition)

    return jax.vmap(one)(jax.random.split(key, count))


def check_flow(flow: Any, condition: Any = None) -> Any:
    """The condition as an array, if there is a flow that can be drawn from and takes it."""
    plain = unwrap_flow(flow)
    for path, leaf in jax.tree_util.tree_leaves_with_path(split_flow(flow)[0]):
        if isinstance(leaf, Tracer):
            continue
        with jax.ensure_compile_time_eval():
            finite = bool(jnp.all(jnp.isfinite(leaf)))
        if not finite:
            raise ValueError(f"flow{jax.tree_util.keystr(path)} holds NaN or infinity.")
    if plain.cond_shape is None:
        if condition is not None:
            raise ValueError("condition must be None for a flow that takes no condition.")
        return None
    if condition is None:
        raise ValueError(f"condition must have shape {plain.cond_shape}, got None.")
    if isinstance(condition, jax.Array):
        if not jnp.issubdtype(condition.dtype, jnp.number):
            raise TypeError(f"condition must be an array of numbers, got dtype {condition.dtype}.")
        if condition.shape != plain.cond_shape:
            raise ValueError(
                f"condition must have shape {plain.cond_shape}, got {condition.shape}."
            )
        if condition.ndim or isinstance(condition, Tracer):
            check_finite("condition", condition)
            return condition
    return jnp.asarray(check_array("condition", condition, shape=plain.cond_shape))


def unwrap_flow(flow: AbstractDistribution) -> AbstractDistribution:
    """A flow with its wrapped parameters computed, and nested transforms side by side."""
    check_instance("flow", flow, AbstractDistribution, "a flowjax distribution")
    flow = paramax.unwrap(flow)
    return flow.merge_transforms() if isinstance(flow, AbstractTransformed) else flow


def one_draw(flow, key, condition) -> FlowDraws:
    """One draw of an unwrapped flow."""
    base = flow.base_dist if isinstance(flow, AbstractTransformed) else flow
    z, log_base = base._sample_and_log_prob(key, condition)
    return pushed_draw(flow, z, log_base, condition)


def pushed_draw(flow, z, log_base, condition) -> FlowDraws:
    """The draw that comes of a draw of the base and its log density there."""
    if not isinstance(flow, AbstractTransformed):
        return FlowDraws(z, log_base, score_of(flow, z, condition))
    base = flow.base_dist
    pushed = push_score(flow.bijection, z, score_of(base, z, condition), condition)
    return FlowDraws(pushed.value, log_base - pushed.log_det, pushed.score)


def score_of(distribution, x, condition):
    """The score of a distribution at a point by differentiation, constant itself."""
    frozen, given = freeze((distribution, condition))
    return jax.grad(lambda x: frozen._log_prob(x, given))(lax.stop_gradient(x))


def parameters(flow: AbstractDistribution) -> Any:
    """The trainable arrays of a flow, everything else None: a position to optimize.

    Args:
        flow: A flowjax distribution.

    Raises:
        TypeError: it is none.
    """
    check_instance("flow", flow, AbstractDistribution, "a flowjax distribution")
    return split_flow(flow)[0]


def split_flow(flow: Any) -> tuple[Any, Any]:
    """A flow's trainable arrays and the rest; ``equinox.combine`` puts them together."""
    return eqx.partition(
        flow,
        eqx.is_inexact_array,
        is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
    )
