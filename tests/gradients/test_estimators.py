"""Score-function estimates against enumeration, and blends of two estimates."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad.gradients import leave_one_out_coefficients, optimal_mixing_weights, score_function

LOGITS = np.array([0.3, -1.0, 0.5])


def probabilities(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


REWARDS = np.array([1.0, 7.0, -2.0])


@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "optimal"])
def test_unbiased_by_enumeration(baseline):
    """All triples of draws with their probabilities: the mean is the gradient itself."""
    p = probabilities(LOGITS)
    wanted = p * (REWARDS - p @ REWARDS)
    with jax.enable_x64(True):
        triples = list(product(range(3), repeat=3))
        chosen = np.array(triples)
        scores = np.eye(3)[chosen] - p
        each = np.asarray(
            jax.vmap(lambda f, s: score_function(f, s, baseline))(
                jnp.asarray(REWARDS[chosen]), jnp.asarray(scores)
            )
        )
    weights = p[chosen].prod(1)
    np.testing.assert_allclose(weights @ each, wanted, atol=1e-12)


def test_a_constant_reward_gives_nothing():
    s = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_allclose(score_function(jnp.full(3, 4.0), s), 0.0, atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="baseline must be"):
        score_function(jnp.ones(3), jnp.ones(3), "mean")
    with pytest.raises(ValueError, match="needs at least two draws, got 1"):
        score_function(jnp.ones(1), jnp.ones(1))


def test_the_coefficient_of_least_variance_is_found(key):
    """Where the score part explains the path's noise in part, the coefficient is that part."""
    s = jax.random.normal(key, (8, 4))
    own, pooled = leave_one_out_coefficients(-0.3 * s + s + 2.0, s)
    np.testing.assert_allclose(own, 0.3, atol=1e-4)
    np.testing.assert_allclose(pooled, 0.3, atol=1e-4)


def test_where_little_is_known_it_is_the_total_gradients(key):
    p, s = jax.random.normal(key, (2, 8, 1))
    own, pooled = leave_one_out_coefficients(s, s - 30.0 * p)
    np.testing.assert_allclose(own, 1.0, atol=0.05)
    np.testing.assert_allclose(pooled, 1.0, atol=0.05)


@pytest.mark.parametrize("count", [4, 20])
def test_measured_blends_are_unbiased(count, key):
    """Skewed, dependent parts: would catch a coefficient that looks at its own draw."""

    def parts(position, key):
        e = jax.random.exponential(key) - 1.0
        return position * (e**2 + 1.0), position * e

    def one(key):
        position = jnp.float32(1.3)
        draws_key, direction_key = jax.random.split(key)
        keys = jax.random.split(draws_key, count)

        def bound(position):
            c = optimal_mixing_weights(parts, position, keys, direction_key)
            path, score = jax.vmap(parts, (None, 0))(position, keys)
            return jnp.mean(path + c * score)

        return jax.grad(bound)(position) - 2.0

    error = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(key, 100_000)), np.float64)
    assert abs(error.mean()) < 5.5 * error.std() / np.sqrt(len(error))


def test_it_measures_what_only_goes_backward(key):
    """A density with a derivative of its own, which forward mode refuses."""

    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))

    def parts(function):
        return lambda p, key: (function(p * jax.random.normal(key)), p * jax.random.normal(key))

    keys = jax.random.split(key, 9)
    found = [
        optimal_mixing_weights(parts(function), jnp.float32(0.7), keys, key)
        for function in (square, lambda x: x**2)
    ]
    np.testing.assert_allclose(*found, rtol=1e-5)
