"""Gradients centered at a point of the chain's own past."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from stochgrad.core import (
    Gradient,
    Position,
    Posterior,
    Shared,
    check_count,
    full_data_mean_traceable,
)
from stochgrad.gradients._control_variate_score import centered
from stochgrad.gradients._minibatch import check_posterior


class SVRGState(NamedTuple):
    """State of the gradient.

    Attributes:
        batch_state: The stream's state.
        anchor: Where the gradient is centered.
        whole: Value and gradient there, on all data.
        count: Steps since the anchor was set; all chains move theirs at once.
    """

    batch_state: Any
    anchor: Position
    whole: PyTree
    count: Shared


def svrg(posterior: Posterior, *, period: int | None = None) -> Gradient:
    r"""The minibatch gradient, centered at an anchor that moves along with the chain.

    $$\hat g(\theta) = \hat g_b(\theta) - \hat g_b(\tilde\theta) + \nabla\log\pi(\tilde\theta)$$

    with one minibatch b in both estimates (Johnson & Zhang, NeurIPS 2013; for sampling Dubey et
    al., NeurIPS 2016). Every ``period`` steps the anchor $\tilde\theta$ becomes the chain's
    position, at the cost of one pass over the data. It is the control variate for those who have
    no center: unbiased given the anchor, the better the shorter the period. With the default, one
    epoch, a step costs three minibatch gradients on average.

    Args:
        posterior: A posterior and its stream of minibatches.
        period: Steps between two anchors; by default an epoch, $\lceil N/B \rceil$.

    Raises:
        TypeError: ``posterior`` is not a posterior.
        ValueError: the period is not a positive integer.
    """
    check_posterior("svrg", posterior)
    batches = posterior.batches
    if batches.stream is not None:
        raise ValueError(
            "posterior: svrg passes over all data within the loop, which streamed data do not "
            "allow: take control_variate with the center that stochgrad.find_center finds."
        )
    if batches.anchored is not None:
        raise ValueError(
            "posterior: svrg passes over the data of all owners each time its anchor moves, which "
            "is what visits to one at a time are to save: take control_variate with the mode that "
            "stochgrad.federated.find_reference finds."
        )
    period = batches.epoch if period is None else check_count("period", period)
    value_and_gradient = jax.value_and_grad(posterior.log_density)
    whole = full_data_mean_traceable(posterior, value_and_gradient)

    def anchored(position: Position):
        return position, whole(position)

    def init(key, position: Position) -> SVRGState:
        count = Shared(jnp.zeros((), jnp.int32))
        return SVRGState(batches.init(key), *anchored(position), count)

    def next(key, position: Position, state: SVRGState):
        batch, batch_state = batches.next(state.batch_state)
        count = state.count.value
        anchor, whole = lax.cond(
            count == period,
            anchored,
            lambda _: (state.anchor, state.whole),
            position,
        )

        following = jnp.where(count == period, 1, count + 1).astype(np.int32)
        score = centered(value_and_gradient, batch, anchor, whole)
        return score, SVRGState(batch_state, anchor, whole, Shared(following))

    return Gradient(init, next, posterior)
