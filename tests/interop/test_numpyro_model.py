"""numpyro models as posteriors: equal to numpyro's own density, unbiased over minibatches."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import cond
from numpyro.infer.util import constrain_fn, log_density, potential_energy

import stochgrad
from tests.conftest import Z
from tests.interop import models as m

NESTED = {"nested", "two plates"}  # an epoch of one is not an epoch of the other


@pytest.fixture(params=list(m.MODELS))
def case(request):
    model, args, kwargs = m.MODELS[request.param]
    return request.param, model, args, kwargs


def whole(model, args, kwargs, z):
    """numpyro's own unconstrained log density on all the data."""
    energy = lambda z, args: potential_energy(model, args, {**kwargs, "b": None}, z)
    return -jax.jit(energy)(z, args)


def epoch(target, position, count):
    @jax.jit
    def run(state):
        def body(state, _):
            batch, state = target.batches.next(state)
            return state, jax.value_and_grad(target.log_density)(position, batch)

        return jax.lax.scan(body, state, None, length=count)[1]

    return run(target.batches.init(jax.random.key(5)))


def test_the_full_batch_is_numpyros_density(case):
    name, model, args, kwargs = case
    if name == "handlers":
        pytest.skip("numpyro scales the Jacobian as well; see the next test")
    target = stochgrad.from_numpyro(model, *args, **kwargs)
    z = target.initial(jax.random.key(1))
    ours = jax.jit(lambda z: target.log_density(z, target.batches.full))(z)
    np.testing.assert_allclose(ours, whole(model, args, kwargs, z), rtol=1e-5)


@pytest.mark.slow
def test_the_constrained_density_plus_jacobians_is_log_density(case):
    """The same through ``log_density``, with the Jacobians by automatic differentiation."""
    name, model, args, kwargs = case
    if name in ("hierarchical", "scan"):
        pytest.skip("simplex and Cholesky factors have no square Jacobian; scan wants all at once")
    full = {**kwargs, "b": None}
    target = stochgrad.from_numpyro(model, *args, **kwargs)
    z = target.initial(jax.random.key(2))
    density, _ = log_density(model, args, full, constrain_fn(model, args, full, z))
    jacobians = [
        jnp.log(jnp.abs(jax.grad(lambda v: constrain_fn(model, args, full, {**z, k: v})[k])(v)))
        for k, v in z.items()
        if v.shape == ()
    ]
    expected = density + sum(jacobians, start=jnp.float32(0.0))
    np.testing.assert_allclose(target.log_density(z, target.batches.full), expected, rtol=1e-5)


@pytest.mark.parametrize("layout", ["blocks", pytest.param("rows", marks=pytest.mark.slow)])
def test_an_epochs_average_is_the_full_score(case, layout):
    name, model, args, kwargs = case
    target = stochgrad.from_numpyro(model, *args, layout=layout, **kwargs)
    z = target.initial(jax.random.key(1))
    full = lambda z: target.log_density(z, target.batches.full)
    expected = jax.jit(jax.value_and_grad(full))(z)
    if name in NESTED:  # all pairs of blocks appear over many epochs: a z-test
        values = jax.tree.map(np.asarray, epoch(target, z, 6000))
        blocks = jax.tree.map(lambda x: x.reshape(60, 100, *x.shape[1:]).mean(axis=1), values)
        jax.tree.map(
            lambda x, e: np.testing.assert_array_less(
                np.abs(x.mean(axis=0) - e), Z * x.std(axis=0) / np.sqrt(59) + 1e-4 * np.abs(e)
            ),
            blocks,
            expected,
        )
        return
    k = -(-target.batches.size // target.batches.batch_size)
    values = epoch(target, z, k)
    jax.tree.map(
        lambda x, e: np.testing.assert_allclose(np.mean(x, axis=0), e, rtol=2e-4, atol=2e-3),
        values,
        expected,
    )
    assert np.std(values[0]) > 0


@pytest.mark.parametrize("order", ["iid", "symmetric", "full"])
def test_other_orders_work(order):
    target = stochgrad.from_numpyro(m.regression, m.X, y=m.Y, order=order)
    z = target.initial(jax.random.key(1))
    value, _ = epoch(target, z, 4)
    assert np.all(np.isfinite(value))
    if order == "full":
        np.testing.assert_allclose(value, whole(m.regression, (m.X,), {"y": m.Y}, z), rtol=1e-5)


def test_the_batch_size_may_be_given():
    target = stochgrad.from_numpyro(m.regression, m.X, y=m.Y, batch_size=7)
    assert target.batches.batch_size == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch, _ = target.batches.next(target.batches.init(jax.random.key(0)))
        target.log_density(target.initial(jax.random.key(0)), batch)
    assert batch["rows"].index.shape == (7,)
    nested = stochgrad.from_numpyro(m.nested, m.TABLE, batch_size={"rows": 3})
    batch, _ = nested.batches.next(nested.batches.init(jax.random.key(0)))
    assert (batch["rows"].index.shape, batch["columns"].index.shape) == ((3,), (4,))


def test_data_are_read_by_slices_and_not_gathered():
    def operations(model, *args, **kwargs):
        target = stochgrad.from_numpyro(model, *args, **kwargs)
        batch, _ = target.batches.next(target.batches.init(jax.random.key(0)))
        z = target.initial(jax.random.key(0))
        return str(jax.make_jaxpr(target.log_density)(z, batch))

    assert "gather" not in operations(m.regression, m.X, y=m.Y)
    assert "gather" in operations(m.by_index, m.X, m.Y)


def test_positions_are_named_and_constrained():
    target = stochgrad.from_numpyro(m.hierarchical, m.X, m.G, m.Y)
    z = target.initial(jax.random.key(0))
    assert z["chol"].shape == (1,)
    assert z["share"].shape == (2,)
    values = target.constrain(z)
    assert set(values) == {"tau", "rho", "chol", "share", "a", "spread"}  # no "mean": it is per row
    assert values["tau"] > 0
    assert 0 < values["rho"] < 1
    np.testing.assert_allclose(values["share"].sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(values["spread"], values["a"] - values["a"].mean(), rtol=1e-5)
    assert target.dims["a"] == ("groups",)
    assert target.dims["chol"] == ("chol_dim_0", "chol_dim_1")


def test_models_that_cannot_be_are_refused():
    def discrete(y):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        with numpyro.plate("rows", len(y), subsample_size=5):
            numpyro.sample("y", dist.Normal(z, 1.0), obs=numpyro.subsample(y, event_dim=0))

    def local(y):
        with numpyro.plate("rows", len(y), subsample_size=5):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=numpyro.subsample(y, event_dim=0))

    def branching(y):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        scale = 2.0 if z > 0 else 1.0
        with numpyro.plate("rows", len(y), subsample_size=5):
            numpyro.sample("y", dist.Normal(z, scale), obs=numpyro.subsample(y, event_dim=0))

    def conditional(y):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        cond(z > 0, lambda _: 1.0, lambda _: 2.0, None)

    def unsubsampled(y):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def numpy_inside(y):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 53, subsample_size=5) as rows:
            numpyro.sample("y", dist.Normal(z, 1.0), obs=m.Y[rows])

    y = np.ones(20, np.float32)
    for model, words in [
        (discrete, "latent site 'z' is discrete"),
        (local, "latent site 'z' lies inside the subsampled plate 'rows'"),
        (branching, "stochastic control flow"),
        (conditional, "stochastic control flow"),
        (unsubsampled, "no subsampled plate"),
        (numpy_inside, "indexing a numpy array of its own"),
    ]:
        with pytest.raises(ValueError, match=words):
            stochgrad.from_numpyro(model, y)
    assert stochgrad.from_numpyro(unsubsampled, y, batch_size=5).batches.batch_size == 5
    for options in ({"batch_size": 20}, {"order": "full"}):
        target = stochgrad.from_numpyro(unsubsampled, y, **options)
        z = {"z": jnp.float32(0.3)}
        np.testing.assert_allclose(
            target.log_density(z, target.batches.full),
            -potential_energy(unsubsampled, (y,), {}, z),
            rtol=1e-6,
        )


def test_bad_arguments_are_refused():
    bad = m.X.copy()
    bad[17, 1] = np.nan
    with pytest.raises(ValueError, match="argument 0 must be finite, but row 17"):
        stochgrad.from_numpyro(m.regression, bad, y=m.Y)
    with pytest.raises(ValueError, match="batch_size must be from 1 to the number of rows, 53"):
        stochgrad.from_numpyro(m.regression, m.X, y=m.Y, batch_size=54)
    with pytest.raises(ValueError, match="give batch_size as a dict"):
        stochgrad.from_numpyro(m.nested, m.TABLE, batch_size=3)
    with pytest.raises(ValueError, match=r"batch_size names \['row'\]"):
        stochgrad.from_numpyro(m.nested, m.TABLE, batch_size={"row": 3})
