"""Sets of configurations in one, and what counts in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import potentials
from stochgrad.potentials import concatenate, configurations

RNG = np.random.default_rng(1)
R, F = RNG.normal(size=(2, 5, 4, 3)).astype(np.float32)
SMALL = configurations(R[:2, :2], F[:2, :2], energies=np.arange(2.0), species=np.array([1, 0]))
LARGE = configurations(R[2:], F[2:], species=np.array([0, 0, 1, 1]))


def test_sets_of_different_sizes_and_labels():
    both = concatenate([SMALL, LARGE])
    assert len(both) == 5
    np.testing.assert_array_equal(both.atoms, [2, 2, 4, 4, 4])
    np.testing.assert_array_equal(both.species, [[1, 0, 0, 0]] * 2 + [[0, 0, 1, 1]] * 3)
    np.testing.assert_array_equal(both.forces[2:], F[2:])
    np.testing.assert_array_equal(both.weights["energies"], [1, 1, 0, 0, 0])
    assert "forces" not in both.weights
    np.testing.assert_array_equal(np.isnan(both.energies), [False, False, True, True, True])
    back = concatenate([both[:2], both[2:]])
    np.testing.assert_array_equal(back.positions, both.positions)
    assert [len(one) for one in both] == [1] * 5


def test_sets_of_one_shape_share_what_they_shared():
    data = configurations(R, F, species=np.array([0, 1, 1, 0]), box=np.full(3, 20.0))
    both = concatenate([data[:2], data[2:]])
    assert both.mask is None
    np.testing.assert_array_equal(both.species, data.species)
    np.testing.assert_array_equal(both.box, np.full((5, 3), 20.0))


def test_boxes_of_two_kinds_become_matrices():
    lengths = configurations(R[:2], F[:2], box=np.array([9.0, 8.0, 7.0]))
    matrices = configurations(R[2:], F[2:], box=np.tile(9 * np.eye(3), (3, 1, 1)))
    np.testing.assert_array_equal(concatenate([lengths, matrices]).box[0], np.diag([9.0, 8, 7]))


def test_further_arrays_of_atoms_are_padded():
    small = configurations(R[:2, :2], F[:2, :2], charge=np.ones((2, 2)), field=np.ones((2, 3)))
    large = configurations(R[2:], F[2:], charge=np.ones((3, 4)), field=np.ones((3, 3)))
    both = concatenate([small, large])
    np.testing.assert_array_equal(both.graph["charge"].sum(1), [2, 2, 4, 4, 4])
    assert both.graph["field"].shape == (5, 3)


BAD = {
    "a set alone": (lambda: LARGE, "must be a list"),
    "no sets": (lambda: [], "must be configurations"),
    "what is no set": (lambda: [LARGE, R], "ndarray"),
    "a box of some": (lambda: [configurations(R, F, box=np.full(3, 9.0)), configurations(R, F)],
                      "must all have box or none, but part 1 has none"),
    "other elements": (
        lambda: [
            configurations(R, F, species=np.zeros(4, int), elements=[z]) for z in (1, 2)
        ],
        "the same elements",
    ),
    "other references": (
        lambda: [
            configurations(R, F, species=np.zeros(4, int), reference_energies=[z]) for z in (1, 2)
        ],
        "the same reference_energies",
    ),
    "other further arrays": (
        lambda: [configurations(R, F, charge=R[..., 0]), configurations(R, F)],
        "the same further arrays",
    ),
    "further arrays of other shapes": (
        lambda: [configurations(R, F, bonds=np.zeros((5, n))) for n in (2, 3)],
        "bonds of one shape a row",
    ),
    "virials of two shapes": (
        lambda: [
            configurations(R, F, box=np.tile(50 * np.eye(3), (5, 1, 1)), virials=np.zeros(shape))
            for shape in ((5, 3), (5, 3, 3))
        ],
        "virials of one shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_go_together_is_refused(case):
    parts, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=words):
        concatenate(parts())


def springs(k, positions, species=None, mask=None):
    square = jnp.sum(positions**2, -1)
    return 0.5 * k * jnp.sum(square if mask is None else jnp.where(mask, square, 0))


def density(data, noise, k=1.3):
    target = potentials.force_matching(
        springs, data, init=jnp.float32(1.0), noise=noise, prior="flat", order="full"
    )
    position = {"params": jnp.float32(k), "noise": {}}
    return float(target.log_density(position, target.batches.full))


@pytest.mark.parametrize("weight", [np.arange(5.0), np.array([0, 1, 1, 0, 2.5])])
def test_a_weighted_density_is_the_weighted_sum_of_each(weight):
    """Of each label by itself, whatever labels of weight zero hold."""
    energies = RNG.normal(size=5)
    there = weight > 0
    noise = {"forces": 0.7, "energies": 0.3}
    data = configurations(
        R,
        np.where(there[:, None, None], F, np.nan),
        energies=energies,
        weights={"forces": weight},
    )
    f = [density(configurations(R[[n]], F[[n]]), 0.7) for n in range(5)]
    u = [
        density(configurations(R[[n]], energies=energies[[n]]), {"energies": 0.3}) for n in range(5)
    ]
    np.testing.assert_allclose(density(data, noise), weight @ np.array(f) + np.sum(u), rtol=2e-6)
    alike = configurations(R, F, energies=energies, weights=weight)
    np.testing.assert_allclose(density(alike, noise), weight @ (np.array(f) + u), rtol=2e-6)


def test_gradients_are_finite_where_labels_are_missing():
    both = concatenate([SMALL, LARGE])
    target = potentials.force_matching(
        springs, both, init=jnp.float32(1.0), noise={"forces": 1.0, "energies": 1.0}, batch_size=2
    )
    batch, _ = target.batches.next(target.batches.init(jax.random.key(0)))
    slope = jax.grad(target.log_density)({"params": jnp.float32(1.0), "noise": {}}, batch)
    assert np.isfinite(slope["params"])


def test_an_energy_that_counts_padding_is_refused():
    """Of atoms that there are not, and of pairs that fill a list up."""
    both = concatenate([SMALL, LARGE])
    options = {"init": jnp.float32(1.0), "noise": {"forces": 1.0, "energies": 1.0}, "batch_size": 2}
    deaf = lambda k, positions, species, mask: springs(k, positions)
    with pytest.raises(ValueError, match="padding of atoms: take the mask"):
        potentials.force_matching(deaf, both, **options)
    data = configurations(R, F).with_neighbors(2.0)
    options["noise"] = 1.0

    def all_of(k, positions, neighbors):
        return k * jnp.sum(potentials.pair_vectors(positions, neighbors) ** 2)

    def right(k, positions, neighbors):
        square = jnp.sum(potentials.pair_vectors(positions, neighbors) ** 2, -1)
        return k * jnp.sum(jnp.where(neighbors.mask, square, 0))

    with pytest.raises(ValueError, match=r"padding of pairs: take neighbors\.mask"):
        potentials.force_matching(all_of, data, **options)
    potentials.force_matching(right, data, **options)


BAD_WEIGHTS = {
    "of another name": ({"virials": np.ones(5)}, "must name what the data have"),
    "of another shape": (np.ones(4), r"shape \(5,\)"),
    "below zero": (-np.ones(5), "must not be negative"),
    "all zero": ({"forces": np.zeros(5)}, "nor all zero"),
    "NaN": (np.full(5, np.nan), "finite"),
    "words": (["a"] * 5, "weights"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused(case):
    weights, words = BAD_WEIGHTS[case]
    with pytest.raises((ValueError, TypeError), match=words):
        configurations(R, F, weights=weights)


def test_a_label_that_is_nan_needs_a_weight_of_zero():
    energies = np.array([0.0, np.nan, 1, 2, 3])
    with pytest.raises(ValueError, match="configuration 1 is not; where there is no label, give"):
        configurations(R, F, energies=energies)
    with pytest.raises(ValueError, match="got none of them"):
        configurations(R)
    data = configurations(R, energies=energies, weights=np.isfinite(energies) * 1.0)
    assert set(data.labels) == {"energies"}
