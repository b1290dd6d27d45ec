"""Pathfinder and windows find the bulk of a posterior, where its mode is and where it is not."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import stochgrad
from stochgrad.core import Kernel
from stochgrad.sgmcmc import Place, Precision, TunedKernel, _warm_up
from stochgrad.sgmcmc._windows import run_window

RNG = np.random.default_rng(0)
# a regression on raw columns: condition 1e7 of the posterior covariance
YEAR = RNG.integers(1970, 1983, 300).astype(np.float32)
WEIGHT = RNG.normal(2970, 850, 300).astype(np.float32)
MILES = (-880 + 0.47 * YEAR - 0.0066 * WEIGHT + 3.4 * RNG.standard_normal(300)).astype(np.float32)
# a centered hierarchy, whose joint density is unbounded where the group scale goes to zero
GROUP = np.repeat(np.arange(12), 6)
SCORES = (RNG.normal(1.0, 0.7, 12)[GROUP] + RNG.standard_normal(72)).astype(np.float32)


def raw_regression(year, weight, miles, rows=50):
    b = numpyro.sample("b", dist.Normal(0.0, 1000.0).expand([3]).to_event(1))
    with numpyro.plate("rows", len(miles), subsample_size=rows):
        y, w, m = (numpyro.subsample(v, 0) for v in (year, weight, miles))
        numpyro.sample("miles", dist.Normal(b[0] + b[1] * y + b[2] * w, 3.4), obs=m)


def hierarchy(group, scores, rows=24):
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("groups", 12):
        a = numpyro.sample("a", dist.Normal(mean, scale))
    with numpyro.plate("rows", len(scores), subsample_size=rows):
        g, s = numpyro.subsample(group, 0), numpyro.subsample(scores, 0)
        numpyro.sample("scores", dist.Normal(a[g], 1.0), obs=s)


def exact_regression():
    x = np.stack([np.ones(300), YEAR, WEIGHT], 1).astype(np.float64)
    precision = x.T @ x / 3.4**2 + np.eye(3) / 1e6
    return np.linalg.solve(precision, x.T @ MILES / 3.4**2), np.linalg.inv(precision)


def scale_of_groups():
    """Mean and sd of the group scale, by integrating all else out."""
    means = np.array([SCORES[g == GROUP].mean(dtype=np.float64) for g in range(12)])
    s = np.linspace(1e-4, 4, 4000)
    v = s[:, None] ** 2 + 1 / 6
    _weight, total = np.sum(1 / v, 1) * np.ones(1), 0.0
    a = 12 / v[:, 0] + 1 / 4
    b = np.sum(means / v, 1)
    total = -0.5 * s**2 - 0.5 * np.sum(np.log(v) * np.ones(12), 1)
    total += -0.5 * np.sum(means**2 / v, 1) + 0.5 * b**2 / a - 0.5 * np.log(a)
    p = np.exp(total - total.max())
    p /= p.sum()
    return p @ s, np.sqrt(p @ s**2 - (p @ s) ** 2)


def test_pathfinder_on_raw_data_gives_the_exact_normal():
    target = stochgrad.from_numpyro(raw_regression, YEAR, WEIGHT, MILES)
    found = stochgrad.pathfinder(jax.random.key(0), target, num_paths=4)
    mean, covariance = exact_regression()
    white = found.precision.whiten(found.paths[0].mean - mean)
    assert np.sqrt(np.mean(white**2)) < 0.1
    ratio = np.linalg.eigvals(np.linalg.solve(covariance, found.precision.covariance)).real
    np.testing.assert_allclose(ratio, 1, atol=0.1)  # the curvature is of single precision


def test_pathfinder_does_not_fall_into_a_singularity():
    target = stochgrad.from_numpyro(hierarchy, GROUP, SCORES)
    found = stochgrad.pathfinder(jax.random.key(0), target)
    mean, sd = scale_of_groups()
    scale = float(target.constrain(found.position)["scale"])
    assert abs(scale - mean) < 2 * sd


def test_windows_on_raw_data_keep_a_condition_of_ten_million():
    target = stochgrad.from_numpyro(raw_regression, YEAR, WEIGHT, MILES, order="symmetric")
    lines = []
    tuned = stochgrad.warm_up(jax.random.key(0), target, report=lines.append)
    assert tuned.settled
    assert not tuned.reasons
    assert len(lines) == len(tuned.windows) + 2
    mean, covariance = exact_regression()
    center = np.asarray(tuned.center["b"], np.float64)
    assert np.sqrt((center - mean) @ np.linalg.solve(covariance, center - mean) / 3) < 0.3
    ratio = np.linalg.eigvals(np.linalg.solve(covariance, tuned.precision.covariance)).real
    assert ratio.min() > 0.5
    assert ratio.max() < 2


@pytest.mark.slow
def test_a_centered_hierarchy_is_sampled_right():
    draws = stochgrad.infer(
        jax.random.key(0), hierarchy, GROUP, SCORES, method="sghmc", progress=False
    )
    mean, sd = scale_of_groups()
    scale = draws.constrained()["scale"]
    assert draws.verdict.ok
    assert abs(scale.mean() - mean) < 0.2 * sd
    assert abs(scale.std() / sd - 1) < 0.15


def test_a_warm_up_that_ends_early_says_so():
    target = stochgrad.from_numpyro(hierarchy, GROUP, SCORES)
    tuned = stochgrad.warm_up(jax.random.key(0), target, max_windows=1, num_chains=2)
    assert not tuned.settled
    assert "has not settled after 1 windows" in tuned.reasons[0]


def test_a_window_whose_mean_is_no_center_is_run_again(monkeypatch):
    """Chains far astray have a mean where the density is zero; that ended the run."""
    target = stochgrad.posterior(
        lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(99), batch_size=9
    )
    run_window, places, lines = _warm_up.run_window, [], []

    def astray(kernel_at, place, *rest):
        places.append(place)
        if len(places) == 2:
            raise ValueError("center must be where the log density is finite, got -inf.")
        following, found = run_window(kernel_at, place, *rest)
        return following, found._replace(rhat=2.0 if len(places) == 1 else found.rhat)

    monkeypatch.setattr(_warm_up, "run_window", astray)
    options = {"init": jnp.float32(0.0), "report": lines.append}
    assert stochgrad.warm_up(jax.random.key(0), target, **options).settled
    assert places[2] is places[0]
    assert any("back to where the one before began (center must be" in line for line in lines)

    def steep(*_):
        raise ValueError("steep")

    monkeypatch.setattr(_warm_up, "run_window", steep)
    with pytest.raises(ValueError, match="steep"):
        stochgrad.warm_up(jax.random.key(0), target, **options)


def test_no_start_is_refused():
    target = stochgrad.posterior(
        lambda q: 0.0 * q - jnp.inf, lambda q, x: -0.5 * (x - q) ** 2, jnp.ones(9), order="full"
    )
    with pytest.raises(ValueError, match="no starting point leads to"):
        stochgrad.pathfinder(jax.random.key(0), target, init=jnp.float32(0.0))
    with pytest.raises(ValueError, match="init is needed"):
        stochgrad.pathfinder(jax.random.key(0), target)


class Walk(NamedTuple):
    position: Any
    stuck: Any


class WalkInfo(NamedTuple):
    diverging: Any


def test_a_chain_whose_transitions_all_diverge_is_no_part_of_the_place():
    """Independent normal draws, but for one chain of four that never moves."""

    def init(position, rng_key):
        return Walk(position, position > 10)

    def step(rng_key, state):
        drawn = 0.99 + 0.1 * jax.random.normal(rng_key)
        position = jnp.where(state.stuck, state.position, drawn)
        return Walk(position, state.stuck), WalkInfo(state.stuck)

    kernel = Kernel(init, step, settings=(("step_size", 1.0),), initial=lambda key: jnp.float32(1))
    starts = np.float32([[50.0], [0.9], [1.0], [1.1]])
    place = Place(np.ones(1), Precision.of_covariance(np.eye(1)), starts, lambda x: x[0], starts)
    following, window = run_window(
        lambda *_: TunedKernel(kernel), place, jax.random.key(0), 400.0, 400
    )
    assert window.diverged == 1
    assert window.rhat < 1.05
    assert abs(following.mean[0] - 0.99) < 5 * 0.1 / np.sqrt(600)
    assert following.starts.shape == (4, 1)
    assert np.all(np.abs(following.starts - 0.99) < 6 * 0.1)
