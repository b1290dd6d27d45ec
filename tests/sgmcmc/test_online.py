"""What is learnt of draws that are not kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import stochgrad
from tests.core import worker


def both(online, num_chains=2, **options):
    """One run that keeps its draws, and the same with an ``Online``."""
    run = lambda **more: stochgrad.sample(
        jax.random.key(3),
        worker.kernel(),
        init=jnp.zeros(3),
        num_samples=150,
        num_warmup=30,
        thin=2,
        num_chains=num_chains,
        progress=False,
        **more,
    )
    return run().positions, run(collect=online, **options)


@pytest.mark.parametrize("full", [pytest.param(False, marks=pytest.mark.slow), True])
def test_moments_are_those_of_the_draws_after_warm_up(full):
    kept, draws = both(stochgrad.moments(full=full))
    assert draws.positions == {}
    assert draws.finite.shape == (2, 150)
    assert "noise_ratio" in draws.stats
    summary = draws.summary
    np.testing.assert_array_equal(summary.count, 150)
    np.testing.assert_allclose(summary.mean, kept.mean(axis=1), rtol=1e-4, atol=1e-6)
    expected = [np.cov(x.T) if full else x.var(axis=0, ddof=1) for x in kept]
    np.testing.assert_allclose(summary.variance, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_run_in_two_parts_learns_the_same(tmp_path):
    _, whole = both(stochgrad.moments())
    online = stochgrad.moments()
    run = lambda n, **more: stochgrad.sample(
        jax.random.key(3), worker.kernel(), init=jnp.zeros(3), num_samples=n, num_warmup=30,
        thin=2, num_chains=2, progress=False, collect=online, **more,
    )  # fmt: skip
    run(70, checkpoint=tmp_path / "c")
    again = run(150, checkpoint=tmp_path / "c", resume=True)
    stored = run(150, store=tmp_path / "d")
    for draws in (again, stored):
        np.testing.assert_array_equal(draws.summary.mean, whole.summary.mean)
        np.testing.assert_array_equal(draws.finite, whole.finite)
        np.testing.assert_array_equal(draws.stats["step_size"], whole.stats["step_size"])


@pytest.mark.slow
def test_swag_keeps_the_last_deviations_and_draws_from_its_gaussian(key):
    kept, draws = both(stochgrad.swag(rank=4), num_chains=1)
    x = kept[0].astype(np.float64)
    means = np.cumsum(x, axis=0) / np.arange(1, 151)[:, None]
    summary = draws.summary
    np.testing.assert_allclose(summary.deviations, (x - means)[-4:], rtol=1e-3, atol=1e-5)
    many = jax.vmap(summary.sample)(jax.random.split(key, 40_000))
    d = np.asarray(summary.deviations, np.float64)
    expected = np.diag(x.var(axis=0, ddof=1)) / 2 + d.T @ d / (2 * 3)
    found = np.cov(np.asarray(many, np.float64).T)
    sd = np.sqrt(np.diag(expected))
    errors = np.sqrt((np.outer(sd, sd) ** 2 + expected**2) / 40_000)
    assert np.all(np.abs(found - expected) < 5.5 * errors)
    with pytest.raises(ValueError, match="rank must be an integer of at least 2"):
        stochgrad.swag(rank=1)


def test_a_lost_chain_does_not_spoil_what_it_has_learnt():
    target = worker.target()
    with pytest.warns(stochgrad.DivergenceWarning):
        draws = stochgrad.sample(
            jax.random.key(0),
            stochgrad.sgld(target, lambda step: jnp.where(step < 40, 1e-4, 1.0)),
            init=jnp.zeros(3),
            num_samples=120,
            progress=False,
            collect=stochgrad.moments(),
        )
    assert np.all(np.isfinite(ravel_pytree(draws.summary.mean)[0]))
    assert 40 <= int(draws.summary.count) < 120
