r"""Bounds and divergences beside Kullback and Leibler's.

All path gradients here have one form. With draws $x_i = T_\theta(z_i)$ of the flow, log weights
$\log w_i = \log p(x_i) - \log q_\theta(x_i)$ and

$$P_i = (\partial_\theta x_i)^\top\,\nabla_x\log w\,(x_i),$$

the path gradient of $\log w_i$, each climbs $\sum_i c_i P_i$ with coefficients of its own,
functions of the weights alone.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flowjax.distributions import AbstractDistribution
from jax import lax
from jax.scipy.special import logsumexp

from stochgrad.core import Gradient, check_choice, check_count, check_number, check_real
from stochgrad.flows._draw import draws_of
from stochgrad.flows._objective import (
    LogDensity,
    check_density,
    check_path,
    objective,
    valued,
)
from stochgrad.gradients import path_log_density


def renyi_bound(
    flow: AbstractDistribution,
    log_density: LogDensity,
    alpha: float = 0.0,
    estimator: Literal["path", "total"] = "path",
    *,
    num_importance: int = 8,
    num_samples: int = 8,
    condition: Any = None,
) -> Gradient:
    r"""Rényi's variational bound; the importance-weighted bound at $\alpha = 0$.

    $$\mathcal L_\alpha = \frac{1}{1-\alpha}\,\mathbb E\log\frac1K\sum_{i=1}^K w_i^{1-\alpha},
      \qquad
      \nabla\mathcal L_\alpha = \mathbb E\sum_i\bigl[\alpha\tilde w_i + (1-\alpha)\tilde w_i^2\bigr]
      P_i, \quad \tilde w = \mathrm{softmax}((1-\alpha)\log w).$$

    The second is the doubly reparameterized gradient [Tucker et al. 2019], unbiased; to stop the
    parameters in $\log q$ without those coefficients is not. Negative orders bound from above in
    the limit of many draws only, and a few draws can be made to look better by running away; for
    the chi-square divergence there is ``alpha_divergence``.

    Args:
        flow: A flowjax distribution.
        log_density: ``x -> scalar``, unnormalized.
        alpha: Order, not negative; 1 is the evidence lower bound itself, see ``reverse_kl``.
        estimator: ``"path"``, or ``"total"`` for the plain derivative.
        num_importance: Draws of one bound, K.
        num_samples: Bounds to average.
        condition: The condition of a conditional flow.

    Raises:
        ValueError: as ``reverse_kl``'s path gradient; ``alpha`` is 1, negative or not finite.
    """
    log_weights = _log_weights(flow, log_density, estimator, condition)
    count = check_count("num_samples", num_samples)
    importance = check_count("num_importance", num_importance)
    alpha = check_number("alpha", alpha, zero=True)
    if alpha == 1:
        raise ValueError("alpha must not be 1: that bound is reverse_kl's.")

    def value(flow, key):
        log_w = log_weights(flow, key, count * importance).reshape(count, importance)
        powered = (1.0 - alpha) * log_w
        bound = (logsumexp(powered, axis=1) - jnp.log(float(importance))) / (1.0 - alpha)
        if estimator == "path":
            share = lax.stop_gradient(jax.nn.softmax(powered, axis=1))
            coefficients = alpha * share + (1.0 - alpha) * share**2
            bound = valued(jnp.sum(coefficients * log_w, axis=1), bound)
        return jnp.mean(bound)

    return objective(flow, value)


def alpha_divergence(
    flow: AbstractDistribution,
    log_density: LogDensity,
    alpha: float = 2.0,
    estimator: Literal["path", "total"] = "path",
    *,
    num_samples: int = 64,
    log_z: float | None = None,
    condition: Any = None,
) -> Gradient:
    r"""An $\alpha$-divergence; half the chi-square divergence at $\alpha = 2$.

    $$D_\alpha = \frac{1}{\alpha(\alpha-1)}\bigl(\mathbb E_q[u^\alpha] - 1\bigr),
      \qquad u = \frac{p}{Z q}, \qquad -\nabla D_\alpha = \mathbb E_q[u^\alpha P],$$

    with limits $\mathrm{KL}(q\|p)$ at 0 and $\mathrm{KL}(p\|q)$ at 1. The larger $\alpha$, the more
    it covers and the heavier the tail of its weights: with an unfit flow a few draws decide.

    Args:
        flow: A flowjax distribution.
        log_density: ``x -> scalar``, unnormalized.
        alpha: Order, not negative.
        estimator: ``"path"``, or ``"total"`` for the plain derivative.
        num_samples: Draws of a step.
        log_z: Log of the normalizer, if known. Otherwise it is estimated by the same draws, which
            biases gradients by the order of one over their number.
        condition: The condition of a conditional flow.

    Raises:
        ValueError: as ``reverse_kl``'s path gradient; ``alpha`` is negative.
    """
    alpha = check_number("alpha", alpha, zero=True)

    def value(log_u):
        if alpha == 0:
            return -log_u
        if alpha == 1:
            return jnp.exp(log_u) * log_u
        return (jnp.exp(alpha * log_u) - 1.0) / (alpha * (alpha - 1.0))

    def coefficient(log_u):
        return jnp.exp(alpha * log_u)

    return _divergence(
        flow, log_density, value, coefficient, estimator, num_samples, log_z, condition
    )


def jensen_shannon(
    flow: AbstractDistribution,
    log_density: LogDensity,
    estimator: Literal["path", "total"] = "path",
    *,
    num_samples: int = 64,
    log_z: float | None = None,
    condition: Any = None,
) -> Gradient:
    r"""The Jensen-Shannon divergence, by draws of the flow alone.

    $$D = \mathbb E_q\Bigl[\tfrac12 u\log u - \tfrac12(1 + u)\log\frac{1 + u}{2}\Bigr],
      \qquad u = \frac{p}{Z q}, \qquad
      -\nabla D = \mathbb E_q\Bigl[\frac{u}{2(1 + u)}\,P\Bigr].$$

    Its coefficients are bounded, whatever the weights.

    Args:
        flow: A flowjax distribution.
        log_density: ``x -> scalar``, unnormalized.
        estimator: ``"path"``, or ``"total"`` for the plain derivative.
        num_samples: Draws of a step.
        log_z: As in ``alpha_divergence``.
        condition: The condition of a conditional flow.

    Raises:
        ValueError: as ``reverse_kl``'s path gradient.
    """

    def value(log_u):
        mixed = jnp.logaddexp(log_u, jnp.zeros_like(log_u)) - jnp.log(2.0).astype(log_u.dtype)
        return 0.5 * (jnp.exp(log_u) * (log_u - mixed) - mixed)

    def coefficient(log_u):
        return 0.5 * jax.nn.sigmoid(log_u)

    return _divergence(
        flow, log_density, value, coefficient, estimator, num_samples, log_z, condition
    )


def _divergence(
    flow, log_density, value, coefficient, estimator, num_samples, log_z, condition
) -> Gradient:
    r"""$\mathbb E_q[f(u)]$, whose negative gradient is $\mathbb E_q[u^2 f''(u)\,P]$.

    For the reparameterized gradient of $f(u)$ is $f'(u)\,u\,(P - \partial_\theta\log q|_x)$, and
    by parts $\mathbb E_q[g\,\partial_\theta\log q|_x]$ is the path gradient of $g = f'(u)\,u$.
    """
    log_weights = _log_weights(flow, log_density, estimator, condition)
    count = check_count("num_samples", num_samples)
    log_z = None if log_z is None else check_real("log_z", log_z)

    def climbed(flow, key):
        log_w = log_weights(flow, key, count)
        known = logsumexp(log_w) - jnp.log(float(count)) if log_z is None else log_z
        log_u = log_w - lax.stop_gradient(known)
        f = -jnp.mean(value(log_u))
        if estimator == "total":
            return f
        return valued(jnp.mean(lax.stop_gradient(coefficient(log_u)) * log_u), f)

    return objective(flow, climbed)


def _log_weights(flow, log_density, estimator, condition):
    """``(flow, key, count) -> log weights`` of draws, with the gradient that was asked for."""
    condition = check_density(flow, log_density, condition)
    check_choice("estimator", estimator, ("path", "total"))
    check_path(flow, condition)
    score_coef = 1.0 if estimator == "total" else 0.0

    def log_weights(flow, key, count):
        x, log_q, score = draws_of(flow, key, count, condition)
        return jax.vmap(log_density)(x) - path_log_density(x, log_q, score, score_coef)

    return log_weights
