"""Reweighting against closed forms of harmonic wells, and where it gives way to new dynamics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad.potentials import Observable, mean_energy, propagate, reweight
from tests.conftest import Z

KT = 1.3
SPRINGS = np.array([1.0, 1.3, 0.8], np.float32)
FRAMES = (np.random.default_rng(0).normal(size=(16, 250, 1, 3)) * np.sqrt(KT)).astype(np.float32)
"""Independent frames of the spring of stiffness one."""


def spring(k, positions):
    return 0.5 * k * jnp.sum(positions**2)


def unit_spring(positions):
    return 0.5 * jnp.sum(positions**2)


@pytest.fixture(scope="module")
def found():
    return reweight(spring, SPRINGS, FRAMES, unit_spring, kT=KT)


def test_weights_are_boltzmann_factors(found):
    """Of all replicas' frames together; and of the temperature, not one."""
    r2 = (FRAMES.astype(float) ** 2).sum((-1, -2))
    expected = np.exp(-(SPRINGS.astype(float) - 1)[:, None, None] * r2 / 2 / KT)
    expected /= expected.sum((1, 2), keepdims=True)
    assert found.weights.shape == (3, 16, 250)
    np.testing.assert_allclose(found.weights, expected, rtol=1e-4)
    np.testing.assert_allclose(found.weights.sum((1, 2)), 1)
    np.testing.assert_allclose(found.ess, 1 / (expected**2).sum((1, 2)) / 4000, rtol=1e-4)


def test_the_reference_keeps_all_of_its_frames(found):
    np.testing.assert_allclose(found.ess[0], 1, rtol=1e-6)
    assert np.all(found.ess[1:] < 1)


def test_reweighted_variances_are_those_of_the_wells(found):
    """kT/k, in the standard error of a ratio."""
    x2 = (FRAMES.astype(float) ** 2).mean((-1, -2))
    for d in range(3):
        w, expected = found.weights[d], KT / SPRINGS[d]
        error = np.sqrt((w**2 * (x2 - expected) ** 2).sum())
        assert abs((w * x2).sum() - expected) < Z * error


def test_energies_do_for_a_reference(found):
    """And a constant that they differ by does not matter."""
    energies = 0.5 * (FRAMES**2).sum((-1, -2)) + 100
    again = reweight(spring, SPRINGS, FRAMES, energies, kT=KT)
    np.testing.assert_allclose(again.weights, found.weights, rtol=1e-4)


def test_what_is_given_by_name_reaches_the_energy(found):
    def scaled(k, positions, scale):
        return scale * spring(k, positions)

    again = reweight(scaled, SPRINGS / 2, FRAMES, unit_spring, kT=KT, scale=jnp.float32(2.0))
    np.testing.assert_allclose(again.weights, found.weights, rtol=1e-4)


def test_lists_of_neighbors_are_refused_unless_they_hold_for_every_frame(found):
    def listed(k, positions, pairs):
        return spring(k, positions)

    pairs = np.zeros((1, 2), np.int32)
    with pytest.raises(ValueError, match="pairs looks like a list of neighbors"):
        reweight(listed, SPRINGS, FRAMES, unit_spring, kT=KT, pairs=pairs)
    again = reweight(listed, SPRINGS, FRAMES, unit_spring, kT=KT, pairs=pairs, static=("pairs",))
    np.testing.assert_allclose(again.weights, found.weights, rtol=1e-4)


def test_energies_that_rounding_swallows_are_warned_of():
    high = lambda k, r: spring(k, r) + np.float32(4e6)
    energies = 0.5 * (FRAMES**2).sum((-1, -2)) + 4e6
    with pytest.warns(stochgrad.PrecisionWarning, match="apart in float32.*of kT"):
        reweight(high, SPRINGS, FRAMES, energies, kT=KT)


def test_energies_that_are_no_numbers_are_refused_where_they_count():
    """And infinite ones weigh nothing."""
    energies = np.zeros(FRAMES.shape[:2])
    energies[3, 7] = np.nan
    with pytest.raises(ValueError, match=r"reference .*frame 7 of replica 3 is nan"):
        reweight(spring, SPRINGS, FRAMES, energies, kT=KT)
    sound = np.arange(16) != 3
    assert np.isfinite(reweight(spring, SPRINGS, FRAMES, energies, kT=KT, sound=sound).ess).all()
    far = FRAMES[..., :1].max()
    walled = lambda k, r: jnp.where(r[0, 0] >= far, jnp.inf, spring(k, r))
    weights = reweight(walled, SPRINGS, FRAMES, unit_spring, kT=KT).weights
    assert np.all(weights[:, FRAMES[..., 0, 0] >= far] == 0)
    np.testing.assert_allclose(weights.sum((1, 2)), 1)


def test_a_mean_energy_is_the_mean():
    value = mean_energy(spring)(SPRINGS, jnp.ones((2, 3)))
    np.testing.assert_allclose(value, 0.5 * SPRINGS.mean() * 6, rtol=1e-6)
    assert mean_energy(spring) is mean_energy(spring)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="kT must be a positive number"):
        reweight(spring, SPRINGS, FRAMES, unit_spring, kT=0.0)


# --- with dynamics --------------------------------------------------------------------------------

PULLS = np.array([-0.2, 0.1, 0.3, 6.0], np.float32)
"""Wells of one stiffness, the last of them far to one side."""
MIDDLE = PULLS.mean()
WHERE = Observable((np.arange(3.0),), lambda frame: frame[0])
SIZE = Observable((np.zeros(1),), lambda frame: jnp.sum(frame**2)[None])
DYNAMICS = {
    "masses": 1.0, "kT": KT, "time_step": 0.3, "friction": 1.0, "num_frames": 100,
    "steps_per_frame": 15, "num_warmup": 4,
}  # fmt: skip


def pulled(a, positions):
    return 0.5 * jnp.sum(positions**2) - a * jnp.sum(positions[:, 0])


def starts(replicas=32):
    start = np.random.default_rng(2).normal(size=(replicas, 1, 3)) * np.sqrt(KT)
    start[..., 0] += MIDDLE
    return start.astype(np.float32)


@pytest.fixture(scope="module")
def carried():
    return propagate(
        jax.random.key(0), pulled, PULLS, starts(), [WHERE, SIZE], min_ess=0.02, **DYNAMICS
    )


@pytest.mark.slow
def test_a_far_network_gets_dynamics_of_its_own(carried):
    """Effective shares are exp(-shift^2/kT): below one part in a million of the last."""
    assert carried.fresh.tolist() == [False, False, False, True]
    assert carried.ess[3] < 0.02 < carried.ess[:3].min()
    assert [a.shape for a in carried.averages] == [(4, 32, 3), (4, 32, 1)]
    assert carried.sound.shape == (4, 32)
    assert carried.sound.all()
    assert carried.reference.positions.shape == (1, 32, 100, 1, 3)


@pytest.mark.slow
def test_averages_are_those_of_each_well(carried):
    """The far one's, from dynamics of its own; and the reference's in the mean of the wells."""
    settled = np.array([PULLS[3], 0, 0])
    per_replica = carried.averages[0][3]
    error = per_replica.std(0, ddof=1) / np.sqrt(32)
    assert np.all(np.abs(per_replica.mean(0) - settled) < Z * error)
    reference = carried.reference.positions[0, :, :, 0].mean(1).astype(float)
    error = reference.std(0, ddof=1) / np.sqrt(32)
    assert np.all(np.abs(reference.mean(0) - [MIDDLE, 0, 0]) < Z * error)


@pytest.mark.slow
def test_each_replica_is_weighted_within_itself(carried):
    """By the weights that reweighting gives, so that replicas tell the error."""
    frames = carried.reference.positions[0]
    w = np.exp((PULLS[:3, None, None] - MIDDLE) * frames[..., 0, 0] / KT)
    w /= w.sum(2, keepdims=True)
    expected = np.einsum("drf,rfk->drk", w, frames[..., 0, :])
    np.testing.assert_allclose(carried.averages[0][:3], expected, atol=2e-3)


def test_zero_always_reweights_and_one_never():
    few = {**DYNAMICS, "num_frames": 3, "steps_per_frame": 2}
    given = (jax.random.key(0), pulled, PULLS[:2], starts(2), [WHERE])
    assert not propagate(*given, min_ess=0.0, **few).fresh.any()
    assert propagate(*given, min_ess=1.0, **few).fresh.all()
    with pytest.raises(ValueError, match="min_ess must be a non-negative number"):
        propagate(*given, min_ess=-0.1, **few)


def test_averages_are_finite_where_one_replica_has_no_weight():
    """Two wells a long way apart, a replica in each, and one network that prefers the first."""

    def two_wells(a, positions):
        x = positions[0, 0]
        return 0.5 * (jnp.abs(x) - 10) ** 2 - a * x + 0.5 * jnp.sum(positions[:, 1:] ** 2)

    start = np.array([[[10.0, 0, 0]], [[-10.0, 0, 0]]], np.float32)
    few = {**DYNAMICS, "num_frames": 3, "steps_per_frame": 2}
    found = propagate(
        jax.random.key(0), two_wells, jnp.array([-12.0, 12.0]), start, [WHERE], min_ess=0.0, **few
    )
    assert np.all(np.isfinite(found.averages[0]))


def test_a_checkpoint_does_for_both_runs(tmp_path):
    """The reference's, and that of the networks that get their own."""
    few = {**DYNAMICS, "num_frames": 3, "steps_per_frame": 2}
    given = (jax.random.key(0), pulled, PULLS[:2], starts(2), [WHERE])
    whole = propagate(*given, min_ess=1.0, **few)
    for resume in (False, True):
        again = propagate(*given, min_ess=1.0, checkpoint=tmp_path, resume=resume, **few)
        np.testing.assert_array_equal(again.averages[0], whole.averages[0])


def test_an_exploded_replica_does_not_spoil_the_effective_share():
    """It is marked, and the others' frames keep the share that they have without it."""

    def walled(a, positions):
        r2 = jnp.sum(positions**2)
        wall = jnp.where(r2 > 100, r2, 100.0) - 100
        return 0.5 * r2 - a * positions[0, 0] + 1e4 * a * wall

    start = starts(4) - np.array([MIDDLE, 0, 0], np.float32)
    start[3] = 12.0  # on the wall
    few = {**DYNAMICS, "num_frames": 10, "steps_per_frame": 2}
    with pytest.warns(RuntimeWarning, match="exploded"):
        found = propagate(
            jax.random.key(0), walled, jnp.array([-0.1, 0.3]), start, [WHERE], min_ess=0.0, **few
        )
    assert found.sound.tolist() == [[True] * 3 + [False]] * 2
    assert np.all(found.ess > 0.5)
