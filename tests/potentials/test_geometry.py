"""Displacements, distances, angles and dihedrals against numpy and brute force."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from stochgrad.potentials import angle, dihedral, displacement, distances

SKEW = np.array([[4.0, 1.0, 0.5], [0.0, 3.5, -0.7], [0.0, 0.0, 5.0]])
"""Lattice vectors in columns."""


def atoms(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def nearest(delta, lattice):
    """The shortest of many images, lattice vectors in columns."""
    dim = len(lattice)
    shifts = np.array(list(product(range(-7, 8), repeat=dim))) @ lattice.T
    images = delta[..., None, :] + shifts
    best = np.argmin((images**2).sum(-1), -1)
    return np.take_along_axis(images, best[..., None, None], -2)[..., 0, :]


@pytest.mark.parametrize("dim", [2, 3])
def test_box_lengths_give_the_nearest_image(dim):
    """Also of points that lie several boxes away."""
    one, other = atoms(50, dim, scale=3.0), atoms(50, dim, seed=1, scale=3.0)
    box = np.array([2.0, 5.0, 3.0])[:dim]
    found = displacement(one, other, box)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, nearest(other - one, np.diag(box)), atol=5e-6)
    np.testing.assert_allclose(displacement(one, other), other - one, rtol=1e-6)


def test_a_matrix_box_gives_the_nearest_image_below_half_its_width():
    """Lattice vectors are the columns: taken for rows, images are wrong."""
    half = 0.5 / np.linalg.norm(np.linalg.inv(SKEW), axis=1).max()
    rng = np.random.default_rng(2)
    short = rng.normal(size=(200, 3))
    short *= (half * rng.uniform(size=(200, 1)) ** 0.3) / np.linalg.norm(short, axis=1)[:, None]
    shift = rng.integers(-2, 3, size=(200, 3)) @ SKEW.T
    with jax.enable_x64(True):
        found = displacement(jnp.zeros((200, 3)), jnp.asarray(short + shift), SKEW)
    np.testing.assert_allclose(found, short, atol=1e-12)
    np.testing.assert_allclose(found, nearest(short + shift, SKEW), atol=1e-12)


def test_a_diagonal_matrix_box_is_its_lengths():
    one, other, box = atoms(20, 3), atoms(20, 3, seed=1, scale=2.0), np.array([2.0, 3.0, 1.5])
    lengths, matrix = displacement(one, other, box), displacement(one, other, np.diag(box))
    np.testing.assert_allclose(lengths, matrix, atol=1e-6)


def test_distances_of_every_pair_once_and_of_those_named():
    at = atoms(4, 5, 3)
    i, j = np.triu_indices(5, 1)
    every = np.linalg.norm(at[:, i] - at[:, j], axis=-1)
    np.testing.assert_allclose(distances(at), every, rtol=1e-5)
    named = distances(at, [(3, 1), (0, 4)])
    expected = [
        np.linalg.norm(at[:, 3] - at[:, 1], axis=-1),
        np.linalg.norm(at[:, 0] - at[:, 4], axis=-1),
    ]
    np.testing.assert_allclose(named, np.transpose(expected), rtol=1e-5)
    box = np.array([1.5, 1.0, 2.0])
    folded = np.linalg.norm(nearest(at[:, j] - at[:, i], np.diag(box)), axis=-1)
    np.testing.assert_allclose(distances(at, box=box), folded, atol=2e-6)


def test_atoms_that_are_not_there_are_refused():
    """They were clamped to the last, or counted from the end."""
    at = atoms(4, 5, 3)
    for call in (
        lambda: distances(at, [(0, 5)]), lambda: angle(at, (0, 1, 5)),
        lambda: dihedral(at, [(0, 1, 2, 3), (0, 1, 2, -1)]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"numbers of atoms from 0 to 4, got (5|-1)"):
            call()


def test_whole_numbers_are_not_folded_in_a_box_of_whole_numbers():
    """A box of 2.5 was cut to 2."""
    found = displacement([0, 0, 0], [3, 0, 0], [2.5, 9.0, 9.0])
    np.testing.assert_allclose(found, [0.5, 0, 0], rtol=1e-6)


def test_angles_are_those_of_arccos():
    at = atoms(6, 5, 3)
    rows = np.array([[0, 1, 2], [4, 3, 0]])
    u, v = at[:, rows[:, 0]] - at[:, rows[:, 1]], at[:, rows[:, 2]] - at[:, rows[:, 1]]
    cosine = (u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)
    np.testing.assert_allclose(angle(at, rows), np.arccos(cosine), rtol=1e-4)
    np.testing.assert_allclose(angle(at[0], (0, 1, 2)), np.arccos(cosine[0, 0]), rtol=1e-4)


def test_angles_in_a_box_see_the_nearest_images():
    at = np.array([[0.1, 0.9, 0.0], [0.1, 0.1, 0.0], [0.9, 0.1, 0.0]], np.float32)
    np.testing.assert_allclose(angle(at, (0, 1, 2), np.ones(3)), np.pi / 2, rtol=1e-5)


@pytest.mark.parametrize("rows", [(0, 1, 2), [(0, 1, 2), (0, 2, 1)]])
def test_angles_in_two_dimensions(rows):
    at = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], np.float32)
    expected = np.array([np.pi / 2, np.pi / 4])[0 if isinstance(rows, tuple) else slice(None)]
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(angle(at, rows), expected, rtol=1e-5)


def turned(degrees):
    """Four atoms, the last bond turned clockwise from the first, seen from the second to third."""
    t = np.deg2rad(degrees)
    # seen along +z with x to the right, y points down: from x to y is clockwise
    return np.array([[1, 0, -0.3], [0, 0, 0], [0, 0, 1], [np.cos(t), np.sin(t), 1.4]], np.float32)


@pytest.mark.parametrize("degrees", [-179.0, -120.0, -60.0, -1.0, 0.0, 60.0, 90.0, 150.0])
def test_dihedrals_have_the_sign_of_iupac(degrees):
    at = turned(degrees)
    np.testing.assert_allclose(np.rad2deg(dihedral(at, (0, 1, 2, 3))), degrees, atol=1e-4)
    np.testing.assert_allclose(np.rad2deg(dihedral(at, (3, 2, 1, 0))), degrees, atol=1e-4)


def test_dihedrals_are_those_of_numpy_in_batches_and_through_a_boundary():
    at = atoms(7, 6, 3)
    rows = np.array([[0, 1, 2, 3], [5, 2, 4, 1]])
    b1, b2, b3 = (at[:, rows[:, n + 1]].astype(float) - at[:, rows[:, n]] for n in range(3))
    n1, n2 = np.cross(b1, b2), np.cross(b2, b3)
    cosine = (n1 * n2).sum(-1) / np.linalg.norm(n1, axis=-1) / np.linalg.norm(n2, axis=-1)
    expected = np.sign((b1 * n2).sum(-1)) * np.arccos(cosine)
    np.testing.assert_allclose(dihedral(at, rows), expected, atol=1e-4)
    wide = np.full(3, 20.0)
    split = at + 20.0 * np.random.default_rng(3).integers(-1, 2, size=at.shape).astype(np.float32)
    np.testing.assert_allclose(dihedral(split, rows, wide), expected, atol=1e-3)


def test_rotations_change_nothing_and_a_mirror_turns_the_sign():
    at = atoms(5, 4, 3)
    moved = (at @ Rotation.from_euler("xyz", [0.3, -1.2, 2.0]).as_matrix().T).astype(np.float32) + 3
    for f in map(
        jax.jit, (distances, lambda x: angle(x, (0, 1, 2)), lambda x: dihedral(x, (0, 1, 2, 3)))
    ):
        np.testing.assert_allclose(f(moved), f(at), atol=2e-5)
    mirror = dihedral(at * np.array([1, 1, -1], np.float32), (0, 1, 2, 3))
    np.testing.assert_allclose(mirror, -dihedral(at, (0, 1, 2, 3)), atol=1e-5)


def test_gradients_are_finite_at_straight_angles_and_coincident_atoms():
    """Where arccos and the square root have none."""
    line = jnp.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [2, 0, 0]])
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda x: distances(x).sum()))(line)))
    for rows in [(0, 1, 2), (0, 2, 1)]:
        assert np.all(np.isfinite(jax.jit(jax.grad(lambda x: angle(x, rows)))(line)))


def test_the_gradient_of_an_angle_of_coincident_atoms_is_finite():
    at = jnp.array([[0.0, 0, 0], [0, 0, 0], [2, 1, 0]])
    for rows in [(0, 1, 2), (2, 1, 0)]:
        assert np.all(np.isfinite(jax.jit(jax.grad(lambda x: angle(x, rows)))(at)))


def test_the_gradient_of_a_dihedral_of_atoms_in_line_is_finite():
    at = jnp.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 1, 0]])
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda x: dihedral(x, (0, 1, 2, 3))))(at)))
