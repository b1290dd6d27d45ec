"""Networks as a calculator of ASE, and in a directory."""

import json

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import units
from ase.calculators.fd import calculate_numerical_forces
from ase.calculators.lj import LennardJones
from ase.md.verlet import VelocityVerlet

from stochgrad import potentials
from stochgrad.potentials import Potential, UncertaintyError, calculator, load_networks
from tests.potentials.test_ase import CUTOFF, INNER, crystals, lennard_jones

POTENTIAL = Potential(lennard_jones, ("box", "mask", "neighbors", "species"), (29,), None, CUTOFF)
MEMBERS = {"sigma": jnp.array([2.3, 2.25, 2.35]), "epsilon": jnp.array([0.4, 0.42, 0.39])}


def ases(n, frame):
    """ASE's own calculator with the weights of a network."""
    frame = frame.copy()
    params = jax.tree.map(lambda x: float(x[n]), MEMBERS)
    frame.calc = LennardJones(**params, rc=CUTOFF, ro=INNER, smooth=True)
    return frame


@pytest.mark.parametrize("pbc", [True, (True, True, False)])
def test_mean_and_spread_are_those_of_ases_own(pbc):
    """Energy, forces and stress, of all networks, in a sheared and narrow cell."""
    with jax.enable_x64(True):
        members = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), float), MEMBERS)
        frame = crystals(2)[1]
        frame.pbc = pbc
        frame.calc = calculator(POTENTIAL, members)
        found = {
            "energy": frame.get_potential_energy(),
            "forces": frame.get_forces(),
            "stress": frame.get_stress(),
        }
    single = [ases(n, frame) for n in range(3)]
    right = {
        "energy": [one.get_potential_energy() for one in single],
        "forces": [one.get_forces() for one in single],
        "stress": [one.get_stress() for one in single],
    }
    for name, values in right.items():
        scale = np.abs(values).max()
        np.testing.assert_allclose(found[name], np.mean(values, 0), atol=1e-6 * scale)
        sd = frame.calc.results[f"{name}_sd"]
        np.testing.assert_allclose(sd, np.std(values, 0, ddof=1), atol=1e-6 * scale)
    np.testing.assert_allclose(frame.calc.results["energy_members"], right["energy"], rtol=1e-6)
    np.testing.assert_allclose(frame.calc.results["forces_members"], right["forces"], atol=1e-5)
    worst = np.sqrt((np.std(right["forces"], 0, ddof=1) ** 2).sum(-1)).max()
    np.testing.assert_allclose(frame.calc.results["max_force_sd"], worst, rtol=1e-5)


def test_reference_energies_are_added_again():
    frame = crystals(2)[1]
    bare, whole = frame.copy(), frame.copy()
    bare.calc = calculator(POTENTIAL, MEMBERS)
    whole.calc = calculator(POTENTIAL._replace(reference_energies=(-1e6,)), MEMBERS)
    totals = [f.get_potential_energy() for f in (whole, bare)]
    np.testing.assert_allclose(totals[0] - totals[1], -1e6 * len(frame), rtol=1e-12)


def test_dynamics_of_ase_conserve_energy():
    """While the length of lists changes."""
    frame = ase.build.bulk("Cu", cubic=True) * (2, 2, 2)
    frame.rattle(0.05, seed=0)
    with jax.enable_x64(True):
        frame.calc = calculator(POTENTIAL, jax.tree.map(lambda x: x[:1].astype(float), MEMBERS))
        start = frame.get_total_energy()
        VelocityVerlet(frame, 2 * units.fs).run(50)
        kinetic = frame.get_kinetic_energy()
        assert abs(frame.get_total_energy() - start) < 0.02 * kinetic
        forces = calculate_numerical_forces(frame, eps=1e-4, iatoms=[3])
        np.testing.assert_allclose(frame.get_forces()[3], forces[0], rtol=1e-4, atol=1e-5)
    assert frame.calc.results["energy_sd"] == 0


def test_disagreement_warns_or_stops():
    frame = crystals(2)[1]
    frame.calc = calculator(POTENTIAL, MEMBERS, max_force_sd=1e-3)
    with pytest.warns(RuntimeWarning, match="more than max_force_sd=0.001: label this frame"):
        frame.get_forces()
    frame.rattle(0.01, seed=1)
    frame.get_forces()  # said once
    frame.calc = calculator(POTENTIAL, MEMBERS, max_force_sd=1e-3, above="stop")
    with pytest.raises(UncertaintyError, match="disagree about the force"):
        frame.get_forces()
    frame.calc = calculator(POTENTIAL, MEMBERS, max_force_sd=1e3, above="stop")
    frame.get_forces()


BAD = {
    "no potential": (lambda: calculator(lennard_jones, MEMBERS), "potential must be"),
    "unknown elements": (
        lambda: calculator(POTENTIAL._replace(elements=None), MEMBERS), "know its elements"
    ),
    "what frames do not have": (
        lambda: calculator(POTENTIAL._replace(inputs=("charges",)), MEMBERS), "takes charges"
    ),
    "another way to stop": (
        lambda: calculator(POTENTIAL, MEMBERS, above="halt"), "above must be"
    ),
    "weights without an axis": (
        lambda: calculator(POTENTIAL, jax.tree.map(lambda x: x[0], MEMBERS)), "leading axis"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_calculators_are_refused_in_words(case):
    make, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_atoms_that_networks_do_not_know_are_refused():
    gold = ase.build.bulk("Au")
    gold.calc = calculator(POTENTIAL, MEMBERS)
    with pytest.raises(ValueError, match="not trained on Au"):
        gold.get_potential_energy()
    copper = ase.build.bulk("Cu")
    copper.calc = calculator(POTENTIAL._replace(inputs=("species",)), MEMBERS)
    with pytest.raises(ValueError, match="trained without a box"):
        copper.get_potential_energy()
    copper.calc = calculator(POTENTIAL._replace(lengths=True), MEMBERS)
    with pytest.raises(ValueError, match="cell of right angles"):
        copper.get_potential_energy()


@pytest.fixture(scope="module")
def trained():
    """Two networks of a posterior on ASE's energies and forces, from their own start."""
    data = potentials.from_ase(crystals(), cutoff=CUTOFF, stress=False, reference_energies=None)
    with jax.numpy_dtype_promotion("standard"):
        target = potentials.force_matching(
            lennard_jones,
            data,
            init=lambda key: {
                "sigma": 2.2 + 0.1 * jax.random.uniform(key),
                "epsilon": jnp.float32(0.3),
            },
            noise={"forces": potentials.learned(0.1), "energies": 0.01},
            prior="flat",
            batch_size=5,
        )
        return potentials.networks(
            jax.random.key(0), target, num_chains=2, train_steps=300, learning_rate=0.02
        )


def test_from_frames_to_a_calculator(trained):
    frame = crystals(2)[1]
    right = frame.get_potential_energy(), frame.get_forces()
    frame.calc = trained.calculator()
    assert abs(frame.get_potential_energy() - right[0]) < 0.02 * len(frame)
    assert np.abs(frame.get_forces() - right[1]).max() < 0.05 * np.abs(right[1]).max()
    assert frame.calc.results["energy_members"].shape == (2,)


def test_a_directory_brings_networks_back(trained, tmp_path):
    trained.save(tmp_path / "cu")
    assert sorted(p.name for p in (tmp_path / "cu").iterdir()) == [
        "networks.json", "positions.npz", "trained.npz",
    ]  # fmt: skip
    one = {"sigma": jnp.zeros(()), "epsilon": jnp.zeros(())}
    again = load_networks(tmp_path / "cu", lennard_jones, one)
    for found, right in zip(
        jax.tree.leaves((again.positions, again.trained)),
        jax.tree.leaves((trained.positions, trained.trained)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, right)
    assert again.method == trained.method == "Deep Ensemble"
    frames = [crystals(2)[1], crystals(2)[1]]
    for frame, networks in zip(frames, (again, trained), strict=True):
        frame.calc = networks.calculator()
    assert frames[0].get_potential_energy() == frames[1].get_potential_energy()
    trained.save(tmp_path / "cu")  # in the same place once more
    assert json.loads((tmp_path / "cu/networks.json").read_text())["elements"] == [29]


def test_weights_of_sixteen_bits_come_back(trained, tmp_path):
    half = trained._replace(
        positions={"params": {"w": jnp.ones((2, 1, 3), jnp.bfloat16)}, "noise": {}},
        trained={"params": {"w": jnp.ones((2, 3), jnp.bfloat16)}, "noise": {}},
    )
    half.save(tmp_path / "half")
    again = load_networks(tmp_path / "half", lennard_jones, {"w": jnp.zeros(3)})
    assert again.params["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.params["w"], half.params["w"])


def test_bad_directories_are_refused_in_words(trained, tmp_path):
    trained.save(tmp_path / "cu")
    one = {"sigma": jnp.zeros(()), "epsilon": jnp.zeros(())}
    with pytest.raises(ValueError, match="holds no networks"):
        load_networks(tmp_path / "none", lennard_jones, one)
    with pytest.raises(ValueError, match="differ in params"):
        load_networks(tmp_path / "cu", lennard_jones, {**one, "depth": jnp.zeros(())})
    with pytest.raises(ValueError, match="sigma has shape"):
        load_networks(tmp_path / "cu", lennard_jones, {**one, "sigma": jnp.zeros(4)})
    (tmp_path / "cu/positions.npz").write_bytes(b"cut")
    with pytest.raises(ValueError, match="holds no networks"):
        load_networks(tmp_path / "cu", lennard_jones, one)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("a")
    with pytest.raises(ValueError, match="a new directory, or one of networks"):
        trained.save(tmp_path / "other")
    with pytest.raises(ValueError, match="must be a directory, got the file"):
        trained.save(tmp_path / "other/thesis.tex")
    with pytest.raises(ValueError, match="that stochgrad"):
        trained._replace(potential=None).calculator()
