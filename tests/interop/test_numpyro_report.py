"""numpyro's MCMC says after a run of our kernels what ``sample`` says."""

import warnings

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

import stochgrad
from stochgrad.numpyro import SGHMC, SGLD

Y = (1 + np.random.default_rng(0).normal(size=2000)).astype(np.float32)


def model(y, rows=100):
    w = numpyro.sample("w", dist.Normal(0.0, 10.0))
    with numpyro.plate("rows", len(y), subsample_size=rows):
        numpyro.sample("y", dist.Normal(w, 1.0), obs=numpyro.subsample(y, 0))


def run(kernel, *args, num_samples=200, **options):
    """A run, and what it said by category."""
    mcmc = MCMC(
        kernel, num_warmup=50, num_samples=num_samples, num_chains=2, chain_method="vectorized",
        progress_bar=False, **options,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(jax.random.key(0), *(args or (Y,)))
    ours = [w for w in caught if w.category.__module__.startswith("stochgrad")]
    assert all(w.filename == __file__ for w in ours)
    return mcmc, {w.category: str(w.message) for w in ours}


def test_divergence_is_named():
    mcmc, said = run(SGHMC(model, 1.0, 1.0, gradient="minibatch"))
    assert "2 of 2 chains diverged" in said[stochgrad.DivergenceWarning]
    assert mcmc.get_extra_fields()["diverging"].all()


def test_noise_is_named():
    _, said = run(SGLD(model, 2e-4))
    assert "minibatch noise is" in said[stochgrad.GradientNoiseWarning]


def test_chains_that_have_not_mixed_are_named():
    _, said = run(SGLD(model, 1e-9))
    assert "R-hat is" in said[stochgrad.ConvergenceWarning]
    assert "'w'" in said[stochgrad.ConvergenceWarning]


@pytest.mark.slow
def test_the_defaults_sample_the_posterior_and_have_nothing_to_say():
    mcmc, said = run(SGHMC(model), num_samples=4000)
    assert said == {}
    w = np.asarray(mcmc.get_samples(group_by_chain=True)["w"])
    precision = len(Y) + 0.01
    ess = numpyro.diagnostics.effective_sample_size(w)
    error = np.sqrt(1 / precision / ess)
    assert abs(w.mean() - Y.sum() / precision) < 5.5 * error
    # a variance has a relative error of sqrt(2 / ESS); the integrator's bias is within 2%
    assert abs(w.var() * precision - 1) < 0.02 + 5.5 * np.sqrt(2 / ess)
    settings = mcmc.sampler.settings
    chosen = (settings["integrator"], settings["gradient"], settings["order"])
    assert chosen == ("BAOAB", "control_variate", "symmetric")


@pytest.mark.slow
def test_a_model_without_a_mode_is_sampled_right_or_says_that_it_is_not():
    """The joint density is unbounded where the scale goes to zero, and the data know no better."""
    rng = np.random.default_rng(0)
    group, y = np.repeat(np.arange(20), 3), rng.normal(size=60).astype(np.float32)

    def centered(group, y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("groups", 20):
            mean = numpyro.sample("mean", dist.Normal(0.0, scale))
        with numpyro.plate("rows", 60, subsample_size=12):
            g, seen = numpyro.subsample(group, 0), numpyro.subsample(y, 0)
            numpyro.sample("y", dist.Normal(mean[g], 1.0), obs=seen)

    mcmc, said = run(SGHMC(centered), group, y, num_samples=2000)
    s = np.linspace(1e-4, 3, 3000)
    means = y.reshape(20, 3).mean(1, dtype=np.float64)
    variance = s[:, None] ** 2 + 1 / 3
    log_p = -0.5 * s**2 + np.sum(-0.5 * np.log(variance) - 0.5 * means**2 / variance, axis=1)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean, sd = p @ s, np.sqrt(p @ s**2 - (p @ s) ** 2)
    scale = np.asarray(mcmc.get_samples()["scale"])
    right = abs(scale.mean() - mean) < 0.2 * sd and abs(scale.std() / sd - 1) < 0.15
    assert right or stochgrad.ConvergenceWarning in said


def test_other_kernels_are_left_alone():
    _, said = run(NUTS(lambda y: model(y, None)), num_samples=5)
    assert said == {}


def test_a_run_under_a_transformation_says_nothing():
    def draws(key):
        mcmc = MCMC(SGLD(model, 1e-9), num_warmup=0, num_samples=5, progress_bar=False)
        mcmc.run(key, Y)
        return mcmc.get_samples()["w"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # numpyro's donated buffers
        for category in (stochgrad.ConvergenceWarning, stochgrad.DivergenceWarning):
            warnings.simplefilter("error", category)
        assert jax.vmap(draws)(jax.random.split(jax.random.key(0), 3)).shape == (3, 5)
