"""Minibatch gradients centered at a fixed point."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from stochgrad.core import (
    Anchored,
    Gradient,
    Position,
    Posterior,
    check_position,
    first_line,
    full_data_mean,
)
from stochgrad.gradients._control_variate_score import centered
from stochgrad.gradients._like import check_like
from stochgrad.gradients._minibatch import check_posterior
from stochgrad.gradients._mode_check import check_center


def control_variate(posterior: Posterior, center: Any) -> Gradient:
    r"""The minibatch gradient with the noise it has at a fixed point taken out.

    $$\hat g(\theta) = \hat g_b(\theta) - \hat g_b(\theta_0) + \nabla\log\pi(\theta_0),$$

    with one and the same minibatch $b$ in both estimates (Baker, Fearnhead, Fox & Nemeth, Stat.
    Comput. 2019). Unbiased for any center. Its variance falls with the squared distance from
    $\theta_0$, so that near the posterior's mode it is smaller than the plain estimate's by about
    the ratio of parameters to rows; far from it, it may be larger. A step costs two minibatch
    gradients, the factory one pass over the data.

    Of data that clients own, the client that is visited knows its own part only: what it puts back
    is $\nabla\log p(\theta_0) + \nabla\log p(x_s \mid \theta_0) / f_s$.

    Args:
        posterior: A posterior and its stream of minibatches.
        center: $\theta_0$, a position near the mode, or what ``stochgrad.find_center`` found.

    Raises:
        TypeError: ``posterior`` is not a posterior, or there is no center.
        ValueError: the center, or the gradient there, is not finite, or the center is not a
            position of this posterior: of another structure, or with arrays of other shapes; or
            ``stochgrad.find_center`` reports that it is no mode (its bare position is taken).
    """
    check_posterior("control_variate", posterior)
    if center is None:
        raise TypeError(
            "control_variate needs a center: stochgrad.find_center(posterior, key) finds one; "
            "stochgrad.svrg and stochgrad.saga do without."
        )
    batches = posterior.batches
    value_and_gradient = jax.value_and_grad(posterior.log_density)
    anchor = _anchor(posterior, check_center("center", center))
    try:
        whole = (batches.anchored or _on_all_data)(posterior, value_and_gradient, anchor)
    except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        raise ValueError(f"center does not fit the posterior: {first_line(error)}.") from error
    _check_whole(whole.values)

    def init(key, position):
        check_like("center", anchor, position, "the chain's position")
        return batches.init(key)

    def next(key, position, state):
        check_like("center", anchor, position, "the chain's position")
        batch, state = batches.next(state)
        return centered(value_and_gradient, batch, anchor, whole.at(state)), state

    return Gradient(init, next, posterior)


def _on_all_data(posterior: Posterior, function: Callable, point: Position) -> Anchored:
    value = full_data_mean(posterior, function)(point)
    return Anchored(value, lambda state: value)


def _anchor(posterior: Posterior, center: Any) -> Position:
    """The center as arrays, if it is a position of the posterior."""
    with jax.ensure_compile_time_eval():
        check_position(center, "center")
    anchor: Position = jax.tree.map(jnp.asarray, center)
    if posterior.initial is None:
        return anchor
    like = jax.eval_shape(posterior.initial, jax.random.key(0))
    check_like("center", anchor, like)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), anchor, like)


def _check_whole(whole: Any) -> None:
    value, gradient = whole
    if isinstance(value, Tracer):
        return
    if not jnp.all(jnp.isfinite(value)):
        raise ValueError(f"center must be where the log density is finite, got {jnp.min(value)}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        if not jnp.all(jnp.isfinite(leaf)):
            where = "center" + jax.tree_util.keystr(path)
            raise ValueError(f"{where}: the gradient of the log density there is not finite.")
