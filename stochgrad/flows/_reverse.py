"""The reverse Kullback-Leibler divergence, from draws of the flow."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flowjax.distributions import AbstractDistribution
from jax import lax

from stochgrad.core import Gradient, check_choice, check_count, check_number
from stochgrad.flows._draw import draws_of, unwrap_flow
from stochgrad.flows._objective import (
    LogDensity,
    check_density,
    check_stratified_path,
    objective,
    valued,
)
from stochgrad.flows._strata import mixture_of, stratified
from stochgrad.gradients import leave_one_out, leave_one_out_coefficients, path_log_density


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
    - ``"auto"``: c of least variance between the gradients in x, each draw's from the others so
      that the estimate stays unbiased: ``gradients.leave_one_out_coefficients``. It costs no
      further derivative.
    - ``"score"``: $\nabla\log q$ times the integrand, less a leave-one-out baseline. It does not
      differentiate ``log_density``, and is by far the noisiest.

    Of a mixture, flowjax's ``VmapMixture`` as the flow or as its base, all but ``"score"`` draw
    every component, ``num_samples`` divided by their number and rounded up, and weight the draws:
    $\sum_k w_k\,g_k$, the gradient of the weights included. What else decides between draws has no
    derivative, and all but ``"score"`` refuse to train it.

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
        >>> fit = stochgrad.fit(jax.random.key(0), objective, 500, learning_rate=0.05)
        >>> fit.model.loc.round(3)
        Array([1., 1.], dtype=float32)
    """
    condition = check_density(flow, log_density, condition)
    count = check_count("num_samples", num_samples)
    coefficient = _coefficient(estimator)
    width = _width(flow) if estimator != "score" else 1
    least = {"auto": 4 * width, "score": 2}.get(str(estimator), 1)
    if count < least:
        what = f"estimator={estimator!r}" + (f" with {width} components" if width > 1 else "")
        raise ValueError(f"{what} needs num_samples >= {least}, got {count}.")
    if estimator != "score":
        check_stratified_path(flow, condition)
    log_densities = jax.vmap(log_density)

    def by_score(flow, key):
        x, log_q, score = draws_of(flow, key, count, condition)
        rewards = lax.stop_gradient(log_densities(x) - log_q)
        surrogate = jnp.mean((rewards - leave_one_out(rewards)) * _at_fixed(x, log_q, score))
        return valued(surrogate, jnp.mean(rewards))

    def along_paths(flow, key):
        strata = stratified(flow, key, count, condition)
        x, log_q, score = strata.draws
        return strata.mean(log_densities(x) - path_log_density(x, log_q, score, coefficient))

    def mixed(flow, key):
        strata = stratified(flow, key, count, condition)
        x, log_q, score = strata.draws
        still = lax.stop_gradient(x)
        log_p, up = jax.vmap(jax.value_and_grad(log_density))(still)
        c = leave_one_out_coefficients(strata.rows(up), strata.rows(score))
        log_p = log_p + jnp.sum((up * (x - still)).reshape(len(x), -1), axis=1)
        log_q = path_log_density(x, log_q, score, jnp.repeat(c, strata.width))
        return strata.mean(log_p - log_q)

    named = {"score": by_score, "auto": mixed}
    return objective(flow, named.get(str(estimator), along_paths))


def _width(flow) -> int:
    """Draws of a row: components of the mixture that a flow is or starts from, else one."""
    mixture = mixture_of(unwrap_flow(flow))
    return 1 if mixture is None else len(mixture.log_normalized_weights)


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
