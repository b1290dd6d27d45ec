"""The costs of sites with score functions, by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import TraceGraph_ELBO
from numpyro.infer.util import compute_log_probs

from stochgrad.numpyro import PathGradientELBO
from tests.conftest import Z

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


Y, W = jnp.array([0.3, -1.0, 1.7]), jnp.array([2.0, -0.4])


def plates():
    """Two plates of switches, and one outside of them that both depend on."""
    a = numpyro.sample("a", dist.Bernoulli(0.4))
    with numpyro.plate("first", 3):
        b = numpyro.sample("b", dist.Bernoulli(0.3 + 0.4 * a))
        numpyro.sample("y", dist.Normal(2.0 * b, 1.0), obs=Y)
    with numpyro.plate("second", 2):
        c = numpyro.sample("c", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))
        numpyro.sample("w", dist.Normal(c + a, 0.7), obs=W)


def guide_of_plates():
    """In which the second plate's switches depend on the one outside."""
    a = numpyro.sample("a", dist.Bernoulli(logits=numpyro.param("a0", jnp.array(0.2))))
    with numpyro.plate("first", 3):
        numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("b0", jnp.zeros(3))))
    with numpyro.plate("second", 2):
        logits = numpyro.param("c0", jnp.zeros((2, 2, 3)))
        numpyro.sample("c", dist.Categorical(logits=logits[a]))


RNG = np.random.default_rng(0)
AT = {
    "a0": jnp.array(0.4),
    "b0": jnp.asarray(RNG.normal(size=3)),
    "c0": jnp.asarray(RNG.normal(size=(2, 2, 3))),
}


def enumerated(params):
    """The gradient of the bound, by all combinations of the switches."""
    b = jnp.array(list(itertools.product([0, 1], repeat=3)))
    c = jnp.array(list(itertools.product([0, 1, 2], repeat=2)))

    def loss(params):
        def term(a, b, c):
            values = {"a": a, "b": b, "c": c}
            log_p, _ = compute_log_probs(plates, (), {}, values)
            log_q, _ = compute_log_probs(guide_of_plates, (), {}, {**values, **params})
            log_q = sum(log_q.values())
            return jnp.exp(log_q) * (log_q - sum(log_p.values()))

        over = jax.vmap(jax.vmap(jax.vmap(term, (None, None, 0)), (None, 0, None)), (0, None, None))
        return jnp.sum(over(jnp.array([0, 1]), b, c))

    return jax.grad(loss)(params)


def gradients(elbo, model, guide, params, keys):
    @jax.jit
    @jax.vmap
    def of(key):
        grad = jax.grad(lambda p: elbo.loss(key, p, model, guide))(params)
        return jax.flatten_util.ravel_pytree(grad)[0]

    return np.asarray(of(keys))


def test_each_site_answers_for_what_depends_on_it(key):
    """Unbiased, and with less noise than numpyro's."""
    wanted = jax.flatten_util.ravel_pytree(enumerated(AT))[0]
    keys, sites = jax.random.split(key, 20_000), ("a", "b", "c")
    found = {"numpyro": gradients(TraceGraph_ELBO(4), plates, guide_of_plates, AT, keys)}
    for kind in ("score", "optimal"):
        elbo = PathGradientELBO(4, estimators=dict.fromkeys(sites, kind))
        found[kind] = gradients(elbo, plates, guide_of_plates, AT, keys)
    square = {}
    for name, g in found.items():
        error = g.std(0) / np.sqrt(len(g))
        assert np.all(np.abs(g.mean(0) - wanted) < Z * error + 1e-12), name
        square[name] = np.sum((g - wanted) ** 2, 1)
    for kind in ("score", "optimal"):
        excess = square[kind] - square["numpyro"]
        assert excess.mean() < -3 * excess.std() / np.sqrt(len(keys)), kind


def test_a_subsampled_plate_and_a_mask(key):
    """The scale of a plate's rows weighs their costs once, and a mask does not hide a draw."""
    size, rows = 6, jnp.arange(6)
    shown = rows % 2 == 0

    def model():
        with numpyro.plate("rows", size, subsample_size=2) as i:
            with numpyro.handlers.mask(mask=shown[i]):
                z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(z + 0.2 * i, 1.0), obs=jnp.ones(2))

    def guide():
        logits = numpyro.param("logits", jnp.zeros(size))
        with numpyro.plate("rows", size, subsample_size=2) as i:
            seen = numpyro.handlers.mask(mask=shown[i])
            with seen:
                numpyro.sample("z", dist.Bernoulli(logits=logits[i]))

    params = {"logits": jnp.linspace(-1.0, 1.0, size)}

    def loss(params):
        q = jax.nn.sigmoid(params["logits"])
        total = 0.0
        for z, share in ((0.0, 1 - q), (1.0, q)):
            log_p = dist.Bernoulli(0.3).log_prob(z) - jnp.log(share)
            log_y = dist.Normal(z + 0.2 * rows, 1.0).log_prob(1.0)
            total = total + jnp.sum(share * (jnp.where(shown, log_p, 0.0) + log_y))
        return -total

    wanted = np.asarray(jax.grad(loss)(params)["logits"])
    for kind in ("score", "optimal"):
        elbo = PathGradientELBO(4, estimators={"z": kind})
        found = gradients(elbo, model, guide, params, jax.random.split(key, 20_000))
        error = found.std(0) / np.sqrt(len(found))
        assert np.all(np.abs(found.mean(0) - wanted) < Z * error), kind
