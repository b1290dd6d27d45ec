"""Score-function gradients: for what cannot be reparameterized."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from stochgrad.core import as_data, check_choice, check_finite, describe

Baseline = Literal["none", "leave_one_out", "optimal"]


def leave_one_out(rewards: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    r"""The mean of the other rewards, $b_i = \frac{1}{n-1}\sum_{j\ne i} f_j$, along the first axis.

    Args:
        rewards: Two or more.

    Raises:
        TypeError: they are no array of numbers.
        ValueError: there are fewer than two, or they are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from stochgrad.gradients import leave_one_out
        >>> leave_one_out(jnp.array([1.0, 2.0, 6.0]))
        Array([4. , 3.5, 1.5], dtype=float32)
    """
    rewards = _rows("rewards", rewards)
    count = rewards.shape[0]
    if count < 2:
        raise ValueError(f"rewards must be at least two draws', got {count}.")
    return _others(rewards)


def _others(rewards):
    count = rewards.shape[0]
    return (jnp.sum(rewards, axis=0, keepdims=True) - rewards) / (count - 1)


def score_function(
    rewards: Float[Array, " n"], scores: PyTree, baseline: Baseline = "leave_one_out"
) -> PyTree:
    r"""The score-function estimate of $\nabla_\theta\,\mathbb E_{q_\theta}[f]$.

    $$\hat g = \frac1n\sum_i (f_i - b_i)\,\nabla_\theta\log q_\theta(x_i).$$

    ``"leave_one_out"`` takes for $b_i$ the mean of the other rewards; ``"optimal"``, coordinate by
    coordinate, the value that minimizes the variance,
    $b_i = \sum_{j\ne i} f_j s_j^2 / \sum_{j\ne i} s_j^2$ with $s_j = \partial\log q_\theta(x_j)$,
    from the other draws as well. Both are unbiased [Ranganath et al. 2014; Kool et al. 2019].

    Args:
        rewards: $f_i$, constant.
        scores: $\nabla_\theta\log q_\theta(x_i)$, leaves of shape (n, ...).
        baseline: As above, or ``"none"``.

    Raises:
        TypeError: rewards or scores are no arrays of numbers.
        ValueError: the baseline is unknown, or there are fewer than two draws for one; there are
            not as many scores as rewards, or they are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from stochgrad.gradients import score_function
        >>> score_function(jnp.array([5.0, 5.0]), jnp.array([0.3, -0.1]))
        Array(0., dtype=float32)
    """
    check_choice("baseline", baseline, ("none", "leave_one_out", "optimal"))
    rewards = _rows("rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(f"rewards must have shape (n,), got {rewards.shape}.")
    scores = jax.tree_util.tree_map_with_path(
        lambda path, x: _rows("scores" + jax.tree_util.keystr(path), x), scores
    )
    if not jax.tree.leaves(scores):
        raise ValueError("scores must hold at least one array, got an empty tree.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(scores):
        if leaf.shape[0] != rewards.shape[0]:
            raise ValueError(
                f"scores{jax.tree_util.keystr(path)} must have one row for each of the "
                f"{rewards.shape[0]} rewards, got shape {leaf.shape}."
            )
    count = rewards.shape[0]
    if baseline != "none" and count < 2:
        raise ValueError(f"baseline={baseline!r} needs at least two draws, got {count}.")

    def estimate(s):
        f = rewards.reshape(count, *[1] * (s.ndim - 1)).astype(s.dtype)
        if baseline == "leave_one_out":
            f = f - _others(f)
        elif baseline == "optimal":
            f = jnp.broadcast_to(f, s.shape)
            over, under = _others(f * s**2), _others(s**2)
            f = f - jnp.where(under > 0, over / jnp.where(under > 0, under, 1.0), _others(f))
        return jnp.mean(f * s, axis=0)

    return jax.tree.map(estimate, scores)


def _rows(name: str, value: Any) -> Array:
    """The value as floating-point rows; what is traced cannot be looked at."""
    if not isinstance(value, Tracer):
        value = as_data(value, name)
        if not hasattr(value, "dtype"):
            raise TypeError(f"{name} must be one array, got {describe(value)}.")
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(float)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be an array of numbers, got dtype {array.dtype}.")
    if array.ndim == 0:
        raise ValueError(f"{name} must have an axis of draws, got a scalar.")
    check_finite(name, array)
    return array
