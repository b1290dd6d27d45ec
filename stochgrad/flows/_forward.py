"""The forward Kullback-Leibler divergence, from samples of the density."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flowjax.bijections import Invert
from flowjax.distributions import AbstractDistribution, AbstractTransformed
from jax import lax
from jaxtyping import Array, Float

from stochgrad.core import (
    Gradient,
    as_data,
    check_choice,
    check_finite,
    data_batches,
    describe,
    first_line,
)
from stochgrad.flows._draw import check_flow, unwrap_flow
from stochgrad.flows._objective import objective
from stochgrad.gradients import push_score


def forward_kl(
    flow: AbstractDistribution,
    samples: Float[Array, "n ..."],
    score_of_target: Callable[[Array], Array] | Float[Array, "n ..."] | None = None,
    estimator: Literal["path", "ml"] = "path",
    *,
    batch_size: int | None = None,
    order: Any = "reshuffled",
    condition: Any = None,
) -> Gradient:
    r"""The forward Kullback-Leibler divergence, from samples of the density.

    $$\mathrm{KL}(p\|q_\theta) + \text{const} = -\mathbb E_p[\log q_\theta],$$

    whose negative, the mean log likelihood of the samples, is the value that is climbed.
    ``"ml"`` is its gradient, maximum likelihood. ``"path"`` also needs the score of the density:
    pulled back to the base space the divergence is a reverse one, of the pulled-back density from
    the base, and with $z = T_\theta^{-1}(x)$, $x \sim p$

    $$-\nabla_\theta\mathrm{KL} = \mathbb E_p\bigl[(\partial_\theta z)^\top
      \nabla_z\log(q_0/p_{\theta,0})(z)\bigr].$$

    It vanishes sample by sample where the flow fits, and does not pull the flow towards the few
    samples there are [Vaitl et al. 2024, section 4]. It is a regularizer, not the gradient of the
    samples' log likelihood. The flow's inverse should be the cheap direction (flowjax:
    ``invert=True``).

    Args:
        flow: A flowjax distribution.
        samples: Samples of the density, of shape (n, \*shape); converged MCMC draws will do.
        score_of_target: Score of the density: ``x -> score`` for one point, as
            ``jax.grad(log_density)`` is, or its values at the samples. It is evaluated once.
        estimator: ``"path"`` or ``"ml"``.
        batch_size: Samples of a minibatch; all of them by default.
        order: Order of the minibatches, as in ``stochgrad.posterior``.
        condition: The condition of a conditional flow, one for all samples.

    Raises:
        TypeError: ``flow`` is not a flowjax distribution; samples or scores are no arrays of
            numbers.
        ValueError: samples or scores do not fit the flow or are not finite; ``"path"`` without
            scores, or for a flow without layers; the batch size does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> from flowjax.distributions import Normal
        >>> x = 1.0 + jax.random.normal(jax.random.key(0), (20, 2))
        >>> objective = stochgrad.flows.forward_kl(Normal(jnp.zeros(2)), x, lambda x: 1.0 - x)
        >>> fit = stochgrad.fit(jax.random.key(0), objective, 1000, learning_rate=0.05)
        >>> fit.model.loc.round(1)  # not the mean of the twenty samples, which is off by 0.2
        Array([1., 1.], dtype=float32)
    """
    check_choice("estimator", estimator, ("path", "ml"))
    condition = check_flow(flow, condition)
    plain = unwrap_flow(flow)
    samples = points("samples", samples)
    if samples.shape[1:] != plain.shape:
        raise ValueError(
            f"samples must have shape (n, {', '.join(map(str, plain.shape))}) for a flow of shape "
            f"{plain.shape}, got {samples.shape}."
        )
    if len(samples) == 0:
        raise ValueError("samples must be one or more, got none.")
    check_finite("samples", samples)
    data: Any = (samples,)
    if estimator == "path":
        if score_of_target is None:
            raise ValueError(
                "estimator='path' needs score_of_target, the score of the density at the samples; "
                "without it there is estimator='ml'."
            )
        if not isinstance(plain, AbstractTransformed):
            raise ValueError("estimator='path' needs a flow with layers, got a base distribution.")
        scores = _scores_at(samples, score_of_target)
        check_finite("score_of_target at the samples", scores)
        data = (samples, scores)
    batches = data_batches(data, batch_size, "full" if batch_size is None else order, "blocks")
    size = samples.shape[0]

    def value(flow, batch):
        flow = unwrap_flow(flow)
        each = jax.vmap(lambda *row: _log_likelihood(flow, condition, *row))(*batch.data)
        return jnp.sum(batch.weight.astype(each.dtype) * each) / size

    return objective(flow, value, batches)


def points(name: str, value: Any) -> jax.Array:
    """What people hold points in as one floating-point array."""
    value = as_data(value, name)
    if not isinstance(value, jax.Array) and not hasattr(value, "dtype"):
        raise TypeError(f"{name} must be one array, got {describe(value)}.")
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or array.dtype == bool:
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}.")
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(float)


def _scores_at(samples: jax.Array, score_of_target: Any) -> jax.Array:
    if callable(score_of_target):
        try:
            scores = jax.jit(jax.vmap(score_of_target))(samples)
        except Exception as error:
            raise ValueError(
                f"score_of_target fails on a point of shape {samples.shape[1:]}: "
                f"{first_line(error)}."
            ) from error
        if not isinstance(scores, jax.Array):
            raise TypeError(f"score_of_target must return one array, got {describe(scores)}.")
    else:
        scores = score_of_target
    scores = points("score_of_target", scores)
    if scores.shape != samples.shape:
        raise ValueError(
            f"score_of_target must give scores of the samples' shape {samples.shape}, got "
            f"{scores.shape}."
        )
    return scores.astype(samples.dtype)


def _log_likelihood(flow, condition, x, score=None):
    """Log likelihood of one sample; with the target's score it has the path gradient."""
    if score is None:
        return flow._log_prob(x, condition)
    base = flow.base_dist
    pushed = push_score(Invert(flow.bijection), x, score, condition)
    z = pushed.value
    log_base = base._log_prob(z, condition)
    still = lax.stop_gradient(z)
    falling = jnp.sum(pushed.score * (z - still))
    return log_base - falling + lax.stop_gradient(pushed.log_det)
