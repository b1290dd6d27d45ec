"""Simulation-based calibration: uniform ranks for right samplers, and not for wrong ones."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import stochgrad
from stochgrad.diagnostics import sbc
from tests.conftest import FALSE_ALARM

N = 100
FAST = {"simulations": 100, "thin": 40, "window_steps": 300}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 2)).astype(np.float32)
G = np.arange(N, dtype=np.int32) % 5
ZEROS = np.zeros(N, np.float32)

pytestmark = pytest.mark.slow


def rows(x, y, event_dim=1):
    return numpyro.subsample(x, event_dim), numpyro.subsample(y, 0)


def regression(x, y):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", len(x), subsample_size=20):
        xb, yb = rows(x, y)
        numpyro.sample("y", dist.Normal(xb @ b, 1.0), obs=yb)


def logistic(x, y):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", len(x), subsample_size=20):
        xb, yb = rows(x, y)
        numpyro.sample("y", dist.Bernoulli(logits=xb @ b), obs=yb)


def hierarchy(g, y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    s = numpyro.sample("s", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("groups", 5):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(g), subsample_size=20):
        gb, yb = rows(g, y, 0)
        numpyro.sample("y", dist.Normal(m + s * z[gb], 1.0), obs=yb)


def heavy_tails(x, y):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    s = numpyro.sample("s", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("rows", len(x), subsample_size=20):
        xb, yb = rows(x, y)
        numpyro.sample("y", dist.StudentT(2.0, xb @ b, s), obs=yb)


def posterior(model, x, y=ZEROS):
    return stochgrad.from_numpyro(model, x, y, order="symmetric")


MODELS = {
    "regression": lambda: posterior(regression, X),
    "logistic": lambda: posterior(logistic, X, ZEROS.astype(np.int32)),
    "hierarchy": lambda: posterior(hierarchy, G),
    "heavy tails": lambda: posterior(heavy_tails, X),
}


@pytest.mark.parametrize("name", MODELS)
def test_ranks_of_the_recommended_sampler_are_uniform(name, key):
    """Some thousandths of bias cannot be seen with 100 data sets; a tenth of an sd can."""
    result = sbc(key, MODELS[name](), **FAST)
    assert result.finite.all()
    assert result.p_value > FALSE_ALARM


def test_a_step_size_that_is_too_large_is_found(key):
    """SGLD in coordinates of unit variance: right at 0.05, and ten times that is too wide."""
    target = MODELS["regression"]()
    for step, uniform in ((0.05, True), (0.5, False)):
        result = sbc(key, target, lambda p, step=step: stochgrad.sgld(p, step), **FAST)
        assert (result.p_value > FALSE_ALARM) == uniform
    assert (
        result.ranks["b"].std() < 100 / np.sqrt(12) * 0.95
    )  # the truth in the middle of wide draws


def test_a_chain_that_never_moves_is_found(key):
    """Starting at the parameters that made the data would make its ranks uniform."""
    still = lambda p: stochgrad.sgld(p, 1e-12)
    assert sbc(key, MODELS["regression"](), still, **FAST).p_value < FALSE_ALARM


def test_a_plain_posterior_with_its_own_simulator(key):
    """Without a warm-up: the same at positions of the posterior itself, on all rows."""

    def simulate(key):
        mean_key, data_key = jax.random.split(key)
        mean = jax.random.normal(mean_key)
        return mean, mean + jax.random.normal(data_key, (50,))

    target = stochgrad.posterior(
        lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.zeros(50), order="full"
    )
    sampler = lambda p: stochgrad.sgld(p, 1e-3)
    options = {**FAST, "simulate": simulate, "windows": 0, "thin": 200}
    result = sbc(key, target, sampler, **options)
    assert result.p_value > FALSE_ALARM
    tree = result.to_datatree()
    pit = tree["prior_sbc"]["x"]
    assert pit.dims == ("chain", "draw")
    assert 0 < float(pit.min()) < float(pit.max()) < 1
    with pytest.raises(ValueError, match="simulate must return data with 50 rows"):
        sbc(key, target, simulate=lambda key: (0.0, jnp.zeros(3)), simulations=20)


def test_p_values_are_those_of_uniform_ranks():
    """Over many sets of uniform ranks they are uniform themselves."""
    from stochgrad.diagnostics._sbc import _p_values

    ranks = np.random.default_rng(1).integers(0, 101, (400, 300))
    p = _p_values(ranks, 100)
    assert p.shape == (300,)
    assert stats.kstest(p, "uniform").pvalue > FALSE_ALARM


def test_bad_input_gets_one_sentence(key):
    target = MODELS["regression"]()
    with pytest.raises(ValueError, match="num_draws must be a multiple of 3 chains, got 100"):
        sbc(key, target, num_chains=3)
    with pytest.raises(TypeError, match="posterior must be a Posterior"):
        sbc(key, regression)
    with pytest.raises(ValueError, match="simulations must be an integer of at least 20"):
        sbc(key, target, simulations=2)
    plain = stochgrad.posterior(lambda m: 0.0, lambda m, x: -(x**2), jnp.zeros(5), order="full")
    with pytest.raises(ValueError, match="simulate must be given for a posterior that is not of"):
        sbc(key, plain)
