"""A message-passing network of equinox: trained, frozen but for its readout, run, saved."""

from functools import partial

import ase.build
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.calculators.emt import EMT

import stochgrad
from stochgrad import potentials

CUTOFF, WIDTH = 4.0, 6


class Messages(eqx.Module):
    """Invariant messages along pairs, and an energy of each atom."""

    embedding: jax.Array
    filters: eqx.nn.Linear
    update: eqx.nn.Linear
    readout: jax.Array
    unused: jax.Array  # of no width, as libraries of equivariant networks have them

    def __init__(self, key):
        one, two, three, four = jax.random.split(key, 4)
        self.embedding = jax.random.normal(one, (2, WIDTH))
        self.filters = eqx.nn.Linear(8, WIDTH, key=two)
        self.update = eqx.nn.Linear(WIDTH, WIDTH, key=three)
        self.readout = 0.1 * jax.random.normal(four, (WIDTH,))
        self.unused = jnp.zeros((0, WIDTH))


def energy(network, positions, neighbors, box, species, mask):
    r = jnp.linalg.norm(potentials.pair_vectors(positions, neighbors, box), axis=-1)
    end = jnp.where(r < CUTOFF, (1 - (r / CUTOFF) ** 2) ** 2, 0.0)
    radial = jnp.exp(-4 * (r[:, None] - jnp.linspace(1.5, CUTOFF, 8)[None]) ** 2)
    filters = jax.vmap(network.filters)(radial) * end[:, None]
    features = network.embedding[species]
    for _ in range(2):
        messages = jax.ops.segment_sum(
            filters * features[neighbors.senders], neighbors.receivers, len(positions)
        )
        features = features + jnp.tanh(jax.vmap(network.update)(messages))
    return jnp.sum(jnp.where(mask, features @ network.readout, 0.0))


def alloys():
    """Cells of gold and copper, of four and eight atoms, by effective medium theory."""
    rng = np.random.default_rng(0)
    frames = []
    for n in range(12):
        frame = ase.build.bulk("Cu", cubic=True) * (1 + n % 2, 1, 1)
        frame.set_cell(
            frame.cell[:] @ (np.eye(3) + 0.03 * rng.normal(size=(3, 3))), scale_atoms=True
        )
        frame.rattle(0.1, seed=n)
        frame.numbers[0] = 79 if n % 3 == 0 else 29
        frame.calc = EMT()
        frame.get_stress(), frame.get_forces()
        frames.append(frame)
    return frames


NOISE = {"forces": 0.1, "energies": 0.02, "virials": 0.1}


@pytest.fixture(scope="module")
def data():
    return potentials.from_ase(alloys(), cutoff=CUTOFF)


@pytest.fixture(scope="module")
def ensemble(data):
    target = potentials.force_matching(
        energy, data[:9], init=Messages, noise=NOISE, prior=3.0, batch_size=3
    )
    return potentials.networks(
        jax.random.key(0), target, num_chains=2, train_steps=400, learning_rate=0.01
    )


@pytest.mark.slow
def test_it_is_trained_and_is_a_calculator(data, ensemble):
    test = data[9:]
    found = potentials.predict(energy, ensemble.members()["params"], test)
    error = np.sqrt(np.mean((found.forces.mean(0) - test.forces)[test.mask] ** 2))
    assert error < 0.5 * np.std(test.forces[test.mask])
    frame = alloys()[10]
    frame.calc = ensemble.calculator()
    np.testing.assert_allclose(frame.get_forces(), found.forces.mean(0)[1][test.mask[1]], atol=2e-4)


@pytest.mark.slow
def test_it_is_moved_with_lists_that_follow(ensemble):
    frame = ase.build.bulk("Cu", cubic=True) * (3, 3, 3)
    run = potentials.simulate(
        jax.random.key(1), energy, ensemble.members()["params"], frame.positions[None],
        masses=63.5, kT=0.026, time_step=0.2, friction=0.2, num_frames=2, steps_per_frame=10,
        cutoff=CUTOFF, box=np.array(frame.cell).T, species=np.zeros(len(frame), int),
        mask=np.ones(len(frame), bool),
    )  # fmt: skip
    assert run.sound.all()


@pytest.mark.slow
def test_its_readout_is_sampled_alone(data, ensemble, tmp_path):
    """The trunk stays as it is; what is sampled is predicted with, and saved."""
    trained = jax.tree.map(lambda x: x[0], ensemble.members()["params"])
    own, free = potentials.freeze(energy, trained, lambda name: "readout" in name)
    assert [x.shape for x in free.values()] == [(WIDTH,)]
    target = potentials.force_matching(own, data[:9], init=free, noise=NOISE, batch_size=3)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules
        found = potentials.networks(
            jax.random.key(2), target, partial(stochgrad.sgld, step_size=1e-6), num_chains=2,
            train_steps=20, learning_rate=1e-3, num_samples=20,
        )  # fmt: skip
    members = found.members()["params"]
    assert jax.tree.leaves(members)[0].shape == (40, WIDTH)
    whole = jax.tree.map(lambda x: jnp.broadcast_to(x, (40, *x.shape)), trained)
    whole = eqx.tree_at(lambda n: n.readout, whole, next(iter(members.values())))
    one, other = (
        potentials.predict(of, params, data[9:]).forces
        for of, params in ((own, members), (energy, whole))
    )
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    found.save(tmp_path / "readouts")
    again = potentials.load_networks(tmp_path / "readouts", own, free)
    np.testing.assert_array_equal(
        *(np.asarray(jax.tree.leaves(n.positions["params"])[0]) for n in (again, found))
    )


BAD = {
    "no leaf": (lambda name: False, "some of the weights, and not all"),
    "every leaf": (lambda name: True, "some of the weights, and not all"),
    "no boolean": (lambda name: "yes", "True or False, got 'yes'"),
    "what fails": (lambda name: name[99], "where fails on"),
    "no function": ("readout", "where must be a function"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_choice_that_is_none_is_refused(case):
    where, words = BAD[case]
    with pytest.raises((TypeError, ValueError), match=words):
        potentials.freeze(energy, {"a": jnp.ones(2), "b": jnp.ones(3)}, where)
