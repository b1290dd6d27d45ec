"""Numpyro models with discrete latents: gradients against enumeration, a guide that learns."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import stochgrad
from stochgrad import em
from tests.conftest import Z

LENGTH = 3


def mixture(x):
    share = numpyro.param("share", jnp.array([0.3, 0.7]), constraint=constraints.simplex)
    mean = numpyro.param("mean", jnp.array([-1.0, 1.0]))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(share))
        numpyro.sample("x", dist.Normal(mean[z], 1.0), obs=x)


def chain(x):
    """A hidden Markov chain of two states along each row."""
    stay = numpyro.param("stay", jnp.array([0.8, 0.6]), constraint=constraints.unit_interval)
    mean = numpyro.param("mean", jnp.array([-0.5, 0.8]))

    def step(z, x):
        to = jnp.where(z == 0, stay[0], 1 - stay[1])
        with numpyro.plate("rows", x.shape[0]):
            z = numpyro.sample("z", dist.Categorical(jnp.stack([to, 1 - to], axis=-1)))
            numpyro.sample("x", dist.Normal(mean[z], 1.0), obs=x)
        return z, None

    scan(step, jnp.zeros(x.shape[0], jnp.int32), x.T)


def mixture_log_likelihood(values, x):
    each = jnp.log(values["share"]) + dist.Normal(values["mean"], 1.0).log_prob(x[:, None])
    return jnp.mean(jax.nn.logsumexp(each, axis=1))


def chain_log_likelihood(values, x):
    """Over all paths, one by one."""
    stay, mean, paths = values["stay"], values["mean"], []
    move = jnp.stack([jnp.stack([stay[0], 1 - stay[0]]), jnp.stack([1 - stay[1], stay[1]])])
    for path in itertools.product(range(2), repeat=LENGTH):
        total, before = 0.0, 0
        for t, z in enumerate(path):
            total += jnp.log(move[before, z]) + dist.Normal(mean[z], 1.0).log_prob(x[:, t])
            before = z
        paths.append(total)
    return jnp.mean(jax.nn.logsumexp(jnp.stack(paths), axis=0))


CASES = {
    "mixture": (mixture, mixture_log_likelihood, (3,)),
    "hidden Markov chain": (chain, chain_log_likelihood, (3, LENGTH)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_enumerated_likelihood(case):
    model, log_likelihood, shape = CASES[case]
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    runs, visits = 1500, 25
    questions = em.Questions((x,))
    target = em.mcmc_em(
        stochgrad.numpyro.latent_model(model),
        questions,
        batch_size=3,
        estimator=em.trice("none"),
        allocator=em.uniform(4),
        order="full",
    )
    theta = target.initial(jax.random.key(0))

    def run(key):
        def visit(state, key):
            score, state = target.next(key, theta, state)
            return state, score(theta)[1]

        keys = jax.random.split(key, visits)
        return jax.tree.map(
            lambda leaf: leaf[-1], jax.lax.scan(visit, target.init(key, theta), keys)[1]
        )

    found = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), runs))
    exact = jax.grad(lambda theta: log_likelihood(target.model(theta), x))(theta)
    for name, expected in exact.items():
        draws = np.asarray(found[name], np.float64)
        error = draws.std(axis=0) / np.sqrt(runs)
        assert (np.abs(draws.mean(axis=0) - np.asarray(expected)) < Z * error + 1e-6).all()
        assert np.abs(np.asarray(expected)).max() > 5 * error.max()


def test_a_guide_learns_the_posterior_of_each_row():
    x = jnp.array([-1.5, 0.3, 2.0])

    def guide(x):
        slope = numpyro.param("slope", jnp.zeros(()))
        offset = numpyro.param("offset", jnp.zeros(()))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Bernoulli(logits=slope * x + offset))

    def two(x):
        mean = numpyro.param("mean", jnp.array([-1.0, 1.0]))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.7))
            numpyro.sample("x", dist.Normal(mean[z], 1.0), obs=x)

    target = em.mcmc_em(
        stochgrad.numpyro.latent_model(two),
        em.Questions((x,), hints=(x,)),
        batch_size=3,
        estimator=em.trice("none"),
        proposal=stochgrad.numpyro.latent_guide(guide),
        order="full",
    )
    still = optax.multi_transform(
        {"model": optax.set_to_zero(), "guide": optax.sgd(0.1)}, ("model", "guide")
    )
    with jax.numpy_dtype_promotion("standard"):  # optax
        path = stochgrad.sample(
            jax.random.key(0),
            stochgrad.ascend(target, still),
            num_warmup=1000,
            num_samples=4000,
            progress=False,
        )
    slope, offset = (np.asarray(path.positions[1][name]).mean() for name in ("slope", "offset"))
    # the posterior's logit is log(0.7 / 0.3) + 2 x: exactly of the guide's form
    assert slope == pytest.approx(2.0, abs=0.25)
    assert offset == pytest.approx(np.log(0.7 / 0.3), abs=0.25)


def outside(x):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(mean + z, 1.0), obs=x)


def subsampled(x):
    mean = numpyro.param("mean", jnp.zeros(()))
    with numpyro.plate("rows", 100, subsample_size=3):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(mean + z, 1.0), obs=x)


def without_latents(x):
    mean = numpyro.param("mean", jnp.zeros(()))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def without_parameters(x):
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(z.astype(jnp.float32), 1.0), obs=x)


@pytest.mark.parametrize(
    "model, words",
    [
        (outside, "'mean' is inside the plates"),
        (subsampled, "leave subsample_size out"),
        (without_latents, "no latent sample site"),
        (without_parameters, "no numpyro.param"),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_models_that_do_not_fit_are_refused_by_name(model, words):
    with pytest.raises(ValueError, match=words):
        em.mcmc_em(
            stochgrad.numpyro.latent_model(model),
            em.Questions((jnp.zeros(3),)),
            batch_size=3,
            estimator=em.trice("none"),
        )
