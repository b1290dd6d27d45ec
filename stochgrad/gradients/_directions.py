"""Derivatives along random directions, forward: no gradient of a row is ever held."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Position,
    PRNGKey,
    check_callable,
    check_count,
    check_key,
    describe,
    first_line,
)


@key_first
def directional_derivatives(
    key: PRNGKey, function: Callable[[Position], PyTree], position: Position, count: int
) -> PyTree:
    """Derivatives along random directions of signs, forward: no gradient of a row is ever held.

    Args:
        key: For the directions, which all rows have in common.
        function: ``position -> arrays`` of shape (n,).
        position: Where.
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
