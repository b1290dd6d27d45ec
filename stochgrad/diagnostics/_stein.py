"""How far draws are from a density that is known only by its score."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad._deprecations import key_first
from stochgrad.core import (
    PRNGKey,
    Target,
    check_choice,
    check_key,
    full_data_mean_traceable,
    hoisted_jit,
    resident_block,
)
from stochgrad.diagnostics._inputs import check_fit, flattened, gradient_of, positions_of

_BLOCK = 512


@key_first
def ksd(key: PRNGKey, draws: Any, target: Target, *, scores: str = "minibatch") -> float:
    r"""Kernel Stein discrepancy between draws and a posterior, by the inverse multiquadric.

    $$\mathrm{KSD}^2 = \frac{1}{n(n-1)}\sum_{i \ne j} k_\pi(x_i, x_j), \qquad
      k_\pi(x, y) = s_x^\top s_y k + s_x^\top\nabla_y k + s_y^\top\nabla_x k
        + \nabla_x\!\cdot\!\nabla_y k,$$

    with $k(x, y) = (1 + |x - y|^2)^{-1/2}$ and the score s (Gorham & Mackey, ICML 2017), in
    coordinates scaled by the draws' standard deviations. It vanishes for draws of the posterior,
    and only for those. Leaving out $i = j$ keeps the estimate unbiased when the scores are noisy;
    it may then come out below zero, and the result is $\pm\sqrt{|\mathrm{KSD}^2|}$. Time is
    quadratic in the number of draws, memory is not: thin to a few thousand.

    Args:
        key: A typed PRNG key, for the minibatches.
        draws: ``stochgrad.Draws``, or an ArviZ object.
        target: The posterior that the draws should follow, or a gradient.
        scores: ``"minibatch"``, a fresh minibatch gradient at each draw, or ``"full"``.

    Raises:
        ValueError: there are fewer than two draws, some are not finite, ``scores`` is unknown, or
            full scores are asked of a gradient without a posterior.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> from stochgrad.diagnostics import ksd
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(9), batch_size=3
        ... )
        >>> kernel = stochgrad.sghmc(target, 0.05, 5.0)
        >>> draws = stochgrad.sample(
        ...     jax.random.key(0), kernel, init=jnp.float32(0.9), num_samples=500, thin=20
        ... )
        >>> ksd(jax.random.key(1), draws, target) < 0.1
        True
    """
    check_key(key)
    scores = check_choice("scores", scores, ("minibatch", "full"))
    gradient = gradient_of(target)
    positions = positions_of(draws, gradient.posterior)
    check_fit(gradient, positions)
    full_score = None
    if scores == "full":
        posterior = gradient.posterior
        if posterior is None:
            raise ValueError("scores='full' need a posterior: this gradient has none.")
        if posterior.batches.stream is not None:
            raise ValueError(
                "scores='full' need data in memory: take minibatch scores of a stream."
            )
        full_score = full_data_mean_traceable(posterior, jax.grad(posterior.log_density))
    flat = flattened(positions)
    if len(flat) < 2:
        raise ValueError(f"draws: ksd needs two draws or more, got {len(flat)}.")

    def score_at(x):
        key, position = x
        if full_score is not None:
            return full_score(position)
        state_key, next_key = jax.random.split(key)
        score, _ = gradient.next(next_key, position, gradient.init(state_key, position))
        return score(position)[1]

    merged = jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, *x.shape[2:])), positions)
    keys = jax.random.split(key, len(flat))
    with resident_block(gradient.posterior):
        found = hoisted_jit(lambda *x: jax.lax.map(score_at, x, batch_size=16))(keys, merged)
    bad = ~np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)]))
    if bad.any():
        raise ValueError("target has scores that are not finite at the draws.")
    s = flattened(jax.tree.map(lambda x: np.asarray(x)[None], found))
    scale = np.maximum(flat.std(axis=0), np.finfo(flat.dtype).tiny)
    squared = float(_mean_off_diagonal(jnp.asarray(flat / scale), jnp.asarray(s * scale)))
    return float(np.sign(squared) * np.sqrt(np.abs(squared)))


@jax.jit
def _mean_off_diagonal(x, s):
    n, d = x.shape
    number = jnp.arange(n)

    def row(one):
        i, xi, si = one
        r = xi[None] - x
        u = 1 + jnp.sum(r**2, axis=1)
        root = jax.lax.rsqrt(u)
        cube = root / u
        kernel = (s @ si) * root - cube * jnp.sum((s - si[None]) * r, axis=1)
        kernel = kernel + d * cube - 3 * (u - 1) * cube / u
        return jnp.sum(jnp.where(number == i, 0, kernel)) / (n - 1)

    return jnp.mean(jax.lax.map(row, (number, x, s), batch_size=_BLOCK))
