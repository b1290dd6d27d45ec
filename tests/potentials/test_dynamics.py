"""Langevin dynamics of many networks: equilibria, explosions, and runs in parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import potentials
from tests.conftest import Z

H, KT, FRICTION = 0.2, 1.5, 1.0


def spring(k, positions):
    return 0.5 * k * jnp.sum(positions**2)


def fenced(params, positions):
    """A spring; beyond a distance of three, for one network, no bottom; for another, no number."""
    r2 = jnp.sum(positions**2, -1)
    beyond = r2 > 9
    out = jnp.where(beyond, r2, 9.0)  # so that no NaN comes inside by the way of the gradient
    abyss = jnp.where(params["abyss"] > 1, jnp.nan, params["abyss"])
    fall = 4.5 - abyss * (out**2 - 81)
    return jnp.sum(jnp.where(beyond & (params["abyss"] > 0), fall, 0.5 * r2))


def run(energy, params, start, key=0, **options):
    given = {
        "masses": 1.0, "kT": KT, "time_step": H, "friction": FRICTION, "num_frames": 4,
        "steps_per_frame": 3, **options,
    }  # fmt: skip
    return potentials.simulate(jax.random.key(key), energy, params, start, **given)


GOOD = np.zeros((2, 2, 3), np.float32)
STIFFNESS, MASSES = np.array([1.0, 4.0, 0.25], np.float32), np.array([1.0, 3.0])
REPLICAS, FRAMES = 128, 40


LONG = {"num_frames": FRAMES, "steps_per_frame": 25, "num_warmup": 2, "masses": MASSES}


def at_equilibrium():
    normal = np.random.default_rng(0).normal(size=(3, REPLICAS, 2, 3))
    return (normal * np.sqrt(KT / STIFFNESS)[:, None, None, None]).astype(np.float32)


@pytest.fixture(scope="module")
def wells():
    """Two atoms of different masses in each of three wells, at equilibrium from the start."""
    return run(spring, STIFFNESS, at_equilibrium(), **LONG)


@pytest.mark.slow
@pytest.mark.parametrize("network", range(3))
def test_a_well_has_the_variance_of_its_temperature(wells, network):
    """kT/k exactly, for BAOAB has no error in the positions of harmonic wells; of either mass."""
    per_replica = (wells.positions[network].astype(float) ** 2).mean((1, 3))
    error = per_replica.std(0, ddof=1) / np.sqrt(REPLICAS)
    expected = KT / STIFFNESS[network]
    assert np.all(np.abs(per_replica.mean(0) - expected) < Z * error)


@pytest.mark.slow
def test_momenta_have_the_temperature_of_baoab(wells):
    """1 - h^2 k / 4m of each atom; frames are 25 steps apart, next to independent."""
    expected = (1 - H**2 * STIFFNESS[:, None] / (4 * MASSES)).mean(1)
    error = np.sqrt(2 / (REPLICAS * FRAMES * 6))
    assert np.all(np.abs(wells.kinetic_temperature - expected) < Z * error)


@pytest.mark.slow
def test_networks_replicas_and_atoms_are_independent(wells):
    """No key is used for two of them: correlations of the last frames vanish."""
    last = wells.positions[:, :, -1] * np.sqrt(STIFFNESS / KT)[:, None, None, None]
    for one, other in [
        (last[0], last[1]),
        (last[:, 0::2], last[:, 1::2]),
        (last[:, :, 0], last[:, :, 1]),
        (last[..., 0], last[..., 1]),
    ]:
        assert abs((one.astype(float) * other).mean()) < Z / np.sqrt(one.size)


@pytest.mark.slow
def test_a_network_does_not_depend_on_the_others(wells):
    """The first of three is the same alone; but not by another key."""
    alone, other = (run(spring, STIFFNESS[:1], at_equilibrium()[0], key=k, **LONG) for k in (0, 1))
    assert alone.positions.shape == (1, REPLICAS, FRAMES, 2, 3)
    assert alone.exploded.shape == (1, REPLICAS)
    np.testing.assert_allclose(alone.positions[0], wells.positions[0], rtol=1e-3, atol=1e-4)
    assert np.all(other.positions != alone.positions)


def test_what_is_given_by_name_reaches_the_energy():
    """It explodes if it does not."""

    def particular(k, positions, species, box):
        right = jnp.all(species == np.array([0, 1], np.int32)) & (box[2] == 7)
        return jnp.where(right, 1, jnp.nan) * spring(k, positions)

    options = {"species": np.array([0, 1]), "box": np.array([5.0, 6.0, 7.0])}
    assert run(particular, jnp.ones(1), GOOD, **options).sound.all()


@pytest.fixture(scope="module")
def inside_and_beyond():
    """Two replicas inside the fence and one beyond; as the networks have no abyss, one, or NaN."""
    start = np.full((3, 2, 3), 0.2, np.float32)
    start[1, 1] = 2.5
    at = lambda *abyss: {"abyss": jnp.array(abyss, jnp.float32)}
    options = {"num_frames": 12, "friction": 0.1}
    quiet = run(fenced, at(0.0, 0.0, 0.0), start, **options)
    with pytest.warns(RuntimeWarning) as said:
        loud = run(fenced, at(0.0, 1.0, 2.0), start, **options)
    return quiet, loud, [str(w.message) for w in said]


def test_shapes(inside_and_beyond):
    quiet, _, _ = inside_and_beyond
    assert quiet.positions.shape == (3, 3, 12, 2, 3)
    assert quiet.exploded.shape == quiet.sound.shape == (3, 3)
    assert quiet.kinetic_temperature.shape == (3,)
    assert quiet.seconds > 0


def test_explosions_are_counted_and_named(inside_and_beyond):
    quiet, loud, said = inside_and_beyond
    assert quiet.sound.all()
    bad = ~loud.sound
    assert not bad[0].any()
    assert bad[1:, 1].all()
    (message,) = said
    first = loud.exploded[bad].min()
    assert f"{bad.sum()} of 9 trajectories exploded, the first at step {first}" in message
    assert all(f"{bad[n].sum()} of network {n}" in message for n in (1, 2))
    assert "of network 0" not in message


def test_the_step_of_an_explosion_is_kept(inside_and_beyond):
    """Frozen from there on, and moving before; NaN at the start is step zero."""
    _, loud, _ = inside_and_beyond
    assert loud.exploded[2, 1] == 0
    for n, r in np.argwhere(~loud.sound):
        step, frames = loud.exploded[n, r], loud.positions[n, r]
        frozen = step // 3  # frame f ends with step 3 f + 2
        assert np.all(np.isfinite(frames))
        same = np.all(frames[1:] == frames[:-1], axis=(1, 2))
        assert same[frozen:].all()
        assert not same[: max(frozen - 1, 0)].any()


def test_other_replicas_do_not_notice_to_the_bit(inside_and_beyond):
    quiet, loud, _ = inside_and_beyond
    np.testing.assert_array_equal(loud.positions[0], quiet.positions[0])
    # inside the fence the three networks are one spring
    stayed = loud.sound & (np.abs(quiet.positions).max((2, 3, 4)) < np.sqrt(3))
    assert stayed[1:].any()
    np.testing.assert_array_equal(loud.positions[stayed], quiet.positions[stayed])
    assert np.all(np.isfinite(loud.kinetic_temperature))


def test_a_network_whose_replicas_all_explode_leaves_the_others_alone():
    start = np.full((2, 1, 3), 2.5, np.float32)
    with pytest.warns(RuntimeWarning, match="2 of 4 trajectories exploded.*2 of network 1"):
        found = run(fenced, {"abyss": jnp.array([0.0, 2.0])}, start)
    assert np.all(np.isfinite(found.positions))
    assert np.isfinite(found.kinetic_temperature[0])
    assert np.isnan(found.kinetic_temperature[1])
    np.testing.assert_array_equal(found.positions[1], np.full((2, 4, 1, 3), 2.5))


def test_an_energy_that_is_no_number_explodes_though_its_force_is_zero():
    hole = lambda k, r: jnp.where(jnp.sum(r**2) > 1, jnp.nan, 0.5 * k * jnp.sum(r**2))
    start = np.zeros((2, 1, 3), np.float32)
    start[1] = 2.0
    with pytest.warns(RuntimeWarning, match="exploded"):
        found = run(hole, jnp.ones(1), start, num_frames=1, steps_per_frame=1)
    assert found.exploded[0, 1] == 0


@pytest.mark.parametrize("networks", [1, 2])
def test_a_run_in_two_parts_is_the_run_in_one(tmp_path, networks):
    """An explosion of the first part is remembered in the second."""
    start = np.full((2, 1, 3), 0.2, np.float32)
    start[1] = 2.5
    params = {"abyss": jnp.array([2.0, 0.0])[:networks]}
    simulated = partial(run, fenced, params, start, num_warmup=1)
    with pytest.warns(RuntimeWarning, match="of network 0"):
        whole = simulated(num_frames=6)
    with pytest.warns(RuntimeWarning, match="of network 0"):
        simulated(num_frames=2, checkpoint=tmp_path)
    with pytest.warns(RuntimeWarning, match="of network 0"):
        again = simulated(num_frames=6, checkpoint=tmp_path, resume=True)
    np.testing.assert_array_equal(again.positions, whole.positions)
    np.testing.assert_array_equal(again.exploded, whole.exploded)
    np.testing.assert_array_equal(again.kinetic_temperature, whole.kinetic_temperature)


def test_langevin_is_a_kernel_of_its_settings():
    """Made once for equal arrays, so that nothing is compiled anew."""
    make = lambda m: potentials.langevin(
        spring, masses=np.array(m), kT=KT, time_step=H, friction=2.0
    )
    one = make([1.0, 2.0])
    assert dict(one.settings) == {"kT": KT, "step_size": H, "friction": 2.0}
    assert make([1.0, 2.0]) is one
    assert make([1.0, 3.0]) is not one


BAD = {
    "masses of zero": ({"masses": np.array([1.0, 0.0])}, "masses must be positive"),
    "masses that are NaN": ({"masses": np.nan}, "masses must be positive"),
    "no masses": ({"masses": np.array([])}, "masses must be positive"),
    "masses of another number": (
        {"masses": np.ones(3)},
        r"masses must have one entry for each atom, got \(3,\) for 2 atoms",
    ),
    "kT of zero": ({"kT": 0.0}, "kT must be a positive number"),
    "a time step below zero": ({"time_step": -0.1}, "time_step must be a positive number"),
    "friction of zero": ({"friction": 0.0}, "friction must be a positive number"),
    "no frames": ({"num_frames": 0}, "num_frames must be an integer of at least 1"),
    "no steps": ({"steps_per_frame": 0}, "steps_per_frame must be an integer of at least 1"),
    "positions of two axes": ({"start": GOOD[0]}, r"positions must have shape .*got \(2, 3\)"),
    "positions of more networks": ({"start": np.zeros((3, 2, 2, 3))}, "positions must have shape"),
    "weights of no axis": ({"params": jnp.float32(1.0)}, "params must have one leading axis"),
    "weights of different axes": (
        {"params": {"a": jnp.ones(2), "b": jnp.ones(3)}, "energy": lambda p, r: jnp.sum(r)},
        "params must have one leading axis of networks",
    ),
    "positions that are NaN": ({"start": GOOD * np.nan}, "must be finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    given, words = BAD[case]
    options = {"energy": spring, "params": jnp.ones(2), "start": GOOD, **given}
    with pytest.raises(ValueError, match=words):
        run(options.pop("energy"), options.pop("params"), options.pop("start"), **options)


def with_arrays(k, positions, **graph):
    return spring(k, positions)


STALE = {
    "pairs": {"pairs": np.zeros((5, 2), np.int32)},
    "senders of as many edges as atoms": {"senders": np.zeros(2, np.int32)},
    "integer shifts": {"cells": np.zeros((5, 3), np.int32)},
    "shifts of floats": {"shifts": np.zeros((5, 3), np.float32)},
    "who is near whom": {"near": np.eye(2, dtype=bool)},
}


@pytest.mark.parametrize("case", STALE)
def test_lists_of_neighbors_are_refused(case):
    """They would stay those of the first frame; of the kernel itself too."""
    graph = STALE[case]
    (name,) = graph
    with pytest.raises(ValueError, match=f"{name} looks like a list of neighbors.*static="):
        run(with_arrays, jnp.ones(1), GOOD, **graph)
    settings = {"masses": 1.0, "kT": KT, "time_step": H, "friction": FRICTION}
    kernel = potentials.langevin(with_arrays, **settings, **graph)
    with pytest.raises(ValueError, match=f"{name} looks like a list of neighbors"):
        kernel.init({"positions": jnp.asarray(GOOD), "params": jnp.float32(1)}, jax.random.key(0))


def bonded(k, positions, bonds, types, charges):
    r = potentials.distances(positions, bonds)
    return 0.5 * k * jnp.sum(r**2) + 0.0 * jnp.sum(charges[types])


def test_bonds_that_hold_for_every_frame_are_named():
    """And numbers of each atom need no name: the same run as with the bonds closed over."""
    bonds, types = np.array([[0, 1]], np.int32), np.array([0, 1], np.int32)
    charges = np.float32([0.1, -0.1, 0.2])
    graph = {"bonds": bonds, "types": types, "charges": charges}
    start = np.random.default_rng(0).normal(size=(2, 2, 3)).astype(np.float32)
    found = run(bonded, jnp.ones(1), start, static=("bonds",), **graph)
    closed = run(lambda k, r: bonded(k, r, **graph), jnp.ones(1), start)
    np.testing.assert_allclose(found.positions, closed.positions, rtol=1e-4, atol=1e-5)


def test_padding_is_not_simulated():
    """It would move freely, and be counted by observables."""
    with pytest.raises(ValueError, match="mask leaves out atom 1 of every frame: drop"):
        run(with_arrays, jnp.ones(1), GOOD, mask=np.array([True, False]))
    assert run(with_arrays, jnp.ones(1), GOOD, mask=np.ones(2, bool)).sound.all()


def test_energies_that_rounding_swallows_are_warned_of():
    """A spacing of 0.25 at 4e6, a sixth of kT; none at a tenth of that."""
    high = lambda k, r: spring(k, r) + np.float32(4e6)
    with pytest.warns(stochgrad.PrecisionWarning, match="4e\\+06 are 0.25 apart in float32.*kT"):
        run(high, jnp.ones(1), GOOD, num_frames=1)
    run(lambda k, r: spring(k, r) + np.float32(4e5), jnp.ones(1), GOOD, num_frames=1)


def needs_box(k, positions, box):
    return 0.5 * k * jnp.sum(potentials.distances(positions, box=box) ** 2)


@pytest.mark.parametrize("networks", [1, 2])
def test_an_energy_that_fails_says_why(networks):
    with pytest.raises((TypeError, ValueError), match="box"):
        run(needs_box, jnp.ones(networks), GOOD)


def opens_up(k, positions, box=None):
    """Without a box, boundaries are open."""
    return 0.5 * k * jnp.sum(potentials.distances(positions, box=box) ** 2)


def test_a_box_that_is_left_out_is_missed():
    """Where the energy function knows of one, also as a potential of data in a box."""
    data = potentials.configurations(np.eye(3)[None], np.eye(3)[None], box=np.full(3, 9.0))
    target = potentials.force_matching(
        opens_up, data, init=jnp.float32(1.0), noise=1.0, order="full"
    )
    for energy in (opens_up, target.model):
        for of in (
            lambda e: run(e, jnp.ones(1), GOOD),
            lambda e: potentials.reweight(e, jnp.ones(1), GOOD[:, None], np.zeros((2, 1)), kT=1.0),
        ):
            with pytest.raises(ValueError, match="box=None for open boundaries"):
                of(energy)
    settings = {"num_frames": 3, "steps_per_frame": 2, "min_ess": 1.0}
    found = potentials.propagate(
        jax.random.key(0), opens_up, jnp.ones(2), GOOD, [], box=None, masses=1.0, kT=1.0,
        time_step=0.01, friction=1.0, **settings,
    )  # fmt: skip
    assert found.fresh.all() or (found.ess == 1).all()
    both = [run(opens_up, jnp.ones(1), GOOD, box=box) for box in (None, np.full(3, 1e4))]
    np.testing.assert_allclose(both[0].positions, both[1].positions, atol=1e-3)
