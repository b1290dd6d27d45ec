"""The blend of path and total gradient that has the least variance, measured as it goes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from stochgrad.core import (
    Position,
    PRNGKey,
    check_callable,
    check_count,
    check_finite,
    check_key,
    describe,
    first_line,
    tree_dot,
)
from stochgrad.gradients._path import freeze

Parts = Callable[[Any, Any], tuple[Array, Array]]
"""``(position, key) -> (path, score)``: one draw's value with the path gradient, and with the
gradient that is to be added for the total one."""

_MEASURED = 8


def optimal_mixing_weights(
    parts: Parts, position: Position, keys: Float[Array, " n"], key: PRNGKey
) -> Float[Array, " n"]:
    r"""How much of the score each draw's gradient should keep, for the least variance.

    Eight draws at most are differentiated along random directions v of signs, forward, which
    costs about two evaluations of each and holds no gradient per draw. Where forward mode is not
    allowed (a differential equation in diffrax, a ``custom_vjp``) their gradients are taken
    backward, at two backward passes each, and projected. What is found there is as in
    ``leave_one_out_coefficients``; other draws get the coefficient of all that were measured. Each
    draw's coefficient is thus independent of the draw, and the estimate unbiased.

    Args:
        parts: ``(position, key) -> (path, score)``, two scalars.
        position: Where; constant for differentiation.
        keys: The draws' keys, n of at least four.
        key: For the directions.

    Raises:
        TypeError: ``parts`` is no function, does not return two numbers, or ``key`` is no key.
        ValueError: there are fewer than four keys, or ``parts`` fails.
    """
    check_callable("parts", parts, "a function (position, key)")
    _check_floating(position)
    check_key(key)
    if not (isinstance(keys, jax.Array) and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"keys must be an array of typed PRNG keys, got {describe(keys)}.")
    if keys.ndim != 1 or len(keys) < 4:
        raise ValueError(f"keys must be at least four in a row, got shape {keys.shape}.")
    count = min(len(keys), _MEASURED)
    path, score = _along_directions(
        parts, freeze(position), keys[:count], key, 1 if count == _MEASURED else 2
    )
    own, pooled = leave_one_out_coefficients(path + score, score)
    rest = jnp.broadcast_to(pooled, (len(keys) - count,))
    return freeze(jnp.concatenate([own, rest]))


def leave_one_out_coefficients(
    total: Float[Array, "n m"], score: Float[Array, "n m"]
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    r"""Coefficients c of least variance of $t - (1 - c)s$, each from the other draws.

    $$\hat d_i = \frac{\sum_{j\ne i}\langle t_j - \bar t, s_j - \bar s\rangle}
      {\sum_{j\ne i}\|s_j - \bar s\|^2}, \qquad
      1 - c_i = \hat d_i \Bigl(1 - \frac{e_i^2}{\hat d_i^2}\Bigr)_+ \text{ within } [0, 1].$$

    $\hat d_i$ minimizes the variance between the other draws; $e_i$ is its standard error, with as
    many degrees of freedom as there are draws left, so that where they say little c is 1, the total
    gradient.

    Args:
        total: Total gradients of n draws, or projections of them on m directions.
        score: Score parts likewise: total gradient minus path gradient.

    Returns:
        The coefficients of the draws, and that of all draws together.

    Raises:
        ValueError: they are not two matrices of one shape, of three rows or more.
    """
    for name, value in (("total", total), ("score", score)):
        if not (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)):
            raise TypeError(f"{name} must be a floating-point array, got {describe(value)}.")
        if value.ndim != 2 or value.shape[0] < 3 or value.shape[1] < 1:
            raise ValueError(f"{name} must have shape (n, m) with n >= 3, got {value.shape}.")
        check_finite(name, value)
    if total.shape != score.shape:
        raise ValueError(f"score must have total's shape {total.shape}, got {score.shape}.")
    total, score = jnp.asarray(total), jnp.asarray(score)
    count = total.shape[0]
    others = jnp.concatenate([1.0 - jnp.eye(count), jnp.ones((1, count))]).astype(total.dtype)
    left = jnp.sum(others, axis=1)

    def between(a, b):
        """Sums of products about the mean of those that are left."""
        gram = a @ b.T
        return others @ jnp.diag(gram) - jnp.sum((others @ gram) * others, axis=1) / left

    noise = between(score, score)
    safe = jnp.where(noise > 0, noise, 1.0)
    d = between(total, score) / safe
    unexplained = jnp.maximum(between(total, total) - d**2 * noise, 0.0)
    error = unexplained / safe / jnp.maximum(left - 1.0, 1.0)
    shrunk = d * jnp.maximum(1.0 - error / jnp.where(d != 0, d**2, 1.0), 0.0)
    c = 1.0 - jnp.clip(jnp.where(noise > 0, shrunk, 1.0), 0.0, 1.0)
    return c[:-1], c[-1]


def directional_derivatives(
    function: Callable[[Position], PyTree], position: Position, key: PRNGKey, count: int
) -> PyTree:
    """Derivatives along random directions of signs, forward: no gradient of a row is ever held.

    Args:
        function: ``position -> arrays`` of shape (n,).
        position: Where.
        key: For the directions, which all rows have in common.
        count: Number of directions, m.

    Returns:
        Arrays of shape (n, m).

    Raises:
        TypeError: ``function`` is no function, or ``position`` no tree of floating-point arrays.
        ValueError: ``function`` fails, or ``count`` is not positive.
    """
    check_callable("function", function, "a function of the position")
    check_key(key)
    count = check_count("count", count)
    _check_floating(position)
    _evaluable("function", function, position)

    def along(key):
        return _derivative(function, position, _signs(key, position))

    return jax.vmap(along, out_axes=1)(jax.random.split(key, count))


def _along_directions(parts, position, keys, key, count: int) -> tuple[Array, Array]:
    """Derivatives of draws' parts along directions: forward, or, where that is not allowed, by
    their gradients, draw by draw.
    """
    shapes = _evaluable("parts", parts, position, keys[0])
    scalars = isinstance(shapes, tuple) and len(shapes) == 2
    if not scalars or any(getattr(x, "shape", None) != () for x in shapes):
        raise TypeError("parts must return two numbers, the path's part and the score's.")
    directions = jax.vmap(lambda key: _signs(key, position))(jax.random.split(key, count))

    def forward(direction):
        function = lambda p: jax.vmap(parts, (None, 0))(p, keys)
        return jax.jvp(function, (position,), (direction,))[1]

    def of_one(key):
        value, pull = jax.vjp(lambda p: parts(p, key), position)
        one, none = (jax.tree.map(make, value[0]) for make in (jnp.ones_like, jnp.zeros_like))
        gradients = pull((one, none))[0], pull((none, one))[0]
        return jax.vmap(lambda v: (tree_dot(gradients[0], v), tree_dot(gradients[1], v)))(
            directions
        )

    try:
        return jax.vmap(forward, out_axes=1)(directions)
    except TypeError:
        return jax.vmap(of_one)(keys)


def _signs(key, position):
    leaves, structure = jax.tree.flatten(position)
    signs = [
        jax.random.rademacher(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, signs)


def _check_floating(position) -> None:
    if not jax.tree.leaves(position):
        raise ValueError("position must hold at least one array, got an empty tree.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(position):
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            where = "position" + jax.tree_util.keystr(path)
            raise TypeError(f"{where} must be a floating-point array, got {describe(leaf)}.")


def _evaluable(name, function, *arguments):
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:
        raise ValueError(f"{name} fails at this position: {first_line(error)}.") from error


def _derivative(function, position, direction):
    """A directional derivative: forward, or, where forward mode is not allowed, backward twice."""
    try:
        return jax.jvp(function, (position,), (direction,))[1]
    except TypeError:
        value, pull = jax.vjp(function, position)
        zeros = jax.tree.map(jnp.zeros_like, value)
        return jax.vjp(lambda u: pull(u)[0], zeros)[1](direction)[0]
