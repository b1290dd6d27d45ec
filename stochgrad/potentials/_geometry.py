"""Displacements, distances, angles and dihedrals of atoms, in periodic boxes too."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


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
    """
    delta = target - origin
    if box is None:
        return delta
    box = jnp.asarray(box, delta.dtype)
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

    Example:
        >>> import jax.numpy as jnp, stochgrad
        >>> at = jnp.array([[0.1, 0.0, 0.0], [0.9, 0.0, 0.0]])
        >>> round(float(stochgrad.potentials.distances(at, box=jnp.ones(3))[0]), 2)
        0.2
    """
    if pairs is None:
        one, other = jnp.triu_indices(positions.shape[-2], 1)
    else:
        one, other = jnp.asarray(pairs).T
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
    """
    i, j, k = jnp.moveaxis(jnp.asarray(atoms), -1, 0)
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

    Example:
        >>> import jax.numpy as jnp, stochgrad
        >>> at = jnp.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1]])
        >>> round(float(stochgrad.potentials.dihedral(at, (0, 1, 2, 3))), 3)
        1.571
    """
    i, j, k, m = jnp.moveaxis(jnp.asarray(atoms), -1, 0)
    first = displacement(positions[..., i, :], positions[..., j, :], box)
    axis = displacement(positions[..., j, :], positions[..., k, :], box)
    last = displacement(positions[..., k, :], positions[..., m, :], box)
    one, other = jnp.cross(first, axis), jnp.cross(axis, last)
    sine = jnp.sum(first * other, -1) * _norm(axis)
    return _arctan2(sine, jnp.sum(one * other, -1))


def _arctan2(y: Array, x: Array) -> Array:
    """The angle of a point, zero with all its derivatives at the origin."""
    nowhere = (x == 0) & (y == 0)
    return jnp.arctan2(y, jnp.where(nowhere, 1, x))


def _norm(x: Array) -> Array:
    """Euclidean norm over the last axis, whose derivative at zero is zero and not NaN."""
    square = jnp.sum(x * x, -1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
