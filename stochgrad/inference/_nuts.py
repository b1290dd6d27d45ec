"""NUTS on all rows, where they are cheap: blackjax's kernel in the one loop."""

from typing import Any, NamedTuple

import blackjax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.step_size import dual_averaging_adaptation
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from stochgrad.core import (
    Kernel,
    Position,
    Posterior,
    PRNGKey,
    check_array,
    check_instance,
    check_number,
    number,
    sample,
)
from stochgrad.sgmcmc import DENSE_DIMENSION, KernelAt, Place, Precision, TunedKernel

_ADAPTATION_STEPS = 150


class NUTSInfo(NamedTuple):
    """What a transition reports, under ArviZ's names.

    Attributes:
        log_density: Of the position, on all rows.
        energy: Of the transition.
        diverging: Whether the energy's error exceeded 1,000.
        n_steps: Leapfrog steps, each a gradient on all rows.
        tree_depth: Doublings of the trajectory.
        acceptance_rate: Mean acceptance probability along it.
        step_size: h.
    """

    log_density: Float[Array, ""]
    energy: Float[Array, ""]
    diverging: Array
    n_steps: Array
    tree_depth: Array
    acceptance_rate: Float[Array, ""]
    step_size: Float[Array, ""]


def nuts(posterior: Posterior, step_size: float, inverse_mass: Any) -> Kernel:
    """NUTS of blackjax on all rows of a posterior, for ``stochgrad.sample``.

    Args:
        posterior: A posterior whose rows are in memory.
        step_size: Of the leapfrog.
        inverse_mass: A covariance, dense (d, d) or its diagonal (d,), over the raveled position.

    Raises:
        ValueError: the rows are streamed or spread over devices; the mass has another shape.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(9), order="full"
        ... )
        >>> kernel = stochgrad.nuts(target, 0.5, jnp.array([0.1]))
        >>> kernel.method
        'NUTS'
    """
    check_instance("posterior", posterior, Posterior, "a Posterior")
    step_size = check_number("step_size", step_size)
    matrix = check_array("inverse_mass", inverse_mass)
    variances = np.diag(matrix) if matrix.ndim == 2 else matrix
    if not np.all(np.isfinite(matrix)) or np.any(variances <= 0):
        raise ValueError("inverse_mass must hold finite numbers, its variances positive.")
    log_density = _on_all_rows(posterior)
    transition = blackjax.nuts.build_kernel()

    def init(position: Position, rng_key: PRNGKey) -> Any:
        size = ravel_pytree(position)[0].size
        if matrix.shape not in ((size,), (size, size)):
            raise ValueError(
                f"inverse_mass must have the shape ({size},) or ({size}, {size}), got "
                f"{matrix.shape}."
            )
        return blackjax.nuts.init(position, log_density)

    def step(rng_key: PRNGKey, state: Any) -> tuple[Any, NUTSInfo]:
        dtype = state.logdensity.dtype
        h, inverse = number(step_size, dtype), np.asarray(matrix, dtype)
        state, info = transition(rng_key, state, log_density, h, jnp.asarray(inverse))
        return state, _info(state, info, h)

    return Kernel(
        init=init,
        step=step,
        method="NUTS",
        settings=(
            ("step_size", step_size),
            ("inverse_mass", matrix),
            ("data_size", posterior.batches.size),
            ("order", "full"),
        ),
        posterior=posterior,
    )


def nuts_at(posterior: Posterior, acceptance: float = 0.85) -> KernelAt:
    """``(place, key, shrink) -> kernel``: NUTS with the mass of a place, its step adapted there."""
    log_density = _on_all_rows(posterior)
    transition = blackjax.nuts.build_kernel()
    begin, update, _ = dual_averaging_adaptation(acceptance)

    def kernel_at(place: Place, key: PRNGKey, shrink: float) -> TunedKernel:
        inverse_mass = _inverse_mass(place.precision)

        def init(position, rng_key):
            return _Adapting(
                position, blackjax.nuts.init(position, log_density), begin(number(shrink))
            )

        def step(rng_key, state):
            h = jnp.exp(state.averaging.log_step_size)
            dtype = state.inner.logdensity.dtype
            inverse = jnp.asarray(np.asarray(inverse_mass, dtype))
            inner, info = transition(rng_key, state.inner, log_density, h.astype(dtype), inverse)
            averaging = update(state.averaging, info.acceptance_rate)
            return _Adapting(inner.position, inner, averaging), _info(inner, info, h)

        run = sample(
            key,
            Kernel(init, step, "NUTS, adapting", samples=False),
            init=place.positions,
            num_samples=1,
            thin=_ADAPTATION_STEPS,
            num_chains=len(place.starts),
            collect=_log_step_size,
            progress=False,
        )
        steps = np.exp(np.asarray(run.positions, np.float64)).ravel()
        return TunedKernel(nuts(posterior, float(np.median(steps)), inverse_mass))

    return kernel_at


class _Adapting(NamedTuple):
    position: Position
    inner: Any
    averaging: Any


def _log_step_size(state: _Adapting) -> Any:
    return state.averaging.log_step_size_avg


def _inverse_mass(precision: Precision) -> np.ndarray:
    if precision.scale.size <= DENSE_DIMENSION:
        return precision.covariance
    return precision.variances


def _info(state: Any, info: Any, step_size: Any) -> NUTSInfo:
    return NUTSInfo(
        log_density=state.logdensity,
        energy=info.energy,
        diverging=info.is_divergent,
        n_steps=info.num_integration_steps,
        tree_depth=info.num_trajectory_expansions,
        acceptance_rate=info.acceptance_rate,
        step_size=step_size,
    )


def _on_all_rows(posterior: Posterior) -> Any:
    full = posterior.batches.full
    if full is None:
        raise ValueError(
            "posterior: NUTS needs all rows in memory on one device; take method='sghmc' for data "
            "that are streamed or spread."
        )
    return lambda position: posterior.log_density(position, full)
