"""Stability limits, recommended steps and masses against what is known in closed form."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.helpers import exact_gradient, gaussian_posterior

K = 25.0  # curvature of the stiffest direction


def stiff(q):
    return -0.5 * jnp.sum(jnp.array([K, 1.0, 0.1]) * q**2)


@pytest.mark.parametrize(
    ("integrator", "limit"),
    [  # in units of sqrt(k), at C = sqrt(k)
        ("EM", 1.0),
        ("SGHMC", np.sqrt(5) - 1),
        ("LEAPFROG", np.sqrt(5) - 1),
        ("LT", 2.0),
        ("BAOAB", 2.0),
        ("OBABO", 2.0),
        ("UBU", 2.399),
        ("BUB", 2.399),
        ("SSI", 3.243),
    ],
)
def test_stability_limits_are_the_known_ones(integrator, limit, key):
    found = stochgrad.find_step_size(
        key, exact_gradient(stiff), jnp.zeros(3), friction=K**0.5, integrator=integrator
    )
    np.testing.assert_allclose(found.curvature, K, rtol=1e-3)
    np.testing.assert_allclose(found.limit * K**0.5, limit, rtol=2e-3)
    assert found.noise_bias < 1e-12
    assert found.step_size <= found.limit / 3 * 1.0001
    assert abs(found.integrator_bias) <= 0.0201


@pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")
@pytest.mark.parametrize("integrator", ["SGHMC", "BAOAB", "EM"])
def test_a_chain_diverges_just_beyond_the_limit_and_not_before(integrator, key):
    target = exact_gradient(stiff)
    found = stochgrad.find_step_size(key, target, jnp.zeros(3), friction=5.0, integrator=integrator)

    def spread(factor):
        kernel = stochgrad.sghmc(target, factor * found.limit, 5.0, integrator=integrator)
        return stochgrad.sample(key, kernel, init=jnp.ones(3), num_samples=50, thin=100).positions

    with pytest.warns(stochgrad.DivergenceWarning):
        spread(1.05)
    assert np.all(np.isfinite(spread(0.95)))


def test_sgld_has_its_closed_form(key):
    found = stochgrad.find_step_size(key, exact_gradient(stiff), jnp.zeros(3), bias=0.1)
    np.testing.assert_allclose(found.limit, 2 / K, rtol=1e-3)
    h = found.step_size
    np.testing.assert_allclose(1 / (1 - h * K / 2) - 1, 0.1, rtol=1e-2)


@pytest.mark.slow
def test_the_bias_of_gradient_noise_is_predicted(key):
    """hV/2C, with V known: rows of a Gaussian mean, independent blocks of a fixed partition."""
    target, mean, precision = gaussian_posterior(num_rows=400, dim=3, batch_size=20, order="iid")
    find = partial(stochgrad.find_step_size, friction=40.0, integrator="BAOAB")
    found = find(key, target, jnp.asarray(mean))
    blocks = target.batches.blocks
    sums = [np.asarray(blocks.at(b).data.sum(axis=0)) * 20 for b in range(20)]
    v = np.var(sums, axis=0).mean()
    # a variance from 64 minibatches in three directions: 3.3 standard errors of 0.105
    np.testing.assert_allclose(found.noise_bias, found.step_size * v / 80, rtol=0.35)
    np.testing.assert_allclose(found.noise_bias + abs(found.integrator_bias), 0.02, rtol=0.01)
    np.testing.assert_allclose(found.curvature, precision, rtol=1e-3)
    swept, _, _ = gaussian_posterior(num_rows=400, dim=3, batch_size=20, order="reshuffled")
    assert find(key, swept, jnp.asarray(mean)).step_size > 2 * found.step_size
    centered = stochgrad.control_variate(target, jnp.asarray(mean))
    assert find(key, centered, jnp.asarray(mean)).noise_bias < 1e-6  # one curvature for all rows


def test_a_mass_makes_the_curvature_one(key):
    scales = jnp.array([100.0, 4.0, 0.01])
    target = stochgrad.posterior(
        lambda q: -0.5 * jnp.sum(scales * q**2), lambda q, x: 0.0 * x + 0 * q[0], np.ones(4),
        order="full",
    )  # fmt: skip
    mass = stochgrad.find_mass(key, target, jnp.ones(3))
    np.testing.assert_allclose(mass, scales, rtol=1e-5)
    found = stochgrad.find_step_size(key, target, jnp.ones(3), friction=mass, mass=mass)
    np.testing.assert_allclose(found.curvature, 1.0, rtol=1e-4)
    dense = np.diag(np.asarray(scales, float)) + 0.005
    found = stochgrad.find_step_size(key, target, jnp.ones(3), friction=dense, mass=dense)
    expected = np.linalg.eigvals(np.linalg.solve(dense, np.diag(scales))).max()
    np.testing.assert_allclose(found.curvature, expected, rtol=1e-3)


def test_many_parameters_are_probed(key):
    target = stochgrad.posterior(
        lambda q: -0.5 * jnp.sum(3.0 * q**2), lambda q, x: 0.0 * x + 0 * q[0], np.ones(4),
        order="full",
    )  # fmt: skip
    np.testing.assert_allclose(
        stochgrad.find_mass(key, target, jnp.zeros(600), num_probes=4), 3.0, rtol=1e-5
    )


def test_what_cannot_be_found_is_refused(key):
    target = exact_gradient(stiff)
    with pytest.raises(ValueError, match="bias must be a positive number"):
        stochgrad.find_step_size(key, target, jnp.zeros(3), bias=0.0)
    with pytest.raises(ValueError, match="the curvature at position came out as"):
        stochgrad.find_step_size(key, exact_gradient(jnp.sum), jnp.zeros(3), friction=1.0)
    with pytest.raises(ValueError, match="integrator must be one of"):
        stochgrad.find_step_size(key, target, jnp.zeros(3), friction=1.0, integrator="QUICK")
