"""Models whose log density is no sum over a plate's rows are refused, and no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen as nn
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import flax_module, random_flax_module

import stochgrad

N, B = 40, 10
Y = (1 + np.random.default_rng(0).normal(size=N)).astype(np.float32)
X = np.arange(N, dtype=np.float32) / N


def log_prob(w, y):
    return dist.Normal(w, 1.0).log_prob(y)


def plated(body, after=None, dim=-1):
    """A model of one mean, with what comes inside and after the block of its plate."""

    def model(y, x=X):
        w = numpyro.sample("w", dist.Normal(0.0, 10.0))
        with numpyro.plate("rows", N, subsample_size=B, dim=dim) as rows:
            values = body(w, y, x, rows)
        if after is not None:
            after(w, *values)

    return model


def read(v):
    return numpyro.subsample(v, event_dim=0)


def observe(w, y, scale=1.0):
    numpyro.sample("y", dist.Normal(w, scale), obs=y)


def both(w, y, x, rows):
    return read(y), read(x)


WRONG = {
    "observed after the block": (
        plated(both, lambda w, y, x: observe(w, y)),
        r"(?s)'y', shape \(10,\).*inside the block of `with numpyro.plate\('rows'",
    ),
    "one observed after the block": (
        plated(
            lambda w, y, x, rows: observe(w, read(y)) or both(w, y, x, rows),
            lambda w, y, x: numpyro.sample("x", dist.Normal(w, 1.0), obs=x),
        ),
        r"site 'x', shape \(10,\), depends on the rows .* outside of the subsampled plate 'rows'",
    ),
    "factor after the block": (
        plated(
            lambda w, y, x, rows: observe(w, read(y)) or both(w, y, x, rows),
            lambda w, y, x: numpyro.factor("f", jnp.sum(log_prob(w, x))),
        ),
        r"factor 'f', shape \(\), depends on the rows .* one value per row, without jnp.sum",
    ),
    "summed factor": (
        plated(lambda w, y, x, rows: numpyro.factor("f", jnp.sum(log_prob(w, read(y))))),
        r"factor 'f', shape \(10,\), has one value for the whole minibatch",
    ),
    "a mean for a factor": (
        plated(lambda w, y, x, rows: numpyro.factor("f", N * jnp.mean(log_prob(w, read(y))))),
        r"factor 'f', shape \(10,\), has one value for the whole minibatch",
    ),
    "plate of columns": (
        plated(lambda w, y, x, rows: observe(w, read(y[:, None])[:, 0]), dim=-2),
        r"site 'y', .* has no rows along dimension -2",
    ),
    "plate of columns, mean of rows": (
        plated(lambda w, y, x, rows: observe(w + read(x[:, None]), read(y[:, None])[:, 0]), dim=-2),
        r"site 'y', shape \(10, 10\), pairs the rows",
    ),
    "scaled by hand": (
        plated(lambda w, y, x, rows: numpyro.factor("f", N / len(rows) * log_prob(w, read(y)))),
        r"factor 'f', .* leave out factors such as N / B",
    ),
    "scaled by a handler": (
        plated(lambda w, y, x, rows: handlers.scale(observe, scale=N / len(rows))(w, read(y))),
        r"site 'y', .* leave out factors such as N / B",
    ),
    "centered in the minibatch": (
        plated(lambda w, y, x, rows: observe(w, read(y) - jnp.mean(read(y)))),
        r"site 'y', shape \(10,\), depends on which other rows",
    ),
    "a column against rows": (
        plated(lambda w, y, x, rows: observe(w * read(x[:, None]), read(y))),
        r"site 'y' has shape \(40, 10\): data and distribution are broadcast .* dimension -2",
    ),
    "rows against a column": (
        plated(lambda w, y, x, rows: observe(w * read(x), read(y[:, None]))),
        r"site 'y' has shape \(40, 10\): data and distribution are broadcast .* dimension -2",
    ),
    "columns in a plate of rows": (
        plated(lambda w, y, x, rows: observe(w * read(x[:, None]), read(y[:, None]))),
        r"site 'y', .* has no rows along dimension -1",
    ),
    "a column by index": (
        plated(lambda w, y, x, rows: observe(w * jnp.asarray(x)[rows][:, None], y[rows])),
        r"site 'y', shape \(10, 10\), pairs the rows of the minibatch with each other",
    ),
    "y with all its rows": (
        plated(lambda w, y, x, rows: observe(w * read(x), y)),
        r"site 'y' .*A minibatch of 10 rows of the plate 'rows' meets all 40.*"
        r"argument 0, shape \(40,\) did not go through it",
    ),
    "x with all its rows": (
        plated(lambda w, y, x, rows: observe(w * x, read(y))),
        r"site 'y' .*A minibatch of 10 rows of the plate 'rows' meets all 40",
    ),
    "nothing read": (
        plated(lambda w, y, x, rows: observe(w * x, y)),
        r"site 'y' .*A minibatch of 10 rows of the plate 'rows' meets all 40",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_no_sum_over_rows_is_refused(name):
    """Each of these was accepted, and gave a posterior of another width or place."""
    model, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        stochgrad.from_numpyro(model, Y)


def test_a_minibatch_of_one_row_hides_nothing():
    """All rows of y broadcast against one of x without an error of shapes."""
    for body in (
        lambda w, y, x, rows: observe(w * read(x), y),
        lambda w, y, x, rows: observe(w * x, read(y)),
    ):

        def model(y, x, body=body):
            w = numpyro.sample("w", dist.Normal(0.0, 10.0))
            with numpyro.plate("rows", N, subsample_size=1) as rows:
                body(w, y, x, rows)

        with pytest.raises(ValueError, match=r"site 'y' has 40 rows.* whose minibatch has 1"):
            stochgrad.from_numpyro(model, Y, X)


def test_rows_that_are_fixed_are_said():
    """Ten rows written into the model, whatever the minibatch: nothing fails at ten rows."""
    model = plated(lambda w, y, x, rows: observe(w * read(x), y[:B]))
    with pytest.warns(UserWarning, match="something in it has a fixed number of rows"):
        stochgrad.from_numpyro(model, Y)
    paired = plated(lambda w, y, x, rows: observe(w + jnp.zeros(B), read(y) - read(y).mean()))
    with (
        pytest.warns(UserWarning, match="fixed number of rows"),
        pytest.raises(ValueError, match="depends on which other rows"),
    ):
        stochgrad.from_numpyro(paired, Y)


def test_priors_of_the_minibatch_are_refused():
    def model(y):
        w = numpyro.sample("w", dist.Normal(0.0, 10.0))
        with numpyro.plate("rows", N, subsample_size=B):
            yb = read(y)
            observe(w, yb)
        numpyro.sample("v", dist.Normal(jnp.mean(yb), 1.0))

    with pytest.raises(ValueError, match="the prior of latent site 'v' depends on the rows"):
        stochgrad.from_numpyro(model, Y)


def test_what_is_reported_of_a_minibatch_is_refused():
    """A deterministic site after the block had the value of the first ten rows."""
    model = plated(
        lambda w, y, x, rows: observe(w, read(y)) or both(w, y, x, rows),
        lambda w, y, x: numpyro.deterministic("residual", w - jnp.mean(y)),
    )
    with pytest.raises(ValueError, match="deterministic site 'residual' depends on the rows"):
        stochgrad.from_numpyro(model, Y)


def constant(y):
    """A normalizing constant per row is one number for all of them, and right."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", N, subsample_size=B):
        numpyro.factor("f", -0.5 * (read(y) - w) ** 2)
        numpyro.factor("log_z", -jnp.log1p(w**2))


def zeros(y):
    w = numpyro.sample("w", dist.HalfNormal(1.0))
    with numpyro.plate("rows", N, subsample_size=B):
        numpyro.sample("y", dist.Poisson(jnp.exp(w + read(y))), obs=jnp.zeros((), jnp.int32))


def several(y):
    """Three measurements of each row, in a dimension without a plate: as many as rows, once."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", N, subsample_size=B):
        yb = read(y)
        numpyro.sample("y", dist.Normal(w, 1.0), obs=jnp.stack([yb, 2 * yb, 3 * yb]))
        numpyro.sample("z", dist.Normal(w, 1.0), obs=jnp.stack([yb] * B))


def steep(y):
    """Of no finite density at the first place that is tried."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", N, subsample_size=B):
        numpyro.sample("y", dist.Uniform(w, 9.0), obs=2 * jnp.abs(read(y)))


def extremes(y):
    """Terms of 1e10 that differ by little, and cancel."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", N, subsample_size=B):
        yb = read(y)
        numpyro.sample("y", dist.Normal(1e4 + 1e-2 * w + yb, 1e-3), obs=1e4 + yb + 30 * yb)
        numpyro.factor("f", 1e6 * (jnp.sin(1e4 * (w + yb))))


def scanned(y):
    """Sampled and observed steps of a scan with a whole plate inside, and a plate of rows."""

    def step(carry, t):
        with numpyro.plate("series", 3):
            z = numpyro.sample("z", dist.Normal(0.5 * carry, 1.0))
            numpyro.sample("seen", dist.Normal(z, 1.0), obs=t * jnp.ones(3))
        return z, z

    _, z = scan(step, jnp.zeros(3), jnp.arange(4.0))
    with numpyro.plate("rows", N, subsample_size=B):
        observe(z[-1, 0], read(y))


def scoped(y):
    with handlers.scope(prefix="in"):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", N, subsample_size=7):  # padded: 40 is no multiple of 7
            observe(w, read(y))


def masked(y):
    """Masks and scales per row, around and inside of the plate."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with handlers.scale(scale=2.0), numpyro.plate("rows", N, subsample_size=B):
        yb = read(y)
        with handlers.mask(mask=yb > 0), handlers.scale(scale=jnp.abs(yb)):
            observe(w, yb)
        numpyro.sample("z", dist.Normal(w, 1.0).mask(yb > 1), obs=yb)


def same(y):
    """Rows that are all alike."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", N, subsample_size=B):
        observe(w, read(jnp.ones(N)))


RIGHT = [constant, zeros, several, steep, extremes, scanned, scoped, masked, same]


@pytest.mark.parametrize("model", RIGHT, ids=lambda model: model.__name__)
def test_what_is_a_sum_over_rows_is_taken(model):
    """And its minibatches' mean over an epoch is the density on all rows."""
    target = stochgrad.from_numpyro(model, Y)
    z = target.initial(jax.random.key(0))
    count = -(-target.batches.size // target.batches.batch_size)

    @jax.jit
    def densities(state):
        def body(state, _):
            batch, state = target.batches.next(state)
            return state, target.log_density(z, batch)

        return jax.lax.scan(body, state, None, length=count)[1]

    values = densities(target.batches.init(jax.random.key(1)))
    whole = jax.jit(target.log_density)(z, target.batches.full)
    rounding = 2.0**-12 * (np.abs(values).max() + 1e7 * (model is extremes))
    np.testing.assert_allclose(np.mean(values), whole, atol=rounding, rtol=0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x[..., None])[..., 0]


def with_param(y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    scale = numpyro.param("scale", 2.0, constraint=dist.constraints.positive)
    with numpyro.plate("rows", N, subsample_size=B):
        observe(w, read(y), scale)


def with_module(y, prior=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    net = (
        flax_module("net", Net(), input_shape=())
        if prior is None
        else random_flax_module("net", Net(), prior, input_shape=())
    )
    with numpyro.plate("rows", N, subsample_size=B):
        observe(w + net(read(X)), read(y))


def test_parameters_without_a_prior_are_refused():
    """They would stay at their first value, neither sampled nor learned."""
    kernel = {"Dense_0.kernel": dist.Normal(0.0, 1.0)}
    for model, name in [
        (with_param, "scale"),
        (with_module, r"net\$params"),
        (functools.partial(with_module, prior=kernel), r"net\$params"),
    ]:
        with pytest.raises(ValueError, match=f"numpyro.param site '{name}', .* neither sampled"):
            stochgrad.from_numpyro(model, Y)


def test_parameters_that_are_fixed_or_drawn_are_fine():
    fixed = stochgrad.from_numpyro(handlers.substitute(with_param, data={"scale": 3.0}), Y)
    z = {"w": jnp.float32(0.5)}
    expected = dist.Normal(0.0, 1.0).log_prob(0.5) + dist.Normal(0.5, 3.0).log_prob(Y).sum()
    np.testing.assert_allclose(fixed.log_density(z, fixed.batches.full), expected, rtol=1e-5)
    drawn = stochgrad.from_numpyro(with_module, Y, prior=dist.Normal(0.0, 1.0))
    assert set(drawn.initial(jax.random.key(0))) == {
        "w",
        "net/Dense_0.bias",
        "net/Dense_0.kernel",
    }


def test_a_subsampled_plate_in_a_scan_is_checked():
    """Its rows are read and scaled as others are, and may not depend on each other."""

    def make(center):
        def model(x):
            a = numpyro.sample("a", dist.Uniform(-1.0, 1.0))

            def step(before, now):
                with numpyro.plate("series", N, subsample_size=B):
                    values = read(now)
                    shift = jnp.mean(values) if center else 0.0
                    numpyro.sample("x", dist.Normal(a * read(before), 1.0), obs=values - shift)
                return now, None

            scan(step, jnp.zeros(N), x)

        return model

    x = np.random.default_rng(1).normal(size=(5, N)).astype(np.float32)
    target = stochgrad.from_numpyro(make(False), x)
    a, before = 0.5, np.concatenate([np.zeros((1, N)), x[:-1]])
    z = target.unconstrain({"a": jnp.float32(a)})
    prior = np.log(0.5) + np.log(2 * 0.75 * 0.25)  # of the density 1/2, and of the map to (-1, 1)
    expected = prior + dist.Normal(a * before, 1.0).log_prob(x).sum()
    np.testing.assert_allclose(target.log_density(z, target.batches.full), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"site 'x', shape \(5, 10\), depends on which other rows"):
        stochgrad.from_numpyro(make(True), x)


def improper(y):
    s = numpyro.sample("s", dist.ImproperUniform(dist.constraints.positive, (), (2,)))
    numpyro.deterministic("sum", s.sum())
    with numpyro.plate("rows", N, subsample_size=B):
        observe(s[0], read(y), s[1])


def test_distributions_that_cannot_be_drawn_from_work():
    """The density is that of the likelihood and the Jacobian of exp, in closed form."""
    target = stochgrad.from_numpyro(improper, Y)
    z = target.initial(jax.random.key(0))
    assert z["s"].shape == (2,)
    assert np.all(np.abs(z["s"]) < 2)
    values = target.constrain(z)
    np.testing.assert_allclose(values["s"], np.exp(z["s"]), rtol=1e-6)
    np.testing.assert_allclose(values["sum"], np.exp(z["s"]).sum(), rtol=1e-6)
    np.testing.assert_allclose(target.unconstrain(values)["s"], z["s"], rtol=1e-5)
    mean, sd = values["s"]
    expected = dist.Normal(mean, sd).log_prob(Y).sum() + z["s"].sum()
    np.testing.assert_allclose(target.log_density(z, target.batches.full), expected, rtol=1e-5)


def test_names_with_a_slash_are_read_by_slices():
    target = stochgrad.from_numpyro(scoped, Y)
    assert set(target.initial(jax.random.key(0))) == {"in/w"}
    batch, _ = target.batches.next(target.batches.init(jax.random.key(0)))
    z = {"in/w": jnp.float32(0.3)}
    assert "gather" not in str(jax.make_jaxpr(target.log_density)(z, batch))


COUNTS = {
    "int(np.max)": lambda g: int(np.max(g)) + 1,
    "int(max)": lambda g: int(g.max()) + 1,
    "unique": lambda g: len(np.unique(g)),
    "max": lambda g: g.max() + 1,
    "range": lambda g: len(range(int(g.min()), int(g.max()) + 1)),
}


def grouped(count, by_index):
    def model(g, y):
        with numpyro.plate("groups", count(g)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", N, subsample_size=B) as rows:
            gb, yb = (g[rows], y[rows]) if by_index else (read(g), read(y))
            numpyro.sample("y", dist.Normal(a[gb], 1.0), obs=yb)

    return model


G = np.arange(N) % 4


COUNTED = [
    pytest.param(name, by_index, marks=() if name == "int(np.max)" else pytest.mark.slow)
    for name in COUNTS
    for by_index in (False, True)
]


@pytest.mark.parametrize(("name", "by_index"), COUNTED)
def test_data_count_groups_in_the_model(name, by_index):
    """int(group.max()) + 1 on numpy or jax arrays, through both doors."""
    model = grouped(COUNTS[name], by_index)
    a = jnp.array([0.1, 0.2, 0.3, 0.4])
    expected = dist.Normal(0.0, 1.0).log_prob(a).sum() + dist.Normal(a[G], 1.0).log_prob(Y).sum()
    for g, y in [(G, Y), (jnp.asarray(G), jnp.asarray(Y))]:
        target = stochgrad.from_numpyro(model, g, y)
        np.testing.assert_allclose(
            target.log_density({"a": a}, target.batches.full), expected, rtol=1e-5
        )
    kernel = stochgrad.numpyro.SGHMC(model, 1e-3, 20.0)
    state = kernel.init(jax.random.key(0), 10, None, (G, Y), {})
    assert state.z["a"].shape == (4,)


@pytest.mark.parametrize("how", ["streamed", "clients", "mesh"])
def test_data_elsewhere_are_checked_too(how, tmp_path):
    """Streamed rows, rows of several owners, rows spread over devices."""
    np.save(tmp_path / "y.npy", Y)

    def make(model):
        if how == "streamed":
            y = np.load(tmp_path / "y.npy", mmap_mode="r")
            return stochgrad.from_numpyro(model, y, order="streamed")
        if how == "clients":
            return stochgrad.from_numpyro(model, clients=[(Y[:15],), (Y[15:],)])
        mesh = jax.make_mesh((1,), ("data",))
        return stochgrad.from_numpyro(model, Y, mesh=mesh)

    make(plated(lambda w, y, x, rows: observe(w, read(y))))
    with pytest.raises(ValueError, match="one value for the whole minibatch"):
        make(plated(lambda w, y, x, rows: numpyro.factor("f", jnp.sum(log_prob(w, read(y))))))
    with pytest.raises(ValueError, match=r"factor 'f', .* outside of the subsampled plate"):
        make(
            plated(
                lambda w, y, x, rows: observe(w, (values := read(y))) or (values,),
                lambda w, y: numpyro.factor("f", jnp.sum(log_prob(w, y))),
            )
        )
