"""Minibatch gradients centred at a fixed point."""

from typing import Any

import jax
import jax.numpy as jnp

from stochgrad.core import Gradient, Position, Posterior, on_all_data
from stochgrad.gradients._centred import centred


def control_variate(posterior: Posterior, center: Any) -> Gradient:
    r"""The minibatch gradient with the noise it has at a fixed point taken out.

    $$\hat g(\theta) = \hat g_b(\theta) - \hat g_b(\theta_0) + \nabla\log\pi(\theta_0),$$

    with one and the same minibatch $b$ in both estimates (Baker, Fearnhead, Fox & Nemeth, Stat.
    Comput. 2019). Unbiased for any centre. Its variance falls with the squared distance from
    $\theta_0$, so that near the posterior's mode it is smaller than the plain estimate's by about
    the ratio of parameters to rows; far from it, it may be larger. A step costs two minibatch
    gradients, the factory one pass over the data.

    Args:
        posterior: A posterior and its stream of minibatches.
        center: $\theta_0$, a position near the mode, or what ``stochgrad.find_center`` found.

    Raises:
        TypeError: ``posterior`` is not a posterior, or there is no centre.
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(f"control_variate needs a Posterior, got {type(posterior).__name__}.")
    if center is None:
        raise TypeError(
            "control_variate needs a center: stochgrad.find_center(posterior, key) finds one; "
            "stochgrad.svrg and stochgrad.saga do without."
        )
    batches = posterior.batches
    value_and_gradient = jax.value_and_grad(posterior.log_density)
    anchor: Position = jax.tree.map(jnp.asarray, getattr(center, "position", center))
    whole = on_all_data(posterior, value_and_gradient)(anchor)

    def init(key, position):
        return batches.init(key)

    def next(key, position, state):
        batch, state = batches.next(state)
        return centred(value_and_gradient, batch, anchor, whole), state

    return Gradient(init, next, posterior)
