"""The reverse Kullback-Leibler divergence, from draws of the flow."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.distributions import AbstractDistribution
from jax import lax

from stochgrad.core import Gradient, check_choice, check_count, check_number
from stochgrad.flows._draw import draws_of, one_draw, split_flow, unwrap_flow
from stochgrad.flows._objective import (
    LogDensity,
    check_density,
    check_path,
    objective,
    valued,
)
from stochgrad.gradients import leave_one_out, optimal_mixing_weights, path_log_density


def reverse_kl(
    flow: AbstractDistribution,
    log_density: LogDensity,
    estimator: Literal["path", "total", "score", "auto"] | float = "path",
    *,
    num_samples: int = 64,
    condition: Any = None,
) -> Gradient:
    r"""The reverse Kullback-Leibler divergence of a flow from a density.

    $$\mathrm{KL}(q_\theta\|p) + \text{const} = \mathbb E_{q_\theta}[\log q_\theta - \log p],$$

    whose negative, the evidence lower bound, is the value that is climbed. Estimators:

    - ``"path"``: $\frac1n\sum_i P_i$. Its variance vanishes where the flow fits.
    - ``"total"``: the reparameterized gradient of the integrand, with the term
      $-\partial_\theta\log q_\theta(x)|_x$ of mean zero.
    - a number c between: $P_i - c\,\partial_\theta\log q_\theta(x_i)|_{x_i}$; 1 is ``"total"``.
    - ``"auto"``: c of least variance, measured at each step on some of the draws, each draw's from
      the others so that the estimate stays unbiased: ``gradients.optimal_mixing_weights``.
    - ``"score"``: $\nabla\log q$ times the integrand, less a leave-one-out baseline. It does not
      differentiate ``log_density``, and is by far the noisiest. It is the only one that trains
      what decides between draws without a derivative: the weights of a mixture, flowjax's
      ``VmapMixture`` for example, as the flow or as its base. The others refuse such a flow.

    Args:
        flow: A flowjax distribution, drawn from by its forward map.
        log_density: ``x -> scalar`` for one point of the flow's shape, unnormalized.
        estimator: As above.
        num_samples: Draws of a step, n.
        condition: The condition of a conditional flow, one for all draws.

    Raises:
        TypeError: ``flow`` is not a flowjax distribution.
        ValueError: ``log_density`` does not take a point of the flow or does not return a scalar;
            the estimator is unknown, has too few samples, or cannot reach a parameter.

    Returns:
        A gradient whose position is the flow's trainable arrays.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> from flowjax.distributions import Normal
        >>> flow = Normal(jnp.zeros(2))
        >>> objective = stochgrad.flows.reverse_kl(flow, lambda x: -0.5 * jnp.sum((x - 1.0) ** 2))
        >>> fit = stochgrad.fit(objective, jax.random.key(0), 500, learning_rate=0.05)
        >>> fit.model.loc.round(3)
        Array([1., 1.], dtype=float32)
    """
    condition = check_density(flow, log_density, condition)
    count = check_count("num_samples", num_samples)
    coefficient = _coefficient(estimator)
    least = {"auto": 4, "score": 2}.get(str(estimator), 1)
    if count < least:
        raise ValueError(f"estimator={estimator!r} needs num_samples >= {least}, got {count}.")
    if estimator != "score":
        check_path(flow, condition)
    log_densities = jax.vmap(log_density)

    if estimator == "auto":
        return objective(flow, _blended(log_density, count, condition))

    def bound(flow, key):
        x, log_q, score = draws_of(flow, key, count, condition)
        if estimator == "score":
            rewards = lax.stop_gradient(log_densities(x) - log_q)
            surrogate = jnp.mean((rewards - leave_one_out(rewards)) * _at_fixed(x, log_q, score))
            return valued(surrogate, jnp.mean(rewards))
        return jnp.mean(log_densities(x) - path_log_density(x, log_q, score, coefficient))

    return objective(flow, bound)


def _coefficient(estimator) -> float:
    """How much of the score a named estimator keeps, where it is a number."""
    if not isinstance(estimator, str):
        words = "estimator (a number between 0 and 1, or a name)"
        return check_number(words, estimator, zero=True, most=1.0)
    check_choice("estimator", estimator, ("path", "total", "score", "auto"))
    return 1.0 if estimator == "total" else 0.0


def _at_fixed(x, log_q, score):
    """The log density with the gradient that it has at a fixed point."""
    return log_q - path_log_density(x, log_q, score) + lax.stop_gradient(log_q)


def _blended(log_density, count, condition):
    """The bound whose gradient keeps as much of the score as is measured to be best."""

    def bound(flow, key):
        params, static = split_flow(flow)

        def parts(params, key):
            flow = unwrap_flow(eqx.combine(params, static))
            x, log_q, score = one_draw(flow, key, condition)
            along = path_log_density(x, log_q, score)
            return log_density(x) - along, along - log_q

        draw_key, direction_key = jax.random.split(key)
        keys = jax.random.split(draw_key, count)
        path, score = jax.vmap(parts, (None, 0))(params, keys)
        return jnp.mean(path + optimal_mixing_weights(parts, params, keys, direction_key) * score)

    return bound
