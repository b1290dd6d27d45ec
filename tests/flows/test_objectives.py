"""Divergences: their path gradients, and what they refuse."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.distributions import Normal, StandardNormal
from flowjax.flows import coupling_flow

import stochgrad
from stochgrad import flows
from stochgrad.flows import parameters
from tests.conftest import Z
from tests.flows import toys

FLOW = Normal(jnp.array([0.2, -0.1]), jnp.array([1.3, 0.8]))


def log_density(x):
    return -0.5 * jnp.sum(x**2) - 0.3 * jnp.sum(jnp.cos(x))


def gradients(make, keys):
    """Gradients in the flow's parameters, one row a key."""
    objective = make()
    params = parameters(FLOW)

    def one(key):
        score, _ = objective.next(key, params, ())
        return jax.flatten_util.ravel_pytree(score(params)[1])[0]

    return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


def log_z():
    grid = jnp.linspace(-9, 9, 4001)
    one = jnp.trapezoid(jnp.exp(-0.5 * grid**2 - 0.3 * jnp.cos(grid)), grid)
    return float(2 * jnp.log(one))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda e: flows.renyi_bound(FLOW, log_density, 0.0, e, num_importance=4, num_samples=2),
        lambda e: flows.renyi_bound(FLOW, log_density, 0.5, e, num_importance=4, num_samples=2),
        lambda e: flows.alpha_divergence(FLOW, log_density, 2.0, e, log_z=log_z(), num_samples=8),
        lambda e: flows.alpha_divergence(FLOW, log_density, 1.0, e, log_z=log_z(), num_samples=8),
        lambda e: flows.alpha_divergence(FLOW, log_density, 0.5, e, log_z=log_z(), num_samples=8),
        lambda e: flows.jensen_shannon(FLOW, log_density, e, log_z=log_z(), num_samples=8),
    ],
    ids=["importance weighted", "renyi", "chi-square", "forward", "hellinger", "jensen-shannon"],
)
def test_path_and_total_gradient_have_one_mean(make, key):
    """Would catch wrong coefficients: stopping the parameters alone is off by many errors."""
    keys = jax.random.split(key, 20_000)
    path, total = gradients(lambda: make("path"), keys), gradients(lambda: make("total"), keys)
    difference = path - total
    error = difference.std(0) / np.sqrt(len(keys))
    assert np.all(np.abs(difference.mean(0)) < Z * error)
    assert np.linalg.norm(total.mean(0)) > 4 * np.linalg.norm(error)


@pytest.mark.slow
def test_forward_path_gradient_has_the_mean_of_maximum_likelihoods(key):
    flow = toys.make("inverted coupling")
    x = 0.3 + 0.7 * jax.random.normal(key, (4000, toys.DIM))
    params = parameters(flow)

    def each(estimator):
        def one(row):
            objective = flows.forward_kl(flow, row[None], lambda x: (0.3 - x) / 0.49, estimator)
            batch = objective.posterior.batches.full
            gradient = jax.grad(objective.posterior.log_density)(params, batch)
            return jax.flatten_util.ravel_pytree(gradient)[0]

        return jax.jit(jax.vmap(one))(x)

    difference = np.asarray(each("path") - each("ml"), np.float64)
    error = difference.std(0) / np.sqrt(len(x))
    z = difference.mean(0)[error > 0] / error[error > 0]
    assert np.all(np.abs(z) < Z)


@pytest.mark.slow
def test_forward_path_gradient_vanishes_where_the_flow_fits(key):
    """Sample by sample, while maximum likelihood still follows the samples."""
    flow = toys.make("inverted coupling")
    x = flow.sample(key, (3,))
    sizes = {}
    for estimator in ("path", "ml"):
        objective = flows.forward_kl(flow, x, jax.grad(flow.log_prob), estimator)
        state = objective.init(key, parameters(flow))
        score, _ = objective.next(key, parameters(flow), state)
        gradient = jax.jit(score)(parameters(flow))[1]
        sizes[estimator] = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradient))
    assert sizes["path"] < 1e-4
    assert sizes["ml"] > 1e-2


@pytest.mark.slow
def test_a_flow_learns_its_target_and_says_so(key):
    """The whole way: fit, weights, log Z, resampling, Metropolis."""

    def banana(x):
        return -0.5 * (x[0] ** 2 + (x[1] - x[0] ** 2) ** 2 / 0.25)

    flow = coupling_flow(
        key, base_dist=StandardNormal((2,)), invert=False, flow_layers=6, nn_activation=jnp.tanh
    )
    fit = stochgrad.fit(
        key, flows.reverse_kl(flow, banana, num_samples=128), 2500, learning_rate=5e-3,
        every=500, progress=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flows.WeightsWarning)  # its tails are near the limit
        draws = flows.sample(key, fit, 20_000, banana)
    log_z = np.log(2 * np.pi * 0.5)
    assert draws.ess > 0.5
    assert draws.khat < 0.9
    assert abs(draws.log_z - log_z) < Z * draws.log_z_error
    assert draws.log_z_error < 0.05
    x = draws.resample()
    n = draws.ess * 20_000
    assert abs(float(jnp.mean(x[:, 0]))) < Z / np.sqrt(n)
    assert abs(float(jnp.mean(x[:, 1])) - 1.0) < Z * np.sqrt(2.25 / n) + 0.02
    data = draws.to_arviz(500)
    assert data.posterior["x"].shape == (1, 500, 2)
    assert data.posterior.attrs["pareto_khat"] == draws.khat
    assert abs(float(draws.expectation(lambda x: x[1])) - 1.0) < 0.1

    run = stochgrad.sample(
        key, flows.metropolis(fit, banana), num_samples=2000, num_chains=8, progress=False
    )
    rate = run.stats["acceptance_rate"].mean()
    assert rate > 0.5
    y = run.positions[..., 1]
    assert abs(y.mean() - 1.0) < Z * np.sqrt(2.25 * 2 / rate / y.size) + 0.02


def test_effective_sample_sizes_of_two_normals(key):
    """From N(0, s^2) to N(0, 1): both sizes in closed form."""
    s = 1.2
    wanted = np.sqrt(2 - s**-2) / s
    flow = Normal(jnp.zeros(1), s)
    x = jax.random.normal(key, (100_000, 1))
    under_p = flows.ess_under_target(flow, x, lambda x: -0.5 * jnp.sum(x**2) + 3.0)
    under_q = flows.sample(key, flow, 100_000, lambda x: -0.5 * jnp.sum(x**2)).ess
    np.testing.assert_allclose([under_p, under_q], wanted, atol=0.01)


def test_weights_that_cannot_be_trusted_say_so(key):
    """As ArviZ's Pareto k: a flow narrower than the density, and too few draws."""
    narrow = Normal(jnp.zeros(2), 0.3)
    with pytest.warns(flows.WeightsWarning, match=r"above 0.70, the limit for 5000 draws: .*log_z"):
        draws = flows.sample(key, narrow, 5000, log_density)
    assert draws.khat > draws.good_khat == 0.7
    assert draws.to_arviz(100).posterior.attrs["good_khat"] == 0.7
    with pytest.warns(flows.WeightsWarning, match="above 0.23, the limit for 20 draws: those are"):
        flows.sample(key, FLOW, 20, log_density)
    assert flows.sample(key, FLOW, 1000, FLOW.log_prob).khat < 0.1


@pytest.mark.slow
def test_bad_input(key):
    x = jnp.zeros((5, 2))
    cases = [
        (TypeError, "flow must be a flowjax dist", lambda: flows.reverse_kl(lambda x: x, jnp.sum)),
        (ValueError, "must return a scalar", lambda: flows.reverse_kl(FLOW, lambda x: x)),
        (
            ValueError, "do flow and target have the same dimension",
            lambda: flows.reverse_kl(FLOW, lambda x: jnp.sum(x @ jnp.ones(3))),
        ),
        (ValueError, "estimator must be one of", lambda: flows.reverse_kl(FLOW, jnp.sum, "stl")),
        (ValueError, "of at most 1, got 2", lambda: flows.reverse_kl(FLOW, jnp.sum, 2.0)),
        (
            ValueError, "needs num_samples >= 4",
            lambda: flows.reverse_kl(FLOW, jnp.sum, "auto", num_samples=2),
        ),
        (ValueError, "needs score_of_target", lambda: flows.forward_kl(FLOW, x)),
        (ValueError, "samples must have shape", lambda: flows.forward_kl(FLOW, x[:, :1], jnp.sin)),
        (ValueError, "row 0 holds NaN", lambda: flows.forward_kl(FLOW, x + jnp.nan, jnp.sin)),
        (ValueError, "score_of_target must give", lambda: flows.forward_kl(FLOW, x, x[:2])),
        (
            ValueError, "batch_size", lambda: flows.forward_kl(FLOW, x, jnp.sin, batch_size=9),
        ),
        (ValueError, "alpha must not be 1", lambda: flows.renyi_bound(FLOW, jnp.sum, 1.0)),
        (ValueError, "alpha must be", lambda: flows.renyi_bound(FLOW, jnp.sum, -1.0)),
        (
            ValueError, "has a finite weight",
            lambda: flows.sample(key, FLOW, 10, lambda x: jnp.log(-jnp.sum(x**2))),
        ),
        (
            ValueError, "needs a flow with layers",
            lambda: flows.forward_kl(toys.BASE, jnp.zeros((3, 4)), jnp.sin),
        ),
        (
            ValueError, "condition must have shape",
            lambda: flows.reverse_kl(toys.make("conditional"), jnp.sum),
        ),
    ]  # fmt: skip
    for kind, words, call in cases:
        with pytest.raises(kind, match=words):
            call()
