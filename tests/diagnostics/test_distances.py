"""Discrepancies, divergences and extrapolation where the answers are known."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import stochgrad
from stochgrad.diagnostics import knn_divergence, ksd, mcse, richardson, temperatures
from tests.conftest import Z
from tests.helpers import exact_gradient, gaussian_posterior

RNG = np.random.default_rng(0)


def as_draws(x, **stats):
    x = np.asarray(x, np.float32)
    return stochgrad.Draws(
        x, stats, finite=np.ones(x.shape[:2], bool), first_bad=-np.ones(len(x), int)
    )


def test_the_stein_discrepancy_is_its_definition():
    """Against the kernel differentiated by jax, pair by pair."""
    target = exact_gradient(lambda q: -0.5 * jnp.sum(jnp.array([1.0, 4.0]) * q**2))
    x = np.asarray(RNG.normal(size=(1, 12, 2)), np.float32)
    scale = x[0].std(axis=0)
    z = jnp.asarray(x[0] / scale)
    score = lambda z: -jnp.array([1.0, 4.0]) * z * scale * scale
    kernel = lambda a, b: 1 / jnp.sqrt(1 + jnp.sum((a - b) ** 2))

    def stein(a, b):
        da, db = jax.grad(kernel, 0)(a, b), jax.grad(kernel, 1)(a, b)
        trace = jnp.trace(jax.jacfwd(jax.grad(kernel, 1), 0)(a, b))
        return score(a) @ score(b) * kernel(a, b) + score(a) @ db + score(b) @ da + trace

    pairs = jax.jit(jax.vmap(jax.vmap(stein, (None, 0)), (0, None)))(z, z)
    expected = (pairs.sum() - jnp.trace(pairs)) / (12 * 11)
    found = ksd(jax.random.key(0), as_draws(x), target)
    np.testing.assert_allclose(found, np.sign(expected) * np.sqrt(abs(expected)), rtol=1e-4)


@pytest.mark.parametrize("scores", ["minibatch", "full"])
def test_the_stein_discrepancy_tells_right_draws_from_wrong_ones(scores):
    target, mean, precision = gaussian_posterior(num_rows=100, dim=2, batch_size=50)
    right = mean + RNG.normal(size=(2, 500, 2)) / np.sqrt(precision)
    wide = mean + 1.3 * (right - mean)
    moved = right + 0.5 / np.sqrt(precision)
    found = [
        ksd(jax.random.key(0), as_draws(x), target, scores=scores) for x in (right, wide, moved)
    ]
    assert abs(found[0]) < 0.15
    assert min(found[1:]) > 2 * abs(found[0])


def test_the_neighbor_divergence_has_its_closed_form():
    """Between Gaussians: KL(N(m, s^2) | N(0, 1)) = (s^2 + m^2 - 1) / 2 - log s, twice over."""
    m, s, n = 0.7, 0.6, 4000
    x = m + s * RNG.normal(size=(2, n // 2, 2))
    y = RNG.normal(size=(1, n, 2))
    expected = 2 * ((s**2 + m**2 - 1) / 2 - np.log(s))
    assert abs(knn_divergence(as_draws(x), as_draws(y)) - expected) < 0.1
    assert abs(knn_divergence(as_draws(y), as_draws(RNG.normal(size=(1, n, 2))))) < 0.06
    repeated = np.concatenate([x, x[:, :10]], axis=1)  # ties are left out, not infinite
    assert np.isfinite(knn_divergence(as_draws(repeated), as_draws(y), k=1))
    with pytest.raises(ValueError, match="every draw repeats another"):
        knn_divergence(as_draws(np.zeros((1, 9, 2))), as_draws(y))


def test_richardson_takes_the_leading_bias_out():
    """Draws with a bias of 3 h^2 in the mean, by construction."""
    runs = []
    for h in (0.2, 0.1):
        draws = as_draws(RNG.normal(size=(4, 4000, 1)) * 0.1 + 1 + 3 * h**2)
        runs.append(stochgrad.Draws(**{**vars(draws), "attrs": {"step_size": h}}))
    found = richardson(*runs)
    assert abs(found.value[0] - 1) < Z * found.error[0]
    assert abs(found.bias[0] - 0.03) < Z * found.error[0]
    plain = mcse(runs[1])[0]
    assert 1.2 * plain < found.error[0] < 1.6 * plain  # sqrt(16 + 1) / 3
    square = richardson(*runs, function=np.square)
    assert square.value.shape == (1,)
    with pytest.raises(ValueError, match="coarse must have the larger step size"):
        richardson(*runs[::-1])
    with pytest.raises(ValueError, match="constant step sizes"):
        richardson(as_draws(np.zeros((1, 5, 1))), runs[1])


def test_mcse_is_that_of_arviz():
    x = RNG.normal(size=(1, 2000, 3)).cumsum(axis=1) * 0.01 + RNG.normal(size=(1, 2000, 3))
    draws = as_draws(x)
    theirs = az.mcse(draws.to_arviz(), method="mean")["x"].values
    np.testing.assert_allclose(mcse(draws), theirs, rtol=0.02)
    np.testing.assert_allclose(mcse(draws.to_arviz())["x"], mcse(draws), rtol=1e-6)


def test_temperatures_of_each_chain():
    """One chain twice as hot as the other three."""
    heat = np.array([1.0, 1.0, 2.0, 1.0])[:, None]
    x = RNG.normal(size=(4, 3000, 2)) * np.sqrt(heat)[..., None]
    draws = as_draws(x, kinetic_temperature=heat * RNG.chisquare(2, (4, 3000)) / 2)
    target = exact_gradient(lambda q: -0.5 * jnp.sum(q**2))
    t = temperatures(jax.random.key(0), draws, target, per_chain=True)
    assert np.all(np.abs(t.kinetic - heat[:, 0]) < Z * t.kinetic_error)
    centered_on_all = t.configurational - heat[:, 0]
    assert np.all(np.abs(centered_on_all) < Z * t.configurational_error)
    through = temperatures(jax.random.key(0), draws.to_arviz(), target, per_chain=True)
    np.testing.assert_allclose(through.kinetic, t.kinetic, rtol=1e-6)


def test_arviz_objects_of_a_numpyro_model_go_back_to_where_the_score_is():
    def model(x):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.deterministic("twice", 2 * scale)
        with numpyro.plate("rows", len(x), subsample_size=5):
            numpyro.sample("x", dist.Normal(0.0, scale), obs=numpyro.subsample(x, 0))

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        target = stochgrad.from_numpyro(model, np.asarray(RNG.normal(size=40), np.float32))
        kernel = stochgrad.sghmc(target, 0.02, 10.0)
        draws = stochgrad.sample(jax.random.key(0), kernel, num_samples=200, num_chains=2, thin=5)
        one = ksd(jax.random.key(1), draws, target, scores="full")
        two = ksd(jax.random.key(1), draws.to_arviz(), target, scores="full")
    np.testing.assert_allclose(one, two, rtol=1e-3)


def test_what_cannot_be_compared_is_refused():
    target, _, _ = gaussian_posterior(batch_size=5)
    with pytest.raises(TypeError, match="must be stochgrad.Draws or an ArviZ object"):  # noqa: RUF043
        mcse(np.zeros(3))
    with pytest.raises(ValueError, match=r"scores must be one of .*'minibatch', 'full'"):
        ksd(jax.random.key(0), as_draws(np.zeros((1, 3, 2))), target, scores="some")
    with pytest.raises(ValueError, match="draws have 2 dimensions, the reference 3"):
        knn_divergence(as_draws(np.zeros((1, 9, 2))), as_draws(np.zeros((1, 9, 3))))
    bad = np.zeros((1, 3, 2))
    bad[0, 1] = np.nan
    with pytest.raises(ValueError, match="some draws are not finite"):
        mcse(stochgrad.Draws(bad, {}, finite=np.isfinite(bad).all(-1), first_bad=np.array([1])))
