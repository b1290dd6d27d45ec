"""Flows of numpyro and of bijx as flows, in and outside SVI."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.distributions import transforms
from numpyro.distributions.flows import (
    BlockNeuralAutoregressiveTransform,
    InverseAutoregressiveTransform,
)
from numpyro.infer import SVI
from numpyro.nn import AutoregressiveNN, BlockNeuralAutoregressiveNN

import stochgrad
from stochgrad import flows
from stochgrad.flows import draw_with_score, parameters, unwrap_flow
from stochgrad.numpyro import AutoFlow, PathGradientELBO, as_flow

pytestmark = pytest.mark.slow
needs_bijx = pytest.mark.skipif(importlib.util.find_spec("bijx") is None, reason="needs bijx")
LOG_Z = float(1.5 * np.log(2 * np.pi))


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def log_density(x):
    return -0.5 * jnp.sum((x - 1.0) ** 2)


def autoregressive():
    init, network = AutoregressiveNN(3, [6])

    def make(params):
        layers = [
            InverseAutoregressiveTransform(lambda x: network(params["weights"], x)),
            transforms.PermuteTransform(jnp.array([2, 0, 1])),
            transforms.AffineTransform(params["loc"], jnp.exp(params["log_scale"])),
        ]
        return dist.TransformedDistribution(dist.Normal(jnp.zeros(3), 1.0), layers)

    weights = init(jax.random.key(1), (3,))[1]
    return as_flow(make, {"weights": weights, "loc": jnp.zeros(3), "log_scale": jnp.zeros(3)})


def block():
    init, network = BlockNeuralAutoregressiveNN(3, [4, 4])

    def make(weights):
        layer = BlockNeuralAutoregressiveTransform(lambda x: network(weights, x))
        return dist.TransformedDistribution(dist.Normal(0.0, 1.0).expand([3]).to_event(1), layer)

    return as_flow(make, init(jax.random.key(1), (3,))[1])


def couplings():
    import bijx
    from flax import nnx

    class Shear(bijx.Bijection):
        """The first number by a function of the others."""

        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)
            self.cap = bijx.Const(jnp.array(0.7))

        def _scale(self, x):
            log_scale, shift = self.linear(jnp.tanh(x[1:]))
            return self.cap.get_value() * jnp.tanh(log_scale), shift

        def forward(self, x, log_density):
            log_scale, shift = self._scale(x)
            y = x.at[0].set(x[0] * jnp.exp(log_scale) + shift)
            return jnp.roll(y, 1), log_density - log_scale

        def reverse(self, y, log_density):
            y = jnp.roll(y, -1)
            log_scale, shift = self._scale(y)
            return y.at[0].set((y[0] - shift) * jnp.exp(-log_scale)), log_density + log_scale

    rngs = nnx.Rngs(0)
    layers = bijx.Chain(*[Shear(rngs) for _ in range(4)], Shear(rngs).invert())
    return flows.from_bijx(bijx.Transformed(bijx.IndependentNormal((3,)), layers))


FLOWS = {
    "numpyro's autoregressive": autoregressive,
    "numpyro's block autoregressive": block,
    "bijx": pytest.param(couplings, marks=needs_bijx),
}


@pytest.fixture(params=[
    pytest.param(make.values[0] if hasattr(make, "values") else make, id=name,
                 marks=getattr(make, "marks", ()))
    for name, make in FLOWS.items()
])  # fmt: skip
def flow(request):
    return request.param()


def test_scores_are_those_of_the_density(flow, key):
    """By the whole Jacobian: some of these cannot be inverted."""
    plain = unwrap_flow(flow)
    found = draw_with_score(key, flow, 3)

    def one(key):
        z = plain.base_dist._sample(key)

        def log_density(z):
            return plain.base_dist._log_prob(z) - plain.bijection.transform_and_log_det(z)[1]

        jacobian = jax.jacrev(plain.bijection.transform)(z)
        size = jnp.linalg.slogdet(jacobian)[1] - plain.bijection.transform_and_log_det(z)[1]
        score = jnp.linalg.solve(jacobian.T, jax.grad(log_density)(z))
        return (plain.bijection.transform(z), log_density(z), score), size

    wanted, off = jax.vmap(one)(jax.random.split(key, 3))
    np.testing.assert_allclose(off, 0.0, atol=1e-12)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ["path", "auto"])
def test_trained_outside_svi(flow, estimator, key, request):
    objective = flows.reverse_kl(flow, log_density, estimator, num_samples=16)
    fit = stochgrad.fit(key, objective, 1000, learning_rate=0.02, every=500, progress=False)
    assert fit.value > LOG_Z - 0.05
    if "block" in request.node.callspec.id:  # the tails of its layers are not a normal's
        return
    weighted = flows.sample(key, fit, 4000, log_density)
    assert abs(weighted.log_z - LOG_Z) < 5 * weighted.log_z_error + 1e-6


def test_trained_in_svi(flow, key):
    def model():
        numpyro.sample("x", dist.Normal(1.0, 1.0).expand([3]).to_event(1))

    guide = AutoFlow(model, flow)
    svi = SVI(model, guide, optax.adam(0.02), PathGradientELBO(8))
    result = svi.run(key, 1000, progress_bar=False)
    assert np.mean(result.losses[-50:]) < 0.05
    before, after = (ravel_pytree(p)[0] for p in (parameters(flow), result.params["auto_flow"]))
    assert np.mean(before != after) > 0.5  # masked weights stay


@needs_bijx
def test_what_bijx_holds_constant_is_not_trained():
    params = parameters(couplings())
    assert ravel_pytree(params)[0].size == 5 * 6


def test_a_distribution_itself_is_a_flow_to_draw_from(key):
    flow = as_flow(dist.LogNormal(jnp.zeros(2), 0.5).to_event(1))
    draws = flows.sample(key, flow, 1000, lambda x: flow.log_prob(x))
    np.testing.assert_allclose(draws.log_weight, 0.0, atol=1e-9)
    assert jax.tree.leaves(parameters(flow)) == []


def test_refusals():
    with pytest.raises(ValueError, match=r"must be of one event, got a batch of shape \(3,\)"):
        as_flow(dist.Normal(jnp.zeros(3), 1.0))
    with pytest.raises(TypeError, match="what distribution returns must be a numpyro dist"):
        as_flow(lambda p: p, 3.0)
    with pytest.raises(TypeError, match="distribution must be a numpyro distribution or a func"):
        as_flow(3.0)
    with pytest.raises(ValueError, match="distribution fails on params"):
        as_flow(lambda p: dist.Normal(p["loc"], 1.0), {})
    with pytest.raises(ValueError, match="params must be None"):
        as_flow(dist.Normal(0.0, 1.0), {})
    longer = dist.TransformedDistribution(
        dist.Normal(jnp.zeros(2), 1.0), transforms.StickBreakingTransform()
    )
    with pytest.raises(ValueError, match=r"must keep the shape \(2,\) of its start, got \(3,\)"):
        as_flow(longer)


@needs_bijx
def test_refusals_of_bijx():
    with pytest.raises(TypeError, match="distribution must be a bijx distribution"):
        flows.from_bijx(dist.Normal(0.0, 1.0))
