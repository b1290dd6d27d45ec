"""What the law of a chain rests on, measured around a center: derivatives and gradient noise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from stochgrad.core import (
    Gradient,
    Position,
    PRNGKey,
    first_line,
    full_data_mean_traceable,
    hoisted_jit,
    resident_block,
)

_DRAWS = 256  # of a gradient that knows no data
_MOST_ROWS = 50_000
_AT_ONCE = 8
_POINTS, _BATCHES = 64, 16


def check_fits(gradient: Gradient, center: Position) -> None:
    """Raise unless the gradient can be taken at the center."""

    def score_at(key, position):
        score, _ = gradient.next(key, position, gradient.init(key, position))
        return score(position)[1]

    shapes = jax.tree.map(jnp.shape, center)
    try:
        with resident_block(gradient.posterior):
            out = jax.eval_shape(score_at, jax.random.key(0), center)
    except Exception as error:
        raise ValueError(
            f"center, of shapes {shapes}, is no position of the target: {first_line(error)}."
        ) from error
    if jax.tree.map(jnp.shape, out) != shapes:
        raise ValueError(f"center, of shapes {shapes}, is no position of the target.")


def hessian_times(
    gradient: Gradient, key: PRNGKey, center: Position, directions: np.ndarray
) -> np.ndarray:
    """Minus the Hessian of the log density, times each row of ``directions``."""

    def run(key, center, directions):
        score, unravel = _mean_score(gradient, key, center), ravel_pytree(center)[1]

        def bend(v):
            return -ravel_pytree(jax.jvp(score, (center,), (unravel(v),))[1])[0]

        return lax.map(bend, directions, batch_size=_AT_ONCE)

    return _evaluate(gradient, run, key, center, directions)


def third_derivative_along(
    gradient: Gradient, key: PRNGKey, center: Position, directions: np.ndarray, signs: np.ndarray
) -> np.ndarray:
    r"""$\sum_k s_k \nabla (v_k^\top \nabla^2\log\pi\, v_k)$, shape (d,)."""

    def run(key, center, directions, signs):
        score, unravel = _mean_score(gradient, key, center), ravel_pytree(center)[1]

        def bend(both):
            v, sign = unravel(both[0]), both[1]

            def along(x):
                return jax.jvp(score, (x,), (v,))[1]

            return sign * ravel_pytree(jax.jvp(along, (center,), (v,))[1])[0]

        return jnp.sum(lax.map(bend, (directions, signs), batch_size=_AT_ONCE), axis=0)

    return _evaluate(gradient, run, key, center, directions, signs)


def gradient_residuals(
    gradient: Gradient, key: PRNGKey, center: Position, root: np.ndarray
) -> np.ndarray:
    r"""Deviations of gradient estimates from their mean, averaged over where draws will be.

    Rows R with $R^\top R = V$, the covariance of the estimates, at up to 64 points
    $c \pm \sqrt d\,L e$ (orthonormal e), over which any quadratic function has its mean under
    $\mathcal N(c, LL^\top)$ if there are at least 2d. An estimate with a memory (SVRG, SAGA)
    remembers another draw.

    Args:
        gradient: The estimate.
        key: A typed PRNG key.
        center: c.
        root: L, shape (d, d), or (d,) for a diagonal.
    """
    flat = ravel_pytree(center)[0]
    size = flat.size
    batches = gradient.posterior.batches if gradient.posterior is not None else None
    count, share = _BATCHES, 0.0
    if batches is not None and batches.balanced:  # drawn without replacement
        count, share = max(min(_BATCHES, batches.epoch), 2), 1 / batches.epoch
    keys = jax.random.split(key, 3)
    offsets, past = (_offsets(np.asarray(jax.random.key_data(k)), root, size) for k in keys[:2])

    def run(key, center, offsets, past):
        flat, unravel = ravel_pytree(center)

        def at_a_point(inputs):
            key, offset, past_offset = inputs
            keys = jax.random.split(key, 2)
            at, past = unravel(flat + offset), unravel(flat + past_offset)
            state = gradient.init(keys[0], past)

            def one(state, key):
                score, state = gradient.next(key, past, state)
                return state, ravel_pytree(score(at)[1])[0]

            _, g = lax.scan(one, state, jax.random.split(keys[1], count))
            return g - jnp.mean(g, axis=0, keepdims=True)

        inputs = (jax.random.split(key, len(offsets)), offsets, past)
        return lax.map(at_a_point, inputs)

    found = _evaluate(gradient, run, keys[2], center, offsets, past)
    scale = (1 - share) / ((count - 1) * len(found))
    return np.sqrt(scale) * found.reshape(-1, size)


def _offsets(seed: np.ndarray, root: np.ndarray, size: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if size > _POINTS // 2:
        columns = rng.standard_normal((size, _POINTS // 2))
        frames = [np.linalg.qr(columns)[0]]
    else:
        repeats = -(-_POINTS // (2 * size))
        frames = [np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(repeats)]
    e = np.sqrt(size) * np.concatenate([sign * q.T for q in frames for sign in (1, -1)])
    return e @ root.T if root.ndim == 2 else e * root


def _mean_score(gradient: Gradient, key: PRNGKey, center: Position) -> Callable[[Position], Any]:
    """The score on all data, or on a random 50,000 rows; without data, a mean of estimates."""
    posterior = gradient.posterior
    if posterior is not None:
        batches, one = posterior.batches, jax.grad(posterior.log_density)
        few = batches.blocks
        if few is None or batches.size <= _MOST_ROWS:
            return full_data_mean_traceable(posterior, one)
        blocks = np.arange(min(-(-_MOST_ROWS // batches.batch_size), few.count))

        def of_some_rows(position):
            def add(total, block):
                return jax.tree.map(jnp.add, total, one(position, few.at(block))), None

            zeros = jax.tree.map(jnp.zeros_like, position)
            total, _ = lax.scan(add, zeros, jnp.asarray(blocks, jnp.int32))
            return jax.tree.map(lambda x: x / len(blocks), total)

        return of_some_rows

    def score(position):
        def add(carry, key):
            state, total = carry
            estimate, state = gradient.next(key, center, state)
            return (state, jax.tree.map(jnp.add, total, estimate(position)[1])), None

        start = gradient.init(key, center), jax.tree.map(jnp.zeros_like, position)
        (_, total), _ = lax.scan(add, start, jax.random.split(key, _DRAWS))
        return jax.tree.map(lambda x: x / _DRAWS, total)

    return score


def _evaluate(gradient: Gradient, run: Callable, key, center: Position, *arrays: Any) -> np.ndarray:
    dtype = ravel_pytree(center)[0].dtype
    with resident_block(gradient.posterior):
        found = hoisted_jit(run)(key, center, *(jnp.asarray(x, dtype) for x in arrays))
    return np.asarray(found, np.float64)
