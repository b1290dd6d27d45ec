"""Posteriors from plain functions, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.helpers import gaussian_posterior

X = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
GOOD = {
    "log_prior": lambda q: -0.5 * jnp.sum(q**2),
    "log_likelihood": lambda q, b: -0.5 * jnp.sum((b - q[None]) ** 2, axis=1),
    "data": X,
    "batch_size": 5,
}


def test_the_density_is_prior_plus_likelihood():
    target, mean, precision = gaussian_posterior(batch_size=6)
    score = jax.grad(target.log_density)(jnp.ones(2), target.batches.full)
    np.testing.assert_allclose(score, precision * (mean - 1), rtol=1e-5)


def test_data_may_be_any_tree():
    target = stochgrad.posterior(
        lambda q: 0.0 * q,
        lambda q, b: q * b["x"] * b["more"][0],
        {"x": np.ones(7, np.float32), "more": (jnp.arange(7.0), np.arange(7))},
        batch_size=3,
    )
    np.testing.assert_allclose(target.log_density(jnp.float32(2.0), target.batches.full), 42.0)


def bad(change):
    x = X.copy()
    x[13, 1] = np.inf
    return {
        "infinite": ({"data": x}, "data must be finite, but row 13 holds NaN or infinity"),
        "lengths": (
            {"data": {"a": X, "b": X[:7]}},
            r"same number of rows, but data\['a'\] has 20, data\['b'\] has 7",
        ),
        "scalar": ({"data": 3.0}, "data must have a leading axis of rows, got a scalar"),
        "nothing": ({"data": ()}, "data must hold at least one array"),
        "empty": ({"data": X[:0]}, "data must hold at least one row"),
        "large": (
            {"batch_size": 21},
            "batch_size must be from 1 to the number of rows, 20, got 21",
        ),
        "zero": ({"batch_size": 0}, "batch_size must be from 1 to the number of rows, 20, got 0"),
        "float": ({"batch_size": 5.0}, "batch_size must be an integer from 1 to 20, got 5.0"),
        "missing": ({"batch_size": None}, "batch_size must be an integer from 1 to 20, got None"),
        "order": ({"order": "random"}, "order must be one of .* got 'random'"),
        "layout": ({"layout": "columns"}, "layout must be one of .* got 'columns'"),
        "full": ({"order": "full"}, "order='full' uses all 20 rows at every step"),
    }[change]


@pytest.mark.parametrize(
    "change",
    [
        "infinite",
        "lengths",
        "scalar",
        "nothing",
        "large",
        "zero",
        "float",
        "missing",
        "order",
        "layout",
        "full",
        "empty",
    ],
)
def test_bad_data_and_batches_get_one_sentence(change):
    options, words = bad(change)
    with pytest.raises(ValueError, match=words):
        stochgrad.posterior(**{**GOOD, **options})


def test_functions_of_the_wrong_shape_get_one_sentence():
    for change, words in [
        ({"log_prior": lambda q: -0.5 * q**2}, r"log_prior must return a scalar, got shape \(2,\)"),
        ({"log_likelihood": lambda q, b: b @ q[:, None]}, r"one value per row, shape \(5,\)"),
        ({"log_likelihood": lambda q, b: jnp.sum(b @ q)}, r"got shape \(\)"),
    ]:
        target = stochgrad.posterior(**{**GOOD, **change})
        with pytest.raises(ValueError, match=words):
            stochgrad.sample(
                jax.random.key(0), stochgrad.sgld(target, 0.1), init=jnp.zeros(2), num_samples=1
            )
    with pytest.raises(TypeError, match="log_prior must be a function"):
        stochgrad.posterior(**{**GOOD, "log_prior": 3.0})


def test_a_position_that_does_not_fit_gets_one_sentence():
    target = stochgrad.posterior(**{**GOOD, "log_likelihood": lambda q, b: b @ q["w"]})
    for start in ({"w": jnp.zeros(3)}, jnp.zeros(2), {"v": jnp.zeros(2)}):
        with pytest.raises(ValueError, match=r"fails on a position of shape .* does init match"):
            stochgrad.sample(
                jax.random.key(0), stochgrad.sgld(target, 0.1), init=start, num_samples=1
            )
