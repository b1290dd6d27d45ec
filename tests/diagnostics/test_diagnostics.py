"""Diagnostics against known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.diagnostics import effective_sample_size, gelman_rubin

import stochgrad
from stochgrad.diagnostics import mcse, rhat, temperatures
from tests.conftest import Z
from tests.helpers import exact_gradient, gaussian_posterior


def runs(share, seeds, h=0.02):
    """Runs in which gradient noise is about as large as the injected noise."""
    target, mean, _ = gaussian_posterior(num_rows=100, dim=1, batch_size=5, order="iid")
    kernel = stochgrad.sghmc(target, h, 20.0)
    for seed in seeds:
        yield stochgrad.sample(
            jax.random.key(seed),
            kernel,
            init=lambda key: 0.1 * jax.random.normal(key, (1,)),
            num_samples=300,
            num_warmup=20,
            thin=30,
            num_chains=8,
            share_batches=share,
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")
def test_pooled_errors_of_chains_that_share_minibatches():
    """mcse is right with and without sharing; the usual error is too small with it."""
    spread, claimed, usual = {}, {}, {}
    for share in (False, True):
        all_draws = list(runs(share, range(60)))
        means = [d.positions.mean() for d in all_draws]
        spread[share] = np.std(means, ddof=1)
        claimed[share] = np.sqrt(np.mean([mcse(d)[0] ** 2 for d in all_draws]))
        usual[share] = np.sqrt(
            np.mean([d.positions.var() / effective_sample_size(d.positions)[0] for d in all_draws])
        )
    relative_error = 1 / np.sqrt(2 * 59)  # of a standard deviation from 60 runs
    for share in (False, True):
        assert abs(np.log(claimed[share] / spread[share])) < Z * relative_error
    assert spread[True] > 1.3 * spread[False]
    assert usual[True] < 0.75 * claimed[True]
    assert abs(np.log(usual[False] / spread[False])) < Z * relative_error


@pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")
def test_rhat_is_the_usual_one_for_independent_chains_and_stricter_for_shared_noise():
    rng = np.random.default_rng(0)
    own = rng.normal(size=(4, 2000, 1)) + 0.1 * np.arange(4)[:, None, None]
    common = 3 * rng.normal(size=(1, 2000, 1))
    draws = lambda x: stochgrad.Draws(
        x, {}, finite=np.ones(x.shape[:2], bool), first_bad=-np.ones(4, int)
    )
    np.testing.assert_allclose(rhat(draws(own)), gelman_rubin(own), rtol=2e-3)
    usual, ours = gelman_rubin(own + common), rhat(draws(own + common))
    np.testing.assert_allclose(ours, rhat(draws(own)), rtol=1e-10)
    assert usual - 1 < 0.2 * (ours - 1)


@pytest.mark.slow
def test_temperatures_read_the_closed_forms():
    h, c = 0.3, 2.0
    gradient = exact_gradient(lambda q: -0.5 * jnp.sum(jnp.array([1.0, 0.5]) * q**2))
    kernel = stochgrad.sghmc(gradient, h, c)
    draws = stochgrad.sample(
        jax.random.key(0),
        kernel,
        init=jnp.zeros(2),
        num_samples=4000,
        num_warmup=50,
        thin=10,
        num_chains=8,
    )
    t = temperatures(jax.random.key(1), draws, gradient)
    k = np.array([1.0, 0.5])
    q2 = 2 * (2 - c * h) / (k * (4 - 2 * c * h - h**2 * k))
    p2 = 4 / (4 - 2 * c * h - h**2 * k)
    assert abs(t.configurational - np.mean(k * q2)) < Z * t.configurational_error
    assert abs(t.kinetic - np.mean(p2)) < Z * t.kinetic_error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")
def test_the_noise_ratio_predicts_what_gradient_noise_adds():
    target, mean, precision = gaussian_posterior(num_rows=100, dim=2, batch_size=5, order="iid")
    h, c = 0.02, 20.0
    draws = stochgrad.sample(
        jax.random.key(0),
        stochgrad.sghmc(target, h, c),
        init=jnp.zeros(2),
        num_samples=4000,
        num_warmup=50,
        thin=20,
        num_chains=8,
    )
    state, sums = target.batches.init(jax.random.key(0)), []
    advance = jax.jit(target.batches.next)
    for _ in range(2000):
        batch, state = advance(state)
        sums.append(np.asarray(batch.weight * batch.data.sum(axis=0)))
    v = np.var(np.array(sums), axis=0).mean()
    ratio = np.nanmean(draws.stats["noise_ratio"])
    np.testing.assert_allclose(ratio, h * v / (2 * c), rtol=0.1)
    t = temperatures(jax.random.key(1), draws, target)
    p2 = 2 * (2 * c + v * h) / (c * (4 - 2 * c * h - h**2 * precision))  # the closed form
    assert abs(t.kinetic - p2) < Z * t.kinetic_error


def test_what_cannot_be_diagnosed_is_refused(key):
    target, *_ = gaussian_posterior(batch_size=5)
    kernel = stochgrad.sgld(target, 0.01)
    one = stochgrad.sample(key, kernel, init=jnp.zeros(2), num_samples=5)
    with pytest.raises(ValueError, match="rhat compares chains"):
        rhat(one)
    odd = stochgrad.sample(
        key, kernel, init=jnp.zeros(2), num_samples=5, collect=lambda s: s.position
    )
    with pytest.raises(ValueError, match="draws of positions are needed"):
        temperatures(key, odd, target)
    assert np.isnan(temperatures(key, one, target).kinetic)
