"""Minibatch gradients centred at a fixed point."""

import jax
import jax.numpy as jnp

from stochgrad.core import Gradient, Position, Posterior, compiled


def control_variate(posterior: Posterior, center: Position) -> Gradient:
    r"""The minibatch gradient with the noise it has at a fixed point taken out.

    $$\hat g(\theta) = \hat g_b(\theta) - \hat g_b(\theta_0) + \nabla\log\pi(\theta_0),$$

    with one and the same minibatch $b$ in both estimates (Baker, Fearnhead, Fox & Nemeth, Stat.
    Comput. 2019). Unbiased for any centre. Its variance falls with the squared distance from
    $\theta_0$, so that near the posterior's mode it is smaller than the plain estimate's by about
    the ratio of parameters to rows; far from it, it may be larger. A step costs two minibatch
    gradients, the factory one pass over the data.

    Args:
        posterior: A posterior and its stream of minibatches.
        center: $\theta_0$, a position near the mode; see ``stochgrad.find_center``.

    Raises:
        TypeError: ``posterior`` is not a posterior.
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(f"control_variate needs a Posterior, got {type(posterior).__name__}.")
    batches = posterior.batches
    value_and_gradient = jax.value_and_grad(posterior.log_density)
    center = jax.tree.map(jnp.asarray, center)
    value_there, gradient_there = compiled(lambda c: value_and_gradient(c, batches.full))(center)

    def init(key, position):
        return batches.init(key)

    def next(key, position, state):
        batch, state = batches.next(state)

        def score(position):
            value, g = value_and_gradient(position, batch)
            value_center, g_center = value_and_gradient(center, batch)
            centred = jax.tree.map(lambda g, c, full: g - c + full, g, g_center, gradient_there)
            return value - value_center + value_there, centred

        return score, state

    return Gradient(init, next, posterior)
