"""What reference data are refused for, and what is made of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad.potentials import configurations, predict

N, ATOMS = 6, 4


def frames(dim=3, seed=0):
    """Well separated atoms within a box of edge 4."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[[0.5, 2.5]] * dim), -1).reshape(-1, dim)[:ATOMS]
    return (grid + 0.3 * rng.uniform(size=(N, ATOMS, dim))).astype(np.float32)


R = frames()


def with_value(array, where, value):
    out = np.array(array, copy=True)
    out[where] = value
    return out


SKEWED = np.tile(np.array([[4.0, 1.0, 0], [0, 4.0, 0], [0, 0, 4.0]]), (N, 1, 1))

BAD = {
    "positions not of three axes": (
        {"positions": R[0], "forces": R[0]},
        "positions must have shape",
    ),
    "no configurations": ({"positions": R[:0], "forces": R[:0]}, "not be empty"),
    "no atoms": ({"positions": R[:, :0], "forces": R[:, :0]}, "not be empty"),
    "forces of another shape": (
        {"forces": R[:, :3]},
        r"forces must have the shape of positions, \(6, 4, 3\), got \(6, 3, 3\)",
    ),
    "a force that is NaN": (
        {"forces": with_value(R, (4, 1, 2), np.nan)},
        "forces .*configuration 4 is not",
    ),
    "an infinite position": (
        {"positions": with_value(R, (2, 0, 0), np.inf)},
        "positions .*configuration 2 is not",
    ),
    "NaN all over": ({"forces": R * np.nan}, "configuration 0, 1, 2, 3, 4 and 1 more"),
    "an energy that is NaN": (
        {"energies": with_value(np.zeros(N), 3, np.nan)},
        "energies .*configuration 3 is not",
    ),
    "a virial that is NaN": (
        {"virials": with_value(np.zeros((N, 3)), (5, 0), np.nan)},
        "virials .*configuration 5 is not",
    ),
    "a box edge that is NaN": ({"box": np.array([4.0, np.nan, 4.0])}, "box must be finite"),
    "energies of another shape": (
        {"energies": np.zeros((N, 1))},
        r"energies must have shape \(6,\), got \(6, 1\)",
    ),
    "virials of another shape": ({"virials": np.zeros((N, 6))}, "virials must have shape"),
    "species of another shape": ({"species": np.zeros(N + 1, int)}, "species must have shape"),
    "a box of another shape": ({"box": np.ones(2)}, "box must have shape"),
    "a mask of another shape": ({"mask": np.ones(ATOMS, bool)}, "mask must have shape"),
    "species below zero": (
        {"species": np.array([0, 1, -1, 0])},
        "species must be integers from 0 on, got int64 of least -1",
    ),
    "species of floats": ({"species": np.array([0.0, 1, 1, 0])}, "species must be integers from 0"),
    "a graph without rows": (
        {"neighbors": np.zeros((2, 4))},
        "neighbors must have a row for each",
    ),
    "atoms on each other": (
        {"positions": with_value(R, (3, 2), R[3, 0])},
        "must not overlap: in configuration 3 atom 0 is 0 from",
    ),
    "every atom on another": (
        {"positions": np.zeros_like(R)},
        "must not overlap: in configuration 0",
    ),
    "atoms on each other across a boundary": (
        {"positions": with_value(R, (1, 3), R[1, 0] + [4.0, 0, -8.0]), "box": np.full(3, 4.0)},
        "must not overlap: in configuration 1 atom 0",
    ),
    "atoms on each other across a configuration's own boundary": (
        {
            "positions": with_value(R, (1, 3), R[1, 0] + [4.0, 0, 0]),
            "box": np.tile([4.0, 5.0, 6.0], (N, 1)),
        },
        "must not overlap: in configuration 1 atom 0",
    ),
    "a box below twice the cut-off": (
        {"box": np.array([4.0, 3.9, 5.0]), "cutoff": 2.0},
        "at least twice as wide as the cut-off 2, got 3.9",
    ),
    "a skewed box below twice the cut-off": (
        {"box": SKEWED, "cutoff": 1.95},
        "at least twice as wide as the cut-off 1.95, got 3.88",
    ),
    "a box without edges": (
        {"box": np.array([4.0, 0.0, 4.0])},
        "box must have positive edges, got 0",
    ),
    "a box turned inside out": ({"box": SKEWED[:, [1, 0, 2]]}, "span a positive volume"),
    "full virials with edge lengths": (
        {"virials": np.zeros((N, 3, 3)), "box": np.full(3, 4.0)},
        "need a box of matrices",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_refused_in_words(case):
    given, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        configurations(**{"positions": R, "forces": -R, **given})


def test_atoms_on_each_other_across_a_skewed_boundary_are_refused():
    at = with_value(R, (1, 3), R[1, 0] + SKEWED[0][:, 1])
    with pytest.raises(ValueError, match="must not overlap: in configuration 1"):
        configurations(at, -at, box=SKEWED)


def test_what_is_right_passes():
    """Boxes just wide enough, atoms near in a skewed box, one atom alone, two dimensions."""
    assert configurations(R, -R, box=np.full(3, 4.0), cutoff=2.0).count == N
    assert configurations(R, -R, box=SKEWED, cutoff=1.94, virials=np.zeros((N, 3, 3))).count == N
    assert configurations(R[:, :1], -R[:, :1]).count == N
    flat = frames(2)
    assert configurations(flat, flat, box=np.full(2, 4.0), virials=np.zeros((N, 2))).count == N
    assert len(configurations(R, 0 * R, virials=np.zeros((N, 3, 3)), energies=np.zeros(N))) == N


def test_padding_under_a_mask_may_hold_anything():
    """NaN, and atoms on each other; but an atom that is there has to be finite."""
    there = np.ones((N, ATOMS), bool)
    there[2, 2:], there[4, 3] = False, False
    at, forces = np.where(there[..., None], R, np.nan), np.where(there[..., None], -R, np.inf)
    data = configurations(at, forces, mask=there)
    assert np.all(np.isfinite(data.positions))
    np.testing.assert_array_equal(data.forces, np.where(there[..., None], -R, 0))
    np.testing.assert_array_equal(data.positions[there], R[there])
    with pytest.raises(ValueError, match="configuration 4 is not"):
        configurations(with_value(at, (4, 0, 1), np.nan), forces, mask=there)
    with pytest.raises(ValueError, match="must not overlap: in configuration 2 atom 0"):
        configurations(with_value(at, (2, 1), at[2, 0]), forces, mask=there)


def test_one_atom_under_each_mask_passes():
    there = np.zeros((N, ATOMS), bool)
    there[:, 0] = True
    assert configurations(R, R, mask=there).count == N


def test_a_configuration_without_atoms_is_refused():
    there = np.ones((N, ATOMS), bool)
    there[3] = False
    with pytest.raises(ValueError, match="3"):
        configurations(R, R, mask=there, energies=np.zeros(N))


@pytest.mark.parametrize("rows", [[3, 1], slice(5), np.arange(N) % 2 == 0])
def test_indexing_chooses_what_is_each_configurations_own(rows):
    shared = configurations(
        R, -R, species=np.array([0, 1, 1, 2]), box=np.full(3, 9.0), energies=np.arange(N),
        charges=np.arange(N * ATOMS).reshape(N, ATOMS),
    )  # fmt: skip
    chosen = shared[rows]
    np.testing.assert_array_equal(chosen.positions, R[rows])
    np.testing.assert_array_equal(chosen.forces, -R[rows])
    np.testing.assert_array_equal(chosen.energies, np.arange(N)[rows])
    np.testing.assert_array_equal(chosen.graph["charges"], shared.graph["charges"][rows])
    np.testing.assert_array_equal(chosen.species, [0, 1, 1, 2])
    np.testing.assert_array_equal(chosen.box, np.full(3, 9.0))
    assert chosen.virials is None
    assert chosen.count == len(R[rows])
    assert shared.count == N


@pytest.mark.parametrize("number", [2, -4, np.int64(2), np.array(2), [2], np.array([-4])])
def test_one_configuration_keeps_its_axis(number):
    """Without it the atoms of one frame were taken for configurations: five energies for one."""
    data = configurations(
        R, -R, energies=np.arange(N), species=np.tile([0, 1, 1, 2], (N, 1)), box=np.full((N, 3), 9),
        mask=np.ones((N, ATOMS), bool), charges=R[..., 0],
    )  # fmt: skip
    one = data[number]
    assert one.count == 1
    for field in ("positions", "forces", "energies", "species", "box", "mask"):
        np.testing.assert_array_equal(getattr(one, field), getattr(data, field)[2:3])
    np.testing.assert_array_equal(one.graph["charges"], R[2:3, :, 0])
    assert predict(lambda p, r, **rest: p * jnp.sum(r**2), jnp.ones(1), one).energy.shape == (1, 1)


@pytest.mark.parametrize("rows", [6, -7, [0, 9], np.ones(5, bool), slice(6, 9), [], True, 0.5])
def test_rows_that_there_are_not_are_refused(rows):
    data = configurations(R, -R)
    with pytest.raises((TypeError, ValueError), match=r"data\["):
        data[rows]


def test_species_of_padding_count_for_nothing():
    """Numbers below zero stand for no atom in other libraries."""
    there = np.ones((N, ATOMS), bool)
    there[2, 2:] = False
    species = np.where(there, 1, -1)
    data = configurations(R, R, species=species, mask=there)
    np.testing.assert_array_equal(data.species[there], 1)
    with pytest.raises(ValueError, match="species must be integers from 0 on"):
        configurations(R, R, species=species)


@pytest.mark.parametrize("rows", [[3, 1], slice(5)])
def test_indexing_chooses_species_boxes_and_masks_of_each(rows):
    species = np.arange(N * ATOMS).reshape(N, ATOMS)
    there, virials = species % 5 < 4, np.random.default_rng(0).normal(size=(N, 3, 3))
    boxes = SKEWED * (1 + np.arange(N))[:, None, None]
    data = configurations(R, -R, species=species, box=boxes, mask=there, virials=virials)[rows]
    np.testing.assert_array_equal(data.species, species[rows])
    np.testing.assert_array_equal(data.box, boxes[rows])
    np.testing.assert_array_equal(data.mask, there[rows])
    np.testing.assert_array_equal(data.virials, virials[rows])
    lengths = configurations(R, -R, box=9.0 + np.arange(N * 3).reshape(N, 3))
    np.testing.assert_array_equal(lengths[rows].box, lengths.box[rows])


def test_square_shapes_are_not_mistaken():
    """As many configurations as atoms and dimensions: what is shared stays whole."""
    at = R[:3, :3]
    data = configurations(at, at, species=np.array([0, 1, 2]), box=np.array([5.0, 6, 7]))[[1]]
    assert data.species.shape == (3,)
    assert data.box.shape == (3,)


def test_the_energy_gets_what_there_is_by_name():
    """Rows for what each has, and once what all share."""
    data = configurations(R, R, species=np.zeros(ATOMS, int), box=np.full((N, 3), 9.0), charges=R)
    each, shared = data.inputs()
    assert set(each) == {"box", "charges"}
    assert set(shared) == {"species"}
