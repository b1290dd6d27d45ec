"""Coordinates in which mass, friction and gradient noise are diagonal."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from stochgrad.core import Position, tree_size
from stochgrad.sgmcmc._precision import Precision

_TOLERANCE = 1e-6


class Whitening(NamedTuple):
    r"""A linear change of coordinates, $q = W\tilde q$ and $\tilde p = W^\top p$.

    It leaves Hamiltonian dynamics what it is, and takes M, C and $\hat B$ to $W^\top M W$ and so
    on. Positions change by ``to_white`` and ``from_white``, momenta and gradients by their duals.

    Attributes:
        mass: M in these coordinates, a number or an array for each leaf.
        friction: C, likewise.
        noise: $\hat B$, likewise.
        to_white: $q \mapsto W^{-1}q$.
        from_white: $\tilde q \mapsto W\tilde q$.
        cotangent_to_white: $p \mapsto W^\top p$.
        cotangent_from_white: $\tilde p \mapsto W^{-\top}\tilde p$.
    """

    mass: PyTree
    friction: PyTree
    noise: PyTree
    to_white: Callable[[Position], Position]
    from_white: Callable[[Position], Position]
    cotangent_to_white: Callable[[Position], Position]
    cotangent_from_white: Callable[[Position], Position]

    @property
    def identity(self) -> bool:
        """Whether these coordinates are the position's own."""
        return self.to_white is self.from_white


def whitenings(mass: PyTree, friction: PyTree, noise: PyTree) -> Callable[[Position], Whitening]:
    """A function that gives the whitening for a position of any shape, each computed once."""

    @lru_cache(maxsize=4)
    def of(structure, leaves) -> Whitening:
        position = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*x) for x in leaves])
        return _frame(position, {"mass": mass, "friction": friction, "noise_estimate": noise})

    def whitening_of(position: Position) -> Whitening:
        leaves, structure = jax.tree.flatten(position)
        return of(structure, tuple((x.shape, jnp.result_type(x)) for x in leaves))

    return whitening_of


def _frame(position: Position, given: dict[str, PyTree]) -> Whitening:
    mass, friction, noise = given.values()
    if isinstance(mass, Precision) or isinstance(friction, Precision):
        return _frame_of_precision(position, mass, friction, noise)
    if not any(_is_matrix(value, position) for value in given.values()):
        m, c, b = (spread(name, value, position) for name, value in given.items())
        return Whitening(m, c, b, *4 * (lambda x: x,))
    mass, friction, noise = (_matrix(name, value, position) for name, value in given.items())
    if np.linalg.eigvalsh(mass).min() <= 0:
        raise ValueError("mass must be a symmetric positive definite matrix.")
    ratio = np.trace(friction) / np.trace(mass)
    other = noise if np.allclose(friction, ratio * mass, rtol=_TOLERANCE, atol=0) else friction
    from scipy.linalg import eigh

    w: Any = eigh(other, mass)[1]  # w.T @ mass @ w is the identity
    inside = [w.T @ matrix @ w for matrix in (friction, noise)]
    for matrix in inside:
        off = matrix - np.diag(np.diag(matrix))
        if np.abs(off).max() > _TOLERANCE * max(np.abs(matrix).max(), 1e-300):
            raise ValueError(
                "mass, friction and noise_estimate cannot be made diagonal together: give the "
                "friction as a multiple of the mass, or one of the other two as a number."
            )
    dtype, unravel = _flattening(position)

    def times(matrix, inward):
        matrix = np.asarray(matrix, dtype)
        if inward:
            return lambda x: matrix @ ravel_pytree(x)[0]
        return lambda x: unravel(matrix @ x)

    return Whitening(
        1.0,
        np.diag(inside[0]),
        np.diag(inside[1]),
        times(w.T @ mass, True),
        times(w, False),
        times(w.T, True),
        times(mass @ w, False),
    )


def _frame_of_precision(position: Position, mass: Any, friction: Any, noise: Any) -> Whitening:
    size = tree_size(position)
    if not isinstance(mass, Precision):
        raise ValueError("mass must be a Precision where the friction is one.")
    if mass.scale.size != size:
        raise ValueError(
            f"mass must be of the position's size, {size}, got a Precision of {mass.scale.size}."
        )
    if not mass.same_shape(friction) or not (np.ndim(noise) == 0 and noise == 0):
        raise ValueError(
            "friction must be a multiple of the mass where that is a Precision, as 1.0 * mass is, "
            "and noise_estimate zero."
        )
    dtype, unravel = _flattening(position)
    ravel = lambda x: ravel_pytree(x)[0]
    return Whitening(
        mass.rate,
        friction.rate,
        0.0,
        lambda q: mass.whiten(ravel(q)),
        lambda z: unravel(mass.color(z)),
        lambda p: mass.color_dual(ravel(p)),
        lambda p: unravel(mass.whiten_dual(jnp.asarray(p, dtype))),
    )


def _flattening(position: Position) -> tuple[Any, Callable[[Any], Position]]:
    """The type of a raveled position, and the way back from it."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), position)
    with jax.ensure_compile_time_eval():
        flat, unravel = ravel_pytree(zeros)
    return flat.dtype, unravel


def is_number(value: PyTree) -> bool:
    """Whether a hyper-parameter is one number or array, and not a tree of them."""
    return jax.tree.structure(value) == jax.tree.structure(0.0)


def spread(name: str, value: Any, position: Position) -> PyTree:
    """A number or an array for each leaf of the position, from a number or a tree of its structure.

    Raises:
        ValueError: the tree has another structure, or an array a shape that does not fit.
    """
    if is_number(value):
        value = jax.tree.map(lambda _: value, position)
    if jax.tree.structure(value) != jax.tree.structure(position):
        raise ValueError(
            f"{name} must be a number or have the position's structure, "
            f"{jax.tree.structure(position)}, got {jax.tree.structure(value)}."
        )

    def fit(v, x):
        if np.ndim(v) == 0:
            return float(v)
        if np.shape(v) != x.shape:
            size = tree_size(position)
            raise ValueError(
                f"{name} must be a number, an array of the shape of each leaf of the position, or "
                f"a {size} x {size} matrix: got shape {np.shape(v)} where a leaf has {x.shape}."
            )
        return np.asarray(v, np.float64)

    return jax.tree.map(fit, value, position)


def _is_matrix(value: PyTree, position: Position) -> bool:
    size = tree_size(position)
    if not is_number(value) or np.shape(value) != (size, size):
        return False
    return not (is_number(position) and jax.tree.leaves(position)[0].shape == (size, size))


def _matrix(name: str, value: PyTree, position: Position) -> np.ndarray:
    if _is_matrix(value, position):
        matrix = np.asarray(value, np.float64)
        if not np.allclose(matrix, matrix.T, rtol=1e-5, atol=1e-12):
            raise ValueError(f"{name} must be a symmetric matrix.")
        return (matrix + matrix.T) / 2
    leaves = jax.tree.map(
        lambda v, x: np.broadcast_to(v, x.shape).ravel(), spread(name, value, position), position
    )
    return np.diag(np.concatenate(jax.tree.leaves(leaves)))
