"""Draws that spread as estimates do where the model is wrong."""

import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad.diagnostics import predict_law, sandwich


def misspecified(order="reshuffled", batch_size=100, size=1000):
    """A regression whose noise grows with a regressor while the model says one."""
    rng = np.random.default_rng(3)
    x = np.c_[np.ones(size), rng.normal(size=size), rng.gamma(2.0, size=size)]
    y = x @ [1.0, -0.5, 0.3] + rng.normal(size=size) * (0.3 + x[:, 2])
    target = stochgrad.posterior(
        lambda b: 0.0 * b[0],
        lambda b, rows: -0.5 * (rows[1] - rows[0] @ b) ** 2,
        (x.astype(np.float32), y.astype(np.float32)),
        batch_size=batch_size,
        order=order,
    )
    hessian = x.T @ x
    mode = np.linalg.solve(hessian, x.T @ y)
    scores = x * (y - x @ mode)[:, None]
    inverse = np.linalg.inv(hessian)
    exact = inverse @ scores.T @ scores @ inverse
    return target, jnp.asarray(mode, jnp.float32), hessian, exact


@pytest.mark.parametrize(("order", "centered"), [("symmetric", False), ("iid", True)])
def test_the_stationary_covariance_is_the_sandwich(order, centered, key):
    target, mode, hessian, exact = misspecified(order)
    gradient = stochgrad.control_variate(target, mode) if centered else target
    found = sandwich(key, gradient, mode, step_size=0.1)
    np.testing.assert_allclose(found.covariance, exact, rtol=1e-3)
    assert np.all(np.diag(exact) > 2 * np.diag(np.linalg.inv(hessian)))
    kernel = stochgrad.sghmc(gradient, **found.settings)
    law = predict_law(key, kernel, mode, hessian=hessian, covariance=exact)
    np.testing.assert_allclose(law.covariance, exact, rtol=1e-3, atol=1e-3 * np.abs(exact).max())


def test_what_cannot_be_had_is_refused(key):
    target, mode, hessian, _ = misspecified("iid", batch_size=20)
    with pytest.raises(ValueError, match="smaller step_size, larger minibatches"):
        sandwich(key, target, mode, step_size=0.5)
    with pytest.raises(ValueError, match="below 2"):
        sandwich(key, target, mode, step_size=2.5)
    with pytest.raises(ValueError, match="hessian must be a symmetric positive"):
        sandwich(key, target, mode, hessian=-hessian)
    with pytest.raises(ValueError, match="score_covariance must have shape"):
        sandwich(key, target, mode, score_covariance=np.eye(2))


@pytest.mark.slow
def test_draws_have_the_sandwich_for_covariance(key):
    target, mode, _, exact = misspecified("symmetric")
    gradient = stochgrad.control_variate(target, mode)
    kernel = stochgrad.sghmc(gradient, **sandwich(key, gradient, mode).settings)
    draws = stochgrad.sample(
        key, kernel, init=mode, num_samples=50_000, num_chains=4, num_warmup=1000
    )
    values = np.asarray(draws.positions, np.float64).reshape(-1, 3)
    # times of seven steps: 30,000 effective draws
    np.testing.assert_allclose(np.cov(values.T), exact, rtol=0.03, atol=0.02 * np.abs(exact).max())
