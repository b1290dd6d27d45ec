"""Windows of a warm-up: a short run, and what it says about center, spread and step."""

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from stochgrad.core import (
    Draws,
    Kernel,
    Position,
    PRNGKey,
    as_schedule,
    effective_draws,
    evenly,
    ravel_draws,
    rhat,
    sample,
)
from stochgrad.sgmcmc._precision import DENSE_DIMENSION, Precision, precision_of
from stochgrad.sgmcmc._step_size import StepSizeReport

_MOST_DRAWS = 500
_MOST_BYTES = 2**26
_RETRIES = 4
_SHRINK = 0.3
_MOST_DIVERGENT = 0.5


class Place(NamedTuple):
    """Where a posterior is thought to lie.

    Attributes:
        mean: Its mean, raveled.
        precision: The inverse of its covariance.
        starts: Where the chains are, one row each.
        unravel: ``vector -> position``.
        pool: Some draws.
    """

    mean: Float[np.ndarray, " d"]
    precision: Precision
    starts: Float[np.ndarray, "chains d"]
    unravel: Callable[[Any], Position]
    pool: Float[np.ndarray, "n d"]

    @property
    def center(self) -> Position:
        """The mean as a position."""
        return self.unravel(self.mean)

    @property
    def positions(self) -> Position:
        """Where the chains are, with a leading axis if there are several."""
        each = [self.unravel(start) for start in self.starts]
        if len(each) == 1:
            return each[0]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


class Window(NamedTuple):
    """What a window found.

    Attributes:
        steps: Steps of each chain.
        step_size: Their length.
        rhat: The largest R-hat over the coordinates, in the second half.
        effective: The fewest effective draws there.
        apart: Whether each chain has seen much of a place of its own, and the places differ.
        shift: How far the mean moved, in standard deviations, root mean square over directions.
        change: The largest factor by which the variance of a direction changed.
        noise_ratio: Gradient noise over injected noise, on average; NaN without gradient noise.
        diverged: How many chains diverged before the step was small enough.
        gradients: Gradients of the density, over all chains, two to a step with a control variate.
        seconds: What it took.
    """

    steps: int
    step_size: float
    rhat: float
    effective: float
    apart: bool
    shift: float
    change: float
    noise_ratio: float
    diverged: int
    gradients: float
    seconds: float

    @property
    def settled(self) -> bool:
        """Whether chains agree, and the center and spread from before the window still hold.

        Where chains agree closely, and on many draws, other spreads do not matter.
        """
        mixed = self.rhat < 1.02 and self.effective > 400
        return self.rhat < 1.05 and self.shift < 0.3 and (self.change < 2.5 or mixed)

    def __str__(self) -> str:
        return (
            f"{self.steps} steps of {self.step_size:.3g}: R-hat {self.rhat:.2f}, "
            f"{self.effective:.0f} effective draws, mean moved {self.shift:.2f} sd, "
            f"variances by {self.change:.2g}"
        )


class TunedKernel(NamedTuple):
    """A kernel that fits a place.

    Attributes:
        kernel: The kernel.
        center: Where its control variate is centered, if it has one.
        step_size: What its step size rests on, where ``stochgrad.find_step_size`` found it.
    """

    kernel: Kernel
    center: Position | None = None
    step_size: StepSizeReport | None = None


KernelAt = Callable[[Place, PRNGKey, float], TunedKernel]
"""``(place, key, shrink) -> TunedKernel``; its step is ``shrink`` times what it would be."""


def run_window(
    kernel_at: KernelAt, place: Place, key: PRNGKey, time_length: float, most_steps: int
) -> tuple[Place, Window]:
    """Run a window, and learn the place anew from its second half.

    Args:
        kernel_at: What makes a kernel for a place.
        place: Where the posterior is thought to lie.
        key: A typed PRNG key.
        time_length: Steps times step size.
        most_steps: Steps, at most.

    Raises:
        ValueError: chains diverge at every step size tried.
    """
    begun = time.perf_counter()
    shrink, step, diverged, gradients = 1.0, 0.0, 0, 0.0
    for attempt in range(_RETRIES + 1):
        kernel_key, run_key = jax.random.split(jax.random.fold_in(key, attempt))
        tuned = kernel_at(place, kernel_key, shrink)
        kernel = tuned.kernel
        step = as_schedule(dict(kernel.settings)["step_size"])[1]
        steps = int(np.clip(time_length / step, 100, most_steps))
        x, ratio, bad, leapfrogs = _run(kernel, run_key, place, steps)
        gradients += leapfrogs or steps * len(place.starts) * (1 if tuned.center is None else 2)
        if len(x):
            break
        shrink, diverged = shrink * _SHRINK, max(diverged, bad)
    else:
        raise ValueError(
            f"all chains diverged in warm-up at steps down to {step:.2g}: the log density is steep "
            "beyond what a step can follow, or not finite near where it is large. Reparameterize "
            "the model, or take stochgrad.infer(..., method='nuts')."
        )
    diverged = max(diverged, bad)
    half = x[:, x.shape[1] // 2 :]
    flat = np.concatenate(half)
    coordinates = evenly(half.shape[2], DENSE_DIMENSION)
    values = half[:, :, coordinates]
    effective = effective_draws(values)
    middling = float(np.nanmedian(effective))
    mean, precision = precision_of(flat, middling, place.precision)
    both = np.concatenate([values, precision.whiten(half - mean)[:, :, coordinates]], axis=2)
    white = place.precision.whiten(flat - place.mean)
    moved = precision.whiten(mean - place.mean)
    worst = float(np.nanmax(rhat(both), initial=1.0))
    pool = flat[evenly(len(flat), len(place.pool))]
    following = Place(
        mean, precision, np.resize(half[:, -1], place.starts.shape), place.unravel, pool
    )
    return following, Window(
        steps=steps,
        step_size=step,
        rhat=worst,
        effective=_fewest(both),
        apart=worst > 1.2 and all(_fewest(chain[None]) > 100 for chain in both),
        shift=float(np.sqrt(np.mean(moved**2))),
        change=_change(white, middling),
        noise_ratio=ratio,
        diverged=diverged,
        gradients=gradients,
        seconds=time.perf_counter() - begun,
    )


def _fewest(series: np.ndarray) -> float:
    """The fewest effective draws of any series of shape (chain, draw, series)."""
    return float(np.nanmin(effective_draws(series), initial=np.inf))


def _run(
    kernel: Kernel, key: PRNGKey, place: Place, steps: int
) -> tuple[np.ndarray, float, int, float]:
    """Raveled draws of the finite chains, noise ratio, how many were not, and leapfrog steps."""
    chains, dimension = place.starts.shape
    most = max(min(_MOST_DRAWS, _MOST_BYTES // (4 * chains * dimension)), 20)
    thin = max(steps // most, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = sample(
            key,
            kernel,
            init=place.positions,
            num_samples=steps // thin,
            thin=thin,
            num_chains=chains,
            progress=False,
        )
    healthy = draws.finite.all(axis=1) & (draws.first_bad < 0)
    moving = healthy & ~_stuck(draws)
    healthy = moving if moving.any() else healthy
    leapfrogs = thin * float(np.sum(draws.stats.get("n_steps", 0)))
    if not healthy.any() or draws.num_draws < steps // thin:
        return np.zeros((0, 0, dimension)), np.nan, chains, leapfrogs
    positions = jax.tree.map(lambda x: x[healthy], draws.positions)
    x = ravel_draws(positions)
    ratios = draws.stats.get("noise_ratio", np.full((chains, 1), np.nan))[healthy]
    ratio = float(np.nanmean(ratios)) if np.isfinite(ratios).any() else float("nan")
    return x, ratio, int(np.sum(~healthy)), leapfrogs


def _stuck(draws: Draws) -> np.ndarray:
    """Which chains of NUTS hardly move in their second half, for their transitions diverge there.

    Such a chain has started where the density is narrow beyond what its step can follow, next to a
    singularity for instance, and says nothing of where the posterior lies.
    """
    divergent = draws.stats.get("diverging")
    if divergent is None:
        return np.zeros(draws.num_chains, bool)
    return np.mean(divergent[:, draws.num_draws // 2 :], axis=1) > _MOST_DIVERGENT


def _change(white: np.ndarray, effective: float) -> float:
    """The largest factor between variances and one, over coordinates and principal directions."""
    variances = np.var(white, axis=0)
    if white.shape[1] <= DENSE_DIMENSION:
        d = white.shape[1]
        # noise alone spreads eigenvalues to (1 +- sqrt(d / n))^2: only what goes beyond counts
        noise = np.sqrt(d / max(effective, 1))
        low, high = (1 - min(noise, 0.9)) ** 2, (1 + noise) ** 2
        values = np.linalg.eigvalsh(np.cov(white, rowvar=False).reshape(d, d))
        extremes = np.array([values[0] / low, values[-1] / high])
        extremes = np.where([extremes[0] > 1, extremes[1] < 1], 1.0, extremes)
        variances = np.concatenate([variances, extremes])
    variances = np.maximum(variances, 1e-30)
    return float(np.max(np.maximum(variances, 1 / variances)))
