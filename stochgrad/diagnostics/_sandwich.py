"""A sampler whose stationary covariance is the sandwich, robust to a model that is wrong."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Gradient,
    Observations,
    Posterior,
    PRNGKey,
    Target,
    by_name,
    check_key,
    check_number,
    direction_name,
    hoisted_jit,
    some_series,
    tree_size,
)
from stochgrad.diagnostics._around_center import check_fits, gradient_residuals, hessian_times
from stochgrad.diagnostics._inputs import gradient_of
from stochgrad.diagnostics._law import noise_order
from stochgrad.diagnostics._mass_frame import positive_matrix, square_matrix
from stochgrad.diagnostics._stationary import NoiseOrder, stationary_moments
from stochgrad.gradients import minibatch
from stochgrad.kernels import mode_maps
from stochgrad.sgmcmc import as_position, sghmc

_LEAST_DEGREES = 10
_ROWS_AT_ONCE, _MOST_ROWS = 4096, 50_000
_MARGIN = 1.01
_LEAST_SHARE = 1e-3
_STEP_SIZE, _TRIALS = 0.3, 6


class Sandwich(NamedTuple):
    r"""A covariance that holds under a wrong model, and a sampler that has it.

    Attributes:
        covariance: $H^{-1} J H^{-1}$ of the raveled position, shape (d, d).
        settings: Arguments of ``stochgrad.sghmc`` beside the target.
    """

    covariance: np.ndarray
    settings: Mapping[str, Any]


@key_first
def sandwich(
    key: PRNGKey,
    target: Target,
    center: Any,
    *,
    step_size: float | None = None,
    friction: float = 1.0,
    hessian: Float[Any, "d d"] | None = None,
    score_covariance: Float[Any, "d d"] | None = None,
) -> Sandwich:
    r"""Settings with which draws spread as the estimate would over data sets.

    Where the model is wrong, the posterior's covariance $H^{-1}$ is not that of its mode over
    repeated data; the sandwich $H^{-1} J H^{-1}$ is, with J the covariance of the sum of the rows'
    scores (Huber, 1967). With mass H and friction $\gamma H$ all directions have unit curvature and
    one linear map, on which injected noise of covariance $2\gamma D h$ has the stationary
    covariance $H^{-1} D H^{-1}$ under BAOAB, exactly, and gradient noise of covariance V adds
    $s H^{-1} V H^{-1}$, with s from the discrete Lyapunov equation. So

    $$D = J - sV, \qquad \hat B = \gamma (TH - D), \qquad T \ge \lambda_{\max}(H^{-1}D),$$

    with $\hat B$ for ``noise_estimate`` and T for ``temperature``: friction and noise no longer
    belong to one temperature. To leading order in the departure from a Gaussian, as the sandwich
    itself. For draws of the mode of SGD with momentum see arXiv:2606.00293.

    Args:
        key: A typed PRNG key.
        target: A posterior, or a gradient of one.
        center: The mode, as ``stochgrad.find_center`` finds it.
        step_size: h, in units of a direction's frequency, below 2; by default 0.3, or what is left
            of it after halvings until gradient noise alone is not wider than the sandwich.
        friction: $\gamma$, in units of the frequency.
        hessian: H, minus the Hessian of the log density over the raveled position, if known.
        score_covariance: J, if known: of clusters or a time series it is for the caller to say. By
            default the sum of the outer products of the rows' scores at the center (about their
            mean; from 50,000 rows, if there are more), or, where the rows cannot be told apart,
            from at least 10d + 1 minibatches.

    Raises:
        TypeError: the target is neither a posterior nor a gradient.
        ValueError: the log density is not strictly concave at the center; J cannot be estimated, or
            the rows say nothing in some direction; the gradient noise exceeds what is to be
            injected.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> x = 3.0 * jax.random.normal(jax.random.key(1), (1000,))  # the model says 1.0
        >>> target = stochgrad.posterior(
        ...     lambda m: 0.0 * m, lambda m, x: -0.5 * (x - m) ** 2, x, batch_size=10
        ... )
        >>> gradient = stochgrad.control_variate(target, jnp.mean(x))
        >>> robust = stochgrad.diagnostics.sandwich(jax.random.key(0), gradient, jnp.mean(x))
        >>> kernel = stochgrad.sghmc(gradient, **robust.settings)
        >>> round(float(robust.covariance[0, 0] / (jnp.var(x) / 1000)), 3)
        1.0
    """
    check_key(key)
    gradient = gradient_of(target)
    center = as_position("center", center)
    check_fits(gradient, center)
    if step_size is not None and not check_number("step_size", step_size) < 2:
        raise ValueError(f"step_size must be below 2 for the step to be stable, got {step_size:g}.")
    friction = check_number("friction", friction)
    size = tree_size(center)
    keys = jax.random.split(key, 3)
    if hessian is None:
        h = hessian_times(gradient, keys[0], center, np.eye(size))
    else:
        h = positive_matrix("hessian", hessian, size)
    h = (h + h.T) / 2
    if not np.linalg.eigvalsh(h).min() > 0:
        raise ValueError("center: the log density is not strictly concave there.")
    if score_covariance is None:
        j = _score_covariance(gradient, keys[1], center)
    else:
        j = square_matrix("score_covariance", score_covariance, size)
    inverse = np.linalg.inv(h)
    covariance = inverse @ j @ inverse
    inward = np.linalg.inv(np.linalg.cholesky(h))
    shares, axes = np.linalg.eigh(inward @ j @ inward.T)
    if not shares[0] > _LEAST_SHARE:
        one_draw = jax.tree.map(lambda x: np.asarray(x)[None, None], center)
        names, _, _ = some_series(by_name(one_draw), size)
        direction = inward.T @ axes[:, 0] / np.sqrt(np.diag(inverse))
        raise ValueError(
            f"center: the rows say next to nothing of {direction_name(direction, names)} there, so "
            "that the sandwich has no spread: it is for parameters that rows inform, not for those "
            "that only a prior does (the scales of a hierarchy)."
        )
    residuals = gradient_residuals(gradient, keys[2], center, _root(covariance))
    noise = residuals.T @ residuals
    tried = _STEP_SIZE / 2.0 ** np.arange(_TRIALS) if step_size is None else [step_size]
    for step in map(float, tried):
        injected = j - _gain(step, friction, noise_order(gradient)) * noise
        heats = np.linalg.eigvalsh(inward @ injected @ inward.T)
        if heats.min() >= 0:
            break
    else:
        raise ValueError(
            "target: its gradient noise alone spreads draws wider than the sandwich in some "
            "direction: take a smaller step_size, larger minibatches or a control variate."
        )
    temperature = float(_MARGIN * heats.max())
    settings = {
        "step_size": step,
        "friction": friction * h,
        "mass": h,
        "noise_estimate": friction * (temperature * h - injected),
        "temperature": temperature,
        "integrator": "BAOAB",
    }
    return Sandwich(covariance, settings)


def _gain(step_size: float, friction: float, order: NoiseOrder) -> float:
    """What gradient noise of variance one adds to the variance of a direction of curvature one."""
    one = np.ones(1)
    maps = mode_maps(partial(sghmc, friction=friction, integrator="BAOAB"), step_size, one)
    loud = stationary_moments(maps, one, one, order).covariance
    return float(loud[0] - stationary_moments(maps, 0 * one, one, NoiseOrder()).covariance[0])


def _score_covariance(gradient: Gradient, key, center) -> np.ndarray:
    posterior = gradient.posterior
    if posterior is None:
        raise ValueError("score_covariance is needed where the target is no posterior's.")
    scores = _row_scores(posterior, key, center)
    if scores is not None:
        scores = scores - scores.mean(axis=0)
        return posterior.batches.size / len(scores) * scores.T @ scores
    size, count = tree_size(center), posterior.batches.epoch
    if count - 1 < _LEAST_DEGREES * size:
        raise ValueError(
            f"score_covariance is needed where rows cannot be told apart; give batch_size=, or "
            f"one of which more than {_LEAST_DEGREES * size} make an epoch (now {count})."
        )
    r = gradient_residuals(minibatch(posterior), key, center, np.zeros(size))
    n, b = posterior.batches.size, posterior.batches.batch_size
    return r.T @ r * (n - 1) * n / (count**2 * b * (n - b))


def _row_scores(posterior: Posterior, key, center) -> np.ndarray | None:
    """The scores of rows, at most 50,000 at random; None where rows cannot be told apart."""
    if posterior.observations is None or posterior.batches.owners is not None:
        return None
    of: Observations = posterior.observations()
    flat, unravel = ravel_pytree(center)

    def of_rows(position, batch):
        total: Any = 0.0
        for site, x in of.log_likelihood(unravel(position), batch).items():
            by_row = jnp.moveaxis(x, of.axis(site) or 0, 0)
            total += jnp.sum(by_row.reshape(len(by_row), -1), axis=1)
        return total

    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    rows = rng.permutation(of.size)[:_MOST_ROWS]
    blocks = [rows[i : i + _ROWS_AT_ONCE] for i in range(0, len(rows), _ROWS_AT_ONCE)]
    sites = jax.eval_shape(of.log_likelihood, center, of.take(blocks[0]))
    if of.rows is None or any(of.axis(site) is None for site in sites):
        return None
    slopes = hoisted_jit(jax.jacfwd(of_rows))
    scores = [np.asarray(slopes(flat, of.take(block)), np.float64) for block in blocks]
    return np.concatenate(scores)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))
