"""Draws that spread as estimates do over data sets, from one call."""

from dataclasses import replace

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import stochgrad


def heteroskedastic(seed=3, size=2000):
    """Rows whose noise grows with a regressor, and the exact sandwich and posterior covariances."""
    rng = np.random.default_rng(seed)
    x = np.c_[np.ones(size), rng.normal(size=size), rng.gamma(2.0, size=size)]
    y = x @ [1.0, -0.5, 0.3] + rng.normal(size=size) * (0.3 + x[:, 2])
    hessian = x.T @ x / 4.0 + np.eye(3) / 100
    inverse = np.linalg.inv(hessian)
    scores = x * (y - x @ (inverse @ x.T @ y / 4.0))[:, None] / 4.0
    scores -= scores.mean(axis=0)
    return (
        x.astype(np.float32),
        y.astype(np.float32),
        inverse @ scores.T @ scores @ inverse,
        inverse,
    )


def regression(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, 2.0), obs=y)


@pytest.mark.slow
def test_the_sandwich_for_a_target():
    x, y, robust, posterior = heteroskedastic()
    draws = stochgrad.infer(
        jax.random.key(0),
        regression,
        x,
        y,
        batch_size=100,
        target="sandwich",
        target_ess=2000,
        progress=False,
    )
    assert draws.verdict.ok, draws.verdict
    assert draws.attrs["target"] == "sandwich"
    widths = draws.constrained()["w"].var((0, 1)) / np.diag(robust)
    np.testing.assert_allclose(widths, 1.0, atol=4 * np.sqrt(2 / 2000))
    assert abs(robust[2, 2] / posterior[2, 2] - 1) > 0.5  # another spread than the posterior's
    np.testing.assert_allclose(draws.verdict.table["sd_predicted"], np.sqrt(np.diag(robust)), 0.01)

    def narrow(x):
        return x.mean((0, 1)) + 0.7 * (x - x.mean((0, 1)))

    verdict = stochgrad.diagnose(replace(draws, positions=jax.tree.map(narrow, draws.positions)))
    assert not verdict.ok
    assert "do not have the sandwich's spread" in verdict.reasons[0]
    assert "0.7 times" in verdict.reasons[0]


def test_a_sandwich_is_refused_where_rows_say_nothing():
    def grouped(group, y):
        mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
        with numpyro.plate("groups", 5):
            effect = numpyro.sample("effect", dist.Normal(mean, 1.0))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(effect[group], 0.5), obs=y)

    group = np.arange(300) % 5
    y = np.random.default_rng(0).normal(size=300).astype(np.float32)
    options = {"batch_size": 30, "target": "sandwich", "progress": False}
    with pytest.raises(ValueError, match=r"next to nothing of 'mean'"):
        stochgrad.infer(jax.random.key(0), grouped, group, y, **options)
    with pytest.raises(ValueError, match="method must be 'sghmc'"):
        stochgrad.infer(jax.random.key(0), grouped, group, y, **options, method="nuts")
    with pytest.raises(ValueError, match=r"rows cannot be told apart; give batch_size="):
        stochgrad.infer(
            jax.random.key(0), regression, *heteroskedastic()[:2], target="sandwich", progress=False
        )
