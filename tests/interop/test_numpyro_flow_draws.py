"""What a guide's draws become: weighted, resampled, with a verdict and ArviZ's groups."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flowjax.bijections import AbstractBijection, Affine
from flowjax.distributions import StandardNormal, Transformed
from numpyro.infer import SVI
from scipy.stats import norm

from stochgrad.flows import WeightsWarning
from stochgrad.numpyro import AutoFlow, PathGradientELBO

Y = jnp.array([1.6, 0.8])
PRECISION = 1 + len(Y)
EVIDENCE = norm.logpdf(1.6, 0, np.sqrt(2)) + norm.logpdf(0.8, 0.8, np.sqrt(1.5))


def model(y):
    numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def normal(scale=1.0):
    """The posterior, of the logarithm of ``scale`` and of ``x``, or one as much wider."""
    loc = jnp.array([0.0, float(jnp.sum(Y)) / PRECISION])
    return Transformed(StandardNormal((2,)), Affine(loc, scale * jnp.array([1, PRECISION**-0.5])))


def started(flow, **options):
    guide = AutoFlow(model, flow, **options)
    svi = SVI(model, guide, optax.adam(1e-3), loss=PathGradientELBO())
    return guide, svi.get_params(svi.init(jax.random.key(0), Y))


@pytest.mark.slow
def test_a_guide_that_is_the_posterior_has_the_evidence_without_error(key):
    guide, params = started(normal())
    draws = guide.to_draws(key, params, 1000, Y)
    assert draws.attrs["log_z"] == pytest.approx(EVIDENCE, abs=1e-5)
    assert draws.attrs["log_z_error"] < 1e-5
    assert draws.attrs["ess_q"] == pytest.approx(1, abs=1e-5)
    assert draws.attrs["pareto_khat"] <= draws.attrs["good_khat"]
    assert draws.verdict.ok
    tree = draws.to_datatree(["posterior", "sample_stats", "log_likelihood"])
    assert set(tree["posterior"].data_vars) == {"scale", "x"}
    assert float(tree["posterior"]["scale"].min()) > 0
    x = draws.constrained()["x"]
    wanted = norm.logpdf(np.asarray(Y), x[..., None], 1.0)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], wanted, rtol=1e-4)


@pytest.mark.slow
def test_a_guide_that_is_too_narrow_is_named(key):
    guide, params = started(normal(0.3))
    with pytest.warns(WeightsWarning, match="k-hat of the weights"):
        draws = guide.to_draws(key, params, 2000, Y)
    verdict = draws.verdict
    assert not verdict.ok
    assert "k-hat of the weights" in str(verdict)


@pytest.mark.slow
def test_a_condition_is_computed_from_the_arguments(key):
    """Of the shape of a flow that goes where the data say."""

    def locate(y):
        return jnp.array([0.0, jnp.sum(y) / PRECISION])

    class Moved(AbstractBijection):
        scale: jax.Array
        shape: tuple = (2,)
        cond_shape: tuple = (2,)

        def transform_and_log_det(self, x, condition=None):
            return self.scale * x + condition, jnp.sum(jnp.log(self.scale))

        def inverse_and_log_det(self, y, condition=None):
            return (y - condition) / self.scale, -jnp.sum(jnp.log(self.scale))

    layer = Moved(jnp.array([1, PRECISION**-0.5]))
    flow = Transformed(StandardNormal((2,)), layer)
    guide, params = started(flow, condition=locate)
    for y in (Y, Y + 2.0):
        draws = guide.to_draws(key, params, 500, y)
        assert draws.attrs["ess_q"] == pytest.approx(1, abs=1e-4)


def test_parameters_of_another_guide_are_refused(key):
    guide, _ = started(normal())
    with pytest.raises(ValueError, match=r"^params must be those of svi.run with this guide"):
        guide.to_draws(key, {"other": jnp.zeros(2)}, 100, Y)


@pytest.mark.slow
def test_draws_are_as_many_as_asked_for(key):
    guide, params = started(normal(1.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guide.to_draws(key, params, 300, Y).num_draws == 300
