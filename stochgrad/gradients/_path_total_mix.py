"""The mix of path and total gradient that has the least variance, from the draws of a step."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from stochgrad.core import check_finite, describe


def leave_one_out_coefficients(
    total: Float[Array, "n m"], score: Float[Array, "n m"]
) -> Float[Array, " n"]:
    r"""Coefficients c of least variance of $p + cs$, path and score part, each from the others.

    With $p = t - s$ and sums over the draws $j \ne i$, about their means,

    $$\hat c_i = -\frac{\sum\langle p_j, s_j\rangle}{\sum\|s_j\|^2}, \qquad
      e_i^2 = \frac{\sum\|p_j + \hat c_i s_j\|^2}{(n - 2)\sum\|s_j\|^2}, \qquad
      c_i = \hat c_i\Bigl(1 - \frac{9 e_i^2}{\hat c_i^2}\Bigr)_+ \text{ within } [0, 1].$$

    $e_i$ is the standard error of $\hat c_i$, with as many degrees of freedom as there are draws
    left: unless the path's noise is seen, by three of them, to come from the score, c is 0, the
    path gradient. No draw has a say in its own coefficient, which keeps $p_i + c_i s_i$ unbiased.

    The rows need not be gradients in the parameters. Of draws $x = T_\theta(z)$ the gradients in x,
    $t = \nabla\log p(x)$ and $s = \nabla\log q_\theta(x)$, which every step computes, say the
    same of a location and of a scale.

    Args:
        total: Total gradients of n draws, or projections of them on m directions.
        score: Score parts likewise: total gradient minus path gradient.

    Raises:
        ValueError: they are not two matrices of one shape, of three rows or more.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from stochgrad.gradients import leave_one_out_coefficients
        >>> score = jax.random.normal(jax.random.key(0), (4, 3))
        >>> path = 2.0 - 0.3 * score  # three tenths of the score are the path's noise
        >>> leave_one_out_coefficients(path + score, score).round(3)
        Array([0.3, 0.3, 0.3, 0.3], dtype=float32)
    """
    for name, value in (("total", total), ("score", score)):
        if not (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)):
            raise TypeError(f"{name} must be a floating-point array, got {describe(value)}.")
        if value.ndim != 2 or value.shape[0] < 3 or value.shape[1] < 1:
            raise ValueError(f"{name} must have shape (n, m) with n >= 3, got {value.shape}.")
        check_finite(name, value)
    if total.shape != score.shape:
        raise ValueError(f"score must have total's shape {total.shape}, got {score.shape}.")
    count = len(total)
    both = jnp.stack([jnp.asarray(total) - score, jnp.asarray(score)])
    path, score = both - jnp.mean(both, axis=1, keepdims=True)
    products = jnp.sum(jnp.stack([path * path, path * score, score * score]), axis=2)
    sums = jnp.sum(products, axis=1, keepdims=True)
    # for each row, the sums of the other rows' products about the other rows' means
    power, common, noise = sums - count / (count - 1) * products
    safe = jnp.where(noise > 0, noise, 1.0)
    c = -common / safe
    unexplained = jnp.maximum(power - c**2 * noise, 0.0)
    error = unexplained / safe / (count - 2)
    shrunk = c * jnp.maximum(1.0 - 9.0 * error / jnp.where(c != 0, c**2, 1.0), 0.0)
    return jnp.where(noise > 0, jnp.clip(shrunk, 0.0, 1.0), 0.0)
