"""Displacements, distances, angles and dihedrals of atoms, in periodic boxes too."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from stochgrad.core import check_array, describe


def displacement(
    origin: Float[Array, "*batch dim"],
    target: Float[Array, "*batch dim"],
    box: Float[Array, "..."] | None = None,
) -> Float[Array, "*batch dim"]:
    r"""The vector from one point to the nearest image of another.

    $$\Delta = r_j - r_i - L \operatorname{round}(L^{-1}(r_j - r_i)).$$

    Args:
        origin: $r_i$.
        target: $r_j$.
        box: None where there is no periodicity; edge lengths L of shape (dim,), or a matrix whose
            columns are the lattice vectors, shape (dim, dim). With a matrix the image is the
            nearest where the distance is below half the box's least width.

    Raises:
        TypeError: these are no numbers.
        ValueError: their dimensions differ, or the box is none.
    """
    origin, target = as_points("origin", origin), as_points("target", target)
    if origin.shape[-1:] != target.shape[-1:] or not _broadcast(origin.shape, target.shape):
        raise ValueError(
            f"target must have the shape of origin, {origin.shape}, got {target.shape}."
        )
    delta = target - origin
    if box is None:
        return delta
    box = as_box(box, delta.shape[-1]).astype(delta.dtype)
    if box.ndim == 1:
        box = jnp.broadcast_to(box, delta.shape)
        return delta - box * jnp.round(delta / box)
    fractional = delta @ jnp.linalg.inv(box).T
    return delta - jnp.round(fractional) @ box.T


def distances(
    positions: Float[Array, "*batch atoms dim"],
    pairs: Sequence[tuple[int, int]] | Array | None = None,
    box: Float[Array, "..."] | None = None,
) -> Float[Array, "*batch pairs"]:
    """Distances of pairs of atoms, every pair once where none are named.

    Args:
        positions: Where the atoms are.
        pairs: Numbers of atoms, shape (pairs, 2).
        box: As in ``displacement``.

    Raises:
        TypeError: these are no numbers.
        ValueError: there is no such atom, or a shape does not fit.

    Example:
        >>> import jax.numpy as jnp, stochgrad
        >>> at = jnp.array([[0.1, 0.0, 0.0], [0.9, 0.0, 0.0]])
        >>> round(float(stochgrad.potentials.distances(at, box=jnp.ones(3))[0]), 2)
        0.2
    """
    positions = as_positions(positions)
    if pairs is None:
        one, other = jnp.triu_indices(positions.shape[-2], 1)
    else:
        numbers = as_atoms("pairs", pairs, 2, positions.shape[-2])
        if numbers.ndim != 2:
            raise ValueError(f"pairs must have shape (pairs, 2), got {numbers.shape}.")
        one, other = numbers.T
    delta = displacement(positions[..., one, :], positions[..., other, :], box)
    return _norm(delta)


def angle(
    positions: Float[Array, "*batch atoms dim"],
    atoms: Sequence[int] | Array,
    box: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""The angle at the middle one of three atoms, in radians from 0 to $\pi$.

    Args:
        positions: Where the atoms are.
        atoms: Three numbers of atoms, or many such rows.
        box: As in ``displacement``.

    Raises:
        TypeError: these are no numbers.
        ValueError: there is no such atom, or a shape does not fit.
    """
    positions = as_positions(positions, dims=(2, 3))
    i, j, k = jnp.moveaxis(as_atoms("atoms", atoms, 3, positions.shape[-2]), -1, 0)
    one = displacement(positions[..., j, :], positions[..., i, :], box)
    other = displacement(positions[..., j, :], positions[..., k, :], box)
    if one.shape[-1] == 2:
        one, other = (jnp.concatenate([x, jnp.zeros_like(x[..., :1])], -1) for x in (one, other))
    # of sine and cosine both: arccos alone has no derivative at a straight angle
    return _arctan2(_norm(jnp.cross(one, other)), jnp.sum(one * other, -1))


def dihedral(
    positions: Float[Array, "*batch atoms 3"],
    atoms: Sequence[int] | Array,
    box: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""The torsion about the middle bond of four atoms, in radians from $-\pi$ to $\pi$ (IUPAC).

    Args:
        positions: Where the atoms are.
        atoms: Four numbers of atoms, or many such rows.
        box: As in ``displacement``.

    Raises:
        TypeError: these are no numbers.
        ValueError: there is no such atom, or a shape does not fit.

    Example:
        >>> import jax.numpy as jnp, stochgrad
        >>> at = jnp.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1]])
        >>> round(float(stochgrad.potentials.dihedral(at, (0, 1, 2, 3))), 3)
        1.571
    """
    positions = as_positions(positions, dims=(3,))
    i, j, k, m = jnp.moveaxis(as_atoms("atoms", atoms, 4, positions.shape[-2]), -1, 0)
    first = displacement(positions[..., i, :], positions[..., j, :], box)
    axis = displacement(positions[..., j, :], positions[..., k, :], box)
    last = displacement(positions[..., k, :], positions[..., m, :], box)
    one, other = jnp.cross(first, axis), jnp.cross(axis, last)
    sine = jnp.sum(first * other, -1) * _norm(axis)
    return _arctan2(sine, jnp.sum(one * other, -1))


def as_points(name: str, value: Any) -> Array:
    """Vectors in a last axis, of floating-point numbers."""
    if not isinstance(value, Tracer):
        value = check_array(name, value, finite=False) if not _is_numeric(value) else value
    array = jnp.asarray(value)
    if array.ndim == 0:
        raise ValueError(f"{name} must have an axis of dimensions, got {describe(value)}.")
    whole = jnp.issubdtype(array.dtype, jnp.integer)
    return array.astype(jnp.result_type(float)) if whole else array


def as_positions(value: Any, name: str = "positions", dims: tuple[int, ...] = ()) -> Array:
    """Positions of atoms, shape (..., atoms, dim)."""
    array = as_points(name, value)
    if array.ndim < 2 or (dims and array.shape[-1] not in dims):
        last = " or ".join(map(str, dims)) if dims else "dim"
        raise ValueError(f"{name} must have shape (..., atoms, {last}), got {array.shape}.")
    return array


def as_atoms(name: str, value: Any, count: int, atoms: int | None = None) -> Array:
    """Numbers of atoms in rows of ``count``; of those there are, where that is known."""
    if not isinstance(value, Tracer):
        rows = check_array(name, value, kind="integer")
        beyond = rows[(rows < 0) | (rows >= (np.inf if atoms is None else atoms))]
        if beyond.size:
            there = "from 0 on" if atoms is None else f"from 0 to {atoms - 1}"
            raise ValueError(f"{name} must be numbers of atoms {there}, got {beyond[0]}.")
        value = rows
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be an array of integers, got {describe(value)}.")
    if array.ndim == 0 or array.shape[-1] != count:
        raise ValueError(f"{name} must have rows of {count} atoms, got shape {array.shape}.")
    return array


def as_box(box: Any, dim: int) -> Array:
    """Edge lengths or lattice vectors of a box in so many dimensions."""
    if not isinstance(box, Tracer):
        values = check_array("box", box)
        if (values.ndim == 1 and np.any(values <= 0)) or (
            values.ndim == 2 and values.shape[0] == values.shape[1] and np.linalg.det(values) == 0
        ):
            raise ValueError(
                f"box must have positive edges, or span a volume, got {values.tolist()}."
            )
    array = jnp.asarray(box)
    if array.shape not in ((dim,), (dim, dim)):
        raise ValueError(f"box must have shape ({dim},) or ({dim}, {dim}), got {array.shape}.")
    whole = jnp.issubdtype(array.dtype, jnp.integer)
    return array.astype(jnp.result_type(float)) if whole else array


def _is_numeric(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.number)


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    try:
        np.broadcast_shapes(one, other)
    except ValueError:
        return False
    return True


def _arctan2(y: Array, x: Array) -> Array:
    """The angle of a point, zero with all its derivatives at the origin."""
    nowhere = (x == 0) & (y == 0)
    return jnp.arctan2(y, jnp.where(nowhere, 1, x))


def _norm(x: Array) -> Array:
    """Euclidean norm over the last axis, whose derivative at zero is zero and not NaN."""
    square = jnp.sum(x * x, -1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
