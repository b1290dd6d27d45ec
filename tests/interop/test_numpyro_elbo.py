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
from numpyro.infer import SVI, Trace_ELBO, autoguide
from numpyro.infer.util import compute_log_probs
from numpyro.primitives import mutable

from stochgrad.numpyro import AutoFlow, PathGradientELBO, PathGradientWarning
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


GUIDES = {
    "block autoregressive": block,
    "flow": lambda m: AutoFlow(m, coupled),
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


def test_a_mixture_by_score_functions(key):
    """Weights and locations against quadrature. The locations' gradients were counted twice over:
    along the path of a draw that the score takes for fixed."""
    x = jnp.linspace(-12.0, 14.0, 8001)

    def bound(p):
        log_q = jax.nn.logsumexp(
            jax.nn.log_softmax(p["logit"])
            + dist.Normal(p["loc"], jnp.array([0.7, 1.0])).log_prob(x[:, None]),
            axis=1,
        )
        return jnp.trapezoid(jnp.exp(log_q) * (log_q - dist.Normal(0.7, 1.5).log_prob(x)), x)

    params = jax.tree.map(jnp.asarray, COMPONENTS)
    wanted = jax.grad(bound)(params)
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
    with pytest.raises(ValueError, match=r"'x' of the guide, a MixtureSameFamily.*'score'"):
        PathGradientELBO(4).loss(key, params, target, guide_by_mixture)


def test_a_flow_over_a_mixture_is_refused_or_trained_by_scores(key):
    """Weights stayed at their start under path gradients, of Trace_ELBO they walked at random."""

    def two():
        parts = dist.Categorical(jnp.array([0.2, 0.8])), dist.Normal(jnp.array([-3.0, 3.0]), 1.0)
        numpyro.sample("x", dist.MixtureSameFamily(*parts))

    parts = eqx.filter_vmap(Normal)(jnp.array([[-3.0], [3.0]]))
    flow = Transformed(VmapMixture(parts, jnp.ones(2)), Affine(jnp.zeros(1), jnp.ones(1)))
    guide = AutoFlow(two, flow)
    for elbo in (Trace_ELBO(4), PathGradientELBO(4)):
        svi = SVI(two, guide, optax.adam(0.02), elbo)
        with pytest.raises(ValueError, match=r"log_normalized_weights.*'_auto_latent': 'score'"):
            svi.update(svi.init(key))
    elbo = PathGradientELBO(8, estimators={"_auto_latent": "score"})
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
    guide = autoguide.AutoDAIS(correlated, K=2)
    svi = SVI(correlated, guide, optax.adam(0.1), PathGradientELBO(2, score_coef=0.0))
    state = svi.init(key)
    with pytest.warns(PathGradientWarning, match="AutoDAIS"):
        svi.evaluate(state)
