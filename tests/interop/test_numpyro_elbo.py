"""Path gradients in numpyro's SVI."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flowjax.bijections import Affine
from flowjax.distributions import Normal, StandardNormal, Transformed, VmapMixture
from flowjax.flows import coupling_flow
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, autoguide
from numpyro.infer.util import compute_log_probs
from numpyro.primitives import mutable

from stochgrad.flows import Continuous
from stochgrad.numpyro import AutoFlow, PathGradientELBO
from tests.conftest import Z

pytestmark = pytest.mark.slow

X = np.random.default_rng(0).normal(1.0, 1.0, (20, 2))


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def model(x=X):
    mean = numpyro.sample("mean", dist.Normal(0, 1).expand([2]).to_event(1))
    sd = numpyro.sample("sd", dist.LogNormal(0.0, 0.3))
    with numpyro.plate("rows", len(x), subsample_size=5):
        rows = numpyro.subsample(x, event_dim=1)
        with numpyro.handlers.mask(mask=rows[:, 0] > 0):
            numpyro.sample("x", dist.Normal(mean, sd).to_event(1), obs=rows)


def by_hand(x=X):
    """Hierarchical: the second site depends on the first, by a flow and by a normal."""
    loc = numpyro.param("loc", jnp.zeros(2))
    scale = numpyro.param("scale", jnp.full(2, 0.5), constraint=dist.constraints.positive)
    slope = numpyro.param("slope", jnp.array(0.3))
    mean = numpyro.sample("mean", dist.Normal(loc, scale).to_event(1))
    layers = [
        dist.transforms.AffineTransform(slope * mean[0], jnp.exp(slope)),
        dist.transforms.ExpTransform(),
    ]
    numpyro.sample("sd", dist.TransformedDistribution(dist.Normal(slope * mean[1], 1.0), layers))


def coupled(dim):
    return coupling_flow(
        jax.random.key(0), base_dist=StandardNormal((dim,)), invert=False, flow_layers=2,
        nn_width=8, nn_activation=jnp.tanh,
    )  # fmt: skip


def block(m):
    return autoguide.AutoBNAFNormal(m, hidden_factors=[2, 2])


class Field(eqx.Module):
    net: eqx.nn.MLP

    def __call__(self, x, t):
        return self.net(jnp.append(x, t.astype(x.dtype)))


def continuous(dim):
    field = Field(eqx.nn.MLP(dim + 1, dim, 8, 1, jnp.tanh, key=jax.random.key(0)))
    return Transformed(StandardNormal((dim,)), Continuous(field, shape=(dim,), num_steps=8))


GUIDES = {
    "block autoregressive": block,
    "flow": lambda m: AutoFlow(m, coupled),
    "differential equation": lambda m: AutoFlow(m, continuous),
    "by hand": lambda m: by_hand,
}


def loss_and_gradient(elbo, svi, args=(X,)):
    def loss(params, key):
        return elbo.loss(key, svi.constrain_fn(params), svi.model, svi.guide, *args)

    return jax.value_and_grad(loss)


@pytest.fixture(params=GUIDES)
def fitted(request, key):
    """An objective some way from its start."""
    svi = SVI(model, GUIDES[request.param](model), optax.adam(0.02), Trace_ELBO(4))
    start, unravel = jax.flatten_util.ravel_pytree(
        svi.optim.get_params(svi.init(key, X).optim_state)
    )
    return svi, unravel(start + 0.1 * jax.random.normal(key, start.shape))


def test_gradients_have_one_mean_and_coefficient_one_is_numpyros(fitted, key):
    """Plates, subsampling, masks, flows without inverse, latents that others depend on."""
    svi, params = fitted
    elbos = {
        "total": Trace_ELBO(4),
        "path": PathGradientELBO(4, score_coef=0.0),
        "auto": PathGradientELBO(4),
    }
    if svi.guide is by_hand:
        elbos["one"] = PathGradientELBO(4, score_coef=1.0)
    count = 1000

    @jax.jit
    def all_of(keys):
        def one(key):
            both = {n: loss_and_gradient(e, svi)(params, key) for n, e in elbos.items()}
            return {n: (v, jax.flatten_util.ravel_pytree(g)[0]) for n, (v, g) in both.items()}

        found = jax.lax.map(one, keys, batch_size=500)
        directions = jax.random.normal(jax.random.key(1), (found["path"][1].shape[1], 4))
        return {n: (v, g[0], g @ directions) for n, (v, g) in found.items()}

    found = all_of(jax.random.split(key, count))
    value, first, total = map(np.asarray, found["total"])
    for name, (same, *_) in found.items():
        np.testing.assert_allclose(same, value, rtol=1e-9, err_msg=name)
    if "one" in found:
        np.testing.assert_allclose(found["one"][1], first, rtol=1e-9, atol=1e-9 * abs(first).max())
    for name in ("path", "auto"):
        d = np.asarray(found[name][2]) - total
        noise = d.std(0) / np.sqrt(count)
        assert np.all(np.abs(d.mean(0)) < Z * noise)


def correlated():
    numpyro.sample("x", dist.MultivariateNormal(jnp.ones(3), jnp.eye(3) + 0.5))


def test_no_variance_at_the_optimum_and_measured_far_from_it(key):
    guide = autoguide.AutoMultivariateNormal(correlated)
    svi = SVI(correlated, guide, optax.adam(0.1), Trace_ELBO())
    start = svi.get_params(svi.init(key))
    best = {
        "auto_loc": jnp.ones(3),
        "auto_scale_tril": jnp.linalg.cholesky(jnp.eye(3) + 0.5),
    }
    elbo = PathGradientELBO(4)
    far = elbo.variances(key, start, correlated, guide)
    near = elbo.variances(key, best, correlated, guide)
    assert far.path > 3 * far.total
    assert far.blend < 1.05 * far.total
    assert far.score_coef > 0.9
    assert near.path < 1e-20 < 1e-3 < near.total
    assert near.blend < 1e-20
    gradient = jax.jit(jax.grad(lambda p: elbo.loss(key, p, correlated, guide)))(best)
    assert max(float(jnp.max(jnp.abs(g))) for g in gradient.values()) < 1e-10


def test_operations_of_a_step():
    """The score shares the flow's pass, four passes instead of three; it had taken five."""

    def wide():
        numpyro.sample("x", dist.Normal(0.0, 1.0).expand([12]).to_event(1))

    guide = AutoFlow(
        wide, lambda dim: coupling_flow(
            jax.random.key(0), base_dist=StandardNormal((dim,)), invert=False, flow_layers=3,
            nn_width=64, nn_depth=2,
        ),
    )  # fmt: skip
    svi = SVI(wide, guide, optax.adam(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0)))

    def operations(elbo):
        gradient = jax.grad(lambda p: elbo.loss(jax.random.key(1), p, wide, guide))
        return jax.jit(gradient).lower(params).compile().cost_analysis()["flops"]

    assert operations(PathGradientELBO(32)) < 1.45 * operations(Trace_ELBO(32))


@pytest.mark.parametrize("name", ["AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal"])
def test_the_default_is_as_good_as_the_better_gradient(name, key):
    """At the narrow start as the total gradient, after a fit as the path gradient."""
    guide = getattr(autoguide, name)(correlated)
    svi = SVI(correlated, guide, optax.adam(0.02), Trace_ELBO(4))
    state = svi.init(key)
    fitted = jax.lax.scan(lambda s, _: svi.update(s), state, None, length=1000)[0]
    elbos = [PathGradientELBO(4, score_coef=c) for c in (0.0, 1.0, "auto")]

    @jax.jit
    def of_each(params, keys):
        def one(key):
            return [
                jax.flatten_util.ravel_pytree(
                    jax.grad(lambda p, e=e: e.loss(key, p, correlated, guide))(params)
                )[0]
                for e in elbos
            ]

        return jax.vmap(one)(keys)

    for point in (state, fitted):
        path, total, auto = map(
            np.asarray, of_each(svi.get_params(point), jax.random.split(key, 4000))
        )
        difference = auto - total
        moving = difference.std(0) > 0
        z = difference.mean(0)[moving] / (difference.std(0)[moving] / np.sqrt(4000))
        assert np.all(np.abs(z) < Z)
        # squared distances from the mean, whose ratio has its error from a few of 4000 draws
        spread = [np.sum((g - total.mean(0)) ** 2, 1) for g in (path, total, auto)]
        best = min(spread[:2], key=np.mean)
        excess = spread[2] - 1.03 * best
        assert excess.mean() < 3 * excess.std() / np.sqrt(4000)


def mixture():
    k = numpyro.sample("k", dist.Bernoulli(0.3))
    z = numpyro.sample("z", dist.Normal(2.0 * k, 1.0))
    numpyro.sample("y", dist.Normal(z, 0.5), obs=1.4)


def guide_of_mixture():
    logit = numpyro.param("logit", jnp.array(0.4))
    loc = numpyro.param("loc", jnp.array([0.3, 1.0]))
    k = numpyro.sample("k", dist.Bernoulli(logits=logit))
    numpyro.sample("z", dist.Normal(jnp.where(k > 0, loc[1], loc[0]), 0.6))


def exact_gradient(params):
    """By enumeration of k, and Gauss-Hermite quadrature of z."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)

    def bound(params):
        q = jax.nn.sigmoid(params["logit"])
        total = 0.0
        for k, share in ((0.0, 1 - q), (1.0, q)):
            z = params["loc"][int(k)] + 0.6 * nodes
            data = {"k": jnp.array(k)}

            def one(z, data=data):
                given = {**data, "z": z}
                log_p, _ = compute_log_probs(mixture, (), {}, given)
                log_q, _ = compute_log_probs(guide_of_mixture, (), {}, {**given, **params})
                return sum(log_p.values()) - sum(log_q.values())

            total = total + share * (jax.vmap(one)(z) @ (weights / weights.sum()))
        return -total

    return jax.grad(bound)(params)


@pytest.mark.parametrize(("kind", "coefficient"), [("score", "auto"), ("optimal", 0.0)])
def test_discrete_sites_by_score_functions(kind, coefficient, key):
    """Each site by an estimator of its own, against enumeration."""
    params = {"logit": jnp.array(0.4), "loc": jnp.array([0.3, 1.0])}
    elbo = PathGradientELBO(5, score_coef=coefficient, estimators={"k": kind})
    wanted = exact_gradient(params)

    def one(key):
        return jax.grad(lambda p: elbo.loss(key, p, mixture, guide_of_mixture))(params)

    found = jax.jit(jax.vmap(one))(jax.random.split(key, 20_000))
    for name, want in wanted.items():
        got = np.asarray(found[name])
        assert np.all(np.abs(got.mean(0) - want) < Z * got.std(0) / np.sqrt(len(got))), name
        assert np.all(got.std(0) > 0)


COMPONENTS = {"logit": jnp.array([0.2, -0.1]), "loc": jnp.array([-0.5, 1.2])}


def target():
    numpyro.sample("x", dist.Normal(0.7, 1.5))


def guide_by_mixture():
    logit, loc = (numpyro.param(name, value) for name, value in COMPONENTS.items())
    scale = jnp.array([0.7, 1.0])
    parts = dist.Categorical(logits=logit), dist.Normal(loc, scale)
    numpyro.sample("x", dist.MixtureSameFamily(*parts))


def gradient_by_quadrature(params):
    x = jnp.linspace(-12.0, 14.0, 8001)

    def bound(p):
        log_q = jax.nn.logsumexp(
            jax.nn.log_softmax(p["logit"])
            + dist.Normal(p["loc"], jnp.array([0.7, 1.0])).log_prob(x[:, None]),
            axis=1,
        )
        return jnp.trapezoid(jnp.exp(log_q) * (log_q - dist.Normal(0.7, 1.5).log_prob(x)), x)

    return jax.grad(bound)(params)


@pytest.mark.parametrize("coefficient", ["auto", 0.0, 1.0])
def test_a_mixture_component_by_component(coefficient, key):
    """Weights and locations against quadrature; no estimator has to be named."""
    params = jax.tree.map(jnp.asarray, COMPONENTS)
    elbo = PathGradientELBO(4, score_coef=coefficient)

    def one(key):
        return jax.grad(lambda p: elbo.loss(key, p, target, guide_by_mixture))(params)

    found = jax.jit(jax.vmap(one))(jax.random.split(key, 20_000))
    for name, want in gradient_by_quadrature(params).items():
        got = np.asarray(found[name])
        error = got.std(0) / np.sqrt(len(got))
        assert np.all(np.abs(got.mean(0) - want) < Z * error), name
        assert np.all(np.abs(want) > 5 * error)


def test_a_mixture_that_others_depend_on(key):
    """A defensive mixture beneath transforms, and a site that is drawn from it: paired with the
    score function, whose mean is the gradient's."""

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        y = numpyro.sample("y", dist.Normal(x[0], 1.0))
        numpyro.sample("z", dist.Normal(x[1] * y, 1.0), obs=0.7)

    def guide():
        share = jax.nn.sigmoid(numpyro.param("share", jnp.array(1.0)))
        loc = numpyro.param("loc", jnp.array([0.3, -0.2]))
        wide, narrow = (dist.Normal(loc, scale).to_event(1) for scale in (2.0, 0.6))
        parts = dist.MixtureGeneral(
            dist.Categorical(jnp.array([1.0 - share, share])), [wide, narrow]
        )
        x = numpyro.sample(
            "x", dist.TransformedDistribution(parts, dist.transforms.AffineTransform(0.1, 1.3))
        )
        slope = numpyro.param("slope", jnp.array(0.4))
        numpyro.sample("y", dist.Normal(slope * x[1], 0.8))

    params = {"share": jnp.array(1.0), "loc": jnp.array([0.3, -0.2]), "slope": jnp.array(0.4)}
    elbos = PathGradientELBO(4), PathGradientELBO(8, estimators={"x": "score"})

    @jax.jit
    @jax.vmap
    def both(key):
        keys = jax.random.split(key)
        return [
            jax.grad(lambda p, e=e, k=k: e.loss(k, p, model, guide))(params)
            for e, k in zip(elbos, keys, strict=True)
        ]

    strata, score = both(jax.random.split(key, 20_000))
    for name in params:
        means = [np.asarray(g[name]).mean(0) for g in (strata, score)]
        errors = [np.asarray(g[name]).std(0) / np.sqrt(20_000) for g in (strata, score)]
        assert np.all(np.abs(means[0] - means[1]) < Z * np.hypot(*errors)), name
        assert np.all(means[0] != 0), name


def test_mixtures_that_cannot_be_drawn_so_are_refused(key):
    parts = dist.Categorical(jnp.array([0.5, 0.5])), dist.Normal(jnp.array([-1.0, 1.0]), 1.0)
    mixture = dist.MixtureSameFamily(*parts)

    def two():
        numpyro.sample("x", mixture)
        numpyro.sample("y", mixture)

    def batch():
        numpyro.sample("x", mixture.expand([3]).to_event(1))

    def plate():
        with numpyro.plate("rows", 3):
            numpyro.sample("x", mixture)

    for program in (two, batch, plate):
        with pytest.raises(ValueError, match=r"'x' of the guide, a Mixture.*only one.*'score'"):
            PathGradientELBO(4).loss(key, {}, program, program)
    params = jax.tree.map(jnp.asarray, COMPONENTS)
    with pytest.raises(ValueError, match="site 'x' is a mixture, drawn component by component"):
        PathGradientELBO(4, objective="renyi").loss(key, params, target, guide_by_mixture)


def test_a_mixture_by_score_functions(key):
    """Weights and locations against quadrature. The locations' gradients were counted twice over:
    along the path of a draw that the score takes for fixed."""
    params = jax.tree.map(jnp.asarray, COMPONENTS)
    wanted = gradient_by_quadrature(params)
    for kind, coefficient in (("score", "auto"), ("optimal", 0.0)):
        elbo = PathGradientELBO(4, score_coef=coefficient, estimators={"x": kind})

        def one(key, elbo=elbo):
            return jax.grad(lambda p: elbo.loss(key, p, target, guide_by_mixture))(params)

        found = jax.jit(jax.vmap(one))(jax.random.split(key, 20_000))
        for name, want in wanted.items():
            got = np.asarray(found[name])
            error = got.std(0) / np.sqrt(len(got))
            assert np.all(np.abs(got.mean(0) - want) < Z * error), (kind, name)
            assert np.all(np.abs(want) > 5 * error)


@pytest.mark.parametrize("estimators", [None, {"_auto_latent": "score"}])
def test_a_flow_over_a_mixture(estimators, key):
    """Weights stayed at their start under path gradients, of Trace_ELBO they walked at random."""

    def two():
        parts = dist.Categorical(jnp.array([0.2, 0.8])), dist.Normal(jnp.array([-3.0, 3.0]), 1.0)
        numpyro.sample("x", dist.MixtureSameFamily(*parts))

    parts = eqx.filter_vmap(Normal)(jnp.array([[-3.0], [3.0]]))
    flow = Transformed(VmapMixture(parts, jnp.ones(2)), Affine(jnp.zeros(1), jnp.ones(1)))
    guide = AutoFlow(two, flow)
    svi = SVI(two, guide, optax.adam(0.02), Trace_ELBO(4))
    with pytest.raises(ValueError, match=r"log_normalized_weights.*PathGradientELBO.*'score'"):
        svi.update(svi.init(key))
    elbo = PathGradientELBO(8, estimators=estimators)
    schedule = optax.cosine_decay_schedule(0.05, 800)
    result = SVI(two, guide, optax.adam(schedule), elbo).run(key, 800, progress_bar=False)
    weights = jnp.exp(guide._made(result.params["auto_flow"]).base_dist.log_normalized_weights)
    np.testing.assert_allclose(weights, [0.2, 0.8], atol=5e-3)


def test_a_parameter_that_no_path_reaches_is_named(key):
    """Whatever the distribution calls itself."""

    class Forgetful(dist.Normal):
        def sample(self, key, sample_shape=()):
            return jax.lax.stop_gradient(super().sample(key, sample_shape))

    def guide():
        numpyro.sample("x", Forgetful(numpyro.param("at", jnp.array(0.0)), 1.0))

    with pytest.raises(ValueError, match=r"guide: \['at'\] cannot be trained.*\{'x': 'score'\}"):
        PathGradientELBO(4).loss(key, {"at": jnp.array(0.0)}, target, guide)


def counted(data):
    """A posterior in closed form: z ~ N(theta, 1), data ~ N(z, 1)."""
    theta = numpyro.param("theta", jnp.array(0.4))
    z = numpyro.sample("z", dist.Normal(theta, 1.0).expand([2]).to_event(1))
    numpyro.sample("data", dist.Normal(z, 1.0).to_event(1), obs=data)


def fixed(data):
    z = numpyro.sample("z", dist.Normal(0.4, 1.0).expand([2]).to_event(1))
    numpyro.sample("data", dist.Normal(z, 1.0).to_event(1), obs=data)


DATA = np.array([1.0, -0.5])
AT = {"auto_loc": jnp.array([0.5, 0.3]), "auto_scale": jnp.array([0.9, 0.6])}


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_renyi_bounds_are_numpyros_with_less_noise(alpha, key):
    """Value, and mean of the gradient, in guide and model; the path's share has less variance."""
    guide = autoguide.AutoDiagonalNormal(counted)
    SVI(counted, guide, optax.adam(0.1), Trace_ELBO()).init(key, DATA)
    params = {**AT, "theta": jnp.array(0.4)}
    elbos = [
        RenyiELBO(alpha or 0, num_particles=5),
        PathGradientELBO(5, objective="renyi", alpha=alpha, score_coef=1.0),
        PathGradientELBO(5, objective="renyi", alpha=alpha),
    ]

    @jax.jit
    @jax.vmap
    def of_each(key):
        found = [
            jax.value_and_grad(lambda p, e=e: e.loss(key, p, counted, guide, DATA))(params)
            for e in elbos
        ]
        return [(value, jax.flatten_util.ravel_pytree(g)[0]) for value, g in found]

    theirs, total, path = (map(np.asarray, x) for x in of_each(jax.random.split(key, 20_000)))
    (v0, g0), (v1, g1), (v2, g2) = theirs, total, path
    np.testing.assert_allclose(v1, v2, rtol=1e-9)
    for a, b in ((v0[:, None], v1[:, None]), (g0, g1), (g1, g2)):
        error = np.hypot(a.std(0), b.std(0)) / np.sqrt(len(a))
        assert np.all(np.abs(a.mean(0) - b.mean(0)) < Z * error)
    assert np.sum(g2.var(0)) < 0.7 * np.sum(g1.var(0))


def test_jensen_shannon_of_two_normals(key):
    """Value and gradient by quadrature, to the bias of 512 particles."""
    guide = autoguide.AutoDiagonalNormal(fixed)
    SVI(fixed, guide, optax.adam(0.1), Trace_ELBO()).init(key, DATA)
    side = jnp.linspace(-7.0, 7.0, 801)
    grid = jnp.stack(jnp.meshgrid(side, side), -1)

    def divergence(p):
        log_q = dist.Normal(p["auto_loc"], p["auto_scale"]).log_prob(grid).sum(-1)
        log_p = dist.Normal((0.4 + DATA) / 2, 0.5**0.5).log_prob(grid).sum(-1)
        mixed = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
        terms = jnp.exp(log_p) * (log_p - mixed) + jnp.exp(log_q) * (log_q - mixed)
        return 0.5 * jnp.trapezoid(jnp.trapezoid(terms, side), side)

    value, wanted = jax.value_and_grad(divergence)(AT)
    for coefficient in ("auto", 1.0):
        elbo = PathGradientELBO(512, objective="jensen_shannon", score_coef=coefficient)

        def one(key, elbo=elbo):
            return jax.value_and_grad(lambda p: elbo.loss(key, p, fixed, guide, DATA))(AT)

        values, found = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(key, 1000))
        for got, want in ((values, value), *((found[n], wanted[n]) for n in AT)):
            got = np.asarray(got)
            error = Z * got.std(0) / np.sqrt(1000)
            assert np.all(np.abs(got.mean(0) - want) < error + 0.01 * np.abs(want))


def test_objectives_of_all_particles_refuse_what_they_do_not_know(key):
    guide = autoguide.AutoNormal(model)
    svi = SVI(model, guide, optax.adam(0.1), PathGradientELBO(4, objective="renyi"))
    state = svi.init(key, X)
    with pytest.raises(ValueError, match="plate 'rows' subsamples its data, and objective='renyi'"):
        svi.evaluate(state, X)
    guide = autoguide.AutoNormal(counted)
    svi = SVI(counted, guide, optax.adam(0.1), PathGradientELBO(4, objective="jensen_shannon"))
    state = svi.init(key, DATA)
    with pytest.raises(ValueError, match="parameter 'theta' moves the evidence"):
        svi.evaluate(state, DATA)


@pytest.mark.parametrize("coefficient", ["auto", 0.0])
def test_factors_of_a_guide_keep_their_whole_gradient(coefficient, key):
    """A factor is no density of a draw, and its own gradient's mean is not zero: the path gradient
    of the parameters of annealing was off by 50 standard errors."""
    guide = autoguide.AutoDAIS(correlated, K=2)
    svi = SVI(correlated, guide, optax.adam(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(key))
    elbos = Trace_ELBO(4), PathGradientELBO(4, score_coef=coefficient)

    @jax.jit
    @jax.vmap
    def both(key):
        return [
            jax.flatten_util.ravel_pytree(
                jax.grad(lambda p, e=e: e.loss(key, p, correlated, guide))(params)
            )[0]
            for e in elbos
        ]

    total, path = map(np.asarray, both(jax.random.split(key, 4000)))
    difference = path - total
    noise = difference.std(0) / np.sqrt(4000)
    assert np.all(np.abs(difference.mean(0)) < Z * noise + 1e-9)
    assert np.any(noise > 1e-3)


@pytest.mark.parametrize("coefficient", ["auto", 0.0])
def test_annealed_locals_of_a_subsampled_plate(coefficient, key):
    """Momenta whose density is masked, factors and points in a plate, and a global guide."""

    def of_all():
        return numpyro.sample("level", dist.Normal(0.0, 1.0))

    def of_rows(level):
        with numpyro.plate("rows", 6, subsample_size=2) as i:
            spread = numpyro.sample("spread", dist.Gamma(5.0, 5.0))
            numpyro.sample("y", dist.Normal(level, spread), obs=jnp.arange(6.0)[i] / 3)

    def model():
        of_rows(of_all())

    guide = autoguide.AutoSemiDAIS(model, of_rows, autoguide.AutoNormal(of_all), K=2)
    svi = SVI(model, guide, optax.adam(0.1), Trace_ELBO())
    start, unravel = jax.flatten_util.ravel_pytree(svi.optim.get_params(svi.init(key).optim_state))
    params = svi.constrain_fn(unravel(start + 0.1 * jax.random.normal(key, start.shape)))
    elbos = Trace_ELBO(4), PathGradientELBO(4, score_coef=coefficient)

    @jax.jit
    @jax.vmap
    def both(key):
        found = [
            jax.value_and_grad(lambda p, e=e: e.loss(key, p, model, guide))(params) for e in elbos
        ]
        return [(value, jax.flatten_util.ravel_pytree(g)[0]) for value, g in found]

    (value, total), (same, path) = both(jax.random.split(key, 4000))
    np.testing.assert_allclose(same, value, rtol=1e-9)
    difference = np.asarray(path - total)
    noise = difference.std(0) / np.sqrt(4000)
    assert np.all(np.abs(difference.mean(0)) < Z * noise + 1e-9)
    assert np.sum(noise > 1e-4) > 6


def test_a_model_that_only_goes_forward(key):
    """As numpyro allows: by a number, and refused by the default in words."""

    def forward():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        halved = jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (0.5 * c[0], c[1] + 1), (z, 0))
        numpyro.sample("y", dist.Normal(halved[0], 1.0), obs=1.0)

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("at", 0.1), 0.5))

    svi = SVI(forward, guide, optax.adam(0.1), PathGradientELBO(4, score_coef=0.0))
    state = svi.init(key)
    loss = svi.update(state, forward_mode_differentiation=True)[1]
    assert jnp.isfinite(loss)
    svi = SVI(forward, guide, optax.adam(0.1), PathGradientELBO(4))
    state = svi.init(key)
    with pytest.raises(ValueError, match="takes the model's gradient backward, which this model"):
        svi.update(state, forward_mode_differentiation=True)


def test_straight_through_moves_what_the_score_would(key):
    """Biased, but of the right sign, for a reward that grows with the draw."""

    def target():
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.factor("reward", 3.0 * k)

    def guide():
        numpyro.sample("k", dist.Bernoulli(logits=numpyro.param("logit", jnp.array(-1.0))))

    elbo = PathGradientELBO(8, estimators={"k": "straight_through"})
    params = {"logit": jnp.array(-1.0)}
    assert jax.grad(lambda p: elbo.loss(key, p, target, guide))(params)["logit"] < 0


def test_state_that_changes_and_parameters_of_the_model(key):
    def counted():
        state = mutable("count", {"n": jnp.array(0.0)})
        state["n"] = state["n"] + 1
        at = numpyro.param("at", jnp.array(0.0))
        z = numpyro.sample("z", dist.Normal(at, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=2.0)

    guide = autoguide.AutoNormal(counted)
    svi = SVI(counted, guide, optax.adam(0.05), PathGradientELBO())
    result = svi.run(key, 800, progress_bar=False)
    assert result.state.mutable_state["count"]["n"] == 801  # one of init
    np.testing.assert_allclose(result.params["at"], 2.0, atol=0.1)


def test_a_conditional_flow_learns_through_its_condition(key):
    """flowjax's own wrapper stops the gradient there."""

    def conditioned(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    weight = jnp.array(0.5)
    x = jnp.array([1.0, -1.0])
    flow = coupling_flow(
        key, base_dist=StandardNormal((2,)), invert=False, cond_dim=2, flow_layers=2,
        nn_activation=jnp.tanh,
    )  # fmt: skip
    guide = AutoFlow(conditioned, flow, condition=lambda x: numpyro.param("weight", weight) * x)
    svi = SVI(conditioned, guide, optax.adam(1e-2), PathGradientELBO())
    params = svi.get_params(svi.init(key, x))
    elbo = svi.loss
    gradient = jax.jit(jax.grad(lambda p: elbo.loss(key, p, conditioned, guide, x)))(params)
    assert gradient["weight"] != 0
    with pytest.raises(ValueError, match="needs condition"):
        SVI(conditioned, AutoFlow(conditioned, flow), optax.adam(1e-2), elbo).init(key, x)


def test_refusals(key):
    def discrete():
        numpyro.sample("k", dist.Bernoulli(logits=numpyro.param("logit", jnp.array(0.0))))

    def plain():
        numpyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="'k' of the guide, a BernoulliLogits, cannot be repar"):
        PathGradientELBO(4).loss(key, {}, plain, discrete)
    with pytest.raises(ValueError, match="num_particles >= 4, got 1"):
        PathGradientELBO(1)
    with pytest.raises(ValueError, match="score_coef must be"):
        PathGradientELBO(4, score_coef=1.5)
    with pytest.raises(ValueError, match="must be one of"):
        PathGradientELBO(4, estimators={"k": "stl"})
    with pytest.raises(ValueError, match=r"the guide lacks: \['j'\]"):
        PathGradientELBO(4, estimators={"j": "score", "k": "score"}).loss(key, {}, plain, discrete)
    with pytest.raises(ValueError, match=r"must have shape \(3,\)"):
        SVI(correlated, AutoFlow(correlated, coupled(2)), optax.adam(0.1), PathGradientELBO()).init(
            key
        )
