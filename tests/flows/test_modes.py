"""Many modes in one call, against weights and normalizers that are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax import bijections as bij
from flowjax.distributions import Normal, StandardNormal, Transformed
from jax.scipy.special import logsumexp

import stochgrad
from stochgrad import flows
from stochgrad.flows import parameters
from tests.conftest import Z

SHARES = np.array([0.2, 0.8])
PLACES = np.array([[-4.0, 1.0], [4.0, -1.0]], np.float32)
SCALE = 0.7
LOG_Z = 3.0


def two_modes(x):
    """Normals with weights 0.2 and 0.8, times e^3."""
    square = jnp.sum((x - PLACES) ** 2, axis=1) / SCALE**2
    log_each = jnp.log(SHARES.astype(np.float32)) - 0.5 * square
    return logsumexp(log_each) - float(2 * np.log(SCALE) + np.log(2 * np.pi) - LOG_Z)


def right(x):
    return x[:1] > 0


def tempered(target):
    return stochgrad.replica_exchange(
        stochgrad.mala, target, (0.3, 2.0), temperatures=(1.0, 12.0), swap_every=3,
        energy_batches=1,
    )  # fmt: skip


def wide(key):
    return 5.0 * jax.random.normal(key, (2,))


FIT = partial(
    flows.fit_modes, chains=tempered, init=wide, modes=right, num_steps=300, learning_rate=0.02,
    progress=False,
)  # fmt: skip
LAYERED = Transformed(StandardNormal((2,)), bij.Affine(jnp.ones(2), jnp.full(2, 1.5)))


@pytest.mark.slow
def test_jeffreys_is_the_sum_of_both_divergences(key):
    """Values and gradients, draw by draw, with the same keys."""
    x = jax.random.normal(key, (6, 2))
    options = {"num_samples": 8}
    both = flows.jeffreys(LAYERED, two_modes, x, **options)
    one = flows.reverse_kl(LAYERED, two_modes, **options)
    other = flows.forward_kl(LAYERED, x, jax.grad(two_modes))
    position = parameters(LAYERED)
    wanted = None
    for gradient in (one, other):
        score, _ = gradient.next(key, position, gradient.init(key, position))
        found = score(position)
        wanted = found if wanted is None else jax.tree.map(jnp.add, wanted, found)
    score, _ = both.next(key, position, both.init(key, position))
    for a, b in zip(jax.tree.leaves(score(position)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.slow
def test_jeffreys_has_no_noise_where_a_flow_fits(key):
    x = jax.random.normal(key, (5, 2)) * 1.5 + 1.0
    objective = flows.jeffreys(LAYERED, LAYERED.log_prob, x, num_samples=4)
    position = parameters(LAYERED)
    score, _ = objective.next(key, position, objective.init(key, position))
    assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(score(position)[1])) < 1e-5


def test_a_mixture_starts_at_the_clusters():
    x = np.array([[-5.0, 0.0], [-5.2, 0.2], [7.0, 1.0], [7.4, 1.4], [7.2, 1.2]])
    mixture = flows.unwrap_flow(flows.mixture_of_normals(x, 2, defensive=0.0))
    normal = mixture.dist.bijection
    order = np.argsort(normal.loc[:, 0])
    weights = np.exp(mixture.log_normalized_weights)[order]
    np.testing.assert_allclose(weights, [0.4, 0.6], rtol=1e-5)
    np.testing.assert_allclose(normal.loc[order], [[-5.1, 0.1], [7.2, 1.2]], rtol=1e-4)
    sd = np.sqrt(0.08 / 3)
    np.testing.assert_allclose(normal.scale[order], [[0.1] * 2, [sd] * 2], rtol=1e-3)


def test_a_defensive_component_is_as_wide_as_all_samples():
    x = np.array([[-5.0], [-5.2], [7.0], [7.2]])
    mixture = flows.unwrap_flow(flows.mixture_of_normals(x, 2, defensive=0.25))
    weights = np.exp(mixture.log_normalized_weights)
    np.testing.assert_allclose(weights, [0.375, 0.375, 0.25], rtol=1e-5)
    np.testing.assert_allclose(mixture.dist.bijection.loc[2], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(mixture.dist.bijection.scale[2], x.std(0), rtol=1e-5)


@pytest.mark.parametrize(("x", "count"), [(np.zeros(3), 1), (np.zeros((2, 2)), 3)])
def test_samples_of_no_mixture_are_refused(x, count):
    with pytest.raises(ValueError, match=rf"^samples must have shape \(n, d\) with n >= .*{count}"):
        flows.mixture_of_normals(x, count)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"num_chains": 7}, ValueError, "num_chains must be an integer of at least 8"),
        ({"tolerance": 2.0}, ValueError, "tolerance must be"),
        ({"chains": 3}, TypeError, "chains must be a function of a target"),
        ({"chains": lambda target: None}, TypeError, "the result of chains must be a stochgrad K"),
        ({"modes": 3}, TypeError, "modes must be a function of a point"),
        ({"init": np.zeros((3, 2))}, ValueError, r"init must be floating-point .*here \(8, 2\)"),
        ({"flow": Normal(jnp.zeros(3))}, ValueError, "init must be floating-point"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed, error, words, key):
    arguments = {"flow": LAYERED, "log_density": two_modes, "key": key, "num_chains": 8} | changed
    with pytest.raises(error, match=f"^{words}"):
        FIT(**arguments)


def test_modes_that_are_numbers_and_no_shares_are_refused(key):
    with pytest.raises(ValueError, match=r"^modes must return numbers between 0 and 1, got"):
        FIT(LAYERED, two_modes, key, num_chains=8, num_draws=4, modes=lambda x: 1.0 * x)


@pytest.mark.slow
def test_weights_and_normalizer_are_those_known(key):
    """By both ways, in their own standard errors, and the verdict knows nothing against them."""
    found = FIT(lambda x: flows.mixture_of_normals(x, 2), two_modes, key)
    assert found.ok
    assert found.draws.verdict.ok
    last = found.rounds[-1]
    assert last.khat <= last.good_khat
    for weights, error in (
        (last.weights, last.weights_error),
        (last.weights_reverse, last.weights_reverse_error),
    ):
        assert abs(weights[0] - SHARES[1]) < Z * error[0] < 0.1
    assert abs(found.weighted.log_z - LOG_Z) < Z * found.weighted.log_z_error + 1e-5
    assert last.acceptance == pytest.approx(last.acceptance_reverse, abs=0.02)
    assert found.draws.positions.shape == (64, 32, 2)
    assert "posterior" in found.draws.to_datatree()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [False, True])
def test_evaluations_are_those_made(layers, key):
    """Every one is seen, in chains, swaps, training, Metropolis and weights."""
    count = 0

    def seen(_):
        nonlocal count
        count += 1

    def counted(x):
        jax.debug.callback(seen, x[0])
        return two_modes(x)

    def flow(x):
        mixture = flows.mixture_of_normals(x, 2)
        return Transformed(mixture, bij.Affine(jnp.zeros(2), jnp.ones(2))) if layers else mixture

    found = FIT(
        flow, counted, key, num_chains=8, num_draws=4, num_warmup=2, thin=6, num_steps=20,
        num_samples=4, num_metropolis=6, num_weighted=100, most_rounds=1, tolerance=1.0,
        forward="path" if layers else "ml",
    )  # fmt: skip
    jax.effects_barrier()
    assert found.evaluations == count


@pytest.mark.slow
def test_a_mode_that_the_flow_misses_is_named(key):
    """Its own draws have an effective sample size of one and a k-hat of nothing."""
    flow = Normal(jnp.asarray(PLACES[1]), SCALE)
    with pytest.warns(flows.ModesWarning, match="by draws of chains .* it misses a mode"):
        found = FIT(flow, two_modes, key, num_steps=1, learning_rate=1e-6, most_rounds=1)
    assert found.weighted.ess > 0.9
    assert found.rounds[-1].khat < 0.7
    assert not found.ok
    assert found.rounds[-1].ess_target < 0.01
    assert not found.draws.verdict.ok
    assert "misses a mode" in str(found.draws.verdict)


@pytest.mark.slow
@pytest.mark.optimized
def test_forty_modes(key):
    """Weights of 1/40 each in their own errors; log Z is zero."""
    means = 40 * jax.random.uniform(jax.random.key(40), (40, 2), minval=-1.0)

    def each(x):
        return -0.5 * jnp.sum((x - means) ** 2, axis=1) / 1.7 - float(np.log(40 * 2 * np.pi * 1.7))

    found = flows.fit_modes(
        key, lambda x: flows.mixture_of_normals(x, 60),
        lambda x: logsumexp(each(x)),
        chains=lambda target: stochgrad.replica_exchange(
            stochgrad.mala, target, (1.0, 4.0, 20.0, 100.0), temperatures=(1.0, 4.0, 16.0, 100.0),
            swap_every=5, energy_batches=1,
        ),
        init=lambda key: 25.0 * jax.random.normal(key, (2,)),
        modes=lambda x: jax.nn.softmax(each(x)),
        num_chains=128, num_samples=60, learning_rate=1e-2, progress=False,
    )  # fmt: skip
    assert found.ok
    last = found.rounds[-1]
    assert np.all(np.abs(last.weights_reverse - 1 / 40) < Z * last.weights_reverse_error)
    assert np.all(last.weights_reverse_error < 0.004)
    assert abs(found.weighted.log_z) < Z * found.weighted.log_z_error < 0.05
