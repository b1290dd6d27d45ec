"""Frames of ASE and files of extended XYZ, against ASE's own calculators."""

import ase
import ase.build
import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from stochgrad import potentials

INNER, CUTOFF = 4.0, 5.0
LJ = {"sigma": 2.3, "epsilon": 0.4}


def crystals(count=5, seed=0):
    """Sheared cells of one to eight atoms, narrower than twice the cut-off."""
    rng = np.random.default_rng(seed)
    frames = []
    for n in range(count):
        frame = ase.build.bulk("Cu", cubic=n % 2 == 1) * (1 + n % 2, 1, 2)
        frame.set_cell(
            frame.cell[:] @ (np.eye(3) + 0.05 * rng.normal(size=(3, 3))), scale_atoms=True
        )
        frame.rattle(0.1, seed=n)
        frame.calc = LennardJones(**LJ, rc=CUTOFF, ro=INNER, smooth=True)
        frame.get_stress(), frame.get_forces()
        frames.append(frame)
    return frames


def lennard_jones(params, positions, neighbors, box, species, mask=None):
    """ASE's, with its smooth end."""
    square = jnp.sum(potentials.pair_vectors(positions, neighbors, box) ** 2, -1)
    sixth = (params["sigma"] ** 2 / square) ** 3
    end = (CUTOFF**2 - square) ** 2 * (CUTOFF**2 + 2 * square - 3 * INNER**2)
    end = end / (CUTOFF**2 - INNER**2) ** 3
    smooth = jnp.where(square < INNER**2, 1.0, jnp.where(square < CUTOFF**2, end, 0.0))
    return jnp.sum(2 * params["epsilon"] * (sixth**2 - sixth) * smooth)


def params():
    """Of one network, in the precision that is set."""
    return jax.tree.map(lambda x: jnp.array([x]), LJ)


def relative(one, other):
    return np.abs(one - other).max() / np.abs(other).max()


def test_energies_forces_and_virials_are_those_of_ase():
    """Triclinic cells narrower than the cut-off: a cell untransposed, a shift or a sign is seen."""
    with jax.enable_x64(True):
        data = potentials.from_ase(crystals(), cutoff=CUTOFF, reference_energies=None)
        found = potentials.predict(lennard_jones, params(), data, virial=True)
    assert relative(found.energy[0], data.energies) < 1e-12
    assert relative(found.forces[0], data.forces) < 1e-10
    assert relative(found.virial[0], data.virials) < 1e-10
    np.testing.assert_allclose(data.box[1], np.array(crystals()[1].cell).T)


@pytest.mark.parametrize("pbc", [(True, True, False), (False, True, False), (False,) * 3])
def test_axes_without_periodicity_meet_no_images(pbc):
    frames = crystals(3)
    for frame in frames:
        frame.pbc = pbc
        frame.calc.reset()
        frame.get_potential_energy()
    with jax.enable_x64(True):
        data = potentials.from_ase(
            frames, cutoff=CUTOFF, reference_energies=None, stress=False, forces=False
        )
        assert (data.box is None) == (not any(pbc))
        of = lambda p, r, neighbors, species, mask, box=None: lennard_jones(
            p, r, neighbors, box, species
        )
        found = potentials.predict(of, params(), data)
    assert relative(found.energy[0], data.energies) < 1e-12


def test_a_file_comes_back_as_it_went(tmp_path):
    data = potentials.from_ase(crystals(), cutoff=CUTOFF)
    ase.io.write(tmp_path / "train.extxyz", potentials.to_ase(data))
    again = potentials.read_extxyz(tmp_path / "train.extxyz", cutoff=CUTOFF)
    for name in ("positions", "forces", "energies", "virials", "box", "species", "mask"):
        np.testing.assert_allclose(
            getattr(again, name), getattr(data, name), atol=1e-7, err_msg=name
        )
    assert again.elements == data.elements == (29,)
    np.testing.assert_allclose(again.reference_energies, data.reference_energies)
    few = potentials.read_extxyz(tmp_path / "train.extxyz", index="1:3")
    assert len(few) == 2
    assert few.neighbors is None


def test_trajectories_go_to_a_file_without_what_comes_after_an_explosion(tmp_path):
    like = ase.build.bulk("Cu", cubic=True)
    rng = np.random.default_rng(5)
    positions = rng.normal(size=(2, 2, 3, len(like), 3))
    positions[0, 1, 2] = positions[0, 1, 1]
    positions[1, 0, 1:] = positions[1, 0, :1]
    ends = np.array([[-1, 250], [120, -1]])
    run = potentials.Trajectories(positions, ends, np.ones(2), 0.1, np.full((2, 2), -1))
    ase.io.write(tmp_path / "run.extxyz", potentials.to_ase(run, like))
    frames = ase.io.read(tmp_path / "run.extxyz", index=":")
    places = [tuple(f.info[n] for n in ("draw", "replica", "frame")) for f in frames]
    assert places == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (1, 0, 0)] + [
        (1, 1, n) for n in range(3)
    ]
    for place, frame in zip(places, frames, strict=True):
        np.testing.assert_allclose(frame.positions, positions[place], atol=1e-7)
        assert str(frame.symbols) == str(like.symbols)
        np.testing.assert_allclose(frame.cell, like.cell)
    with pytest.raises(TypeError, match=r"like must be an ase\.Atoms"):
        potentials.to_ase(run)
    with pytest.raises(ValueError, match="like must have 4 atoms"):
        potentials.to_ase(run, ase.build.molecule("H2O"))
    with pytest.raises(TypeError, match="trajectories of simulate"):
        potentials.to_ase(positions, like)


def molecules():
    """Water and methane with labels by the names that files have."""
    frames = []
    for n, name in enumerate(["H2O", "CH4", "H2O", "CH4", "H2"]):
        frame = ase.build.molecule(name)
        rng = np.random.default_rng(n)
        frame.info["REF_energy"] = -1e6 * (1 + (frame.numbers == 6).sum()) + rng.normal()
        frame.arrays["REF_forces"] = rng.normal(size=(len(frame), 3))
        frames.append(frame)
    return frames


def test_species_and_reference_energies():
    """Least squares in double precision: totals of a million leave a unit."""
    frames = molecules()
    data = potentials.from_ase(frames)
    assert data.elements == (1, 6, 8)
    np.testing.assert_array_equal(data.atoms, [3, 5, 3, 5, 2])
    np.testing.assert_array_equal(data.numbers()[1], frames[1].numbers)
    np.testing.assert_array_equal(data.numbers()[4], [1, 1, 0, 0, 0])
    counts = np.stack([(data.numbers() == z).sum(1) for z in data.elements], 1)
    totals = np.array([frame.info["REF_energy"] for frame in frames])
    np.testing.assert_allclose(counts @ data.reference_energies + data.energies, totals, rtol=1e-14)
    np.testing.assert_allclose(counts.T @ data.energies, 0, atol=1e-6)
    np.testing.assert_array_equal(data.forces[0, :3], frames[0].arrays["REF_forces"])

    given = dict(zip(["H", "C", "O"], data.reference_energies, strict=True))
    for references in (given, data.reference_energies):
        other = potentials.from_ase(
            frames[:1], elements=data.elements, reference_energies=references
        )
        np.testing.assert_allclose(other.energies, data.energies[:1], atol=1e-6)
        np.testing.assert_array_equal(other.species[:3], data.species[0, :3])
    raw = potentials.from_ase(frames, reference_energies=None)
    np.testing.assert_array_equal(raw.energies, totals)
    assert raw.reference_energies is None


def test_labels_that_only_some_frames_have_count_for_nothing_in_the_others():
    frames = molecules()
    del frames[1].info["REF_energy"], frames[2].arrays["REF_forces"]
    frames[3].info["config_weight"] = 0.5
    data = potentials.from_ase(frames)
    np.testing.assert_array_equal(data.weights["energies"], [1, 0, 1, 0.5, 1])
    np.testing.assert_array_equal(data.weights["forces"], [1, 1, 0, 0.5, 1])
    assert np.isnan(data.energies[1])
    assert np.isnan(data.forces[2]).all()
    assert np.isfinite(data.energies[[0, 2, 3, 4]]).all()
    assert repr(data) == "<5 configurations of 2 to 5 atoms with forces (4), energies (4)>"
    alone = potentials.from_ase(frames, forces=False)
    assert set(alone.labels) == {"energies"}


def test_forces_are_as_calculated():
    """Constraints set them to zero in get_forces, and would be learned."""
    frame = crystals(2)[1]
    free = frame.calc.results["forces"].copy()
    frame.set_constraint(FixAtoms([0]))
    np.testing.assert_array_equal(potentials.from_ase([frame]).forces[0], free)


def test_a_left_handed_cell_is_the_same_lattice():
    frame = crystals(2)[1]
    turned = frame.copy()
    turned.set_cell(frame.cell[:][[1, 0, 2]])
    turned.calc = SinglePointCalculator(turned, **frame.calc.results)
    with jax.enable_x64(True):
        pair = [
            potentials.from_ase(f, cutoff=CUTOFF, reference_energies=None) for f in (frame, turned)
        ]
        energies = [potentials.predict(lennard_jones, params(), one).energy for one in pair]
    np.testing.assert_allclose(*energies, rtol=1e-12)


def altered(frame, change):
    frame = frame.copy()
    frame.calc = None
    frame.info, frame.arrays = dict(frame.info), dict(frame.arrays)
    change(frame)
    return frame


def labeled(**results):
    def change(frame):
        frame.calc = SinglePointCalculator(frame, **results)

    return change


MOLECULE, CRYSTAL = molecules()[0], crystals(2)[1]
VIRIAL = -CRYSTAL.get_volume() * CRYSTAL.get_stress(voigt=False)

BAD = {
    "no frames": (lambda: [], {}, "must not be empty"),
    "a path": (lambda: "train.xyz", {}, "read_extxyz"),
    "a frame without atoms": (lambda: [ase.Atoms()], {}, "frame 0 has none"),
    "not frames": (lambda: [MOLECULE, 3], {}, "frame 1 is"),
    "no labels": (lambda: [ase.build.molecule("H2O")], {}, "energy='my_energy'"),
    "a name that there is not": (lambda: [MOLECULE], {"energy": "E"}, "energy='E' names nothing"),
    "two names that disagree": (
        lambda: [altered(MOLECULE, labeled(energy=3.0))],
        {},
        "'REF_energy' and 'energy': say which, energy='REF_energy'",
    ),
    "forces of another shape": (
        lambda: [altered(MOLECULE, lambda f: f.info.update(force=np.zeros((2, 3))))],
        {"forces": "force"},
        r"forces of frame 0 must have shape \(3, 3\), got \(2, 3\)",
    ),
    "an energy that is NaN": (
        lambda: [MOLECULE, altered(MOLECULE, lambda f: f.info.update(REF_energy=np.nan))],
        {},
        "energies must be finite: that of frame 1 is not",
    ),
    "a stress without a cell": (
        lambda: [altered(MOLECULE, lambda f: f.info.update(REF_stress=np.zeros(6)))],
        {},
        "stress of frame 0 needs a cell",
    ),
    "a virial of the wrong sign": (
        lambda: [
            altered(CRYSTAL, lambda f: f.info.update(virial=-VIRIAL, stress=CRYSTAL.get_stress()))
        ],
        {},
        "its sign is that of a stress",
    ),
    "a molecule's virial of the wrong sign": (
        lambda: [
            altered(
                MOLECULE,
                lambda f: f.info.update(virial=-f.arrays["REF_forces"].T @ f.positions),
            )
        ],
        {},
        "virials without a box .*the sign is that of a stress",
    ),
    "an element that is not among them": (
        lambda: [MOLECULE],
        {"elements": ["H", "C"]},
        "O is not among them",
    ),
    "elements that there are not": (lambda: [MOLECULE], {"elements": ["H", "Xx"]}, "'Xx'"),
    "one string of elements": (lambda: [MOLECULE], {"elements": "HO"}, "must be a list"),
    "references without an element": (
        lambda: [MOLECULE],
        {"reference_energies": {"H": -13.6}},
        "one for O",
    ),
    "references of another word": (lambda: [MOLECULE], {"reference_energies": "fitted"}, "'fit'"),
    "a periodic axis without a vector": (
        lambda: [altered(MOLECULE, lambda f: setattr(f, "pbc", True))],
        {},
        "cell of frame 0 has no vector",
    ),
    "an atom of no element": (
        lambda: [altered(MOLECULE, lambda f: f.numbers.__setitem__(0, 0))],
        {},
        "number 0",
    ),
    "weights of another shape": (lambda: [MOLECULE], {"weights": [1.0, 2.0]}, "weights"),
    "a key that is none": (lambda: [MOLECULE], {"energy": True}, "energy must be a key"),
    "an energy that is a word": (
        lambda: [altered(MOLECULE, lambda f: f.info.update(REF_energy="low"))],
        {},
        "REF_energy of frame 0",
    ),
    "a weight that is a word": (
        lambda: [MOLECULE, altered(MOLECULE, lambda f: f.info.update(config_weight="high"))],
        {},
        "config_weight of frame 1",
    ),
    "a cut-off below zero": (lambda: [MOLECULE], {"cutoff": -1.0}, "cutoff"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_right_is_refused_in_words(case):
    frames, options, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=words):
        potentials.from_ase(frames(), **options)


def test_a_free_energy_is_named():
    frame = altered(ase.build.molecule("H2O"), labeled(energy=-10.0, free_energy=-10.5))
    with pytest.warns(UserWarning, match="energy='free_energy' takes that"):
        potentials.from_ase(frame)
    assert (
        potentials.from_ase(frame, energy="free_energy", reference_energies=None).energies == -10.5
    )


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "train.xyz").write_text("nothing\n")
    with pytest.raises(ValueError, match="is not extended XYZ"):
        potentials.read_extxyz(tmp_path / "train.xyz")
    with pytest.raises(FileNotFoundError):
        potentials.read_extxyz(tmp_path / "other.xyz")
