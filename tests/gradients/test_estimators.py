"""Score-function estimates against enumeration, and blends of two estimates."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad.gradients import leave_one_out_coefficients, score_function

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
    own = leave_one_out_coefficients(-0.3 * s + s + 2.0, s)
    np.testing.assert_allclose(own, 0.3, atol=1e-4)


def test_each_coefficient_is_the_other_rows_regression(key):
    """Row by row with numpy, by the formula."""
    path, score = np.asarray(jax.random.normal(key, (2, 6, 3)), np.float64)
    path = 0.3 * path - 0.7 * score
    wanted = []
    for i in range(6):
        p, s = (np.delete(a, i, 0) for a in (path, score))
        p, s = p - p.mean(0), s - s.mean(0)
        c = -np.sum(p * s) / np.sum(s**2)
        error = np.sum((p + c * s) ** 2) / np.sum(s**2) / 4
        wanted.append(np.clip(c * max(0.0, 1 - 9 * error / c**2), 0, 1))
    with jax.enable_x64(True):
        found = leave_one_out_coefficients(jnp.asarray(path + score), jnp.asarray(score))
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert 0 < min(wanted) < max(wanted) < 1


def test_where_the_score_explains_nothing_it_is_the_path(key):
    path, score = jax.random.normal(key, (2, 8, 20))
    np.testing.assert_array_equal(leave_one_out_coefficients(path + score, score), 0.0)


@pytest.mark.parametrize("count", [4, 20])
def test_mixed_estimates_are_unbiased(count, key):
    """Skewed, dependent parts: would catch a coefficient that looks at its own draw."""

    def one(key):
        e = jax.random.exponential(key, (count, 1)) - 1.0
        path, score = e**2 - 1.5 * e, e
        c = leave_one_out_coefficients(path + score, score)[:, None]
        return jnp.mean(path + c * score) - 1.0, jnp.std(c)

    error, spread = jax.jit(jax.vmap(one))(jax.random.split(key, 100_000))
    error = np.asarray(error, np.float64)
    assert abs(error.mean()) < 5.5 * error.std() / np.sqrt(len(error))
    assert np.mean(spread) > 0.01
