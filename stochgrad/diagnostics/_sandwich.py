"""A sampler whose stationary covariance is the sandwich, robust to a model that is wrong."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from stochgrad.core import (
    Batch,
    Gradient,
    PRNGKey,
    Target,
    check_key,
    check_number,
    hoisted_jit,
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
_ROWS_AT_ONCE = 256
_MARGIN = 1.01


class Sandwich(NamedTuple):
    r"""A covariance that holds under a wrong model, and a sampler that has it.

    Attributes:
        covariance: $H^{-1} J H^{-1}$ of the raveled position, shape (d, d).
        settings: Arguments of ``stochgrad.sghmc`` beside the target.
    """

    covariance: np.ndarray
    settings: Mapping[str, Any]


def sandwich(
    target: Target,
    key: PRNGKey,
    center: Any,
    *,
    step_size: float = 0.3,
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
        target: A posterior, or a gradient of one.
        key: A typed PRNG key.
        center: The mode, as ``stochgrad.find_center`` finds it.
        step_size: h, in units of a direction's frequency: below 2, and small for few gradients of
            noise to take out.
        friction: $\gamma$, in units of the frequency.
        hessian: H, minus the Hessian of the log density over the raveled position, if known.
        score_covariance: J, if known: of clusters or a time series it is for the caller to say. By
            default the sum of the outer products of the rows' scores at the center (about their
            mean), or, where the rows cannot be told apart, from at least 10d + 1 minibatches.

    Raises:
        TypeError: the target is neither a posterior nor a gradient.
        ValueError: the log density is not strictly concave at the center; J cannot be estimated;
            the gradient noise exceeds what is to be injected.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> x = 3.0 * jax.random.normal(jax.random.key(1), (1000,))  # the model says 1.0
        >>> target = stochgrad.posterior(
        ...     lambda m: 0.0 * m, lambda m, x: -0.5 * (x - m) ** 2, x, batch_size=10
        ... )
        >>> gradient = stochgrad.control_variate(target, jnp.mean(x))
        >>> robust = stochgrad.diagnostics.sandwich(gradient, jax.random.key(0), jnp.mean(x))
        >>> kernel = stochgrad.sghmc(gradient, **robust.settings)
        >>> round(float(robust.covariance[0, 0] / (jnp.var(x) / 1000)), 3)
        1.0
    """
    check_key(key)
    gradient = gradient_of(target)
    center = as_position("center", center)
    check_fits(gradient, center)
    step_size = check_number("step_size", step_size)
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

    maps = mode_maps(partial(sghmc, friction=friction, integrator="BAOAB"), step_size, np.ones(1))
    if not maps.radius < 1:
        raise ValueError(f"step_size must be below 2 for the step to be stable, got {step_size:g}.")
    one = np.ones(1)
    loud = stationary_moments(maps, one, one, noise_order(gradient)).covariance
    quiet = stationary_moments(maps, 0 * one, one, NoiseOrder()).covariance
    residuals = gradient_residuals(gradient, keys[2], center, _root(covariance))
    injected = j - float(loud[0] - quiet[0]) * residuals.T @ residuals
    inward = np.linalg.inv(np.linalg.cholesky(h))
    heats = np.linalg.eigvalsh(inward @ injected @ inward.T)
    if heats.min() < 0:
        raise ValueError(
            "target: its gradient noise alone spreads draws wider than the sandwich in some "
            "direction: take a smaller step_size, larger minibatches or a control variate."
        )
    temperature = float(_MARGIN * heats.max())
    settings = {
        "step_size": step_size,
        "friction": friction * h,
        "mass": h,
        "noise_estimate": friction * (temperature * h - injected),
        "temperature": temperature,
        "integrator": "BAOAB",
    }
    return Sandwich(covariance, settings)


def _score_covariance(gradient: Gradient, key, center) -> np.ndarray:
    posterior = gradient.posterior
    if posterior is None:
        raise ValueError("score_covariance is needed where the target is no posterior's.")
    batches = posterior.batches
    if isinstance(batches.full, Batch):
        full: Batch = batches.full

        def scores(center):
            def of_row(row):
                batch = Batch(jax.tree.map(lambda x: x[None], row), jnp.ones(1))

                def density(q):
                    without = batch._replace(weight=jnp.zeros(1))
                    return posterior.log_density(q, batch) - posterior.log_density(q, without)

                return ravel_pytree(jax.grad(density)(center))[0]

            return lax.map(of_row, full.data, batch_size=_ROWS_AT_ONCE)

        s = np.asarray(hoisted_jit(scores)(center), np.float64)
        s = s - s.mean(axis=0)
        return s.T @ s
    size, count = tree_size(center), batches.epoch
    if count - 1 < _LEAST_DEGREES * size:
        raise ValueError(
            f"score_covariance is needed: {count} minibatches are too few to estimate it in {size} "
            "dimensions; or take smaller ones."
        )
    r = gradient_residuals(minibatch(posterior), key, center, np.zeros(size))
    n, b = batches.size, batches.batch_size
    return r.T @ r * (n - 1) * n / (count**2 * b * (n - b))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))
