"""What no path reaches: weights of mixtures are trained by strata, all else is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
import pytest
from flowjax import bijections as bij
from flowjax.distributions import (
    AbstractDistribution,
    Gamma,
    Normal,
    StandardNormal,
    StudentT,
    Transformed,
    VmapMixture,
)

import stochgrad
from stochgrad import flows
from stochgrad.flows import Continuous, parameters
from tests.conftest import Z

LOC, WEIGHTS = np.array([-1.0, 2.0]), np.array([0.3, 0.7])
COMPONENTS = eqx.filter_vmap(Normal)(jnp.asarray(LOC, jnp.float32)[:, None])
MIXTURE = VmapMixture(COMPONENTS, weights=jnp.asarray(WEIGHTS, jnp.float32))
LAYERED = Transformed(MIXTURE, bij.Affine(jnp.zeros(1), jnp.ones(1)))


def log_density(x):
    return -0.5 * jnp.sum((x - 0.7) ** 2) / 1.5**2


class Sticky(AbstractDistribution):
    """A normal whose scale a draw forgets: not a mixture, and just as much out of reach."""

    loc: jax.Array
    log_scale: jax.Array
    shape: tuple = ()
    cond_shape: None = None

    def _sample(self, key, condition=None):
        scale = jax.lax.stop_gradient(jnp.exp(self.log_scale))
        return self.loc + scale * jax.random.normal(key)

    def _log_prob(self, x, condition=None):
        return jax.scipy.stats.norm.logpdf(x, self.loc, jnp.exp(self.log_scale))


STICKY = Sticky(jnp.array(0.0), jnp.array(0.0))
LOG_Z = float(np.log(1.5 * np.sqrt(2 * np.pi)))
OBJECTIVES = {
    "score": lambda f: flows.reverse_kl(f, log_density, "score", num_samples=8),
    "path": lambda f: flows.reverse_kl(f, log_density, num_samples=7),  # four rows of two
    "total": lambda f: flows.reverse_kl(f, log_density, "total", num_samples=8),
    "part": lambda f: flows.reverse_kl(f, log_density, 0.5, num_samples=8),
    "auto": lambda f: flows.reverse_kl(f, log_density, "auto", num_samples=8),
    "alpha": lambda f: flows.alpha_divergence(f, log_density, 0.5, num_samples=8, log_z=LOG_Z),
    "alpha by total": lambda f: flows.alpha_divergence(
        f, log_density, 0.5, "total", num_samples=8, log_z=LOG_Z
    ),
    "jensen": lambda f: flows.jensen_shannon(f, log_density, num_samples=8, log_z=LOG_Z),
    "jensen by total": lambda f: flows.jensen_shannon(
        f, log_density, "total", num_samples=8, log_z=LOG_Z
    ),
}
BY_STRATA = [name for name in OBJECTIVES if name != "score"]


@pytest.mark.parametrize("objective", BY_STRATA)
def test_what_neither_path_nor_stratum_reaches_is_refused(objective):
    """Such arrays stayed at their start under path gradients, and walked at random under total."""
    with pytest.raises(ValueError, match=r"^flow: \.\S+ cannot be trained along.*'score'"):
        OBJECTIVES[objective](STICKY)


@pytest.mark.parametrize("flow", [MIXTURE, LAYERED], ids=["mixture", "base"])
def test_mixtures_are_refused_where_strata_would_be_another_bound(flow):
    with pytest.raises(ValueError, match=r"log_normalized_weights\S* cannot be trained along"):
        flows.renyi_bound(flow, log_density)


def test_a_mixture_within_a_mixture_is_refused():
    inner = eqx.filter_vmap(lambda loc: VmapMixture(
        eqx.filter_vmap(Normal)(loc), weights=jnp.ones(2)
    ))(jnp.zeros((3, 2, 1)))  # fmt: skip
    with pytest.raises(ValueError, match=r"^flow: \.dist\.log_normalized_weights cannot be"):
        flows.reverse_kl(VmapMixture(inner, weights=jnp.ones(3)), log_density)


def test_auto_needs_four_rows():
    with pytest.raises(ValueError, match="with 2 components needs num_samples >= 8, got 7"):
        flows.reverse_kl(MIXTURE, log_density, "auto", num_samples=7)


@pytest.mark.parametrize(
    "flow",
    [
        Normal(jnp.zeros(1)),
        StudentT(jnp.full(1, 5.0)),
        Gamma(jnp.ones(1), jnp.ones(1)),
        eqx.tree_at(lambda m: m.log_normalized_weights, MIXTURE, replace_fn=paramax.non_trainable),
    ],
    ids=["normal", "student", "gamma", "fixed weights"],
)
def test_what_a_path_reaches_is_not(flow):
    """Implicit derivatives count, and weights that are not trained need none."""
    flows.reverse_kl(flow, log_density)


def integrand(name, log_p, log_q):
    """What is climbed, as an integral over x, from unnormalized log densities."""
    log_u = log_p - LOG_Z - log_q
    if name.startswith("alpha"):
        return jnp.exp(log_q) * (1 - jnp.exp(0.5 * log_u)) / (0.5 * -0.5)
    if name.startswith("jensen"):
        mixed = jnp.logaddexp(log_u, 0.0) - jnp.log(2.0)
        return -0.5 * (jnp.exp(log_q + log_u) * (log_u - mixed) - jnp.exp(log_q) * mixed)
    return jnp.exp(log_q) * (log_p - log_q)


def exact_gradient(name):
    """In weights' logits, locations and scales, by quadrature."""
    x = jnp.linspace(-14.0, 16.0, 6001)

    def bound(p):
        weights, loc, scale = p
        log_q = jax.nn.logsumexp(
            jax.nn.log_softmax(weights)
            + jax.scipy.stats.norm.logpdf(x[:, None], loc, jax.nn.softplus(scale)),
            axis=1,
        )
        log_p = -0.5 * (x - 0.7) ** 2 / 1.5**2
        return jnp.trapezoid(integrand(name, log_p, log_q), x)

    with jax.enable_x64(True):
        one = np.log(np.expm1(1.0))
        return jax.grad(bound)((jnp.log(WEIGHTS), jnp.asarray(LOC), jnp.full(2, one)))


def gradients(name, flow, keys):
    objective = OBJECTIVES[name](flow)
    params = parameters(flow)

    @jax.jit
    @jax.vmap
    def each(key):
        score, _ = objective.next(key, params, ())
        g = score(params)[1]
        g = getattr(g, "base_dist", g)
        scale = g.dist.bijection.scale
        return jnp.concatenate(
            [g.log_normalized_weights.args[0], g.dist.bijection.loc[:, 0], scale.args[0][:, 0]]
        )

    return np.asarray(each(keys), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("flow", [MIXTURE, LAYERED], ids=["alone", "as a base"])
def test_gradient_is_that_of_quadrature(flow, name, key):
    """In weights, locations and scales at once, none of them at its best value."""
    found = gradients(name, flow, jax.random.split(key, 20_000))
    error = found.std(0) / np.sqrt(len(found))
    wanted = np.concatenate(exact_gradient(name))
    assert np.all(np.abs(found.mean(0) - wanted) < Z * error)
    assert np.sum(np.abs(wanted) > 5 * error) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["path", "auto"])
@pytest.mark.parametrize("flow", [MIXTURE, LAYERED], ids=["alone", "as a base"])
def test_no_variance_is_left_where_a_mixture_fits(flow, estimator, key):
    objective = flows.reverse_kl(flow, flow.log_prob, estimator, num_samples=8)
    score, _ = objective.next(key, None, ())
    leaves = jax.tree.leaves(jax.jit(score)(parameters(flow))[1])
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in leaves) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["path", "auto", "score"])
def test_weights_train_to_the_targets(estimator, key):
    """Where flow and target are one family the divergence has its minimum at zero noise."""
    target = VmapMixture(COMPONENTS, weights=jnp.array([0.8, 0.2]))
    fit = stochgrad.fit(
        key, flows.reverse_kl(MIXTURE, target.log_prob, estimator, num_samples=16), 1500,
        learning_rate=0.05, every=500, progress=False,
    )  # fmt: skip
    weights = jnp.exp(paramax.unwrap(fit.model).log_normalized_weights)
    np.testing.assert_allclose(weights, [0.8, 0.2], atol=2e-3)


class Stretch(eqx.Module):
    rate: jax.Array

    def __call__(self, x, t):
        return self.rate * x


def stretched(rate):
    layer = Continuous(Stretch(jnp.asarray(rate, jnp.float32)), shape=(1,), num_steps=4)
    return Transformed(StandardNormal((1,)), layer)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["total", "auto"])
def test_gradients_of_a_differential_equation(estimator, key):
    r"""x' = a x: q is N(0, e^{2a}), and the bound's gradient 1 - e^{2a} / s^2, s = 1.5.

    With "auto" it failed within jax, which goes through the solver neither forward nor twice
    backward. With "total" it came out 8 too large, the gradient of the constant divergence counted
    once for each of the nine draws.
    """
    objective = flows.reverse_kl(
        stretched(0.1), lambda x: -0.5 * jnp.sum(x**2) / 1.5**2, estimator, num_samples=9
    )

    @jax.jit
    def slopes(params):
        def one(key):
            score, _ = objective.next(key, params, ())
            return score(params)[1].bijection.vector_field.rate

        return jax.lax.map(one, jax.random.split(key, 1000))

    found = np.asarray(slopes(parameters(stretched(0.1))), np.float64)
    wanted = 1 - np.exp(0.2) / 1.5**2
    rounding = 1e-5  # in single precision; "auto" has no noise here, its c is the gradient itself
    assert abs(found.mean() - wanted) < Z * found.std() / np.sqrt(len(found)) + rounding
    if estimator == "auto":
        assert np.all(np.abs(slopes(parameters(stretched(np.log(1.5))))) < 1e-4)
