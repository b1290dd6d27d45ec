"""Score-function estimates against enumeration, and blends of two estimates."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad.gradients import leave_one_out_blend, score_function

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


def test_the_blend_finds_the_coefficient_of_least_variance(key):
    """Where the score part explains the path's noise in part, the coefficient is that part."""
    s = jax.random.normal(key, (8, 40))
    exact = leave_one_out_blend({"a": -0.3 * s + 2.0}, {"a": s})
    np.testing.assert_allclose(exact.gradient["a"], 2.0, atol=1e-4)
    np.testing.assert_allclose(exact.score_coef, 0.3, atol=1e-4)
    assert exact.blend_variance < 1e-6 < exact.path_variance < exact.total_variance


def test_the_blend_falls_back_to_the_total_gradient_where_it_knows_little(key):
    p, s = jax.random.normal(key, (2, 4, 1))
    far = leave_one_out_blend(30.0 * p, s - 30.0 * p)
    np.testing.assert_allclose(far.score_coef, 1.0, atol=0.05)


def test_the_blend_is_unbiased(key):
    """Skewed, dependent parts, three groups: the coefficients are from the other groups alone."""

    def one(key):
        e = jax.random.exponential(key, (3, 2)) - 1.0
        path = e**2 + jnp.array([[1.0, -2.0]])
        return leave_one_out_blend(path, e).gradient - jnp.array([2.0, -1.0])

    error = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(key, 100_000)), np.float64)
    assert np.all(np.abs(error.mean(0)) < 5.5 * error.std(0) / np.sqrt(len(error)))
