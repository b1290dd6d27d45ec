"""Credible intervals of observables, and what they are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from stochgrad.core import check_array, check_callable, check_flag, check_number, first_line


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
    common: bool = False,
) -> Intervals:
    r"""Credible intervals of an observable from its averages over trajectories.

    Let $x_{dr}$ be the average over replica r of network d, $T_d = T(\bar x_{d\cdot})$ of D
    networks, and $w_d$ the jackknife variance of $T_d$ over its R replicas. With B the variance of
    the $T_d$ and $\bar w$ the mean of the $w_d$,

    $$\sigma_{epi}^2 = \max(B - \bar w, 0), \qquad \sigma_{MD}^2 = \bar w / D, \qquad
      \sigma_{al}^2 = R\bar w / L,$$

    $$\bar T \pm t_{D-1}\sqrt{(1 + 1/D)\,\sigma_{epi}^2 + \sigma_{MD}^2 + \sigma_{al}^2},$$

    where the measurement that the intervals are for is L times as long as a replica, and t is
    Student's quantile, for D networks tell their spread no better.

    Args:
        values: Averages, shape (D, R, ...), as ``stochgrad.potentials.average`` gives.
        level: Probability of the intervals.
        sound: Which trajectories count, shape (D, R), as ``Trajectories.sound``. A network with
            fewer than two is left out.
        transform: T, of an average: ``free_energy`` of a histogram, say.
        measured: L; None for a measurement without error.
        common: Whether all networks' averages are of the same frames, reweighted: then they share
            the error of finite trajectories, $\sigma_{epi}^2 = B$ and $\sigma_{MD}^2 = \bar w$.

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
    common = check_flag("common", common)
    check_callable("transform", transform, "a function of an average")
    if sound is None:
        sound = np.ones(values.shape[:2], bool)
    else:
        sound = check_array("sound", sound, kind="boolean")
    if sound.shape != values.shape[:2]:
        raise ValueError(f"sound must have shape {values.shape[:2]}, got {sound.shape}.")
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
    each, within, replicas = [], [], []
    with np.errstate(invalid="ignore"):  # the free energy of a bin that none has visited
        for d in kept:
            x = values[d, sound[d]]
            n = len(x)
            without = np.stack([transform((x.sum(0) - one) / (n - 1)) for one in x])
            each.append(transform(x.mean(0)))
            within.append((n - 1) * without.var(0))
            replicas.append(n)
        count, spread = len(kept), np.var(each, axis=0, ddof=1)
    error = np.mean(within, 0)
    epistemic = spread if common else np.maximum(spread - error, 0)
    sampling = error if common else error / count
    aleatoric = np.mean(replicas) * error / length
    from scipy.stats import t

    total = np.sqrt((1 + 1 / count) * epistemic + sampling + aleatoric)
    reach = t.ppf((1 + level) / 2, count - 1) * total
    mean = np.mean(each, 0)
    return Intervals(
        mean,
        mean - reach,
        mean + reach,
        np.sqrt(epistemic),
        np.sqrt(sampling),
        np.sqrt(aleatoric),
        count,
    )


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
