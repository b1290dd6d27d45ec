"""What is said after every run: what diverged, and how far its draws can be trusted.

Each function takes plain arrays, so that every door can use it.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stochgrad.core._checks import describe
from stochgrad.core._warnings import (
    ConvergenceWarning,
    DivergenceWarning,
    GradientNoiseWarning,
    PrecisionWarning,
)

MOST_RHAT = 1.05
LEAST_EFFECTIVE_DRAWS = 100
_MOST_SERIES = 64
_NAMED = 8
_ROUNDING_SHARE = 0.01


def warn_of_divergence(
    chains: Mapping[int, str], num_chains: int, step_size: Any, kept: int, total: int, level: int
) -> None:
    """Name the chains that diverged.

    Args:
        chains: Where each of them did, in words, by number.
        num_chains: How many chains there are.
        step_size: The step size, if it is a number.
        kept: How many draws are finite.
        total: How many were wanted.
        level: As ``stacklevel`` of ``warnings.warn``.
    """
    if not chains:
        return
    named = "; ".join(f"chain {n} {where}" for n, where in list(chains.items())[:_NAMED])
    more = f" and {len(chains) - _NAMED} more" if len(chains) > _NAMED else ""
    smaller = f"{step_size / 10:g}" if isinstance(step_size, float) else "a smaller one"
    warnings.warn(
        f"{len(chains)} of {num_chains} chains diverged (non-finite position): {named}{more}. Most "
        "likely the step size is too large for the curvature of the target: try "
        f"step_size={smaller}. {kept} finite draws are kept, of {total}.",
        DivergenceWarning,
        stacklevel=level,
    )


def noise_reason(noise_ratio: np.ndarray | None) -> str | None:
    """What is wrong where gradient noise exceeds the injected noise."""
    if noise_ratio is None:
        return None
    ratios = noise_ratio[np.isfinite(noise_ratio)]
    if ratios.size == 0 or (ratio := float(ratios.mean())) <= 1:
        return None
    return (
        f"minibatch noise is {ratio:.2g} times the noise that the dynamics injects, so it, and not "
        "the posterior, sets the spread of the draws: with independent minibatches standard "
        f"deviations come out about {np.sqrt(1 + ratio):.2g} times too large (less with "
        "order='reshuffled' when an epoch is short against the chain's memory). Take a smaller "
        "step_size or a larger batch_size (the ratio is proportional to step_size / batch_size), "
        "more friction (sghmc), or a control variate."
    )


def density_reason(log_density: np.ndarray) -> str | None:
    """What is wrong where draws lie at -inf or NaN, which no gradient leads back from."""
    bad = ~np.isfinite(log_density)
    if not bad.any():
        return None
    return (
        f"the log density is -inf or NaN at {bad.mean():.2g} of the draws: without a "
        "Metropolis step a chain that leaves the support stays outside, and these draws are "
        "not of the target. Let every position have a positive density, by sampling the "
        "logarithm of a positive number for example."
    )


def rhat(series: np.ndarray) -> np.ndarray:
    """Rank-normalized R-hat over split chains, of series of shape (chain, draw, series)."""
    from arviz_stats.base import array_stats

    chains, length = series.shape[:2]
    if length < 8:
        return np.ones(series.shape[2])
    if chains == 1:
        series = series[:, : length // 2 * 2].reshape(2, length // 2, -1)
    with np.errstate(all="ignore"):
        return np.asarray(array_stats.rhat(series, chain_axis=0, draw_axis=1))


def effective_draws(series: np.ndarray, method: str = "bulk") -> np.ndarray:
    """Effective sample size of series of shape (chain, draw, series)."""
    from arviz_stats.base import array_stats

    if series.shape[1] < 8:
        return np.full(series.shape[2], float(series.shape[0] * series.shape[1]))
    with np.errstate(all="ignore"):
        return np.asarray(array_stats.ess(series, chain_axis=0, draw_axis=1, method=method))


def convergence_reason(draws: Mapping[str, np.ndarray]) -> str | None:
    """Name what has not mixed: R-hat above 1.05, or fewer than 100 effective draws.

    Rank-normalized R-hat over split chains and bulk effective sample size (Vehtari et al., Bayesian
    Anal. 2021), of up to 64 numbers spread evenly over all that there are.

    Args:
        draws: Arrays of shape (chain, draw, ...) of finite numbers, by name.
    """
    names, series, total = some_series(draws, _MOST_SERIES)
    if not names:
        return None
    reasons = []
    ratio, effective = rhat(series), effective_draws(series)
    scope = f"{len(names)} numbers" + ("" if total == len(names) else f" looked at, of {total}")
    high, few = ratio > MOST_RHAT, effective < LEAST_EFFECTIVE_DRAWS
    if high.any():
        worst = int(np.nanargmax(ratio))
        reasons.append(
            f"R-hat is {ratio[worst]:.3f} for {names[worst]!r} and above {MOST_RHAT:g} for "
            f"{high.sum()} of {scope} (chains, or their halves, disagree)"
        )
    if few.any():
        worst = int(np.nanargmin(effective))
        reasons.append(
            f"{effective[worst]:.0f} effective draws of {names[worst]!r}, fewer than "
            f"{LEAST_EFFECTIVE_DRAWS} for {few.sum()} of {scope}"
        )
    if not reasons:
        return None
    return (
        "not converged: " + "; ".join(reasons) + ". Run longer (num_samples, thin), discard more "
        "(num_warmup), or let all directions move at one pace (mass)."
    )


def rounding_reason(draws: Mapping[str, np.ndarray], steps: int) -> str | None:
    r"""What is wrong where rounding moves a position about as much as the sampler does.

    A step rounds to a multiple of the spacing s of floating-point numbers at the position, which
    adds a variance of $s^2/12$; so do the ``steps`` from one draw to the next, against the mean
    square by which draws differ. A coordinate that never moves has steps below $s/2$.

    Args:
        draws: Positions, arrays of shape (chain, draw, ...), by name.
        steps: Steps from one draw to the next.
    """
    half = [n for n, x in draws.items() if x.dtype.itemsize < 4]
    if half:
        dtype = draws[half[0]].dtype
        return (
            f"position {half[0]!r} has type {dtype}, whose rounding moves a sampler: small updates "
            "are lost and the spread of the draws is wrong. Keep positions in float32 and sample "
            f"stochgrad.mixed_precision(target, jnp.{dtype})."
        )
    worst, name, spacing = 0.0, "", 0.0
    for key, x in draws.items():
        if x.dtype.kind != "f" or x.shape[1] < 2 or x.size == 0:
            continue
        flat = x.reshape(*x.shape[:2], -1)
        flat = flat[:, :, evenly(flat.shape[2], _MOST_SERIES)]
        moved = np.mean(np.diff(flat.astype(np.float64), axis=1) ** 2, axis=(0, 1))
        gap = np.spacing(np.abs(flat).max(axis=(0, 1))).astype(np.float64)
        with np.errstate(divide="ignore"):
            share = steps * gap**2 / 12 / moved
        if share.max() > worst:
            worst, name, spacing = float(share.max()), key, float(gap[np.argmax(share)])
    if math.isinf(worst):
        return (
            f"{name!r} never moved: steps there are below the spacing of floating-point numbers, "
            f"{spacing:.2g}, or every proposal was rejected. Take larger steps, or sample what is "
            "left after subtracting a constant."
        )
    if worst > _ROUNDING_SHARE:
        return (
            f"rounding moves {name!r} about as much as the sampler does: floating-point numbers "
            f"lie {spacing:.2g} apart there, and a step is not large against that. Sample what is "
            "left after subtracting a constant, or set jax_enable_x64."
        )
    return None


def draw_reasons(
    positions: Mapping[str, np.ndarray],
    *,
    noise_ratio: np.ndarray | None,
    log_density: np.ndarray | None,
    steps: int | None,
    samples: bool = True,
) -> list[tuple[type[Warning], str]]:
    """What is wrong with the draws of the chains that stayed finite, each with its kind.

    Args:
        positions: Arrays of shape (chain, draw, ...), by name.
        noise_ratio: As the kernel reports it; None where gradients have no noise.
        log_density: Of each draw, if it is known.
        steps: Steps from one draw to the next; None where draws are not as the sampler had them.
        samples: Whether the draws stand for a law.
    """
    reasons: list[tuple[type[Warning], str | None]] = [
        (GradientNoiseWarning, noise_reason(noise_ratio))
    ]
    if samples:
        if log_density is not None:
            reasons.append((DivergenceWarning, density_reason(log_density)))
        reasons.append((ConvergenceWarning, convergence_reason(positions)))
        if steps is not None:
            reasons.append((PrecisionWarning, rounding_reason(positions, steps)))
    return [(category, reason) for category, reason in reasons if reason is not None]


def warn_of_draws(positions: Mapping[str, np.ndarray], *, level: int, **known: Any) -> None:
    """Warn of what ``draw_reasons`` finds; ``level`` is as ``stacklevel`` of ``warnings.warn``."""
    for category, reason in draw_reasons(positions, **known):
        warnings.warn(reason, category, stacklevel=level)


def check_start(values: np.ndarray, positions: Any) -> None:
    """Raise a ValueError where a chain would start at a log density that is not finite."""
    bad = np.flatnonzero(~np.isfinite(np.atleast_1d(values)))
    if bad.size:
        value = np.atleast_1d(values)[bad[0]]
        which = f" of chain {bad[0]}" if np.size(values) > 1 else ""
        raise ValueError(
            f"init{which} has a log density of {value:g} on its first minibatch (init is "
            f"{describe(positions)}): start where the density is positive and finite, or look for "
            "what is not finite there in log_prior, log_likelihood or the model."
        )


def some_series(draws: Mapping[str, np.ndarray], most: int) -> tuple[list[str], np.ndarray, int]:
    """Names, at most so many series of shape (chain, draw, series), and how many there are."""
    arrays = {n: x for n, x in draws.items() if _is_floating(x) and x.ndim >= 2 and x.size}
    sizes = {name: math.prod(x.shape[2:]) for name, x in arrays.items()}
    total = sum(sizes.values())
    chosen = evenly(total, most)
    names, parts, first = [], [], 0
    for name, x in arrays.items():
        own = chosen[(chosen >= first) & (chosen < first + sizes[name])] - first
        if own.size:
            flat = x.reshape(*x.shape[:2], -1)
            parts.append(np.asarray(flat[:, :, own], np.float64))
            places = np.transpose(np.unravel_index(own, x.shape[2:])) if x.ndim > 2 else None
            names += [
                name if places is None else f"{name}[{', '.join(map(str, place))}]"
                for place in ([()] if places is None else places.tolist())
            ]
        first += sizes[name]
    if not parts:
        return [], np.zeros((0, 0, 0)), 0
    series = np.concatenate(parts, axis=2)
    finite = np.flatnonzero(np.isfinite(series).all(axis=(0, 1)))
    return [names[i] for i in finite], series[:, :, finite], total


def _is_floating(x: np.ndarray) -> bool:
    return x.dtype.kind == "f" or x.dtype.name == "bfloat16"


def evenly(size: int, most: int) -> np.ndarray:
    """At most so many of the numbers below ``size``, evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(int))


def direction_name(axis: np.ndarray, names: Sequence[str]) -> str:
    """The parameters that a direction is mostly made of."""
    weight = axis**2 / np.sum(axis**2)
    order = np.argsort(-weight)
    chosen = [i for i in order[:3] if weight[i] > 0.1]
    return " and ".join(repr(names[i]) for i in chosen) or repr(names[order[0]])
