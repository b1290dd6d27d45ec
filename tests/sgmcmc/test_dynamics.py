"""Preconditioners, thermostats, cycles, replicas and noise estimates against known laws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.conftest import Z
from tests.helpers import exact_gradient, gaussian_posterior, mean_and_error, noisy_gradient
from tests.sgmcmc.test_stationary import gaussian, second_moments


def test_psgld_with_an_even_preconditioner_is_sgld():
    """A regularizer far above the gradients makes G constant, 1/lambda."""
    target, _, _ = gaussian_posterior(batch_size=5)
    lam = 1e4
    key = jax.random.key(0)
    pre = stochgrad.psgld(target, 0.01 * lam, regularizer=lam)
    plain = stochgrad.sgld(target, 0.01)
    states = [kernel.init(jnp.ones(2), key) for kernel in (pre, plain)]
    for i in range(3):
        states = [
            kernel.step(jax.random.key(i), state)[0]
            for kernel, state in zip((pre, plain), states, strict=True)
        ]
    np.testing.assert_allclose(states[0].position, states[1].position, rtol=2e-3)


def soft(q):
    """A log density with a bounded slope, so that the preconditioner is smooth and bounded."""
    return -jnp.sum(jnp.sqrt(1 + q**2))


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("correction", [True, False])
def test_the_correction_of_psgld_is_what_its_law_needs(correction):
    """Without memory G is a function of the position, and the laws are known: pi with the
    correction, pi / G without."""
    h, lam = 0.01, 0.5
    kernel = stochgrad.psgld(
        exact_gradient(soft), h, decay=0.0, regularizer=lam, correction=correction
    )
    draws = stochgrad.sample(
        jax.random.key(0),
        kernel,
        init=lambda key: jax.random.normal(key, (64,)),
        num_samples=4000,
        num_warmup=200,
        thin=50,
        num_chains=8,
    )
    q = np.linspace(-60, 60, 400_001)
    weight = np.exp(-np.sqrt(1 + q**2))
    if not correction:
        weight *= lam + np.abs(q / np.sqrt(1 + q**2))
    truth = np.sum(weight * np.abs(q)) / np.sum(weight)
    value, error = mean_and_error(np.abs(draws.positions).mean(axis=-1))
    assert abs(value[0] - truth) < Z * error[0] + h * truth  # Euler's bias is of first order
    assert Z * error[0] + h * truth < 0.05 * truth


@pytest.mark.slow
def test_a_frozen_preconditioner_leaves_no_bias_but_that_of_the_step():
    scales = np.array([1.0, 10.0])
    gradient = exact_gradient(lambda q: -0.5 * jnp.sum((q / jnp.asarray(scales, jnp.float32)) ** 2))
    kernel = stochgrad.psgld(gradient, 0.02, decay=0.95, regularizer=1e-2, adapt_steps=300)
    draws = stochgrad.sample(
        jax.random.key(0),
        kernel,
        init=lambda key: jnp.asarray(scales, jnp.float32) * jax.random.normal(key, (2,)),
        num_samples=3000,
        num_warmup=100,
        thin=30,
        num_chains=8,
    )
    metric = 1 / (1e-2 + np.sqrt(np.asarray(draws.state.square)))  # (chain, 2), at rest
    expected = scales**2 / (1 - 0.02 * metric / scales**2 / 2)  # Euler's closed form
    for chain in range(8):
        value, error = mean_and_error(draws.positions[chain : chain + 1] ** 2)
        assert np.all(np.abs(value - expected[chain]) < Z * error)


@pytest.mark.slow
@pytest.mark.parametrize("per_coordinate", [False, True])
def test_thermostats_take_unknown_gradient_noise(per_coordinate):
    """Noise that would make SGHMC's variance 1 + hV/2C = 1.8 times too large."""
    h, sd = 0.1, np.array([4.0, 4.0]) if not per_coordinate else np.array([2.0, 4.0])

    def next(key, position, state):
        noise = jnp.asarray(sd, jnp.float32) * jax.random.normal(key, (2,))
        return lambda q: (-0.5 * jnp.sum(q**2), -q + noise), state

    gradient = stochgrad.Gradient(lambda key, position: (), next)
    kernel = stochgrad.sgnht(gradient, h, 1.0, per_coordinate=per_coordinate)
    run = lambda kernel: stochgrad.sample(
        jax.random.key(0),
        kernel,
        init=jnp.zeros(2),
        num_samples=6000,
        num_warmup=200,
        thin=20,
        num_chains=8,
    )
    draws = run(kernel)
    value, error = mean_and_error(draws.positions**2)
    bias = h**2 * np.max(sd) ** 2 / 8  # second order in h; hV/2 is 0.8 and enters to first order
    assert np.all(np.abs(value - 1) < Z * error + bias)
    assert bias < 0.03
    thermostat, error = mean_and_error(draws.stats["thermostat"])
    assert abs(thermostat[0] - (1 + h * np.mean(sd**2) / 2)) < Z * error[0] + 0.05


@pytest.mark.optimized
@pytest.mark.slow
def test_sgnht_is_of_second_order_without_gradient_noise():
    errors = []
    for h in (0.4, 0.2):
        kernel = stochgrad.sgnht(exact_gradient(gaussian(1.0)), h, 1.0, thermal_mass=4.0)
        moments, error = second_moments(kernel, int(4000 / h), int(100 / h))
        errors.append((moments[0] - 1, error[0]))
    (coarse, e1), (fine, e2) = errors
    assert abs(coarse) > Z * e1  # or there is nothing to see
    assert abs(fine - coarse / 4) < Z * np.hypot(e2, e1 / 4) + 0.1 * abs(coarse)


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("integrator", ["BAOAB", "UBU"])
def test_online_noise_estimates_take_the_gradient_noise_back(integrator):
    h, c, sd = 0.1, 2.0, 4.0
    gradient = noisy_gradient(gaussian(1.0), sd)
    kernel = partial(stochgrad.sghmc, gradient, h, c, integrator=integrator)
    online, error = second_moments(kernel(noise_estimate="online"), 400, 500)
    given, e2 = second_moments(kernel(noise_estimate=h * sd**2 / 2), 400, 500)
    plain, _ = second_moments(kernel(), 400, 500)
    assert abs(online[0] - given[0]) < Z * np.hypot(error[0], e2[0]) + 0.02  # V from few gradients
    assert abs(given[0] - 1) < 0.05
    assert plain[0] > 1.3


@pytest.mark.slow
def test_a_noise_estimate_may_be_a_matrix():
    h, c = 0.1, 2.0
    root = jnp.array([[4.0, 0.0], [2.0, 2.0]])

    def next(key, position, state):
        noise = root @ jax.random.normal(key, (2,))
        return lambda q: (-0.5 * jnp.sum(q**2), -q + noise), state

    gradient = stochgrad.Gradient(lambda key, position: (), next)
    kernel = stochgrad.sghmc(
        gradient, h, c, noise_estimate=h * root @ root.T / 2, integrator="BAOAB"
    )
    draws = stochgrad.sample(
        jax.random.key(0), kernel, init=jnp.zeros(2), num_samples=5000, num_warmup=50, thin=10,
        num_chains=8,
    )  # fmt: skip
    products = draws.positions[..., :, None] * draws.positions[..., None, :]
    value, error = mean_and_error(products.reshape(8, -1, 4))
    assert np.all(np.abs(value - np.eye(2).ravel()) < Z * error + 0.02)


def mixture(q):
    """Two modes, 0.3 and 0.7 of the mass, that one chain at T = 1 does not cross."""
    return jnp.logaddexp(
        jnp.log(0.3) - 0.5 * (q + 4.0) ** 2 / 0.25, jnp.log(0.7) - 0.5 * (q - 4.0) ** 2 / 0.25
    )


def noisy_energies(sd):
    def next(key, position, state):
        tilt = sd * jax.random.normal(key, ())

        def score(q):
            value, g = jax.value_and_grad(mixture)(q)
            return value + tilt * q / 8, g  # the noise of a difference over both modes has this sd

        return score, state

    return stochgrad.Gradient(lambda key, position: (), next)


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("sd", [0.0, 3.0])
def test_replicas_cross_between_modes_in_the_right_proportion(sd):
    kernel = stochgrad.replica_exchange(
        stochgrad.sgld,
        noisy_energies(sd),
        [0.01, 0.05, 0.2],
        temperatures=(1.0, 6.0, 36.0),
        swap_every=5,
    )
    draws = stochgrad.sample(
        jax.random.key(0),
        kernel,
        init=jnp.float32(-4.0),
        num_samples=4000,
        num_warmup=400,
        thin=25,
        num_chains=32,
    )
    right, error = mean_and_error(draws.positions > 0)
    assert abs(right[0] - 0.7) < Z * error[0]
    assert Z * error[0] < 0.1
    within = draws.positions[draws.positions > 0]
    np.testing.assert_allclose(within.var(), 0.25 / (1 - 0.01 * 4 / 2), rtol=0.05)
    alone = stochgrad.sample(
        jax.random.key(0),
        stochgrad.sgld(noisy_energies(0.0), 0.01),
        init=jnp.float32(-4.0),
        num_samples=100,
        thin=25,
        num_chains=8,
    )
    assert np.all(alone.positions < 0)


@pytest.mark.slow
def test_without_the_correction_noisy_energies_heat_the_cold_chain():
    """The penalty is what keeps detailed balance: E min(1, exp(D - u)) has the ratio exp(D)."""
    rng = np.random.default_rng(0)
    n, sd, count = 8, 1.5, 2_000_000
    ratio = []
    for gap in (0.7, -0.7):
        values = gap + sd * np.sqrt(n) * rng.normal(size=(count // 4, n))
        chi = values.var(axis=1, ddof=1) / n
        u = chi / 2 + chi**2 / (4 * (n + 1)) + chi**3 / (3 * (n + 1) * (n + 3))
        accept = np.minimum(1, np.exp(values.mean(axis=1) - u))
        plain = np.minimum(1, np.exp(values.mean(axis=1)))
        ratio.append((accept.mean(), plain.mean(), accept.std() / np.sqrt(count / 4)))
    corrected = np.log(ratio[0][0] / ratio[1][0])
    error = np.hypot(ratio[0][2] / ratio[0][0], ratio[1][2] / ratio[1][0])
    assert abs(corrected - 0.7) < Z * error + 0.03
    assert np.log(ratio[0][1] / ratio[1][1]) < 0.5


def test_cycles_have_their_schedule_and_their_stages(key):
    target, _, _ = gaussian_posterior(batch_size=5)
    kernel = stochgrad.cyclical(
        partial(stochgrad.sghmc, friction=5.0), target, 0.02, steps_per_cycle=20, exploration=0.75
    )
    draws = stochgrad.sample(key, kernel, init=jnp.zeros(2), num_samples=60, num_chains=2)
    k = np.arange(60)
    expected = 0.01 * (np.cos(np.pi * (k % 20) / 20) + 1)
    np.testing.assert_allclose(draws.stats["step_size"], [expected] * 2, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(draws.stats["sampling"][0], k % 20 >= 15)
    np.testing.assert_array_equal(draws.stats["cycle"][0], k // 20)
    kept = draws[draws.stats["sampling"][0]]
    assert kept.num_draws == 15
    np.testing.assert_array_equal(kept.positions, draws.positions[:, k % 20 >= 15])


def test_exploration_injects_no_noise(key):
    """Without noise and without data noise, two keys give the same path."""
    target, _, _ = gaussian_posterior(order="full")
    kernel = stochgrad.cyclical(stochgrad.sgld, target, 0.02, steps_per_cycle=20, exploration=0.5)
    runs = [
        stochgrad.sample(jax.random.key(i), kernel, init=jnp.ones(2), num_samples=20).positions
        for i in range(2)
    ]
    np.testing.assert_array_equal(runs[0][0, :10], runs[1][0, :10])
    assert not np.allclose(runs[0][0, 11], runs[1][0, 11])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")
def test_cycles_find_more_modes_than_one_chain():
    """The 25 Gaussians of the paper's toy, with its gradient noise."""
    places = jnp.array([[x, y] for x in range(-4, 5, 2) for y in range(-4, 5, 2)], jnp.float32)

    def log_density(q):
        return jax.nn.logsumexp(-0.5 * jnp.sum((q[None] - places) ** 2, axis=1) / 0.03)

    gradient = noisy_gradient(log_density, 1.0)

    def modes(kernel, keep):
        draws = stochgrad.sample(
            jax.random.key(0), kernel, init=jnp.zeros(2), num_samples=50_000, progress=False
        )
        q = (draws[draws.stats["sampling"][0]] if keep else draws).positions[0]
        near = np.linalg.norm(q[:, None] - np.asarray(places), axis=-1)
        return len(np.unique(near.argmin(axis=1)[near.min(axis=1) < 0.5]))

    cycling = stochgrad.cyclical(
        stochgrad.sgld, gradient, 0.09, steps_per_cycle=1667, exploration=0.25,
        exploration_temperature=1.0,
    )  # fmt: skip
    assert modes(cycling, True) > 2 * modes(stochgrad.sgld(gradient, 0.01), False)
