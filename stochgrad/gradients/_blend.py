"""Two unbiased estimates put together with the coefficient of least variance."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar


class Blend(NamedTuple):
    r"""Estimates of a gradient and how they vary.

    Attributes:
        gradient: The blended estimate.
        score_coef: The coefficient used, mean over groups.
        path_variance: Variance of a group's path gradient, summed over coordinates.
        total_variance: The same of the total gradient.
        blend_variance: The same of the blended gradient.
    """

    gradient: PyTree
    score_coef: Scalar
    path_variance: Scalar
    total_variance: Scalar
    blend_variance: Scalar


def leave_one_out_blend(path: PyTree, score: PyTree) -> Blend:
    r"""Path and score part of a gradient, blended with a measured coefficient.

    With total gradients $t_i = p_i + s_i$ of G groups the estimate is

    $$\hat g = \frac1G\sum_i \bigl(t_i - d_i s_i\bigr), \qquad
      \hat d_i = \frac{\sum_{j\ne i}\langle t_j - \bar t, s_j - \bar s\rangle}
      {\sum_{j\ne i}\|s_j - \bar s\|^2}, \qquad
      d_i = \hat d_i \Bigl(1 - \frac{e_i^2}{\hat d_i^2}\Bigr)_+ \text{ within } [0, 1].$$

    $\hat d_i$ minimises the variance between the other groups; $e_i$ is its standard error, with as
    many degrees of freedom as there are groups left, so that where the groups say little the
    estimate is the total gradient. $d_i$ is independent of group i, and the score part has mean
    zero: the estimate stays unbiased.

    Args:
        path: Path gradients of G groups, leaves of shape (G, ...), at least three.
        score: Score parts: total gradients minus path gradients.
    """
    p, s = _rows(path), _rows(score)
    t = p + s
    count = p.shape[0]
    others = 1.0 - jnp.eye(count, dtype=p.dtype)

    def between(a, b):
        """Sums of products about the mean of the others, group by group."""
        gram = a @ b.T
        return others @ jnp.diag(gram) - jnp.sum((others @ gram) * others, axis=1) / (count - 1)

    noise = between(s, s)
    safe = jnp.where(noise > 0, noise, 1.0)
    d = between(t, s) / safe
    left = between(t, t) - d**2 * noise
    error = jnp.maximum(left, 0.0) / safe / max(count - 2, 1)
    shrunk = d * jnp.maximum(1.0 - error / jnp.where(d != 0, d**2, 1.0), 0.0)
    c = 1.0 - jnp.clip(jnp.where(noise > 0, shrunk, 1.0), 0.0, 1.0)

    def put(p, s):
        return jnp.mean(p + c.astype(p.dtype).reshape(-1, *[1] * (p.ndim - 1)) * s, axis=0)

    def spread(rows):
        return jnp.sum(jnp.var(rows, axis=0, ddof=1))

    return Blend(
        jax.tree.map(put, path, score),
        jnp.mean(c),
        spread(p),
        spread(t),
        spread(p + c[:, None] * s),
    )


def _rows(tree: Any) -> Float[Array, "groups size"]:
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
