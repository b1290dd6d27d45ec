"""Diffusion and pressure, against what is known of springs, walks and gases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import potentials
from stochgrad.potentials import diffusion, mean_square_displacement, pressure
from tests.conftest import Z

RNG = np.random.default_rng(0)


def test_a_walk_by_hand():
    at = RNG.normal(size=(2, 5, 3, 2))
    found = mean_square_displacement(at, 3, atoms=[0, 2])
    relative = at - at.mean(2, keepdims=True)
    for k in range(3):
        steps = [relative[:, t + k] - relative[:, t] for t in range(5 - k)]
        right = np.mean([(s[:, [0, 2]] ** 2).sum(-1).mean(-1) for s in steps], 0)
        np.testing.assert_allclose(found[:, k], right)
    chosen = mean_square_displacement(at, 3, atoms=np.array([True, False, True]))
    np.testing.assert_array_equal(chosen, found)
    drift = at + np.arange(5.0)[:, None, None] * np.ones(2)
    np.testing.assert_allclose(mean_square_displacement(drift, 3, atoms=[0, 2]), found)


def test_langevin_without_forces_diffuses_by_its_friction():
    """D = kT / (m gamma), less the drift of the mean of n atoms, 1/n of it."""
    kT, mass, gamma, atoms, replicas = 1.5, 2.0, 3.0, 50, 40
    run = potentials.simulate(
        jax.random.key(0), lambda p, r: 0.0 * p * jnp.sum(r), jnp.ones(1),
        RNG.normal(size=(replicas, atoms, 3)), masses=mass, kT=kT, friction=gamma, time_step=0.05,
        num_frames=60, steps_per_frame=20, num_warmup=2,
    )  # fmt: skip
    msd = mean_square_displacement(run.positions[0], 5)
    found = diffusion(msd, 1.0, first=2) / (1 - 1 / atoms)
    error = found.std(ddof=1) / np.sqrt(replicas)
    assert abs(found.mean() - kT / (mass * gamma)) < Z * error
    assert error < 0.02 * found.mean()


def soft(strength, positions, box):
    square = potentials.distances(positions, box=box) ** 2
    return strength * jnp.sum(jnp.where(square < 1, (1 - square) ** 3, 0))


def by_lists(strength, positions, neighbors, box):
    square = jnp.sum(potentials.pair_vectors(positions, neighbors, box) ** 2, -1)
    return 0.5 * strength * jnp.sum(jnp.where(square < 1, (1 - square) ** 3, 0))


@pytest.mark.parametrize(
    "box", [np.full(3, 2.5), np.array([[2.5, 0.3, 0], [0, 2.4, 0.2], [0, 0, 2.6]])]
)
def test_pressure_is_the_derivative_by_the_volume(box):
    """By central differences of the box with the atoms in it, for each network."""
    at, strengths = RNG.uniform(0, 2.4, size=(2, 3, 4, 30, 3)), np.array([1.0, 4.0])
    with jax.enable_x64(True):
        found = pressure(soft, jnp.asarray(strengths), at, kT=0.7, box=box)
        lists = pressure(by_lists, jnp.asarray(strengths), at, kT=0.7, box=box, cutoff=1.0)
        np.testing.assert_allclose(lists, found, rtol=1e-10)
        volume = lambda s: s**3 * abs(np.linalg.det(np.diag(box) if box.ndim == 1 else box))
        ends = []
        for s in (1 + 1e-5, 1 - 1e-5):
            each = jax.vmap(jax.vmap(lambda r, s=s: soft(1.0, s * r, s * jnp.asarray(box))))
            ends.append(
                np.stack([k * np.asarray(each(x)) for k, x in zip(strengths, at, strict=True)])
            )
    slope = (ends[0] - ends[1]) / (volume(1 + 1e-5) - volume(1 - 1e-5))
    right = 30 * 0.7 / volume(1.0) - slope.mean(-1)
    np.testing.assert_allclose(found, right, rtol=1e-6)


BAD = {
    "frames of no axis": (lambda: mean_square_displacement(np.ones((3, 3)), 2), "positions must"),
    "more lags than frames": (
        lambda: mean_square_displacement(np.ones((3, 2, 3)), 4), "at most the number of frames, 3"
    ),
    "frames that are NaN": (
        lambda: mean_square_displacement(np.full((3, 2, 3), np.nan), 2), "finite"
    ),
    "an atom that is not there": (
        lambda: mean_square_displacement(np.ones((3, 2, 3)), 2, atoms=[2]), "some of 2"
    ),
    "no atoms": (
        lambda: mean_square_displacement(np.ones((3, 2, 3)), 2, atoms=[False, False]), "some"
    ),
    "one lag": (lambda: diffusion([0.0, 1.0], 1.0), "two lags from first=1"),
    "no time": (lambda: diffusion([0.0, 1.0, 2.0], 0.0), "time_between"),
    "frames of other networks": (
        lambda: pressure(soft, jnp.ones(3), np.ones((2, 1, 1, 4, 3)), kT=1.0, box=np.ones(3)),
        r"positions must have shape \(3, replicas",
    ),
    "a box of another shape": (
        lambda: pressure(soft, jnp.ones(2), np.ones((2, 1, 1, 4, 3)), kT=1.0, box=np.ones(2)), "box"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    make, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=words):
        make()
