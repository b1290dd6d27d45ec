"""Moments of the draws, for models whose draws do not fit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, PyTree

from stochgrad.core import Online, Position, PRNGKey, check_count, check_flag


class Moments(NamedTuple):
    r"""Mean and spread of the draws so far.

    Attributes:
        count: Number of draws, n.
        mean: Their mean.
        scatter: $\sum_i (\theta_i - \bar\theta)^2$, leaf by leaf; of a full covariance the matrix
            $\sum_i (\theta_i - \bar\theta)(\theta_i - \bar\theta)^\top$ over the raveled position.
    """

    count: Int[Array, ""]
    mean: Position
    scatter: PyTree

    @property
    def variance(self) -> PyTree:
        """Sample variances (or the sample covariance), NaN before the second draw."""

        def divide(x):
            count = self.count.reshape(self.count.shape + (1,) * (x.ndim - self.count.ndim))
            return jnp.where(count > 1, x / jnp.maximum(count - 1, 1).astype(x.dtype), jnp.nan)

        return jax.tree.map(lambda x: divide(jnp.asarray(x)), self.scatter)


def moments(*, full: bool = False) -> Online:
    r"""Mean and variance of the draws as they come (Welford, Technometrics 1962).

    $$\bar\theta_n = \bar\theta_{n-1} + \frac{\delta}{n}, \qquad
      S_n = S_{n-1} + \delta\,(\theta_n - \bar\theta_n), \qquad
      \delta = \theta_n - \bar\theta_{n-1}.$$

    For ``collect`` of ``stochgrad.sample``; what it learnt of each chain is then in
    ``Draws.summary``, as ``Moments``.

    Args:
        full: Whether to keep the full covariance of the raveled position.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(9), order="full"
        ... )
        >>> draws = stochgrad.sample(
        ...     jax.random.key(0),
        ...     stochgrad.sghmc(target, step_size=0.2, friction=5.0, integrator="BAOAB"),
        ...     init=jnp.float32(1.0), num_samples=20_000, collect=stochgrad.moments(),
        ... )
        >>> round(float(draws.summary.mean), 1), round(float(draws.summary.variance), 2)
        (0.9, 0.1)
    """
    full = check_flag("full", full)

    def init(position: Position) -> Moments:
        zeros = jax.tree.map(jnp.zeros_like, position)
        flat = ravel_pytree(position)[0]
        scatter = jnp.zeros((flat.size, flat.size), flat.dtype) if full else zeros
        return Moments(jnp.zeros((), jnp.int32), zeros, scatter)

    def update(summary: Moments, position: Position) -> Moments:
        count = summary.count + 1
        delta = jax.tree.map(jnp.subtract, position, summary.mean)
        mean = jax.tree.map(lambda m, d: m + d / count.astype(d.dtype), summary.mean, delta)
        after = jax.tree.map(jnp.subtract, position, mean)
        if full:
            outer = jnp.outer(ravel_pytree(delta)[0], ravel_pytree(after)[0])
            return Moments(count, mean, summary.scatter + outer)
        scatter = jax.tree.map(lambda s, d, a: s + d * a, summary.scatter, delta, after)
        return Moments(count, mean, scatter)

    return Online(init, update)


class SWAG(NamedTuple):
    r"""A Gaussian fitted to the draws so far.

    Attributes:
        moments: Their mean and variances.
        deviations: The last K deviations $\theta_i - \bar\theta_i$ from the mean of their time,
            newest last; leaves of shape (K, ...).
    """

    moments: Moments
    deviations: PyTree

    def sample(self, key: PRNGKey) -> Position:
        r"""A draw from $\mathcal N(\bar\theta, \tfrac12\Sigma_{diag} + \tfrac12\Sigma_{low})$.

        $$\theta = \bar\theta + \tfrac{1}{\sqrt2}\,\Sigma_{diag}^{1/2} z_1
          + \frac{1}{\sqrt{2(K-1)}}\, D z_2.$$
        """
        mean, unravel = ravel_pytree(self.moments.mean)
        sd = jnp.sqrt(ravel_pytree(self.moments.variance)[0])
        deviations = jax.vmap(lambda d: ravel_pytree(d)[0])(self.deviations)
        rank = deviations.shape[0]
        keys = jax.random.split(key)
        own = jax.random.normal(keys[0], mean.shape, mean.dtype)
        common = jax.random.normal(keys[1], (rank,), mean.dtype)
        low = common @ deviations / jnp.sqrt(jnp.asarray(rank - 1, mean.dtype))
        return unravel(mean + (sd * own + low) / jnp.sqrt(jnp.asarray(2, mean.dtype)))


def swag(rank: int = 20) -> Online:
    """SWAG: mean, variances and last deviations of the draws (Maddox et al., NeurIPS 2019).

    For ``collect`` of ``stochgrad.sample``, with any kernel; ``stochgrad.ascend`` with a constant
    learning rate gives the method of the paper. ``Draws.summary`` then holds a ``SWAG`` (with a
    leading chain axis if there are several chains: ``jax.tree.map(lambda x: x[0], summary)`` is one
    chain's), whose ``sample(key)`` draws from the Gaussian.

    Args:
        rank: K, the number of deviations kept, 2 at least.

    Raises:
        ValueError: ``rank`` is not an integer of at least 2.

    Example:
        >>> import stochgrad
        >>> online = stochgrad.swag(rank=5)
    """
    rank = check_count("rank", rank, least=2)
    spread = moments()

    def init(position: Position) -> SWAG:
        blank = jax.tree.map(lambda x: jnp.zeros((rank, *x.shape), x.dtype), position)
        return SWAG(spread.init(position), blank)

    def update(summary: SWAG, position: Position) -> SWAG:
        following: Any = spread.update(summary.moments, position)

        def push(kept, x, mean):
            return jnp.concatenate([kept[1:], (x - mean)[None]])

        deviations = jax.tree.map(push, summary.deviations, position, following.mean)
        return SWAG(following, deviations)

    return Online(init, update)
