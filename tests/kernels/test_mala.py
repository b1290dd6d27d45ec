"""Langevin moves with Metropolis' correction leave their law as it is, at any step size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.conftest import Z


def gumbel(x):
    """A skewed density."""
    return -(x + jnp.exp(-x))


def full(log_density):
    return stochgrad.posterior(
        log_density, lambda x, row: jnp.zeros_like(row), jnp.zeros(1), order="full"
    )


def after_a_step(kernel, positions, key):
    def one(key, position):
        first, second = jax.random.split(key)
        return kernel.step(second, kernel.init(position, first))

    keys = jax.random.split(key, len(positions))
    return jax.jit(jax.vmap(one))(keys, positions)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_step_from_the_density_ends_in_it(temperature, key):
    """The density to the power 1/T is that of -log of a gamma variable, plus log of 1/T."""
    one, other = jax.random.split(key)
    gamma = jax.random.gamma(one, 1 / temperature, (40_000,))
    start = -jnp.log(gamma) + float(np.log(1 / temperature))
    kernel = stochgrad.mala(full(gumbel), 0.7, temperature=temperature)
    state, info = after_a_step(kernel, start, other)
    assert 0.3 < float(jnp.mean(info.accepted)) < 0.95
    for function in (jnp.tanh, lambda x: jnp.exp(-x), lambda x: (x > 1.0).astype(x.dtype)):
        change = np.asarray(function(state.position) - function(start), np.float64)
        assert abs(change.mean()) < Z * change.std() / np.sqrt(len(change))
        assert change.std() > 0.05


def test_what_is_reported_is_of_the_state(key):
    kernel = stochgrad.mala(full(gumbel), 0.5)
    state, info = after_a_step(kernel, jnp.linspace(-1.0, 3.0, 9), key)
    np.testing.assert_allclose(info.log_density, jax.vmap(gumbel)(state.position), rtol=1e-6)
    slope = jax.vmap(jax.grad(gumbel))(state.position)
    np.testing.assert_allclose(info.gradient_norm, np.abs(slope), rtol=1e-5)


def test_minibatches_are_refused():
    rows = stochgrad.posterior(
        lambda x: -(x**2), lambda x, y: -((y - x) ** 2), jnp.zeros(10), batch_size=5
    )
    with pytest.raises(
        ValueError, match=r"^target must take all 10 rows at every step, got batch_"
    ):
        stochgrad.mala(rows, 0.1)


def test_a_noisy_gradient_is_refused():
    rows = stochgrad.posterior(
        lambda x: -(x**2), lambda x, y: -((y - x) ** 2), jnp.zeros(10), order="full"
    )
    with pytest.raises(ValueError, match=r"^target must be a posterior on all its rows, got"):
        stochgrad.mala(stochgrad.control_variate(rows, jnp.zeros(())), 0.1)


@pytest.mark.slow
def test_replicas_that_swap_keep_the_weights_of_modes(key):
    """A single energy of a density known in full is all that a swap needs."""

    def log_density(x):
        return jnp.logaddexp(-((x + 3.0) ** 2), float(np.log(4.0)) - (x - 3.0) ** 2)

    kernel = stochgrad.replica_exchange(
        stochgrad.mala, full(log_density), (0.4, 3.0), temperatures=(1.0, 10.0), swap_every=2,
        energy_batches=1,
    )  # fmt: skip
    draws = stochgrad.sample(
        key, kernel, init=lambda key: 3.0 * jax.random.normal(key), num_samples=100,
        num_warmup=100, thin=5, num_chains=200, progress=False,
    )  # fmt: skip
    share = np.asarray(draws.positions > 0, np.float64).mean(1)
    assert abs(share.mean() - 0.8) < Z * share.std() / np.sqrt(200)
    assert share.std() / np.sqrt(200) < 0.02


def test_one_energy_is_for_all_rows_alone():
    rows = stochgrad.posterior(
        lambda x: -(x**2), lambda x, y: -((y - x) ** 2), jnp.zeros(10), batch_size=5
    )
    with pytest.raises(ValueError, match="energy_batches must be an integer of at least 2"):
        stochgrad.replica_exchange(
            stochgrad.sgld, rows, 0.1, temperatures=(1.0, 2.0), energy_batches=1
        )
