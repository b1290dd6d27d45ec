"""Intervals: the formula by hand, and how often they hold what they should."""

import numpy as np
import pytest
from scipy.stats import t

from stochgrad.potentials import free_energy, intervals
from tests.conftest import Z

RNG = np.random.default_rng(9)
X = RNG.normal(size=(5, 1, 3)) + 0.5 * RNG.normal(size=(5, 4, 3))
"""Five networks of four replicas, three bins."""


def by_hand(x, level, length=np.inf, common=False):
    """Of the identity: a jackknife variance is that of a mean."""
    d, r = x.shape[:2]
    each = x.mean(1)
    between, within = each.var(0, ddof=1), (x.var(1, ddof=1) / r).mean(0)
    epistemic = between if common else np.maximum(between - within, 0)
    sampling = within if common else within / d
    aleatoric = r * within / length
    reach = t.ppf(0.5 + level / 2, d - 1) * np.sqrt((1 + 1 / d) * epistemic + sampling + aleatoric)
    return each.mean(0), reach, np.sqrt([epistemic, sampling, aleatoric])


@pytest.mark.parametrize("options", [{}, {"measured": 2.5}, {"common": True}, {"level": 0.5}])
def test_the_formula(options):
    found = intervals(X, **options)
    mean, reach, parts = by_hand(
        X, options.get("level", 0.9), options.get("measured", np.inf), options.get("common", False)
    )
    np.testing.assert_allclose(found.mean, mean)
    np.testing.assert_allclose(found.low, mean - reach)
    np.testing.assert_allclose(found.high, mean + reach)
    np.testing.assert_allclose([found.epistemic, found.sampling, found.aleatoric], parts)
    assert found.networks == 5


def test_networks_that_differ_by_less_than_their_error_have_no_epistemic_part():
    x = np.stack([[-1.0, 1.0, 0.1], [1.0, -1.0, 0.0]])
    found = intervals(x)
    assert found.epistemic == 0
    assert found.sampling > 0


def test_exploded_replicas_are_left_out():
    """NaN in them too; and a network of one sound replica altogether."""
    x, sound = np.concatenate([X, X[:1]]), np.ones((6, 4), bool)
    sound[1, 2] = sound[5, 1] = sound[5, 2] = sound[5, 0] = False
    x[~sound] = np.nan
    found = intervals(x, sound=sound, measured=3.0)
    assert found.networks == 5
    kept = [x[d, sound[d]] for d in range(5)]
    each = np.stack([k.mean(0) for k in kept])
    within = np.mean([k.var(0, ddof=1) / len(k) for k in kept], 0)
    np.testing.assert_allclose(found.mean, each.mean(0))
    np.testing.assert_allclose(found.epistemic**2, np.maximum(each.var(0, ddof=1) - within, 0))
    np.testing.assert_allclose(found.sampling**2, within / 5)


def test_a_transform_of_the_averages_and_not_of_the_replicas():
    """With the error of the delta method where replicas scatter little."""
    x = np.exp(RNG.normal(size=(4, 1, 2))) + 1e-4 * RNG.normal(size=(4, 6, 2))
    found = intervals(x, transform=np.log)
    np.testing.assert_allclose(found.mean, np.log(x.mean(1)).mean(0))
    delta = (x.var(1, ddof=1) / 6 / x.mean(1) ** 2).mean(0) / 4
    np.testing.assert_allclose(found.sampling**2, delta, rtol=1e-2)
    linear = intervals(x, transform=lambda mean: 3 * mean - 1)
    np.testing.assert_allclose(linear.high, 3 * intervals(x).high - 1)


def test_a_free_energy_of_bins_that_are_never_visited():
    """The bins that are visited have their intervals, and nothing is said of the others."""
    p = np.abs(RNG.normal(size=(4, 6, 3)))
    p[..., 1] = 0
    found = intervals(p, transform=free_energy)
    alone = intervals(p[..., [0, 2]], transform=free_energy)
    np.testing.assert_allclose(found.high[[0, 2]], alone.high)


SIMULATIONS = 4000


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_hold_the_truth_as_often_as_they_say(level):
    """Few networks, without an error of sampling: Student's quantile is exact."""
    networks, truth = RNG.normal(size=(4, 1, SIMULATIONS)), RNG.normal(size=SIMULATIONS)
    found = intervals(np.repeat(networks, 2, 1), level=level)
    held = ((found.low < truth) & (truth < found.high)).mean()
    assert abs(held - level) < Z * np.sqrt(level * (1 - level) / SIMULATIONS)


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("measured", [None, 0.5])
def test_intervals_hold_a_measurement_as_often_as_they_say(common, measured):
    """Many networks and replicas, so that every part is known: a forgotten part shows."""
    level, d, r, scatter = 0.9, 60, 30, 5.0
    networks, truth = RNG.normal(size=(d, 1, SIMULATIONS)), RNG.normal(size=SIMULATIONS)
    noise = RNG.normal(size=(1 if common else d, r, SIMULATIONS))
    if measured is not None:
        truth = truth + scatter / np.sqrt(measured) * RNG.normal(size=SIMULATIONS)
    found = intervals(networks + scatter * noise, level=level, measured=measured, common=common)
    held = ((found.low < truth) & (truth < found.high)).mean()
    assert abs(held - level) < Z * np.sqrt(level * (1 - level) / SIMULATIONS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"values": np.ones(3)}, r"values must have shape .*got \(3,\)"),
        ({"values": X[:1]}, "two networks with two sound trajectories each .*got 1 of 1"),
        ({"values": X[:, :1]}, "got 0 of 5"),
        ({"sound": np.zeros((5, 4), bool)}, "got 0 of 5"),
        ({"sound": np.ones(5, bool)}, r"sound must have shape \(5, 4\), got \(5,\)"),
        ({"level": 1.0}, "level must be below 1"),
        ({"level": 0.0}, "level must be a positive number"),
        ({"measured": 0.0}, "measured must be a positive number"),
    ],
)
def test_bad_input_is_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        intervals(**{"values": X, **options})
