"""Models that subsample nothing, as people write them: minibatches, or a sentence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC, Predictive, log_likelihood
from numpyro.infer.reparam import CircularReparam
from numpyro.infer.util import potential_energy

import stochgrad

N, B = 23, 5
RNG = np.random.default_rng(7)
X = RNG.normal(size=(N, 2)).astype(np.float32)
Y = (X @ np.array([1.0, -0.5]) + RNG.normal(size=N)).astype(np.float32)
G = np.arange(N) % 4
M = RNG.random(N) < 0.7
P = RNG.normal(size=(N, 3)).astype(np.float32)


def weights(scale=1.0):
    return numpyro.sample("w", dist.Normal(0.0, scale).expand([2]).to_event(1))


def mean(prior=(0.0, 1.0)):
    return numpyro.sample("a", dist.Normal(*prior))


def observe(mean, y, name="y", scale=1.0):
    numpyro.sample(name, dist.Normal(mean, scale), obs=y)


def outside(x, y):
    logits = x @ weights()
    numpyro.deterministic("logits", logits)
    numpyro.deterministic("total", jnp.sum(logits))
    with numpyro.plate("rows", len(y)):
        observe(logits, y)


def of_known_size(x, y):
    w = weights()
    with numpyro.plate("rows", N):
        observe(x @ w, y)


def by_index(x, y):
    w = weights()
    with numpyro.plate("rows", len(y)) as i:
        observe(x[i] @ w, y[i])


def by_subsample(x, y):
    w = weights()
    with numpyro.plate("rows", len(y)):
        observe(numpyro.subsample(x, 1) @ w, numpyro.subsample(y, 0))


def half_by_index(x, y):
    logits = x @ weights()
    with numpyro.plate("rows", len(y)) as i:
        observe(logits, y[i])


def half_by_subsample(x, y):
    logits = x @ weights()
    with numpyro.plate("rows", N):
        observe(logits + numpyro.subsample(Y, 0), numpyro.subsample(y, 0))


def without_a_plate(x, y):
    observe(x @ weights(), y)
    observe(mean(), jnp.array([1.0, 2.0]), "others")


def grouped(x, y):
    count = len(np.unique(G))
    a = numpyro.sample("a", dist.Normal(jnp.zeros(count), 1.0))
    observe(a[0] + x @ weights(), y)


def counted(g, y):
    count = len(np.unique(g))
    assert int(np.max(g)) + 1 == int(g.max()) + 1 == count == 4
    with numpyro.plate("groups", count):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y)):
        observe(a[g], y)


def standardized(x, y):
    observe((x - x.mean(axis=0)) / x.std(axis=0) @ weights(), y)


def two_sites(x, y):
    w = weights()
    with numpyro.plate("first", len(x)):
        numpyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)
    with numpyro.plate("second", len(y)):
        observe(w[0], y)


def several_outputs(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    with numpyro.plate("outputs", 3):
        observe(x @ w, y[:, None] + jnp.arange(3.0))


def factors(x, y):
    w = weights()
    numpyro.factor("prior", -0.1 * jnp.sum(w**4))
    with numpyro.plate("rows", len(y)):
        numpyro.factor("f", -jnp.log1p((y - x @ w) ** 2))


def masked(x, y):
    w = weights()
    with handlers.scale(scale=0.5), numpyro.plate("rows", len(y)), handlers.mask(mask=y > 0):
        observe(x @ w, y)


def improper(x, y):
    scale = numpyro.sample("s", dist.ImproperUniform(dist.constraints.positive, (), ()))
    observe(x @ weights(), y, scale=scale)


def circular(x, y):
    with handlers.reparam(config={"phi": CircularReparam()}):
        phi = numpyro.sample("phi", dist.VonMises(0.0, 1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.VonMises(phi, 2.0), obs=jnp.clip(y, -3.0, 3.0))


def panel(p, size=None):
    """Units with a short series each, in a plate inside numpyro's scan."""
    a = mean()

    def step(before, now):
        with numpyro.plate("units", size or p.shape[0]):
            observe(a * before, now)
        return now, None

    scan(step, jnp.zeros(p.shape[0]), p.T)


def panel_by_subsample(p, b=None):
    a = mean()

    def step(before, now):
        with numpyro.plate("units", N, subsample_size=b):
            observe(a * numpyro.subsample(before, 0), numpyro.subsample(now, 0))
        return now, None

    scan(step, jnp.zeros(N), p.T)


def units(p):
    a = mean()
    with numpyro.plate("units", len(p), dim=-2), numpyro.plate("times", p.shape[1]):
        observe(a, p)


def tree(data, scale):
    a = mean()
    with numpyro.plate("rows", len(data["y"])):
        observe(a * data["x"][0], data["y"], scale=scale)


TAKEN = {
    model.__name__: (model, (X, Y))
    for model in (
        *(outside, of_known_size, by_index, by_subsample, half_by_index, half_by_subsample),
        *(without_a_plate, grouped, standardized, two_sites, several_outputs, factors, masked),
        *(improper, circular, handlers.scope(outside, "in")),
    )
} | {
    "scoped": (handlers.scope(outside, "in"), (X, Y)),
    "counted": (counted, (G, Y)),
    "counted in jax": (counted, (jnp.asarray(G), jnp.asarray(Y))),
    "panel": (panel, (P,)),
    "panel of known size": (functools.partial(panel, size=N), (P,)),
    "panel by subsample": (panel_by_subsample, (P,)),
    "units": (units, (P,)),
    "tree": (tree, ({"x": (X[:, 0],), "y": Y}, 2.0)),
}


def epoch_mean(target, z):
    score = jax.value_and_grad(target.log_density)

    @jax.jit
    def run(state):
        def body(state, _):
            batch, state = target.batches.next(state)
            return state, score(z, batch)

        return jax.lax.scan(body, state, length=target.batches.epoch)[1]

    values = run(target.batches.init(jax.random.key(3)))
    assert np.std(values[0]) > 0
    return jax.tree.map(lambda x: x.mean(axis=0), values)


def on_all_rows(model, args, z):
    every = stochgrad.from_numpyro(model, *args, order="full")
    return jax.jit(lambda z: jax.value_and_grad(every.log_density)(z, every.batches.full))(z)


def assert_close(values, others):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), values, others
    )


@pytest.mark.parametrize("name", list(TAKEN))
def test_an_epochs_mean_is_the_density_of_all_rows(name):
    """And numpyro's own, of the model as it is; the gradient likewise."""
    model, args = TAKEN[name]
    target = stochgrad.from_numpyro(model, *args, batch_size=B)
    assert (target.batches.size, target.batches.batch_size) == (N, B)
    z = target.initial(jax.random.key(1))
    exact = on_all_rows(model, args, z)
    assert_close(epoch_mean(target, z), exact)
    value = jax.jit(lambda z: target.log_density(z, target.batches.full))(z)
    np.testing.assert_allclose(value, exact[0], rtol=1e-4)
    if name != "masked":  # numpyro scales the Jacobian as well
        np.testing.assert_allclose(exact[0], -potential_energy(model, args, {}, z), rtol=1e-5)


@pytest.mark.parametrize("model", [outside, by_index])
@pytest.mark.parametrize("how", ["rows", "mesh", "clients", "symmetric"])
def test_rows_elsewhere_are_the_same(model, how):
    options = {
        "rows": {"layout": "rows"},
        "mesh": {"mesh": jax.make_mesh((1,), ("data",))},
        "symmetric": {"order": "symmetric"},
    }
    if how == "clients":
        clients = [(X[:10], Y[:10]), (X[10:], Y[10:])]
        target = stochgrad.from_numpyro(model, clients=clients, batch_size=B)
        z = target.initial(jax.random.key(1))
        value = jax.jit(lambda z: target.log_density(z, target.batches.full))(z)
        assert_close(value, on_all_rows(model, (X, Y), z)[0])
        return
    target = stochgrad.from_numpyro(model, X, Y, batch_size=B, **options[how])
    z = target.initial(jax.random.key(1))
    assert_close(epoch_mean(target, z), on_all_rows(model, (X, Y), z))


def test_a_subsampled_plate_in_a_scan_is_read():
    target = stochgrad.from_numpyro(panel_by_subsample, P, B)
    z = target.initial(jax.random.key(1))
    assert target.batches.batch_size == B
    assert_close(epoch_mean(target, z), on_all_rows(panel_by_subsample, (P, B), z))


def test_rows_are_read_by_slices():
    target = stochgrad.from_numpyro(outside, X, Y, batch_size=B)
    batch, _ = target.batches.next(target.batches.init(jax.random.key(0)))
    z = target.initial(jax.random.key(0))
    assert "gather" not in str(jax.make_jaxpr(target.log_density)(z, batch))


def test_names_and_reported_values_are_of_all_rows():
    """What has a value for each row is left out; what is computed of all rows is of all."""
    for model in (outside, by_index):
        target = stochgrad.from_numpyro(model, X, Y, batch_size=B)
        assert target.dims["w"] == ("w_dim_0",)
        assert set(target.dims) == ({"w", "total"} if model is outside else {"w"})
    values = stochgrad.from_numpyro(outside, X, Y, batch_size=B).constrain({"w": jnp.ones(2)})
    np.testing.assert_allclose(values["total"], X.sum(), rtol=1e-4)
    assert set(values) == {"w", "total"}
    grouped_target = stochgrad.from_numpyro(counted, G, Y, batch_size=B)
    assert grouped_target.dims == {"a": ("groups",)}


@pytest.mark.filterwarnings("ignore:minibatch noise")  # a run for its shapes
def test_through_numpyros_mcmc():
    kernel = stochgrad.numpyro.SGLD(counted, step_size=1e-4, batch_size=B)
    run = MCMC(kernel, num_warmup=0, num_samples=3, progress_bar=False)
    run.run(jax.random.key(0), G, Y)
    draws = run.get_samples()
    assert draws["a"].shape == (3, 4)
    likelihood = log_likelihood(run.sampler.model, draws, G, Y)["y"]
    np.testing.assert_allclose(likelihood, dist.Normal(draws["a"][:, G]).log_prob(Y), rtol=1e-4)
    whole = stochgrad.numpyro.all_rows(outside)
    predictions = Predictive(whole, {"w": jnp.ones((3, 2))})(jax.random.key(1), X, Y)
    assert predictions["logits"].shape == (3, N)


@pytest.mark.filterwarnings("ignore:minibatch noise")  # a run for its shapes
def test_kernels_take_the_names_of_the_rows():
    """A table that is as long as the data by chance."""

    def looked_up(g, y, table):
        a = mean()
        with numpyro.plate("rows", len(y)):
            observe(a + table[g], y)

    table = np.ones(N, np.float32)
    kernel = stochgrad.numpyro.SGLD(looked_up, step_size=1e-4, batch_size=B, rows=["g", "y"])
    run = MCMC(kernel, num_warmup=0, num_samples=2, progress_bar=False)
    run.run(jax.random.key(0), G, Y, table)
    assert kernel.settings["rows"] == ["g", "y"]
    target = stochgrad.numpyro.to_draws(run).posterior
    np.testing.assert_allclose(
        target.observations().log_likelihood(
            {"a": jnp.zeros(())}, target.batches.take(np.arange(5))
        )["y"],
        dist.Normal(1.0, 1.0).log_prob(Y[:5]),
        rtol=1e-4,
    )


def per_group(x, y, g, u):
    a = mean()
    with numpyro.plate("rows", len(y)):
        observe(a * x[:, 0] + u[g], y)


def square(t):
    a = mean()
    with numpyro.plate("i", N, dim=-2), numpyro.plate("j", N):
        observe(a, t)


def two_sizes(x, y):
    a = mean()
    with numpyro.plate("long", len(x)):
        observe(a, x)
    with numpyro.plate("short", len(y)):
        observe(a, y, "z")


def test_rows_are_named_where_they_are_ambiguous():
    """An argument of as many groups; two plates of one size; the shorter of two."""
    groups, u = RNG.integers(0, N, N), RNG.normal(size=N).astype(np.float32)
    with pytest.raises(ValueError, match=r"site 'y'.* name the arguments.*'x', 'y', 'g', 'u'"):
        stochgrad.from_numpyro(per_group, X, Y, groups, u, batch_size=B)
    t = RNG.normal(size=(N, N)).astype(np.float32)
    with pytest.raises(ValueError, match=r"\['i', 'j'\] are nested, and both have 23 rows"):
        stochgrad.from_numpyro(square, t, batch_size=B)
    for model, args, options in [
        (per_group, (X, Y, groups, u), {"batch_size": B, "rows": ["x", "y", "g"]}),
        (square, (t,), {"batch_size": {"i": B}}),
        (two_sizes, (Y, Y[:11]), {"batch_size": B, "rows": "y"}),
        (two_sizes, (Y, Y[:11]), {"batch_size": {"short": B}}),
        (two_sizes, (Y, Y[:11]), {"batch_size": B}),
    ]:
        target = stochgrad.from_numpyro(model, *args, **options)
        z = target.initial(jax.random.key(1))
        assert_close(epoch_mean(target, z), on_all_rows(model, args, z))


def local(x, y):
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z, y)


def with_obs_mask(x, y):
    a = mean()
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(a, 1.0), obs=y, obs_mask=M)


def gaussian_process(x, y):
    scale = numpyro.sample("s", dist.HalfNormal())
    distance = jnp.sum((x[:, None] - x) ** 2, axis=-1) / scale**2
    covariance = jnp.exp(-0.5 * distance) + jnp.eye(len(y))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(y)), covariance), obs=y)


def random_walk(x, y):
    s = numpyro.sample("s", dist.GaussianRandomWalk(0.1, num_steps=len(y)))
    observe(s, y)


def autoregressive(x, y):
    a = mean()

    def step(before, now):
        observe(a * before, now)
        return now, None

    scan(step, jnp.float32(0.0), y)


def lagged(x, y):
    observe(mean() * y[:-1], y[1:])


def prior_of_size(x, y):
    observe(x @ weights(1 / jnp.sqrt(len(y))), y)


def centered_in_jax(x, y):
    observe((x - jnp.mean(x, axis=0)) @ weights(), y)


def summed_factor(x, y):
    w = weights()
    with numpyro.plate("rows", len(y)):
        observe(x @ w, y)
    numpyro.factor("f", -jnp.sum((y - w[0]) ** 2))


def column(x, y):
    observe(mean() * x[:, :1], y)


def event(x, y):
    numpyro.sample("y", dist.Normal(x @ weights(), 1.0).to_event(1), obs=y)


def closed_over():
    w = weights()
    with numpyro.plate("rows", N):
        observe(X @ w, Y)


def nothing_observed(x, y):
    mean()


REFUSED = {
    local: r"latent site 'z' lies in the plate 'rows' of the data.*NUTS",
    with_obs_mask: r"'y_unobserved' lies in the plate 'rows'.*numpyro.handlers.mask",
    gaussian_process: r"'y', shape \(\)\).* a Gaussian process or a time series.*NUTS",
    random_walk: r"latent site 's' has shape \(23,\) with all 23 rows of 'x', 'y' and \(5,\)",
    autoregressive: r"site 'y', shape \(5,\), has another log density for row .*NUTS",
    lagged: r"no observed site \('y', shape \(22,\)\)",
    prior_of_size: r"the prior of latent site 'w', .* than with all of them",
    centered_in_jax: r"site 'y', .* what rows share \(a mean",
    summed_factor: r"factor 'f', shape \(\), .* one log density per row",
    column: r"site 'y' has shape \(23, 23\) with all 23 rows and \(5, 5\).* every pair",
    event: r"'y', shape \(\)\).*as one event \(.to_event\)",
    nothing_observed: r"the model observes nothing.*NUTS",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_rows_that_do_not_enter_one_by_one_are_refused(model):
    """And taken whole with order='full'."""
    with pytest.raises(ValueError, match=REFUSED[model]) as info:
        stochgrad.from_numpyro(model, X, Y, batch_size=B)
    assert "\n" not in str(info.value)
    every = stochgrad.from_numpyro(model, X, Y, order="full")
    z = every.initial(jax.random.key(0))
    value = jax.jit(lambda z: every.log_density(z, every.batches.full))(z)
    energy = jax.jit(lambda z: potential_energy(model, (X, Y), {}, z))(z)
    np.testing.assert_allclose(value, -energy, rtol=1e-5)


def test_data_that_the_model_closes_over_are_refused():
    with pytest.raises(ValueError, match=r"no argument has as many .* pass the data as arguments"):
        stochgrad.from_numpyro(closed_over, batch_size=B)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": None}, r"no subsampled plate: give batch_size=, .* the 23 rows"),
        ({"batch_size": B, "rows": "z"}, r"rows must name arguments .*\['x', 'y'\]"),
        ({"batch_size": B, "rows": 3}, "rows must be names"),
        ({"batch_size": B, "rows": []}, "rows must name arguments"),
        ({"batch_size": B, "rows": "x"}, r"5 of the 23 rows of 'x' does not fit the model"),
        ({"rows": "x"}, "leave rows out"),
        ({"batch_size": 24}, "from 1 to the number of rows, 23"),
        ({"batch_size": {}}, "must name a plate"),
        ({"batch_size": {"row": 2}}, r"the model's plates are \['rows'\]"),
        ({"batch_size": B, "order": "streamed"}, "needs a plate with a subsample_size"),
    ],
)
def test_bad_options_get_a_sentence(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        stochgrad.from_numpyro(outside, X, Y, **options)


def columns(t):
    with numpyro.plate("columns", t.shape[1]):
        a = mean()
        observe(a, t)


def test_a_batch_size_of_all_rows_takes_the_whole_data():
    """And one that happens to be the size of another plate does not."""
    for model, args in [(outside, (X, Y)), (without_a_plate, (X, Y)), (local, (X, Y))]:
        target = stochgrad.from_numpyro(model, *args, batch_size=N)
        assert target.batches.epoch == 1
        z = target.initial(jax.random.key(1))
        batch, _ = target.batches.next(target.batches.init(jax.random.key(0)))
        value = jax.jit(lambda z, target=target, batch=batch: target.log_density(z, batch))(z)
        np.testing.assert_allclose(value, on_all_rows(model, args, z)[0], rtol=1e-5)
    assert stochgrad.from_numpyro(columns, P, batch_size=3).batches.batch_size == 3


def random_effects(x, y):
    with numpyro.plate("people", N):
        e = numpyro.sample("e", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y)) as i:
        observe(e[i] + x[i, 0], y[i])


def test_latents_that_the_indices_pick_are_those_of_the_rows():
    target = stochgrad.from_numpyro(random_effects, X, Y, batch_size=B)
    z = target.initial(jax.random.key(1))
    assert_close(epoch_mean(target, z), on_all_rows(random_effects, (X, Y), z))


def test_too_many_rows_to_check_are_sampled():
    """The same refusals, of a model that is not run on all rows."""
    count = 70_000
    x = np.tile(X, (count // N + 1, 1))[:count]
    y = np.tile(Y, count // N + 1)[:count]
    target = stochgrad.from_numpyro(outside, x, y, batch_size=100)
    assert target.batches.size == count
    with pytest.raises(ValueError, match="what rows share"):
        stochgrad.from_numpyro(centered_in_jax, x, y, batch_size=100)


def test_values_outside_of_a_support_are_said():
    def labels(y):
        numpyro.sample("y", dist.Bernoulli(logits=mean()).expand([len(y)]), obs=y)

    with pytest.warns(UserWarning, match="site 'y' observes values outside of the support"):
        stochgrad.from_numpyro(labels, 1 + np.arange(N) % 2, batch_size=B)
