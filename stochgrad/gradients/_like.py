"""Checks of positions against each other, and of what a gradient returns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from stochgrad.core import describe, first_line


def check_like(name: str, tree: PyTree, like: PyTree, whose: str = "the model's position") -> None:
    """Raise, naming the leaf, unless a tree has the structure and the shapes of another."""
    leaves, wanted = _by_path(tree), _by_path(like)
    if set(leaves) != set(wanted) or jax.tree.structure(tree) != jax.tree.structure(like):
        parts = [("lacks", set(wanted) - set(leaves)), ("has", set(leaves) - set(wanted))]
        told = [
            f"it {verb} {', '.join(map(_named, sorted(paths)))}" for verb, paths in parts if paths
        ]
        raise ValueError(
            f"{name} must have the structure of {whose}: "
            + ("; ".join(told) or f"{jax.tree.structure(like)}, not {jax.tree.structure(tree)}")
            + "."
        )
    for path, leaf in leaves.items():
        if jnp.shape(leaf) != jnp.shape(wanted[path]):
            raise ValueError(
                f"{name}{path} must have the shape {jnp.shape(wanted[path])} of {whose}, got "
                f"{jnp.shape(leaf)}."
            )


def evaluated(name: str, score: Callable[[PyTree], Any], position: PyTree) -> tuple[Any, PyTree]:
    """Value and gradient that a gradient's score gives at a position, if they are such."""
    if not callable(score):
        raise TypeError(
            f"{name}.next must return (score, state) with a function score(position), got "
            f"{describe(score)} for the score."
        )
    try:
        pair = score(position)
    except Exception as error:
        raise ValueError(
            f"{name} fails on a position of shape {jax.tree.map(jnp.shape, position)}: "
            f"{first_line(error)}."
        ) from error
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"the score of {name} must return (value, gradient), got {describe(pair)}.")
    value, gradient = pair
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"the value of {name} must be a floating-point scalar, got {describe(value)}."
        )
    check_like(f"the gradient of {name}", gradient, position, "the position")
    return value, gradient


def _by_path(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _named(path: str) -> str:
    return path or "one array alone"
