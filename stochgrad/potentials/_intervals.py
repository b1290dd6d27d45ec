"""Credible intervals of observables, and what they are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from stochgrad.core import check_array, check_callable, check_number, first_line


class Intervals(NamedTuple):
    """Credible intervals of an observable, and the standard deviations that make them.

    Attributes:
        mean: Mean over the networks.
        low: Lower ends.
        high: Upper ends.
        epistemic: What the networks differ by.
        sampling: What is left of the error of finite trajectories.
        aleatoric: What a measurement of finite length scatters by, were the potential known.
        networks: How many networks they are of.
    """

    mean: Float[np.ndarray, "..."]
    low: Float[np.ndarray, "..."]
    high: Float[np.ndarray, "..."]
    epistemic: Float[np.ndarray, "..."]
    sampling: Float[np.ndarray, "..."]
    aleatoric: Float[np.ndarray, "..."]
    networks: int


def intervals(
    values: Any,
    *,
    level: float = 0.9,
    sound: Any = None,
    transform: Callable[[np.ndarray], np.ndarray] = lambda mean: mean,
    measured: float | None = None,
    common: Any = False,
) -> Intervals:
    r"""Credible intervals of an observable from its averages over trajectories.

    Let $x_{dr}$ be the average over replica r of network d, $T_d = T(\bar x_{d\cdot})$ of D
    networks, and $w_d$ the jackknife variance of $T_d$ over its R replicas. With B the variance of
    the $T_d$, $\bar w$ the mean of the $w_d$, and m of the networks in one common run,

    $$\sigma_{epi}^2 = \max(B - k\bar w, 0), \quad k = 1 - \tfrac{m(m-1)}{D(D-1)}, \qquad
      \sigma_{MD}^2 = s\bar w, \quad s = \tfrac{m^2 + D - m}{D^2}, \qquad
      \sigma_{al}^2 = R\bar w / L,$$

    ($k = 1$ and $s = 1/D$ where each has its own), the intervals are

    $$\bar T \pm t_\nu\sqrt V, \qquad
      V = \big(1 + \tfrac1D\big)\sigma_{epi}^2 + \sigma_{MD}^2 + \sigma_{al}^2, \qquad
      \frac{V^2}{\nu} = \frac{(1 + 1/D)^2B^2}{D - 1} +
      \frac{\big(s + R/L - k(1 + 1/D)\big)^2\bar w^2}{D(R - 1)},$$

    where the measurement that the intervals are for is L times as long as a replica, and t is
    Student's quantile with the degrees of freedom of Welch and Satterthwaite, two at least. They
    hold what they say, within a hundredth, where the networks' trajectories are not much noisier
    than the networks differ, or the measurement is no longer than theirs together; elsewhere the
    spread of networks cannot be told from noise, and they hold more.

    Where T is infinite for some average that a replica less would give (the free energy of a bin
    that one replica alone has visited), the interval is that of the averages with T of its ends:
    one of them may be infinite then.

    Args:
        values: Averages, shape (D, R, ...), as ``stochgrad.potentials.average`` gives.
        level: Probability of the intervals.
        sound: Which trajectories count, shape (D, R), as ``Trajectories.sound``. A network with
            fewer than two is left out.
        transform: T, of an average: ``free_energy`` of a histogram, say.
        measured: L; None for a measurement without error.
        common: Which networks' averages are of the same frames, reweighted, so that they share the
            error of finite trajectories: a boolean for all, or one for each, shape (D,), as
            ``Propagated.common``.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: fewer than two networks have two sound trajectories; a sound one's average is
            not finite; a shape does not fit; a number is out of range; ``transform`` fails or
            gives NaN.

    Example:
        >>> import numpy as np, stochgrad
        >>> rng = np.random.default_rng(0)
        >>> networks = rng.normal(size=(500, 1)) + rng.normal(size=(500, 8))
        >>> found = stochgrad.potentials.intervals(networks)
        >>> float(found.epistemic.round(1)), float(found.sampling.round(2))
        (1.0, 0.02)
    """
    values = check_array("values", values, finite=False).astype(np.float64)
    if values.ndim < 2 or 0 in values.shape:
        raise ValueError(
            f"values must have shape (networks, replicas, ...), not empty, got {values.shape}."
        )
    level = check_number("level", level)
    if level >= 1:
        raise ValueError(f"level must be below 1, got {level:g}.")
    length = np.inf if measured is None else check_number("measured", measured)
    check_callable("transform", transform, "a function of an average")
    if sound is None:
        sound = np.ones(values.shape[:2], bool)
    else:
        sound = check_array("sound", sound, kind="boolean")
    if sound.shape != values.shape[:2]:
        raise ValueError(f"sound must have shape {values.shape[:2]}, got {sound.shape}.")
    if isinstance(common, bool | np.bool_):
        together = np.full(len(values), bool(common))
    else:
        together = check_array("common", common, kind="boolean", shape=values.shape[:1])
    bad = sound & ~np.isfinite(values).all(tuple(range(2, values.ndim)))
    if bad.any():
        d, r = np.argwhere(bad)[0]
        raise ValueError(
            f"values must be finite where trajectories are sound, but those of replica {r} of "
            f"network {d} are not."
        )
    kept = np.flatnonzero(sound.sum(1) >= 2)
    if len(kept) < 2:
        raise ValueError(
            "values of two networks with two sound trajectories each are needed at least, got "
            f"{len(kept)} of {len(values)}."
        )
    transform = _checked_transform(transform, values[kept[0], sound[kept[0]]].mean(0))
    samples = [values[d, sound[d]] for d in kept]
    shared = int(together[kept].sum())
    mean, reach, parts = _reach(samples, transform, shared, length, level)
    low, high = mean - reach, mean + reach
    if not np.all(np.isfinite(reach)):
        low, high = _of_ends(samples, transform, shared, length, level, low, high, reach)
    epistemic, sampling, aleatoric = map(np.sqrt, parts)
    return Intervals(mean, low, high, epistemic, sampling, aleatoric, len(kept))


def _reach(samples: list[np.ndarray], transform: Callable, shared: int, length: float, level):
    """Mean over the networks, half the width of intervals, and the three variances."""
    each, within, replicas = [], [], []
    with np.errstate(invalid="ignore"):
        for x in samples:
            n = len(x)
            without = np.stack([transform((x.sum(0) - one) / (n - 1)) for one in x])
            each.append(transform(x.mean(0)))
            within.append((n - 1) * without.var(0))
            replicas.append(n)
        D, R = len(samples), np.mean(replicas)
        B, w = np.var(each, axis=0, ddof=1), np.mean(within, 0)
        k = 1 - shared * (shared - 1) / (D * (D - 1))
        s = (shared**2 + D - shared) / D**2 if shared else 1 / D
        a = 1 + 1 / D
        epistemic, sampling, aleatoric = np.maximum(B - k * w, 0), s * w, R * w / length
        V = a * epistemic + sampling + aleatoric
        of_networks = (a * B) ** 2 / (D - 1)
        of_replicas = ((s + R / length - k * a) * w) ** 2 / (sum(replicas) - D)
        total = of_networks + of_replicas
        freedom = np.maximum(V**2 / np.where(total > 0, total, 1), 2)
        mean = np.mean(each, 0)
    from scipy.stats import t

    reach = t.ppf((1 + level) / 2, freedom) * np.sqrt(V)
    return mean, reach, (epistemic, sampling, aleatoric)


def _of_ends(samples, transform, shared, length, level, low, high, reach):
    """Ends of intervals of the averages, transformed, where those of T are not finite."""
    mean, plain, _ = _reach(samples, lambda average: average, shared, length, level)
    least = 0.0 if all(x.min() >= 0 for x in samples) else -np.inf
    with np.errstate(invalid="ignore"):
        ends = [transform(np.maximum(mean - plain, least)), transform(mean + plain)]
    if np.shape(ends[0]) != np.shape(reach):
        return low, high
    lost = ~np.isfinite(reach)
    below, above = np.fmin(*ends), np.where(np.isnan(ends).any(0), np.inf, np.fmax(*ends))
    return np.where(lost, below, low), np.where(lost, above, high)


def _checked_transform(transform: Callable, example: np.ndarray) -> Callable:
    """The transform, which fails in words, and is a number (or infinity) of what is an average."""

    def of(average):
        try:
            result = np.asarray(transform(average), np.float64)
        except Exception as error:
            raise ValueError(
                f"transform fails on an average of shape {np.shape(average)}: {first_line(error)}."
            ) from error
        return result

    if np.isnan(of(example)).any():
        raise ValueError("transform gives NaN for the average of the first network.")
    return of
