"""Score-function gradients: for what cannot be reparameterised."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Baseline = Literal["none", "leave_one_out", "optimal"]


def leave_one_out(rewards: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    r"""The mean of the other rewards, $b_i = \frac{1}{n-1}\sum_{j\ne i} f_j$, along the first axis.

    Args:
        rewards: Two or more.

    Example:
        >>> import jax.numpy as jnp
        >>> from stochgrad.gradients import leave_one_out
        >>> leave_one_out(jnp.array([1.0, 2.0, 6.0]))
        Array([4. , 3.5, 1.5], dtype=float32)
    """
    count = rewards.shape[0]
    return (jnp.sum(rewards, axis=0, keepdims=True) - rewards) / (count - 1)


def score_function(
    rewards: Float[Array, " n"], scores: PyTree, baseline: Baseline = "leave_one_out"
) -> PyTree:
    r"""The score-function estimate of $\nabla_\theta\,\mathbb E_{q_\theta}[f]$.

    $$\hat g = \frac1n\sum_i (f_i - b_i)\,\nabla_\theta\log q_\theta(x_i).$$

    ``"leave_one_out"`` takes for $b_i$ the mean of the other rewards; ``"optimal"``, coordinate by
    coordinate, the value that minimises the variance,
    $b_i = \sum_{j\ne i} f_j s_j^2 / \sum_{j\ne i} s_j^2$ with $s_j = \partial\log q_\theta(x_j)$,
    from the other draws as well. Both are unbiased [Ranganath et al. 2014; Kool et al. 2019].

    Args:
        rewards: $f_i$, constant.
        scores: $\nabla_\theta\log q_\theta(x_i)$, leaves of shape (n, ...).
        baseline: As above, or ``"none"``.

    Raises:
        ValueError: the baseline is unknown, or there are fewer than two draws for one.

    Example:
        >>> import jax.numpy as jnp
        >>> from stochgrad.gradients import score_function
        >>> score_function(jnp.array([5.0, 5.0]), jnp.array([0.3, -0.1]))
        Array(0., dtype=float32)
    """
    if baseline not in ("none", "leave_one_out", "optimal"):
        raise ValueError(
            f"baseline must be 'none', 'leave_one_out' or 'optimal', got {baseline!r}."
        )
    count = rewards.shape[0]
    if baseline != "none" and count < 2:
        raise ValueError(f"baseline={baseline!r} needs at least two draws, got {count}.")

    def estimate(s):
        f = rewards.reshape(count, *[1] * (s.ndim - 1)).astype(s.dtype)
        if baseline == "leave_one_out":
            f = f - leave_one_out(f)
        elif baseline == "optimal":
            f = jnp.broadcast_to(f, s.shape)
            over, under = leave_one_out(f * s**2), leave_one_out(s**2)
            f = f - jnp.where(under > 0, over / jnp.where(under > 0, under, 1.0), leave_one_out(f))
        return jnp.mean(f * s, axis=0)

    return jax.tree.map(estimate, scores)
