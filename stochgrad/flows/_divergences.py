"""Bounds and divergences beside Kullback and Leibler's."""

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
    check_stratified_path,
    objective,
    valued,
)
from stochgrad.flows._strata import stratified
from stochgrad.gradients import (
    FDivergence,
    alpha_family,
    jensen_shannon_family,
    path_log_density,
    renyi,
)


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
    condition, score_coef = _checked(flow, log_density, estimator, condition)
    check_path(flow, condition)
    count = check_count("num_samples", num_samples)
    importance = check_count("num_importance", num_importance)
    alpha = check_number("alpha", alpha, zero=True)
    if alpha == 1:
        raise ValueError("alpha must not be 1: that bound is reverse_kl's.")

    def value(flow, key):
        x, log_q, score = draws_of(flow, key, count * importance, condition)
        log_p = jax.vmap(log_density)(x)
        log_w = log_p - path_log_density(x, log_q, score, score_coef)
        log_w = log_w.reshape(count, importance)
        found = renyi(log_w, alpha)
        if estimator == "total":
            return jnp.mean(found.bound)
        along = jnp.sum(lax.stop_gradient(found.coefficient) * log_w, axis=1)
        return jnp.mean(valued(along, found.bound))

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
    family = alpha_family(alpha)
    return _divergence(flow, log_density, family, estimator, num_samples, log_z, condition)


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
    family = jensen_shannon_family()
    return _divergence(flow, log_density, family, estimator, num_samples, log_z, condition)


def _divergence(
    flow, log_density, family: FDivergence, estimator, num_samples, log_z, condition
) -> Gradient:
    r"""Its negative to climb; strata of a mixture count with the derivative of their weights.

    $$-\nabla\sum_k w_k\mathbb E_{q_k}[f(u)]
      = \mathbb E\sum_k\bigl[w_k\,u^2 f''(u)\,P + \nabla w_k\,(u f'(u) - f(u))\bigr].$$
    """
    condition, score_coef = _checked(flow, log_density, estimator, condition)
    check_stratified_path(flow, condition)
    count = check_count("num_samples", num_samples)
    log_z = None if log_z is None else check_real("log_z", log_z)

    def climbed(flow, key):
        strata = stratified(flow, key, count, condition)
        x, log_q, score = strata.draws
        log_w = jax.vmap(log_density)(x) - path_log_density(x, log_q, score, score_coef)
        known = _log_mean(log_w, strata.weight) if log_z is None else log_z
        log_u = log_w - lax.stop_gradient(known)
        f = -strata.mean(family.value(log_u))
        if estimator == "total":
            return f
        still = lax.stop_gradient(log_u)
        along = strata.mean(family.coefficient(still) * log_u, constant=True)
        if strata.weight is not None:
            along = along + strata.mean(family.slope(still) - family.value(still))
        return valued(along, f)

    return objective(flow, climbed)


def _log_mean(log_w, weight):
    weight = None if weight is None else lax.stop_gradient(weight)
    return logsumexp(log_w, b=weight) - jnp.log(float(len(log_w)))


def _checked(flow, log_density, estimator, condition) -> tuple[Any, float]:
    """The condition, and the share of the score in the gradient that was asked for."""
    condition = check_density(flow, log_density, condition)
    check_choice("estimator", estimator, ("path", "total"))
    return condition, 1.0 if estimator == "total" else 0.0
