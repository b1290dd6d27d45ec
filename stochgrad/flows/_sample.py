"""From a trained flow to draws of the density: weights, a Markov kernel, a change of variables."""

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import AbstractDistribution, AbstractTransformed
from jax.flatten_util import ravel_pytree
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Kernel,
    Position,
    Posterior,
    PRNGKey,
    check_count,
    check_finite,
    check_instance,
    check_key,
)
from stochgrad.flows._draw import check_flow, unwrap_flow
from stochgrad.flows._evaluations import full_target
from stochgrad.flows._forward import points
from stochgrad.flows._objective import LogDensity, check_density
from stochgrad.flows._weighted import WeightedDraws, WeightsWarning, good_khat, heavy_tail
from stochgrad.kernels import Fit, independence


@key_first
def sample(
    key: PRNGKey,
    flow: AbstractDistribution,
    num_samples: int,
    log_density: LogDensity,
    condition: Any = None,
) -> WeightedDraws:
    """Draw from a flow and weight the draws to a density: neural importance sampling.

    Args:
        key: A PRNG key.
        flow: A flowjax distribution, or a ``Fit`` whose model is one.
        num_samples: How many draws.
        log_density: ``x -> scalar``, unnormalized.
        condition: The condition of a conditional flow.

    Raises:
        ValueError: flow and density do not fit; no draw has a finite weight.

    Warns:
        WeightsWarning: k-hat is above ``good_khat``.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> from flowjax.distributions import Normal
        >>> flow = Normal(jnp.zeros(2), 1.2)
        >>> draws = stochgrad.flows.sample(
        ...     jax.random.key(0), flow, 10_000, lambda x: -0.5 * jnp.sum(x**2)
        ... )
        >>> bool(abs(draws.log_z - jnp.log(2 * jnp.pi)) < 4 * draws.log_z_error)
        True
        >>> draws.ess > 0.8, draws.khat < 0.7
        (True, True)
    """
    check_key(key)
    count = check_count("num_samples", num_samples)
    flow = _model_of(flow)
    condition = check_density(flow, log_density, condition)
    flow = unwrap_flow(flow)
    draw_key, resample_key = jax.random.split(key)

    x, log_w, log_z, error, smoothed, khat = _weigh(flow, draw_key, count, log_density, condition)
    if not np.isfinite(log_z):
        raise ValueError(
            f"no draw of the flow has a finite weight, log Z came out as {float(log_z)}: is "
            "log_density finite where the flow draws?"
        )
    _warn_of_tail(float(khat), count)
    numbers = (float(khat), float(log_z), float(error))
    target = full_target(log_density, x)
    return WeightedDraws(x, log_w, smoothed, *numbers, resample_key, target)


def _warn_of_tail(khat: float, count: int) -> None:
    """As ArviZ warns of its Pareto k."""
    if not khat <= good_khat(count):
        warnings.warn(heavy_tail(khat, count), WeightsWarning, stacklevel=3)


@eqx.filter_jit
def _weigh(flow, key, count, log_density, condition):
    """Compiled once for a density, whatever the flow's parameters."""
    from blackjax.diagnostics import psis_weights

    x, log_q = flow.sample_and_log_prob(key, (count,), condition)
    log_w = jax.vmap(log_density)(x) - log_q
    log_w = jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)
    mean = logsumexp(log_w) - jnp.log(float(count))
    spread = jnp.std(jnp.exp(log_w - mean)) / jnp.sqrt(float(count))
    smoothed, khat = psis_weights(log_w)
    flat = jnp.isnan(khat) & (jnp.max(log_w) - jnp.min(log_w) < 1e-3)  # all equal, but for rounding
    return x, log_w, mean, spread, smoothed, jnp.where(flat, -jnp.inf, khat)


def ess_under_target(
    flow: AbstractDistribution,
    samples: Float[Array, "n ..."],
    log_density: LogDensity,
    condition: Any = None,
) -> float:
    r"""Relative effective sample size from samples of the density, between 0 and 1.

    $$\mathrm{ESS}_p = \Bigl(\frac1n\sum_i w_i\;\frac1n\sum_i w_i^{-1}\Bigr)^{-1},
      \qquad x_i \sim p,$$

    which, unlike the one from the flow's own draws, sees a mode that the flow misses.

    Args:
        flow: A flowjax distribution, or a ``Fit`` whose model is one.
        samples: Samples of the density.
        log_density: ``x -> scalar``, unnormalized.
        condition: The condition of a conditional flow.

    Raises:
        ValueError: flow, samples and density do not fit; the weights of no sample are finite.
    """
    flow = _model_of(flow)
    condition = check_density(flow, log_density, condition)
    x, shape = points("samples", samples), flow.shape
    if x.ndim == 0 or x.shape[1:] != shape or len(x) == 0:
        raise ValueError(
            f"samples must have shape (n, {', '.join(map(str, shape))}) for a flow of shape "
            f"{shape}, got {x.shape}."
        )
    check_finite("samples", x)
    found = float(_ess_under_target(flow, x, log_density, condition))
    if np.isnan(found):
        raise ValueError(
            "log_density must be finite at the samples, which are to be samples of it; their "
            "weights came out as NaN."
        )
    return found


def _model_of(flow: Any) -> Any:
    """A flow, or that of a ``Fit``."""
    return flow.model if isinstance(flow, Fit) else flow


@eqx.filter_jit
def _ess_under_target(flow, x, log_density, condition):
    log_w = jax.vmap(log_density)(x) - flow.log_prob(x, condition)
    log_n = jnp.log(float(len(x)))
    return jnp.exp(2 * log_n - logsumexp(log_w) - logsumexp(-log_w))


def metropolis(
    flow: AbstractDistribution, log_density: LogDensity, condition: Any = None
) -> Kernel:
    """Metropolized independence sampling with a flow's draws as proposals.

    Exact, whatever the flow; how well it moves is the acceptance rate. For ``stochgrad.sample``,
    started at draws of the flow unless told otherwise.

    Args:
        flow: A flowjax distribution, or a ``Fit`` whose model is one.
        log_density: ``x -> scalar``, unnormalized.
        condition: The condition of a conditional flow.

    Raises:
        ValueError: flow and density do not fit.
    """
    flow = _model_of(flow)
    condition = check_density(flow, log_density, condition)
    flow = unwrap_flow(flow)

    def propose(key):
        x, log_q = flow._sample_and_log_prob(key, condition)
        return x, log_density(x) - log_q

    def log_weight(x):
        return log_density(x) - flow._log_prob(x, condition)

    kernel = independence(propose, log_weight)
    return kernel._replace(
        method="flow independence", initial=lambda key: flow._sample(key, condition)
    )


def through(flow: AbstractDistribution, posterior: Posterior, condition: Any = None) -> Posterior:
    r"""A posterior in the coordinates of a flow's base: a transport map as preconditioner.

    $$\log\pi_z(z) = \log\pi\bigl(T(z)\bigr) + \log|\det J_T(z)|.$$

    Where the flow fits, $\pi_z$ is near its base, a standard normal mostly, whatever the shape of
    $\pi$: any kernel of ours, or of blackjax, moves there with one step size for all directions.
    Results come back in the old coordinates.

    Args:
        flow: A flowjax distribution of vectors, as long as the posterior's position raveled.
        posterior: A posterior, its position one vector.
        condition: The condition of a conditional flow.

    Raises:
        TypeError: ``flow`` or ``posterior`` is something else.
        ValueError: the flow has no layers, or its shape is not that of the position.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> from flowjax.distributions import Normal
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * jnp.sum(m**2), lambda m, x: -0.5 * jnp.sum((x - m) ** 2, -1),
        ...     jnp.ones((9, 2)), order="full",
        ... )
        >>> flow = Normal(jnp.full(2, 0.9), 0.1**0.5)
        >>> moved = stochgrad.flows.through(flow, target)
        >>> kernel = stochgrad.sghmc(moved, step_size=0.3, friction=2.0, integrator="BAOAB")
        >>> draws = stochgrad.sample(jax.random.key(0), kernel, num_samples=2000)
        >>> round(float(draws.constrained()["x"].mean()), 1)
        0.9
    """
    check_instance(
        "posterior", posterior, Posterior, "a Posterior, as stochgrad.posterior makes it"
    )
    condition = check_flow(_model_of(flow), condition)
    flow = unwrap_flow(_model_of(flow))
    if not isinstance(flow, AbstractTransformed):
        raise ValueError("the flow must have layers, got a base distribution.")
    transport, base = flow.bijection, flow.base_dist

    back: Callable[[Any], Any] = lambda x: x
    if posterior.initial is not None:
        shapes = jax.eval_shape(posterior.initial, jax.random.key(0))
        flat, back = ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
        if flow.shape != flat.shape:
            raise ValueError(
                f"the flow must have the position's shape {flat.shape}, got {flow.shape}: a "
                "position of several arrays is taken as one vector."
            )

    def log_density(z: Position, batch: Any):
        x, log_det = transport.transform_and_log_det(z, condition)
        return posterior.log_density(back(x), batch) + log_det

    def constrain(z: Position):
        x = back(transport.transform(z, condition))
        return posterior.constrain(x) if posterior.constrain is not None else {"x": x}

    return posterior._replace(
        log_density=log_density,
        initial=lambda key: base._sample(key, condition),
        constrain=constrain,
        unconstrain=None,
    )
