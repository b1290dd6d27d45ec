"""A center is a mode, or says that it is none."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad

KEY = jax.random.key(0)


def regression(columns, y, batch_size=64):
    """A linear regression with flat priors on raw data: position (coefficients, log scale)."""
    x = np.concatenate([np.ones((len(y), 1)), columns], axis=1)

    def log_likelihood(q, batch):
        rows, seen = batch
        residual = (seen - rows @ q["b"]) / jnp.exp(q["log_scale"])
        return -q["log_scale"] - 0.5 * residual**2

    rows = x.astype(np.float32), y.astype(np.float32)
    target = stochgrad.posterior(
        lambda q: jnp.zeros(()), log_likelihood, rows, batch_size=batch_size
    )
    b = np.linalg.lstsq(x, y, rcond=None)[0]
    scale = np.sqrt(np.mean((y - x @ b) ** 2))
    errors = scale * np.sqrt(np.diag(np.linalg.inv(x.T @ x)))
    return target, {"b": jnp.zeros(x.shape[1]), "log_scale": jnp.zeros(())}, b, scale, errors


RNG = np.random.default_rng(1)
YEAR = RNG.integers(1970, 1983, 400).astype(float)
RAW = {
    "one binary column": (RNG.random((434, 1)) < 0.78, [77.5, 11.8], 20.0),
    "calendar years": (np.stack([YEAR, RNG.normal(3.0, 0.8, 400)], 1), [-1400, 0.75, -6.6], 3.4),
    "thousands": (RNG.normal(66, 4, (1192, 1)), [-60_000, 1200], 20_000.0),
    "two hundred columns": (RNG.normal(size=(2000, 200)), RNG.normal(size=201), 1.0),
}


@pytest.mark.parametrize("name", RAW)
def test_the_mode_of_raw_regressions_is_reached(name):
    """Adam's 3,000 steps of 0.05 end far from these; the mode is least squares."""
    columns, b, sd = RAW[name]
    mean = np.asarray(b)[0] + columns @ np.asarray(b)[1:]
    y = mean + sd * np.random.default_rng(2).normal(size=len(mean))
    target, init, b, scale, errors = regression(columns, y)
    center = stochgrad.find_center(KEY, target, init=init)
    dimension = len(b) + 1
    assert center.distance < 0.1 * np.sqrt(dimension)
    # single precision carries what is left: rounding of the rows and of their sums
    np.testing.assert_array_less(np.abs(center.position["b"] - b) / errors, 0.3)
    np.testing.assert_allclose(np.exp(center.position["log_scale"]), scale, rtol=5e-3)


def test_no_pass_over_all_rows_where_the_optimizer_has_arrived():
    x = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    target = stochgrad.posterior(
        lambda m: -0.5 * jnp.sum(m**2), lambda m, b: -0.5 * jnp.sum((b - m) ** 2, 1), x,
        batch_size=30,
    )  # fmt: skip
    init = jnp.zeros(3)
    plain = stochgrad.find_center(KEY, target, init=init, passes=0)
    np.testing.assert_array_equal(
        plain.position, stochgrad.find_center(KEY, target, init=init).position
    )
    exact = x.sum(0) / 301
    g = x.sum(0) - 301 * plain.position
    np.testing.assert_allclose(plain.distance, np.sqrt(g @ g / 301), rtol=1e-2)
    np.testing.assert_allclose(plain.position, exact, atol=0.01)


def no_mode(name):
    rows = jnp.zeros(5)
    functions = {
        # a group scale that is sampled: unbounded where it goes to zero
        "hierarchy": lambda q: -10 * q[0] - 0.5 * jnp.sum(q[1:] ** 2) * jnp.exp(-2 * q[0]),
        "wall": lambda q: jnp.where(jnp.abs(q[0]) > 1e6, 0.0, -1e30) + 0.0 * jnp.sum(q),
        "flat direction": lambda q: -0.5 * q[0] ** 2 + 0.0 * jnp.sum(q),
        "saddle": lambda q: -0.5 * q[0] ** 2 + 0.5 * jnp.sin(q[1]) ** 2 * jnp.exp(-(q[0] ** 2)),
    }
    return stochgrad.posterior(functions[name], lambda q, b: jnp.zeros(len(b)), rows, order="full")


@pytest.mark.parametrize("name", ["hierarchy", "wall", "flat direction"])
def test_a_density_without_a_mode_is_said_and_refused(name):
    target = no_mode(name)
    with pytest.warns(stochgrad.ConvergenceWarning, match="find_center: the log density is not"):
        center = stochgrad.find_center(KEY, target, init=jnp.full(4, 0.1), num_steps=300)
    assert np.isnan(center.distance)
    with pytest.raises(ValueError, match="center: the log density is not strictly concave"):
        stochgrad.control_variate(target, center)
    for find in (stochgrad.find_mass, stochgrad.find_step_size):
        with pytest.raises(ValueError, match="position: the log density is not strictly concave"):
            find(target, KEY, center)
    stochgrad.control_variate(target, center.position)  # whoever knows better passes a position


def test_a_search_that_is_too_short_is_said_and_refused():
    x = 50 + np.random.default_rng(0).normal(size=300).astype(np.float32)
    target = stochgrad.posterior(lambda m: 0.0, lambda m, b: -0.5 * (b - m) ** 2, x, batch_size=30)
    with pytest.warns(stochgrad.ConvergenceWarning, match="standard deviations away"):
        center = stochgrad.find_center(KEY, target, init=jnp.float32(0.0), num_steps=20, passes=0)
    # 300 rows of unit variance: the mode is |mean - center| times sqrt(300) away
    exact = abs(x.mean(dtype=np.float64) - float(center.position)) * np.sqrt(300)
    np.testing.assert_allclose(center.distance, exact, rtol=1e-4)
    with pytest.raises(ValueError, match="center: the mode is still"):
        stochgrad.control_variate(target, center)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stochgrad.find_center(KEY, target, init=jnp.float32(0.0), num_steps=20)
