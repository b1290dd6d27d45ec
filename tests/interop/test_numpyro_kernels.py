"""numpyro's own front door."""

import pickle

import arviz as az
import jax
import numpy as np
import pytest
from numpyro.infer import MCMC

import stochgrad
from tests.conftest import Z
from tests.helpers import mean_and_error
from tests.interop import models as m


def run(kernel, chain_method="vectorized", num_chains=2, progress_bar=False, **options):
    settings = {"num_warmup": 50, "num_samples": 200, "thinning": 2, **options}
    mcmc = MCMC(
        kernel,
        num_chains=num_chains,
        chain_method=chain_method,
        progress_bar=progress_bar,
        **settings,
    )
    mcmc.run(jax.random.key(0), m.X, y=m.Y, extra_fields=("potential_energy", "noise_ratio"))
    return mcmc


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
@pytest.mark.parametrize("kernel", ["SGLD", "SGHMC"])
def test_mcmc_runs_and_resumes(kernel, chain_method, capsys):
    kernel = {
        "SGLD": lambda: stochgrad.numpyro.SGLD(m.regression, step_size=1e-5),
        "SGHMC": lambda: stochgrad.numpyro.SGHMC(m.regression, step_size=2e-3, friction=30.0),
    }[kernel]()
    mcmc = run(kernel, chain_method)
    samples = mcmc.get_samples(group_by_chain=True)
    assert {k: v.shape for k, v in samples.items()} == {"w": (2, 100, 2), "sigma": (2, 100)}
    assert np.all(samples["sigma"] > 0)
    assert np.all(np.isfinite(mcmc.get_extra_fields()["potential_energy"]))
    mcmc.print_summary()
    assert "sigma" in capsys.readouterr().out
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(1), m.X, y=m.Y)
    assert not np.array_equal(samples["w"], mcmc.get_samples(group_by_chain=True)["w"])


def test_the_progress_bar_changes_nothing(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    kernel = lambda: stochgrad.numpyro.SGHMC(m.regression, step_size=2e-3, friction=30.0)
    a = run(kernel(), num_chains=1, progress_bar=True).get_samples()
    b = run(kernel(), num_chains=1, progress_bar=False).get_samples()
    np.testing.assert_allclose(a["w"], b["w"], rtol=1e-4, atol=1e-5)


def test_arviz_reads_it():
    mcmc = run(stochgrad.numpyro.SGHMC(m.regression, step_size=2e-3, friction=30.0))
    data = az.from_numpyro(mcmc, log_likelihood=False)
    assert dict(data.posterior.sizes)["chain"] == 2
    assert "lp" in data.sample_stats


def test_kernels_can_be_pickled():
    kernel = stochgrad.numpyro.SGHMC(m.regression, step_size=2e-3, friction=30.0)
    run(kernel, num_chains=1)
    copy = pickle.loads(pickle.dumps(kernel))
    run(copy, num_chains=1)


@pytest.mark.slow
def test_mcmc_agrees_with_our_own_loop():
    settings = {"step_size": 0.004, "friction": 30.0}
    kernel = stochgrad.numpyro.SGHMC(m.regression, **settings, num_steps=20)
    mcmc = run(kernel, num_chains=4, num_warmup=200, num_samples=3000, thinning=1)
    theirs = mcmc.get_samples(group_by_chain=True)
    target = stochgrad.from_numpyro(m.regression, m.X, y=m.Y)
    draws = stochgrad.sample(
        jax.random.key(2),
        stochgrad.sghmc(target, **settings),
        num_samples=3000,
        num_warmup=200,
        thin=20,
        num_chains=4,
    )
    for name, ours in draws.constrained().items():
        (a, ea), (b, eb) = mean_and_error(ours), mean_and_error(theirs[name])
        assert np.all(np.abs(a - b) < Z * np.hypot(ea, eb))


def test_bad_kernels_are_refused():
    with pytest.raises(TypeError, match="model must be a numpyro model"):
        stochgrad.numpyro.SGLD(3, step_size=0.1)
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1"):
        stochgrad.numpyro.SGLD(m.regression, step_size=0.1, num_steps=0)
    with pytest.raises(ValueError, match="step_size must be a positive number"):
        run(stochgrad.numpyro.SGLD(m.regression, step_size=-1.0))
