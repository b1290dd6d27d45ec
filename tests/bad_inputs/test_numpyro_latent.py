"""Bad input to numpyro models with latent variables of each row: one sentence of our own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest

from stochgrad import em
from stochgrad.numpyro import latent_guide, latent_model
from tests.bad_inputs.test_em import refuses

KEY, X = jax.random.key(0), jnp.zeros(4)
PLATES = (3, "", ["rows"], b"rows", True)
FUNCTIONS = (None, 3, "model", [print], dist.Normal)
CASES = [
    pytest.param(partial(make, **{**good, argument: bad}), argument, id=f"{argument}-{bad}")
    for make, good, wrong in (
        (latent_model, {"model": print}, {"model": FUNCTIONS, "plate": PLATES}),
        (latent_guide, {"guide": print}, {"guide": FUNCTIONS, "plate": PLATES}),
    )
    for argument, values in wrong.items()
    for bad in values
]


@pytest.mark.parametrize(("thunk", "name"), CASES)
def test_bad_arguments_get_one_sentence(thunk, name):
    refuses(thunk, name)


def mixture(x):
    mean = numpyro.param("mean", jnp.zeros(2))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(jnp.ones(2) / 2))
        numpyro.sample("x", dist.Normal(mean[z], 1.0), obs=x)


def guide(x):
    share = numpyro.param("share", jnp.ones(2) / 2)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Categorical(share))


def other_sites(x):
    share = numpyro.param("share", jnp.ones(2) / 2)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("s", dist.Categorical(share))


def fails(*arguments):
    raise KeyError("weights")


def learn(model=mixture, x=X, plate=None, proposal=None, **settings):
    questions = em.Questions((x,), (), None if proposal is None else (x,))
    if proposal is not None:
        settings |= {"proposal": latent_guide(proposal), "estimator": em.trice("none")}
    return em.mcmc_em(latent_model(model, plate), questions, batch_size=2, **settings)


PHI = {"share": jnp.ones(2) / 2}
THETA = {"mean": jnp.zeros(2)}
USES = {
    "model fails": (lambda: learn(fails), "model"),
    "model of two": (lambda: learn(lambda x, y: None), "model"),
    "model without sites": (lambda: learn(lambda x: None), "model"),
    "model without parameters": (lambda: learn(lambda x: guide_of_constants(x)), "model"),
    "guide for a model": (lambda: learn(guide), "model"),
    "estimator": (lambda: learn(estimator=em.raft()), "likelihood"),
    "plate": (lambda: learn(plate="groups"), "groups"),
    "to evaluate": (
        lambda: em.evaluate(KEY, latent_model(mixture), {}, em.Questions((X,))), "model",
    ),
    "NaN": (lambda: learn(x=jnp.full(4, jnp.nan)), "questions"),
    "other parameters": (lambda: learn().init(KEY, {"mu": jnp.zeros(2)}), "mu"),
    "too few parameters": (lambda: learn().init(KEY, {}), "mean"),
    "no dict of parameters": (lambda: learn().init(KEY, jnp.zeros(3)), "parameters"),
    "parameter of another shape": (lambda: learn().init(KEY, {"mean": jnp.zeros(3)}), "mean"),
    "guide fails": (lambda: learn(proposal=fails), "guide"),
    "guide without sites": (lambda: learn(proposal=lambda x: None), "guide"),
    "guide of other sites": (
        lambda: learn(proposal=other_sites).init(KEY, (THETA, PHI)), "proposal.policy",
    ),
    "position": (lambda: learn(proposal=guide).init(KEY, THETA), "position"),
}  # fmt: skip


def guide_of_constants(x):
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(jnp.ones(2) / 2))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(("thunk", "name"), USES.values(), ids=USES)
def test_bad_uses_get_one_sentence(thunk, name):
    refuses(thunk, name)


def test_good_ones_are_taken():
    learn().init(KEY, THETA)
    learn(proposal=guide).init(KEY, (THETA, PHI))
