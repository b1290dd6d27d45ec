"""Orders, measured exactly on the steps that ship, against closed forms and the theory."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad.diagnostics import Problem, double_well, gaussian, minibatch_gaussian, weak_order

STEPS = [0.1, 0.05]


def sghmc(integrator, friction=1.0):
    return partial(stochgrad.sghmc, friction=friction, integrator=integrator)


@pytest.mark.parametrize(
    ("integrator", "position", "momentum"),
    [
        ("EM", 0.1140, None),  # the figures: closed forms of E q^2 - 1 at h = 0.1, k = C = 1
        ("SGHMC", 0.002639, None),
        ("LT", 0.002506, 0.0),
        ("OBABO", 0.002506, 0.0),
        ("OABAO", 0.0025, 0.0),
        ("BAOAB", 0.0, 0.0025),
        ("ABOBA", 0.0, 0.1**2 / 4 / (1 - 0.1**2 / 4)),
        ("LEAPFROG", 0.0, None),
        ("SSI", 4.165e-4, None),
        ("UBU", 0.001666, None),
        ("BUB", 8.35e-4, None),
        ("MT3", 4.98e-5, None),
    ],
)
def test_stationary_moments_of_a_gaussian_are_the_closed_forms(integrator, position, momentum):
    """A wrong coefficient anywhere in a step shows here."""
    found = weak_order(sghmc(integrator), gaussian, STEPS)
    np.testing.assert_allclose(found.position_error[0], position, rtol=1e-3, atol=1e-12)
    if momentum is not None:
        np.testing.assert_allclose(found.momentum_error[0], momentum, rtol=1e-6, atol=1e-12)


def test_a_noisy_chain_gets_its_temperature(key):
    """The machinery must see noise and temperature: at T = 1/2 half the variance is missing."""
    cold = partial(stochgrad.sghmc, friction=1.0, integrator="BAOAB", temperature=0.5)
    found = weak_order(cold, gaussian, STEPS)
    np.testing.assert_allclose(found.position_error, 0.5, rtol=1e-9)


ORDERS = {"SGHMC": 2, "LEAPFROG": 2, "BAOAB": 2, "LT": 2, "UBU": 2, "MT3": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("integrator", "order"), list(ORDERS.items()))
def test_orders_on_a_double_well(integrator, order):
    """A Gaussian hides the order of some schemes; a double well hides none."""
    found = weak_order(sghmc(integrator), double_well, [0.05, 0.025])
    assert abs(found.position_order - order) < 0.15
    if integrator in ("SGHMC", "LEAPFROG"):
        assert abs(found.momentum_order - 1) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "same"), [("quantized", 1e-3), ("discrete", 0.05)])
def test_noise_of_few_values_keeps_the_order(noise, same):
    steps = [0.1, 0.05]
    normal = weak_order(sghmc("BAOAB"), double_well, steps)
    other = weak_order(sghmc("BAOAB"), double_well, steps, noise=noise)
    assert abs(other.position_order - 2) < 0.05
    np.testing.assert_allclose(other.position_error, normal.position_error, rtol=same)


@pytest.mark.slow
def test_euler_maruyama_is_of_first_order_on_a_double_well():
    found = weak_order(sghmc("EM", friction=5.0), double_well, [0.01, 0.005])
    assert abs(found.position_order - 1) < 0.15


@pytest.mark.parametrize(("integrator", "order"), [("EM", 1), ("LT", 1), ("OBABO", 2)])
def test_orders_at_a_finite_time(integrator, order):
    """Lie-Trotter's ergodic order is 2 and its order at a finite time 1."""
    found = weak_order(sghmc(integrator), gaussian, [0.05, 0.025], time=1.0)
    assert abs(found.position_order - order) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("integrator", ["BAOAB", "SGHMC", "MT3"])
@pytest.mark.parametrize(("order", "slope"), [("iid", 1), ("reshuffled", 2), ("symmetric", 2)])
def test_the_order_of_the_minibatches_decides(integrator, order, slope):
    """Independent minibatches: first order, third-order schemes included; swept ones: second."""
    found = weak_order(sghmc(integrator, 1.7), minibatch_gaussian(order), [0.025, 0.0125])
    assert abs(found.position_order - slope) < 0.12
    if integrator == "MT3":
        assert found.position_order < 2.2


def test_independent_minibatches_inflate_as_predicted():
    """hV/2C to leading order: two batches that differ in place alone."""
    problem = Problem(
        lambda q, j: -0.5 * jnp.sum((q - (2.0 * jnp.asarray(j, float) - 1.0)) ** 2), 1, 2, "iid"
    )
    found = weak_order(sghmc("BAOAB", 2.0), problem, [0.01, 0.005])
    np.testing.assert_allclose(found.position_error, np.array([0.01, 0.005]) / 4, rtol=0.02)


def test_sgld_is_of_first_order():
    found = weak_order(stochgrad.sgld, gaussian, STEPS)
    np.testing.assert_allclose(found.position_error, 1 / (1 - np.array(STEPS) / 2) - 1, rtol=1e-9)
    assert np.isnan(found.momentum_error).all()


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="step_sizes must be two or more falling numbers"):
        weak_order(sghmc("LT"), gaussian, [0.1])
    with pytest.raises(ValueError, match="unstable at step size"):
        weak_order(sghmc("LT"), gaussian, [2.5, 2.4])
    with pytest.raises(ValueError, match="needs a step that is affine"):
        weak_order(sghmc("LT"), Problem(lambda q, j: -jnp.sum(q**2 / 2 + q**4), 2), STEPS)
    with pytest.raises(ValueError, match="at most 5 batches"):
        weak_order(sghmc("LT"), Problem(lambda q, j: -jnp.sum(q**2), 1, 6, "iid"), STEPS)
