"""Minibatch gradients centred at a fixed point."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import (
    Gradient,
    Position,
    Posterior,
    clients_of,
    for_each_client,
    likelihood_sum,
    of_prior,
    on_all_data,
    visit_in,
)
from stochgrad.gradients._centred import centred
from stochgrad.gradients._mode_check import check_center


def control_variate(posterior: Posterior, center: Any) -> Gradient:
    r"""The minibatch gradient with the noise it has at a fixed point taken out.

    $$\hat g(\theta) = \hat g_b(\theta) - \hat g_b(\theta_0) + \nabla\log\pi(\theta_0),$$

    with one and the same minibatch $b$ in both estimates (Baker, Fearnhead, Fox & Nemeth, Stat.
    Comput. 2019). Unbiased for any centre. Its variance falls with the squared distance from
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
        ValueError: ``stochgrad.find_center`` reports that its center is no mode; its bare position
            is taken as it is.
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
    anchor: Position = jax.tree.map(jnp.asarray, check_center("center", center))
    if batches.clients is None:
        whole = on_all_data(posterior, value_and_gradient)(anchor)
    else:
        of_client = _by_client(posterior, value_and_gradient, anchor)

    def init(key, position):
        return batches.init(key)

    def next(key, position, state):
        batch, state = batches.next(state)
        there = (
            whole
            if batches.clients is None
            else jax.tree.map(lambda x: x[visit_in(state).client], of_client)
        )
        return centred(value_and_gradient, batch, anchor, there), state

    return Gradient(init, next, posterior)


def _by_client(posterior: Posterior, function: Callable, anchor: Position) -> Any:
    """A function of a batch, on the prior and all data of each client over its share."""
    shares = clients_of(posterior).shares.astype(np.float32)
    own = for_each_client(posterior, likelihood_sum(posterior, function), anchor)
    prior = of_prior(posterior, function)(anchor)

    def together(own, prior):
        over = jnp.asarray(shares.reshape(-1, *(1,) * (own.ndim - 1)), own.dtype)
        return prior[None] + own / over

    return jax.tree.map(together, own, prior)
