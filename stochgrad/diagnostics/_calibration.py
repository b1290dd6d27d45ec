"""Whether predictions are as uncertain as they are wrong, and intervals hold what they should."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from stochgrad.core import check_array

_ROUNDING = 1e-12  # of levels, ranks and deviations; distances of ranks are far above it


class Calibration(NamedTuple):
    r"""How well a predictive distribution fits observations.

    Attributes:
        levels: Nominal levels p of central intervals.
        coverage: Share of the observations that lie inside them.
        miscalibration_area: $\int_0^1 |\mathrm{coverage}(p) - p|\,dp$, by trapezoids.
        crps: Mean continuous ranked probability score, in units of the observations.
        nll: Mean of $-\log$ predictive density; NaN without noise.
        sharpness: Root of the mean predictive variance.
        rmse: Root mean square error of the predictive mean.
        rank_correlation: Spearman's, of the mean's absolute error with the predictive standard
            deviation; NaN where either is the same everywhere.
    """

    levels: Float[np.ndarray, " levels"]
    coverage: Float[np.ndarray, " levels"]
    miscalibration_area: float
    crps: float
    nll: float
    sharpness: float
    rmse: float
    rank_correlation: float


def calibration(
    observed: Any, draws: Any, noise: Any = None, *, levels: Any = None, where: Any = None
) -> Calibration:
    r"""Calibration, sharpness and scores of the predictions of posterior draws.

    Each observation y is predicted by the mixture of D draws,
    $F = \frac1D\sum_d \mathcal N(m_d, s_d^2)$. The central interval of level p holds it if
    $|u - \frac12| \le \frac p2$, where $u = F(y)$. Its score is, in closed form (Grimit, Gneiting,
    Berrocal & Johnson, Q. J. R. Meteorol. Soc. 2006),

    $$\mathrm{CRPS} = \int (F(x) - 1[x \ge y])^2\,dx = \frac1D\sum_d A(y - m_d, s_d^2)
      - \frac1{2D^2}\sum_{d,e} A(m_d - m_e, s_d^2 + s_e^2),$$

    $$A(\mu, v) = 2\sqrt v\,\phi(\mu/\sqrt v) + \mu\,(2\Phi(\mu/\sqrt v) - 1),\ A(\mu, 0) = |\mu|.$$

    Without noise F is the draws' empirical distribution, and $u = (r + \frac12)/(D + 1)$, with r
    the number of draws below y, ties counted by half: coverage then rises in steps, and right draws
    too are off by up to 1/(D + 1). Coverage against level is the reliability diagram of Kuleshov,
    Fenner & Ermon (ICML 2018), the area that of Tran et al. (Mach. Learn.: Sci. Technol. 2020).
    With noise, time is quadratic in D, memory linear.

    Args:
        observed: Observations y, of any shape S.
        draws: Predictions $m_d$ of each draw, shape (D, \*S).
        noise: Standard deviation $s_d$ of an observation about a prediction: a number, shape S,
            (D, 1, ..., 1), or whatever broadcasts to the draws; None where the draws contain it.
        levels: Increasing levels in (0, 1); 0.05, 0.1, ..., 0.95 by default.
        where: Booleans, which observations count: of shape S, or of its first axes only, such as
            the mask (N, atoms) of forces (N, atoms, 3). All by default. What is left out may hold
            anything.

    Raises:
        TypeError: these are no arrays of numbers, or ``where`` none of booleans.
        ValueError: shapes do not fit or are empty, a number that counts is not finite, noise is not
            positive, or levels do not increase from above 0 to below 1; or, without ``where``,
            there is padding: numbers that are exactly zero in the observations and in all draws (a
            whole last axis of them, in three axes or more), unless all draws are whole numbers.

    Example:
        >>> import numpy as np
        >>> from stochgrad.diagnostics import calibration
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=2000)
        >>> y = 2 * x + 0.5 * rng.normal(size=2000)
        >>> slopes = 2 + 0.01 * rng.normal(size=(20, 1))
        >>> [calibration(y, slopes * x, s).miscalibration_area < 0.02 for s in (0.5, 0.3)]
        [True, False]
    """
    from scipy.special import logsumexp, ndtr
    from scipy.stats import rankdata

    y = check_array("observed", observed, finite=False).astype(np.float64)
    m = check_array("draws", draws, finite=False).astype(np.float64)
    p = np.linspace(0.05, 0.95, 19)
    if levels is not None:
        p = check_array("levels", levels, finite=False).astype(np.float64)
    if m.ndim != y.ndim + 1 or m.shape[1:] != y.shape or not m.size:
        raise ValueError(
            f"draws must have shape (D, *{y.shape}) by observed, not empty, got {m.shape}."
        )
    s = None
    if noise is not None:
        s = check_array("noise", noise, finite=False).astype(np.float64)
    if where is not None:
        counted = _counted(where, y.shape)
        s = None if s is None else _broadcast_noise(s, m.shape, counted)[:, counted]
        y, m = y[counted], m[:, counted]
    _check("observed", y, np.isfinite(y), "finite")
    _check("draws", m, np.isfinite(m), "finite")
    if p.ndim != 1 or not p.size or not np.all(np.diff(p, prepend=0.0, append=1.0) > 0):
        raise ValueError(f"levels must increase from above 0 to below 1, got {p}.")
    if where is None:
        _refuse_padding(y, m)
    variance = m.var(axis=0)
    if s is None:
        u = ((m < y).sum(axis=0) + (m <= y).sum(axis=0) + 1) / (2 * len(m) + 2)
        crps, nll = _empirical_crps(m - y), np.nan
    else:
        s = _broadcast_noise(s, m.shape)
        variance = variance + np.mean(s**2, axis=0)
        z = (y - m) / s
        u = ndtr(z).mean(axis=0)
        log_density = logsumexp(-0.5 * z**2 - np.log(s), axis=0) - np.log(len(m))
        crps, nll = _mixture_crps(m - y, s), 0.5 * np.log(2 * np.pi) - np.mean(log_density)
    ends, off_center = np.pad(p, 1, constant_values=(0, 1)), np.sort(np.abs(u - 0.5), axis=None)
    coverage = np.searchsorted(off_center, ends / 2 + _ROUNDING, side="right") / y.size
    error, sd = np.abs(m.mean(axis=0) - y), np.sqrt(variance)
    varied = all(np.ptp(x) > _ROUNDING * np.max(x) for x in (error, sd))
    return Calibration(
        levels=p,
        coverage=coverage[1:-1],
        miscalibration_area=float(np.trapezoid(np.abs(coverage - ends), ends)),
        crps=float(np.mean(crps)),
        nll=float(nll),
        sharpness=float(np.sqrt(variance.mean())),
        rmse=float(np.sqrt(np.mean(error**2))),
        rank_correlation=float(np.corrcoef(rankdata(error), rankdata(sd))[0, 1])
        if varied
        else np.nan,
    )


def interval_coverage(truth: Any, low: Any, high: Any, where: Any = None) -> float:
    r"""Share of true values inside their intervals, $\frac1n\sum_i 1[l_i \le t_i \le h_i]$.

    Args:
        truth: True values t, of any shape.
        low: Lower ends l, of the same shape.
        high: Upper ends h, likewise; an end itself is inside.
        where: Booleans, likewise: which bins to count; all by default.

    Raises:
        TypeError: these are no arrays of numbers, or ``where`` none of booleans.
        ValueError: shapes differ, an interval ends before it begins, ``where`` chooses nothing, or
            a number that it chooses is NaN.

    Example:
        >>> from stochgrad.diagnostics import interval_coverage
        >>> interval_coverage([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 3.0])
        0.75
    """
    t, l, h = (  # noqa: E741
        check_array(name, x, finite=False).astype(np.float64)
        for name, x in {"truth": truth, "low": low, "high": high}.items()
    )
    mask = np.ones(t.shape, bool) if where is None else _booleans(where)
    if not t.shape == l.shape == h.shape == mask.shape:
        got = f"{t.shape}, {l.shape}, {h.shape} and {mask.shape}"
        raise ValueError(f"truth, low, high and where must have one shape, got {got}.")
    if not t.size:
        raise ValueError("truth must not be empty.")
    if not mask.any():
        raise ValueError("where must choose something, got False everywhere.")
    for name, x in {"truth": t, "low": l, "high": h}.items():
        _check(name, x, ~(mask & np.isnan(x)), "a number where it is counted")
    _check("low", l, ~(l > h), "at most high")
    return float(np.mean((l <= t) & (t <= h), where=mask))


def _check(name, x, good, wanted):
    if not good.all():
        index = tuple(map(int, np.argwhere(~good)[0]))
        raise ValueError(f"{name} must be {wanted}, got {x[index]} at index {index}.")


def _booleans(where):
    return check_array("where", where, kind="boolean")


def _counted(where, shape):
    """Which observations count, from booleans of their shape or of its first axes."""
    mask = _booleans(where)
    if mask.ndim > len(shape) or mask.shape != shape[: mask.ndim]:
        raise ValueError(
            f"where must have the shape of observed, {shape}, or of its first axes, got "
            f"{mask.shape}."
        )
    if not mask.any():
        raise ValueError("where must choose something, got False everywhere.")
    more = (1,) * (len(shape) - mask.ndim)
    return np.broadcast_to(mask.reshape(*mask.shape, *more), shape)


def _refuse_padding(y, m):
    """Raise where observation and draws are all exactly zero, as only padding (or counts) are."""
    zero = (y == 0) & (m == 0).all(axis=0)
    if y.ndim >= 3:
        zero = zero.all(axis=-1)
    if zero.any() and np.any(np.mod(m, 1) != 0):
        index = tuple(map(int, np.argwhere(zero)[0]))
        raise ValueError(
            f"observed and all draws are exactly zero in {zero.sum()} places, the first at index "
            f"{index}, as padding is: pass where=mask, booleans of what counts, to leave it out, "
            f"or where=numpy.ones({y.shape}, bool) to count it."
        )


def _broadcast_noise(s, shape, counted=None):
    if counted is None:
        _check("noise", s, np.isfinite(s) & (s > 0), "positive and finite")
    try:
        s = np.broadcast_to(s, shape)
    except ValueError:
        raise ValueError(f"noise must broadcast to draws, {shape}, got {s.shape}.") from None
    if counted is not None:
        _check("noise", s, ~counted | (np.isfinite(s) & (s > 0)), "positive and finite")
    return s


def _mixture_crps(m, s):
    total = 0.5 * _mean_distance(0.0, np.sqrt(2) * s).sum(axis=0)
    for d in range(len(m) - 1):  # memory of one row of pairs at a time
        total += _mean_distance(m[d] - m[d + 1 :], np.hypot(s[d], s[d + 1 :])).sum(axis=0)
    return _mean_distance(m, s).mean(axis=0) - total / len(m) ** 2


def _mean_distance(mu, sd):
    """E|X| for a normal X: A of the formula, with the root of v."""
    from scipy.special import erf

    z = mu / (np.sqrt(2) * sd)
    return np.sqrt(2 / np.pi) * sd * np.exp(-(z**2)) + mu * erf(z)


def _empirical_crps(m):
    """The mean distance of two draws is a weighted sum of the sorted ones."""
    n = len(m)
    weights = (2 * np.arange(n) - n + 1) / n**2
    return np.abs(m).mean(axis=0) - np.tensordot(weights, np.sort(m, axis=0), axes=1)
