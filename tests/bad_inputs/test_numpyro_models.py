"""Bad calls of ``stochgrad.from_numpyro``: one sentence each, from here, that names what is bad."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest

import stochgrad
from tests.bad_inputs import harness

refuses = partial(harness.refuses, errors=(TypeError, ValueError), quiet=False)

N, B = 40, 10
Y = np.linspace(-1, 1, N).astype(np.float32)
NAN = np.where(np.arange(N) == 3, np.nan, Y)


def model(y, b=B):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", N, subsample_size=b):
        numpyro.sample("y", dist.Normal(w, 1.0), obs=numpyro.subsample(y, 0))


def plated(size=N, subsample_size=B, site=None):
    """A model with a plate of its own, and what is in it."""

    def model(y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", size, subsample_size=subsample_size):
            (site or observed)(w, numpyro.subsample(y, 0))

    return model


def observed(w, y):
    numpyro.sample("y", dist.Normal(w, 1.0), obs=y)


def raises(error):
    def site(w, y):
        raise error

    return site


def two_plates(y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    for i, size in enumerate((N, N // 2)):
        with numpyro.plate("rows", size, subsample_size=B):
            numpyro.sample(f"y{i}", dist.Normal(w, 1.0), obs=numpyro.subsample(y[:size], 0))


def on_sphere(y):
    numpyro.sample("direction", dist.ProjectedNormal(jnp.ones(2)))
    model(y)


def random(y):
    jax.random.normal(numpyro.prng_key())
    model(y)


def nothing(y):
    with numpyro.plate("rows", N, subsample_size=B):
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=numpyro.subsample(y, 0))


BAD = {
    "model": (
        *(None, 3, "model", [print], dict, dist.Normal, dist.Normal(0.0, 1.0)),
        stochgrad.posterior(lambda w: 0.0 * w, lambda w, y: y - w, Y, batch_size=B),
    ),
    "batch_size": (
        *(0, -1, 2.0, 2.5, True, "10", [2], np.array([2, 3]), np.nan, 41, 10**12, (5,), dict),
        *({"row": 2}, {"rows": 0}, {"rows": 2.5}, {"rows": True}, {3: 2}, {"rows": 41}),
    ),
    "order": (None, 3, True, "random", "", b"iid", ["iid"], np.arange(2)),
    "layout": (None, 3, True, "columns", ["blocks"], np.arange(2)),
    "resident_bytes": (None, 0, -1, 1.5, True, "1GB", [1], np.nan),
    "mesh": (3, "cpu", True, jax.devices(), jax.sharding.Mesh),
    "client": (
        *(3, "ab", [], {}, {"a": (Y,)}, [Y, Y], np.stack([Y, Y]), [None], [3], (Y,)),
        *([(Y,), (Y, 3)], [(Y,), (Y[:5],), (NAN,)]),
    ),
    "argument 0": (
        *(pd.DataFrame({"y": Y}), pd.Series(NAN), NAN, jnp.asarray(NAN), NAN.tolist()),
        *(np.array(["a"] * N), np.array(["a"] * N, object), Y.astype("M8[s]"), Y[:30], Y[:0]),
        *(np.ma.array(Y, mask=Y > 0), np.arange(N) * 10**10, 1.7e9 + np.arange(N), np.tile(Y, 2)),
        *(np.stack([Y, Y], axis=1), float("nan"), np.float32(np.nan)),
    ),
    "numpyro.subsample": (None, "abc", {"y": Y}, [[1.0], [1.0, 2.0]], print),
    "site 'y'": (3, 2.5, np.float32(3.0), jnp.ones(())),
    "real number": (Y.astype(complex),),
}


def call(argument, bad):
    if argument == "model":
        return stochgrad.from_numpyro(bad, Y)
    if argument == "client":
        return stochgrad.from_numpyro(model, clients=bad)
    if argument in ("batch_size", "order", "layout", "resident_bytes", "mesh"):
        return stochgrad.from_numpyro(model, Y, **{argument: bad})
    return stochgrad.from_numpyro(model, bad)


CALLS = [
    pytest.param(lambda a=argument, x=bad: call(a, x), argument, id=f"{argument}-{i}")
    for argument, values in BAD.items()
    for i, bad in enumerate(values)
]
MODELS = {
    "missing a required argument: 'y'": lambda: stochgrad.from_numpyro(model),
    "too many positional arguments": lambda: stochgrad.from_numpyro(model, Y, 2, 3),
    "unexpected keyword argument 'z'": lambda: stochgrad.from_numpyro(model, Y, z=1),
    "argument 'b' must be a number": lambda: stochgrad.from_numpyro(model, Y, b=float("nan")),
    "argument 0 must be an array whose values are known": lambda: jax.jit(
        lambda y: stochgrad.from_numpyro(model, y).batches.full["rows"].index
    )(Y),
    "either as they are or by clients": lambda: stochgrad.from_numpyro(model, Y, clients=[(Y,)]),
    "at the plate 'rows'": lambda: stochgrad.from_numpyro(plated(0), Y),
    "plate 'rows' must have a size": lambda: stochgrad.from_numpyro(plated(40.0), Y),
    "subsample_size of at least 1": lambda: stochgrad.from_numpyro(plated(N, 0), Y),
    "at least 1, an integer, got -3": lambda: stochgrad.from_numpyro(plated(N, -3), Y),
    "at least 1, an integer, got 10.0": lambda: stochgrad.from_numpyro(plated(N, 10.0), Y),
    "at least 1, an integer, got True": lambda: stochgrad.from_numpyro(plated(N, True), Y),
    "subsample_size=50, more than its size": lambda: stochgrad.from_numpyro(plated(N, 50), Y),
    "two plates called 'rows'": lambda: stochgrad.from_numpyro(two_plates, Y),
    "model fails (ZeroDivisionError": lambda: stochgrad.from_numpyro(
        plated(site=lambda w, y: 1 / 0), Y
    ),
    "model fails (NotImplementedError)": lambda: stochgrad.from_numpyro(
        plated(site=raises(NotImplementedError())), Y
    ),
    "model fails (KeyError: 'weights')": lambda: stochgrad.from_numpyro(
        plated(site=raises(KeyError("weights"))), Y
    ),
    "model fails at the site 'y' (TypeError: Invalid type for 'fn'": lambda: stochgrad.from_numpyro(
        plated(site=lambda w, y: numpyro.sample("y", 3.0, obs=y)), Y
    ),
    "invalid scale parameter": lambda: stochgrad.from_numpyro(
        plated(site=lambda w, y: numpyro.sample("y", dist.Normal(w, -1.0), obs=y)), Y
    ),
    "unique names but got `y` duplicated": lambda: stochgrad.from_numpyro(
        plated(site=lambda w, y: observed(w, y) or observed(w, y)), Y
    ),
    "its obs is None": lambda: stochgrad.from_numpyro(
        plated(site=lambda w, y: observed(w, None)), Y
    ),
    "no sample site lies in the subsampled plate": lambda: stochgrad.from_numpyro(
        plated(site=lambda w, y: None), Y
    ),
    "row 3 holds NaN": lambda: stochgrad.from_numpyro(
        plated(site=lambda w, y: observed(w, numpyro.subsample(NAN, 0))), Y
    ),
    "no latent site": lambda: stochgrad.from_numpyro(nothing, Y),
    "no subsampled plate": lambda: stochgrad.from_numpyro(lambda y: None, Y),
    "latent site 'direction' has a support": lambda: stochgrad.from_numpyro(on_sphere, Y),
    "must not draw random numbers": lambda: stochgrad.from_numpyro(random, Y),
}


@pytest.mark.parametrize(("thunk", "name"), CALLS)
def test_bad_arguments_get_one_sentence(thunk, name):
    refuses(thunk, name)


@pytest.mark.parametrize("words", list(MODELS))
def test_bad_models_get_one_sentence(words):
    refuses(MODELS[words], words)


@pytest.mark.parametrize(
    "y",
    [Y.tolist(), pd.Series(Y), jnp.asarray(Y), Y.astype(object), np.ma.array(Y), np.arange(N)],
    ids=["list", "series", "jax", "objects", "unmasked", "integers"],
)
def test_what_people_hold_data_in_works(y):
    target = stochgrad.from_numpyro(model, y, batch_size=np.int64(5))
    z = {"w": jnp.float32(0.5)}
    values = np.asarray(y, np.float32)
    expected = dist.Normal(0.0, 1.0).log_prob(0.5) + dist.Normal(0.5, 1.0).log_prob(values).sum()
    np.testing.assert_allclose(target.log_density(z, target.batches.full), expected, rtol=1e-5)


def test_values_outside_of_a_support_are_said():
    """Labels 1 and 2 for a Bernoulli; soft labels and what parameters bound are the user's."""
    labels = (1 + np.arange(N) % 2).astype(np.float32)
    one_or_two = plated(site=lambda w, y: numpyro.sample("y", dist.Bernoulli(logits=w), obs=y))
    with pytest.warns(UserWarning, match="site 'y' observes values outside of the support"):
        stochgrad.from_numpyro(one_or_two, labels)
    stochgrad.from_numpyro(one_or_two, labels - 1)
    masked = plated(
        site=lambda w, y: numpyro.sample("y", dist.Bernoulli(logits=w).mask(y < 2), obs=y)
    )
    stochgrad.from_numpyro(masked, labels)
    bounded = plated(site=lambda w, y: numpyro.sample("y", dist.Uniform(w, w + 0.1), obs=y))
    stochgrad.from_numpyro(bounded, Y)
