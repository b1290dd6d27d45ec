"""A mass of low rank plus diagonal is the dense matrix that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import Precision

RNG = np.random.default_rng(0)


def of_rank(d, k):
    basis = np.linalg.qr(RNG.standard_normal((d, d)))[0][:, :k]
    return Precision(RNG.uniform(0.5, 2, d), basis, RNG.uniform(0.2, 9, k))


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_its_maps_are_those_of_the_covariance(rank):
    precision = of_rank(5, rank)
    s, q, v = np.diag(precision.scale), precision.basis, precision.values
    covariance = s @ (np.eye(5) + q @ np.diag(v - 1) @ q.T) @ s
    np.testing.assert_allclose(precision.covariance, covariance, rtol=1e-12)
    np.testing.assert_allclose((3.0 * precision).covariance, covariance / 3, rtol=1e-12)
    np.testing.assert_allclose(precision.variances, np.diag(covariance), rtol=1e-12)
    np.testing.assert_allclose(
        precision.log_determinant, np.linalg.slogdet(covariance)[1], rtol=1e-10
    )
    x, y = RNG.standard_normal((2, 7, 5))
    np.testing.assert_allclose(precision.whiten(precision.color(x)), x, atol=1e-12)
    np.testing.assert_allclose(precision.whiten_dual(precision.color_dual(x)), x, atol=1e-12)
    np.testing.assert_allclose(
        np.sum(precision.color(x) * y, 1), np.sum(x * precision.color_dual(y), 1), rtol=1e-10
    )
    white = precision.whiten(np.eye(5)).T
    np.testing.assert_allclose(white @ covariance @ white.T, np.eye(5), atol=1e-10)


def test_more_columns_change_nothing_but_the_rank():
    wide = np.linalg.qr(RNG.standard_normal((300, 3)))[0]
    large = Precision(np.ones(300), wide, np.array([2.0, 3.0, 4.0]))
    for precision, rank in ((of_rank(5, 0), 5), (of_rank(5, 3), 5), (large, 4)):
        padded = precision.padded()
        assert padded.values.shape == (rank,)
        np.testing.assert_allclose(padded.covariance, precision.covariance, rtol=1e-12)
        np.testing.assert_allclose(padded.log_determinant, precision.log_determinant, rtol=1e-12)


def test_a_kernel_with_it_is_the_one_with_the_dense_matrix():
    """The laws are equal: one step from one state has the same mean and covariance."""
    wide = of_rank(3, 3)
    precision = Precision(0.2 * wide.scale, wide.basis, wide.values)
    dense = np.linalg.inv(precision.covariance)
    data = jnp.asarray(RNG.standard_normal((20, 3)), jnp.float32)
    target = stochgrad.posterior(
        lambda q: -0.5 * jnp.sum(q**2),
        lambda q, x: -0.5 * jnp.sum((x - q[None]) ** 2, axis=1),
        data,
        order="full",
    )
    ends = []
    for mass, friction in ((precision, 2.0 * precision), (dense, 2.0 * dense)):
        kernel = stochgrad.sghmc(target, 0.2, friction, mass=mass, integrator="BAOAB")
        draws = stochgrad.sample(
            jax.random.key(0), kernel, init=jnp.zeros(3), num_samples=8000, num_chains=4, thin=2
        )
        flat = draws.positions.reshape(-1, 3)
        ends.append((flat.mean(0), np.cov(flat, rowvar=False)))
    np.testing.assert_allclose(ends[0][0], ends[1][0], atol=0.02)  # sd 0.22, some 5,000 effective
    np.testing.assert_allclose(ends[0][1], ends[1][1], atol=0.006)


def test_what_does_not_fit_is_refused():
    precision = of_rank(3, 1)
    target = stochgrad.posterior(
        lambda q: 0.0, lambda q, x: -0.5 * jnp.sum(q**2) + 0 * x, jnp.ones(4), order="full"
    )
    with pytest.raises(ValueError, match="friction must be a multiple of the mass"):
        stochgrad.sghmc(target, 0.1, 2.0, mass=precision).init(jnp.zeros(3), jax.random.key(0))
    with pytest.raises(ValueError, match="position's size, 2"):
        stochgrad.sghmc(target, 0.1, precision, mass=precision).init(
            jnp.zeros(2), jax.random.key(0)
        )
    with pytest.raises(ValueError, match="mass must be a Precision"):
        stochgrad.sghmc(target, 0.1, precision).init(jnp.zeros(3), jax.random.key(0))
    for scale, basis, values, word in (
        ([1.0, -1.0], np.zeros((2, 0)), [], "scale"),
        ([1.0, 1.0], np.zeros((3, 0)), [], "basis"),
        ([1.0, np.nan], np.zeros((2, 0)), [], "scale"),
        ([1.0, 1.0], np.ones((2, 1)), [0.0], "values"),
    ):
        with pytest.raises(ValueError, match=word):
            Precision(np.array(scale), basis, np.array(values, float))
