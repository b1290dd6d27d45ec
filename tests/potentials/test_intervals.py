"""Intervals: the formula by hand, and how often they hold what they should."""

import numpy as np
import pytest
from scipy.stats import t

from stochgrad.potentials import free_energy, intervals
from tests.conftest import Z

RNG = np.random.default_rng(9)
X = RNG.normal(size=(5, 1, 3)) + 0.5 * RNG.normal(size=(5, 4, 3))
"""Five networks of four replicas, three bins."""


def by_hand(x, level, length=np.inf, shared=0):
    """Of the identity: a jackknife variance is that of a mean."""
    d, r = x.shape[:2]
    each = x.mean(1)
    between, within = each.var(0, ddof=1), (x.var(1, ddof=1) / r).mean(0)
    seen = 1 - shared * (shared - 1) / (d * (d - 1))
    left = (shared**2 + d - shared) / d**2
    epistemic = np.maximum(between - seen * within, 0)
    sampling, aleatoric = left * within, r * within / length
    whole = (1 + 1 / d) * epistemic + sampling + aleatoric
    terms = ((1 + 1 / d) * between) ** 2 / (d - 1)
    terms += ((left + r / length - seen * (1 + 1 / d)) * within) ** 2 / (d * (r - 1))
    reach = t.ppf(0.5 + level / 2, np.maximum(whole**2 / terms, 2)) * np.sqrt(whole)
    return each.mean(0), reach, np.sqrt([epistemic, sampling, aleatoric])


SOME = np.array([True, False, True, True, False])


@pytest.mark.parametrize(
    "options",
    [{}, {"measured": 2.5}, {"common": True}, {"common": SOME, "measured": 3.0}, {"level": 0.5}],
)
def test_the_formula(options):
    found = intervals(X, **options)
    shared = int(np.sum(np.broadcast_to(options.get("common", False), 5)))
    mean, reach, parts = by_hand(
        X, options.get("level", 0.9), options.get("measured", np.inf), shared
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


EXACT = {
    "no noise": (0.01, None),
    "noise of a tenth": (0.1, None),
    "a measurement as long": (0.5, 1.0),
    "noise above all, a measurement as long": (4.0, 1.0),
    "a short measurement": (4.0, 0.05),
    "little noise, a short measurement": (0.05, 0.05),
}
"""Variance of a network's average over that of the networks, and length of the measurement."""


def held(noise, measured, networks=8, replicas=8, common=False):
    """Share of intervals at 0.9 that hold a measurement, over networks of variance one."""
    truth = RNG.normal(size=SIMULATIONS)
    own = RNG.normal(size=(networks, replicas, SIMULATIONS))
    which = np.broadcast_to(common, networks)
    own[which] = RNG.normal(size=(replicas, SIMULATIONS))
    scatter = np.sqrt(noise * replicas)
    if measured is not None:
        truth = truth + scatter / np.sqrt(measured) * RNG.normal(size=SIMULATIONS)
    values = RNG.normal(size=(networks, 1, SIMULATIONS)) + scatter * own
    found = intervals(values, measured=measured, common=common)
    return np.mean((found.low < truth) & (truth < found.high))


@pytest.mark.parametrize("case", EXACT)
def test_eight_networks_hold_what_they_say(case):
    """To a hundredth, where one quantile of seven degrees held 0.84 to 0.94."""
    error = Z * np.sqrt(0.09 / SIMULATIONS)
    assert abs(held(*EXACT[case]) - 0.9) < 0.01 + error


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 100.0])
def test_noise_that_hides_the_networks_spread_makes_no_interval_too_narrow(noise):
    """The spread cannot be told from it: intervals hold more then."""
    assert held(noise, None) > 0.89 - Z * np.sqrt(0.09 / SIMULATIONS)


@pytest.mark.parametrize("common", [True, np.arange(8) < 5, np.arange(8) < 1])
def test_networks_in_one_run_share_its_noise(common):
    """Those that are reweighted, and others with dynamics of their own."""
    assert abs(held(0.1, None, common=common) - 0.9) < 0.015 + Z * np.sqrt(0.09 / SIMULATIONS)


def test_a_bin_that_one_replica_alone_has_visited_has_one_end():
    """Its free energy is infinite without that replica: the interval says how low it may be."""
    p = 0.2 + 0.01 * np.abs(RNG.normal(size=(4, 6, 2)))
    p[..., 1] = 0
    p[:, 2, 1] = 0.01
    found = intervals(p, transform=free_energy)
    alone = intervals(p[..., :1], transform=free_energy)
    np.testing.assert_allclose(found.low[0], alone.low[0])
    np.testing.assert_allclose(found.high[0], alone.high[0])
    plain = intervals(p)
    np.testing.assert_allclose(found.low[1], free_energy(plain.high)[1])
    assert plain.low[1] < 0
    assert found.high[1] == np.inf


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
        ({"common": np.ones(3, bool)}, "common"),
    ],
)
def test_bad_input_is_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        intervals(**{"values": X, **options})
