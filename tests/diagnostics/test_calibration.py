"""Calibration and scores of predictions, against closed forms, quadrature and binomial errors."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import erf, ndtri
from scipy.stats import norm, spearmanr

from stochgrad.diagnostics import calibration, interval_coverage
from tests.conftest import Z

RNG = np.random.default_rng(0)
N = 20_000


def mixture(n=N, d=5):
    """Draws and noise of a mixture, all different, and observations of it."""
    m, s = 10 + RNG.normal(size=(d, n)), RNG.uniform(0.5, 2.0, size=(d, n))
    which = RNG.integers(d, size=n), np.arange(n)
    return m[which] + s[which] * RNG.normal(size=n), m, s


def holds(found, expected):
    """Coverage within binomial errors of what it should be, and the area with it."""
    error = np.sqrt(expected * (1 - expected) / N)
    assert np.all(np.abs(found.coverage - expected) < Z * error)
    ends = np.concatenate([[0.0], found.levels, [1.0]])
    area = np.trapezoid(np.abs(np.pad(expected - found.levels, 1)), ends)
    assert abs(found.miscalibration_area - area) < Z * np.trapezoid(np.pad(error, 1), ends)


def test_intervals_of_the_right_mixture_hold_their_share():
    """One that takes the mixture for a Gaussian, or one draw for all, fails."""
    found = calibration(*mixture())
    np.testing.assert_allclose(found.levels, np.arange(1, 20) / 20)
    holds(found, found.levels)


def test_overconfidence_is_seen_at_its_exact_size():
    """Noise halved: an interval of z/2 standard deviations where one of z is told."""
    m, s = RNG.normal(size=(1, N)), RNG.uniform(0.5, 2.0, size=N)
    levels = np.linspace(0.02, 0.98, 13)
    found = calibration(m[0] + s * RNG.normal(size=N), m, s / 2, levels=levels)
    np.testing.assert_array_equal(found.levels, levels)
    holds(found, erf(ndtri((1 + levels) / 2) / 2 / np.sqrt(2)))


@pytest.mark.parametrize("d", [1, 6, 19])
def test_without_noise_ranks_are_uniform(d):
    """Ends of intervals fall on ranks: rounding of u or of a level would lose whole ranks."""
    found = calibration(RNG.normal(size=N), RNG.normal(size=(d, N)))
    twentieths = np.arange(1, 20)
    inside = 20 * np.abs(2 * np.arange(d + 1)[:, None] - d) <= twentieths * (d + 1)
    expected = inside.mean(axis=0)
    np.testing.assert_array_less(np.abs(expected - found.levels), 1 / (d + 1) + 1e-12)
    certain = (expected == 0) | (expected == 1)
    np.testing.assert_array_equal(found.coverage[certain], expected[certain])
    error = np.sqrt(expected * (1 - expected) / N)[~certain]
    assert np.all(np.abs(found.coverage - expected)[~certain] < Z * error)


def test_ties_count_by_half():
    """An observation amid draws equal to it is at their center, not at an end."""
    draws = np.array([[0.0], [1.0], [1.0], [2.0]])
    np.testing.assert_array_equal(calibration([1.0], draws).coverage, 1)
    assert calibration([1.0], draws).miscalibration_area == pytest.approx(0.5)
    at_end = calibration([0.0], draws, levels=[0.59, 0.6])  # u = (1/2 + 1/2) / 5
    np.testing.assert_array_equal(at_end.coverage, [0, 1])


@pytest.mark.parametrize("noise", [None, 0.4, [[0.2], [0.5], [1.5]]])
def test_crps_is_its_integral(noise):
    """A pair counted twice, or not at all, or a variance taken for a deviation, would show."""
    y, m = RNG.normal(size=4), RNG.normal(size=(3, 4))
    total = 0.0
    for i in range(4):
        if noise is None:
            cdf = lambda x: np.mean(m[:, i] <= x)
        else:
            cdf = lambda x: norm.cdf(x, m[:, i], np.broadcast_to(noise, m.shape)[:, i]).mean()
        breaks = np.sort([-20.0, 20.0, y[i], *m[:, i]])
        for low, high in pairwise(breaks):
            total += quad(lambda x: (cdf(x) - (x >= y[i])) ** 2, low, high, epsabs=1e-12)[0]
    np.testing.assert_allclose(calibration(y, m, noise).crps, total / 4, rtol=1e-8)


def test_scores_of_one_gaussian_have_their_closed_forms():
    y, m, s = RNG.normal(size=50), RNG.normal(size=50), RNG.uniform(0.2, 2.0, size=50)
    found, z = calibration(y, m[None], s), (y - m) / s
    crps = s * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    np.testing.assert_allclose(found.crps, crps.mean(), rtol=1e-12)
    np.testing.assert_allclose(found.nll, -norm.logpdf(y, m, s).mean(), rtol=1e-12)
    np.testing.assert_allclose(found.rmse, np.sqrt(np.mean((y - m) ** 2)), rtol=1e-12)
    np.testing.assert_allclose(found.sharpness, np.sqrt(np.mean(s**2)), rtol=1e-12)


def test_log_density_is_that_of_the_mixture_however_far_out():
    """The mean of the draws' log densities, or an underflow, would show."""
    y, m, s = mixture(n=100)
    expected = -np.log(norm.pdf(y, m, s).mean(axis=0)).mean()
    np.testing.assert_allclose(calibration(y, m, s).nll, expected, rtol=1e-12)
    far = calibration(100.0, np.zeros(7), 1.0)
    np.testing.assert_allclose(far.nll, -norm.logpdf(100.0), rtol=1e-12)


def test_the_predictive_variance_is_that_between_draws_and_within():
    found = calibration([3.0], [[0.0], [2.0]], [[1.0], [3.0]])
    assert found.sharpness == pytest.approx(np.sqrt(1 + (1 + 9) / 2))
    assert found.rmse == pytest.approx(2.0)
    assert calibration([3.0], [[0.0], [2.0]]).sharpness == pytest.approx(1.0)


def test_large_errors_are_found_where_they_are_predicted():
    """Under shuffled noise, a rank correlation is normal with variance 1 / (N - 1)."""
    m, s = RNG.normal(size=(1, N)), np.exp(RNG.normal(size=N))
    y = m[0] + s * RNG.normal(size=N)
    known, shuffled = calibration(y, m, s), calibration(y, m, RNG.permutation(s))
    assert known.rank_correlation * np.sqrt(N - 1) > Z
    assert abs(shuffled.rank_correlation) * np.sqrt(N - 1) < Z
    expected = spearmanr(np.abs(y - m[0]), s).statistic
    np.testing.assert_allclose(known.rank_correlation, expected, rtol=1e-12)
    assert np.isnan(calibration(y, m, 0.7).rank_correlation)
    assert np.isnan(calibration(m[0], m, s).rank_correlation)  # no errors to rank


@pytest.mark.parametrize("shape", [(), (4, 2), (2,), (3, 1, 1), (3, 4, 2)])
def test_noise_and_observations_have_any_shape(shape):
    """Noise matched with the wrong axis would change the numbers."""
    y, m = RNG.normal(size=(4, 2)), RNG.normal(size=(3, 4, 2))
    noise = RNG.uniform(0.5, 2.0, size=shape)
    full = np.broadcast_to(noise, m.shape).reshape(3, 8)
    flat = calibration(y.ravel(), m.reshape(3, 8), full)
    for one, other in zip(calibration(y, m, noise), flat, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_only_observations_that_count_are_scored():
    """Padded forces of calibrated networks: area 0.015, NLL 1.417, RMSE 0.996 by real atoms."""
    rng = np.random.default_rng(0)
    mask = np.arange(20)[None] < np.where(np.arange(400) % 2, 5, 20)[:, None]
    rng.normal(size=(400, 20, 3))
    truth = rng.normal(size=(400, 20, 3))
    y = np.where(mask[..., None], truth + rng.normal(size=truth.shape), 0)
    m = np.where(mask[..., None], truth + 0.3 * rng.normal(size=(30, 400, 20, 3)), 0)
    found = calibration(y, m, 1.0, where=mask)
    figures = [round(x, 3) for x in (found.miscalibration_area, found.nll, found.rmse)]
    assert figures == [0.015, 1.417, 0.996]
    alone = calibration(y[mask], m[:, mask], 1.0)
    each = calibration(y, m, np.ones(y.shape), where=np.broadcast_to(mask[..., None], y.shape))
    unfilled = calibration(np.where(mask[..., None], y, np.nan), m, 1.0, where=mask)
    for other in (alone, each, unfilled):
        for one, two in zip(found, other, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-12)
    for shape in (y.shape, (8000, 3), (-1,)):
        with pytest.raises(ValueError, match=r"exactly zero in .*pass where=mask"):
            calibration(y.reshape(shape), m.reshape(30, *np.reshape(y, shape).shape), 1.0)
    counted = calibration(y, m, 1.0, where=np.ones(y.shape, bool))
    assert counted.miscalibration_area > 10 * found.miscalibration_area


def test_counts_of_zero_are_not_padding():
    """Whole numbers; and a component that is zero by symmetry."""
    y, m = RNG.poisson(0.1, size=50), RNG.poisson(0.1, size=(5, 50))
    assert np.isfinite(calibration(y, m).crps)
    flat = RNG.normal(size=(4, 3, 3)) * [1.0, 1.0, 0.0]
    assert np.isfinite(calibration(flat, flat[None] + [0.1, 0.1, 0.0], 1.0).crps)


def test_one_draw_without_noise_is_a_point():
    found = calibration([1.0, 2.0, 6.0], [[0.0, 4.0, 5.0]])
    np.testing.assert_array_equal(found.coverage, found.levels >= 0.5 - 1e-12)
    assert found.crps == pytest.approx(4 / 3)
    assert found.rmse == pytest.approx(np.sqrt(2))
    assert found.sharpness == 0
    assert np.isnan([found.nll, found.rank_correlation]).all()


def test_pairs_of_draws_are_not_all_held_at_once():
    y, m, s = mixture(n=50, d=300)
    calibration(y[:2], m[:, :2], s[:, :2])  # imports
    tracemalloc.start()
    calibration(y, m, s)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(m) / 10 * m.nbytes


NAN = np.array([[0.0, 1.0, np.nan]])


@pytest.mark.parametrize(
    ("args", "levels", "message"),
    [
        ((np.zeros(3), np.zeros((2, 4))), None, r"draws must have shape .*\(3,\).*got \(2, 4\)"),
        ((np.zeros(3), np.zeros(3)), None, r"draws must have shape .*got \(3,\)"),
        ((0.0, 0.0), None, r"draws must have shape .*got \(\)"),
        ((np.zeros(3), np.zeros((0, 3))), None, r"draws must .*not empty, got \(0, 3\)"),
        ((np.zeros(0), np.zeros((2, 0))), None, r"draws must .*not empty, got \(2, 0\)"),
        ((NAN, np.zeros((2, 1, 3))), None, r"observed must be finite, got nan at index \(0, 2\)"),
        ((np.zeros(3), NAN), None, r"draws must be finite, got nan at index \(0, 2\)"),
        ((np.zeros(2), np.zeros((3, 2)), 0.0), None, "noise must be positive and finite, got 0.0"),
        ((np.zeros(2), np.zeros((3, 2)), [1, -1]), None, r"noise .*got -1.0 at index \(1,\)"),
        ((np.zeros(2), np.zeros((3, 2)), np.nan), None, r"noise .*got nan"),
        ((np.zeros(2), np.zeros((3, 2)), np.ones(3)), None, r"noise must broadcast .*got \(3,\)"),
        ((np.zeros(2), np.zeros((3, 2))), [0.5, 1.0], "levels must increase from above 0"),
        ((np.zeros(2), np.zeros((3, 2))), [0.0, 0.5], "levels must increase from above 0"),
        ((np.zeros(2), np.zeros((3, 2))), [0.5, 0.4], "levels must increase from above 0"),
        ((np.zeros(2), np.zeros((3, 2))), [np.nan], "levels must increase from above 0"),
        ((np.zeros(2), np.zeros((3, 2))), 0.5, "levels must increase from above 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(args, levels, message):
    with pytest.raises(ValueError, match=message):
        calibration(*args, levels=levels)


def test_intervals_hold_their_ends_and_only_chosen_bins_count():
    truth = np.array([[1.0, 2.0, 3.0], [np.nan, 5.0, 6.0]])
    low, high = np.full((2, 3), 1.0), np.full((2, 3), 5.0)
    where = ~np.isnan(truth)
    assert interval_coverage(truth, low, high, where) == pytest.approx(4 / 5)
    assert interval_coverage(truth[0], low[0], high[0]) == 1
    assert interval_coverage(truth, low, high, truth == 6) == 0
    with pytest.raises(ValueError, match=r"truth must be a number .*got nan at index \(1, 0\)"):
        interval_coverage(truth, low, high)
    with pytest.raises(ValueError, match=r"low must be at most high, got 5.0 at index \(0, 0\)"):
        interval_coverage(truth, high, low, where)
    with pytest.raises(ValueError, match=r"must have one shape, got \(2, 3\), \(3,\)"):
        interval_coverage(truth, low[0], high, where)
    with pytest.raises(ValueError, match="where must choose something, got False everywhere"):
        interval_coverage(truth, low, high, np.zeros((2, 3), bool))
    with pytest.raises(TypeError, match="where must be an array of booleans, got dtype int64"):
        interval_coverage(truth, low, high, where.astype(int))
