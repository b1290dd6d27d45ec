"""After the draws: numpyro's and ArviZ's functions see every row, in the order of the data."""

import pickle

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC, Predictive, log_likelihood

import stochgrad

N, DRAWS = 60, 15
X = np.arange(N, dtype=np.float32)  # the mean of a row is its own number
Y = (X + 0.1 * np.random.default_rng(0).normal(size=N)).astype(np.float32)
B = np.linspace(-1, 1, DRAWS).astype(np.float32)


def model(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x), subsample_size=7):
        xb = numpyro.subsample(x, event_dim=0)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(xb + b, 0.1), obs=yb)


def by_index(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x), subsample_size=7) as rows:
        yb = None if y is None else y[rows]
        numpyro.sample("y", dist.Normal(x[rows] + b, 0.1), obs=yb)


def exact(b):
    return dist.Normal(X + b[..., None], 0.1).log_prob(Y)


pytestmark = pytest.mark.filterwarnings("ignore:minibatch noise")  # a run for its shapes


@pytest.fixture(scope="module")
def mcmc():
    kernel = stochgrad.numpyro.SGLD(model, step_size=1e-6)
    run = MCMC(
        kernel,
        num_warmup=0,
        num_samples=DRAWS,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    run.run(jax.random.key(0), X, Y)
    return run


@pytest.mark.parametrize("model", [model, by_index], ids=["subsample", "by index"])
def test_predictions_are_of_all_rows_in_order(model):
    """numpyro's plates draw rows of their own, so that nobody knew whose predictions they were."""
    for whole in (stochgrad.numpyro.all_rows(model), stochgrad.from_numpyro(model, X, Y).model):
        predictions = Predictive(whole, {"b": B})(jax.random.key(1), X)["y"]
        assert predictions.shape == (DRAWS, N)
        assert np.all(np.abs(predictions - X - B[:, None]) < 0.6)  # six standard deviations
        likelihood = log_likelihood(whole, {"b": B}, X, Y)["y"]
        np.testing.assert_allclose(likelihood, exact(B), rtol=1e-4, atol=1e-4)


def test_several_plates_and_scans_give_all_rows():
    def steps(table):
        def step(carry, row):
            with numpyro.plate("series", 6, subsample_size=2):
                seen = numpyro.subsample(row, event_dim=0)
                numpyro.sample("z", dist.Normal(0.0, 1.0), obs=seen)
            return carry, None

        with (
            numpyro.plate("columns", 6, subsample_size=4, dim=-1),
            numpyro.plate("rows", 5, subsample_size=2, dim=-2),
        ):
            numpyro.sample("t", dist.Normal(0.0, 1.0), obs=numpyro.subsample(table, event_dim=0))
        scan(step, None, table)

    table = jnp.arange(30.0).reshape(5, 6)
    trace = handlers.trace(handlers.seed(stochgrad.numpyro.all_rows(steps), 0)).get_trace(table)
    for name in ("t", "z"):
        np.testing.assert_array_equal(trace[name]["value"], table)
        assert trace[name]["scale"] in (None, 1.0)


def test_what_numpyro_and_arviz_ask_of_a_kernel_is_of_all_rows(mcmc):
    """With ArviZ's own defaults, and for one chain's worth of numpyro's functions."""
    draws = mcmc.get_samples()
    predictions = Predictive(mcmc.sampler.model, draws)(jax.random.key(1), X)["y"]
    assert predictions.shape == (2 * DRAWS, N)
    data = az.from_numpyro(mcmc, posterior_predictive={"y": predictions}, log_likelihood=True)
    np.testing.assert_array_equal(data.observed_data["y"].values, Y)
    b = data.posterior["b"].values
    np.testing.assert_allclose(data.log_likelihood["y"].values, exact(b), rtol=1e-4, atol=1e-4)
    assert data.log_likelihood["y"].shape == (2, DRAWS, N)
    np.testing.assert_allclose(
        log_likelihood(mcmc.sampler.model, draws, X, Y)["y"],
        exact(draws["b"]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # few draws say little
def test_arvizs_comparisons_run_on_all_rows(mcmc):
    data = az.from_numpyro(mcmc, log_likelihood=True)
    assert az.loo(data).n_data_points == N
    assert len(az.compare({"one": data, "the same": data})) == 2


def test_all_rows_is_a_model():
    whole = stochgrad.numpyro.all_rows(model)
    trace = handlers.trace(handlers.seed(pickle.loads(pickle.dumps(whole)), 0)).get_trace(X, Y)
    np.testing.assert_array_equal(trace["y"]["value"], Y)
    with pytest.raises(TypeError, match="fn must be a numpyro model, got 3"):
        stochgrad.numpyro.all_rows(3)
    target = stochgrad.from_numpyro(model, X, Y)
    assert target.batches.batch_size == 7
