"""numpyro's own front door."""

import pickle
import subprocess
import sys
from functools import partial

import arviz as az
import jax
import numpy as np
import pytest
from numpyro.infer import MCMC, NUTS

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


@pytest.mark.slow
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


FOUND = {
    "SGLD": lambda: stochgrad.numpyro.SGLD(m.regression, gradient="control_variate"),
    "SGHMC UBU saga": lambda: stochgrad.numpyro.SGHMC(
        m.regression, 2e-3, 30.0, integrator="UBU", gradient="saga"
    ),
    "PSGLD": lambda: stochgrad.numpyro.PSGLD(m.regression, 1e-5, gradient="svrg"),
    "SGNHT": lambda: stochgrad.numpyro.SGNHT(m.regression, 1e-3, 10.0, thermal_mass=0.01),
    "Cyclical": lambda: stochgrad.numpyro.Cyclical(
        m.regression, partial(stochgrad.sghmc, friction=30.0), 2e-3, steps_per_cycle=50
    ),
    "ReplicaExchange": lambda: stochgrad.numpyro.ReplicaExchange(
        m.regression, stochgrad.sgld, 1e-4, temperatures=(1.0, 2.0)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FOUND))
@pytest.mark.filterwarnings("ignore:minibatch noise")
def test_every_kernel_has_its_numpyro_form(name):
    mcmc = run(FOUND[name]())
    samples = mcmc.get_samples(group_by_chain=True)
    assert samples["w"].shape == (2, 100, 2)
    assert np.all(np.isfinite(samples["w"]))
    assert np.all(samples["sigma"] > 0)


@pytest.mark.slow
def test_a_model_alone_is_enough():
    """Center, mass, friction and step size are found; the posterior is NUTS's."""
    kernel = stochgrad.numpyro.SGHMC(
        m.regression, integrator="BAOAB", order="symmetric", gradient="control_variate"
    )
    mcmc = run(kernel, num_warmup=100, num_samples=6000, thinning=2)
    assert kernel.tuning.center.distance < 1
    assert kernel.tuning.step_size.step_size < kernel.tuning.step_size.limit / 2
    nuts = MCMC(NUTS(m.regression), num_warmup=500, num_samples=4000, progress_bar=False)
    nuts.run(jax.random.key(1), m.X, y=m.Y, b=len(m.X))
    ours, theirs = mcmc.get_samples(group_by_chain=True), nuts.get_samples(group_by_chain=True)
    bias = 0.05  # in standard deviations: what the step was found for, and noise far from the mode
    for name in ("w", "sigma"):
        (a, ea), (b, eb) = mean_and_error(ours[name]), mean_and_error(theirs[name])
        sd = np.asarray(theirs[name]).std(axis=(0, 1))
        assert np.all(np.abs(a - b) < Z * np.hypot(ea, eb) + bias * sd)
        (a, ea), (b, eb) = (mean_and_error((np.asarray(x[name]) - b) ** 2) for x in (ours, theirs))
        assert np.all(np.abs(a - b) < Z * np.hypot(ea, eb) + 2 * bias * sd**2)


def test_all_that_a_kernel_reports_can_be_asked_for():
    kernel = FOUND["Cyclical"]()
    mcmc = MCMC(kernel, num_warmup=0, num_samples=100, progress_bar=False)
    mcmc.run(jax.random.key(0), m.X, y=m.Y, extra_fields=("info.sampling", "info.cycle"))
    fields = mcmc.get_extra_fields()
    np.testing.assert_array_equal(fields["info.sampling"], np.arange(100) % 50 >= 40)
    np.testing.assert_array_equal(fields["info.cycle"], np.arange(100) // 50)


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
    with pytest.raises(TypeError, match="unexpected keyword argument 'decai'"):
        stochgrad.numpyro.PSGLD(m.regression, 0.1, decai=0.9)
    with pytest.raises(ValueError, match="gradient must be one of"):
        stochgrad.numpyro.SGHMC(m.regression, 0.1, 1.0, gradient="exact")
    with pytest.raises(ValueError, match="step_size must be a positive number"):
        run(stochgrad.numpyro.SGLD(m.regression, step_size=-1.0))


def test_numpyro_is_loaded_once_where_arviz_has_left_it_lazy():
    code = "import arviz, stochgrad.numpyro, numpyro; numpyro.distributions.distribution"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
