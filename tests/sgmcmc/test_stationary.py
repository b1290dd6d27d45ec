"""The stationary laws, against closed forms, in standard errors of many independent chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.conftest import Z
from tests.helpers import exact_gradient, gaussian_posterior, mean_and_error, noisy_gradient

CHAINS = 4096


def second_moments(kernel, num_steps, warmup, init_sd=1.0, seed=0):
    """E q^2 and E p^2 with standard errors, from independent chains of a scalar."""

    @jax.jit
    def run(key):
        keys = jax.random.split(key, CHAINS)
        q = init_sd * jax.random.normal(jax.random.key(seed + 99), (CHAINS,))
        state = jax.vmap(kernel.init)(q, keys)

        def body(carry, i):
            state, total = carry
            step_keys = jax.vmap(lambda k: jax.random.fold_in(k, i + 1))(keys)
            state, _ = jax.vmap(kernel.step)(step_keys, state)
            p = getattr(state, "momentum", state.position)
            now = jnp.stack([state.position**2, p**2])
            return (state, total + jnp.where(i >= warmup, now, 0.0)), None

        zero = jnp.zeros((2, CHAINS))
        (_, total), _ = jax.lax.scan(body, (state, zero), jnp.arange(warmup + num_steps))
        return total / num_steps

    per_chain = np.asarray(run(jax.random.key(seed)), np.float64)
    return per_chain.mean(axis=1), per_chain.std(axis=1) / np.sqrt(CHAINS)


def gaussian(k):
    return lambda q: -0.5 * k * q**2


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["normal", "discrete"])
@pytest.mark.parametrize(
    ("k", "friction", "h", "sd"), [(1.0, 1.0, 0.2, 0.0), (1.0, 0.5, 0.3, 1.5), (4.0, 4.0, 0.1, 3.0)]
)
def test_sghmc_has_its_closed_form(k, friction, h, sd, noise):
    gradient = noisy_gradient(gaussian(k), sd) if sd else exact_gradient(gaussian(k))
    kernel = stochgrad.sghmc(gradient, h, friction, noise=noise)
    moments, error = second_moments(kernel, 400, int(40 / h))
    c, v = friction, sd**2
    q2 = (2 * c + v * h) * (2 - c * h) / (c * k * (4 - 2 * c * h - h**2 * k))
    p2 = 2 * (2 * c + v * h) / (c * (4 - 2 * c * h - h**2 * k))
    assert abs(moments[0] - q2) < Z * error[0]
    assert abs(moments[1] - p2) < Z * error[1]
    euler = (
        (2 * c + v * h) * (2 - c * h + h**2 * k) / (k * (c - h * k) * (4 - 2 * c * h + h**2 * k))
    )
    assert abs(moments[0] - euler) > Z * error[0]  # so the explicit scheme would not pass


@pytest.mark.slow
@pytest.mark.parametrize(("k", "friction", "h", "sd"), [(1.0, 1.0, 0.1, 0.0), (1.0, 2.0, 0.2, 1.0)])
def test_euler_maruyama_has_its_closed_form(k, friction, h, sd):
    gradient = noisy_gradient(gaussian(k), sd) if sd else exact_gradient(gaussian(k))
    kernel = stochgrad.sghmc(gradient, h, friction, integrator="EM")
    moments, error = second_moments(kernel, 400, int(40 / h))
    c, v = friction, sd**2
    q2 = (2 * c + v * h) * (2 - c * h + h**2 * k) / (k * (c - h * k) * (4 - 2 * c * h + h**2 * k))
    assert abs(moments[0] - q2) < Z * error[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "h", "sd", "temperature"),
    [(1.0, 0.3, 0.0, 1.0), (2.0, 0.2, 2.0, 1.0), (1.0, 0.1, 0.0, 0.25)],
)
@pytest.mark.parametrize("noise", ["normal", "discrete"])
def test_sgld_has_its_closed_form(k, h, sd, temperature, noise):
    gradient = noisy_gradient(gaussian(k), sd) if sd else exact_gradient(gaussian(k))
    kernel = stochgrad.sgld(gradient, h, temperature=temperature, noise=noise)
    moments, error = second_moments(kernel, 400, int(20 / h))
    q2 = (temperature + h * sd**2 / 2) / (k * (1 - h * k / 2))
    assert abs(moments[0] - q2) < Z * error[0]


@pytest.mark.slow
@pytest.mark.parametrize("friction", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_the_variance_is_the_temperature_and_not_the_friction(friction, temperature):
    """What jax-sgmc gets wrong by a factor of the friction, and SGMCMCJax by a power."""
    h = 0.05
    gradient = exact_gradient(gaussian(1.0))
    kernel = stochgrad.sghmc(gradient, h, friction, temperature=temperature)
    moments, error = second_moments(kernel, 400, 1000)
    q2 = temperature * 2 * (2 - friction * h) / (4 - 2 * friction * h - h**2)
    assert abs(moments[0] - q2) < Z * error[0]


@pytest.mark.slow
def test_a_noise_estimate_takes_the_gradient_noise_back():
    h, c, sd = 0.1, 2.0, 4.0
    gradient = noisy_gradient(gaussian(1.0), sd)
    kernel = stochgrad.sghmc(gradient, h, c, noise_estimate=h * sd**2 / 2)
    moments, error = second_moments(kernel, 400, 500)
    assert abs(moments[0] - 2 * (2 - c * h) / (4 - 2 * c * h - h**2)) < Z * error[0]


@pytest.mark.slow
def test_mass_and_friction_trees_leave_the_target_as_it_is():
    precision = jnp.array([1.0, 100.0, 1e4])
    kernel = stochgrad.sghmc(
        exact_gradient(lambda q: -0.5 * jnp.sum(precision * q["x"] ** 2)),
        0.2,
        {"x": precision},
        mass={"x": precision},
    )
    draws = stochgrad.sample(
        jax.random.key(0),
        kernel,
        init={"x": jnp.zeros(3)},
        num_samples=4000,
        num_warmup=50,
        thin=10,
        num_chains=8,
    )
    value, error = mean_and_error(draws.positions["x"] ** 2 * np.asarray(precision))
    expected = 2 * (2 - 0.2) / (4 - 0.4 - 0.04)  # the closed form at k = C = M = 1
    assert np.all(np.abs(value - expected) < Z * error)
    kinetic, error = mean_and_error(draws.stats["kinetic_temperature"])
    assert np.abs(kinetic - 4 / (4 - 0.4 - 0.04)) < Z * error


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("layout", ["blocks", "rows"])
def test_a_conjugate_posterior_by_minibatches(share, layout):
    """Bias predicted: second order in h for reshuffled minibatches, so a small step shows none."""
    target, mean, precision = gaussian_posterior(num_rows=100, dim=3, batch_size=25, layout=layout)
    kernel = stochgrad.sghmc(target, 0.004, 20.0)
    draws = stochgrad.sample(
        jax.random.key(1),
        kernel,
        init=jnp.zeros(3),
        num_samples=3000,
        num_warmup=100,
        thin=50,
        num_chains=8,
        share_batches=share,
    )
    value, error = mean_and_error(draws.positions)
    assert np.all(np.abs(value - mean) < Z * error)
    variance, error = mean_and_error((draws.positions - mean) ** 2)
    assert np.all(np.abs(variance * precision - 1) < Z * error * precision)


@pytest.mark.slow
def test_iid_minibatches_inflate_the_variance_as_predicted_and_reshuffled_ones_do_not():
    h, c, batch = 0.01, 12.0, 10
    x_var = {}
    for order in ("iid", "reshuffled"):
        target, mean, precision = gaussian_posterior(
            num_rows=100, dim=2, batch_size=batch, order=order
        )
        draws = stochgrad.sample(
            jax.random.key(2),
            stochgrad.sghmc(target, h, c),
            init=jnp.zeros(2),
            num_samples=4000,
            num_warmup=100,
            thin=20,
            num_chains=16,
        )
        x_var[order] = mean_and_error((draws.positions - mean) ** 2)
    # the gradient noise of blocks of a fixed partition of these very rows
    batches = target.batches
    state = batches.init(jax.random.key(0))
    sums = []
    for _ in range(10):
        b, state = batches.next(state)
        sums.append(np.asarray(b.weight * b.data.sum(axis=0)))
    v = np.var(np.array(sums), axis=0)  # of the minibatch gradient, whose curvature is constant
    k = precision
    predicted = (2 * c + v * h) * (2 - c * h) / (c * k * (4 - 2 * c * h - h**2 * k))
    value, error = x_var["iid"]
    assert np.all(np.abs(value - predicted) < Z * error)
    exact = 2 * (2 - c * h) / (k * (4 - 2 * c * h - h**2 * k))
    value, _ = x_var["reshuffled"]
    assert np.all(np.abs(value / exact - 1) < 0.5 * np.abs(predicted / exact - 1))


@pytest.mark.slow
def test_a_skewed_target():
    """A Gumbel-like density, exp(q - e^q): mean -0.5772, variance pi^2 / 6, skewness -1.14."""
    kernel = stochgrad.sghmc(exact_gradient(lambda q: jnp.sum(q - jnp.exp(q))), 0.05, 1.5)
    draws = stochgrad.sample(
        jax.random.key(3),
        kernel,
        init=jnp.zeros(1),
        num_samples=8000,
        num_warmup=100,
        thin=20,
        num_chains=16,
    )
    q = draws.positions
    for values, expected in [
        (q, -np.euler_gamma),
        ((q + np.euler_gamma) ** 2, np.pi**2 / 6),
        (np.exp(q), 1.0),
    ]:
        value, error = mean_and_error(values)
        bias = 0.05**2 * abs(expected) / 4 * 2  # second order in h, with a factor of two to spare
        assert np.all(np.abs(value - expected) < Z * error + bias)
