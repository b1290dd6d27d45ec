"""Lists of neighbors on the device: those of the host, in dynamics, reweighted and overfull."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import potentials
from stochgrad.potentials import plan_lists
from stochgrad.potentials._cell_lists import make_lists
from stochgrad.potentials._neighbors import neighbor_lists

RNG = np.random.default_rng(0)
SHEAR = np.triu(RNG.normal(size=(3, 3)), 1)
BOXES = {
    "none": (3, 300, None),
    "flat": (2, 200, np.full(2, 9.0)),
    "lengths": (3, 300, np.array([9.0, 8.0, 5.0])),
    "matrix": (3, 300, 10 * np.eye(3) + SHEAR),
    "narrow": (3, 12, 2.2 * np.eye(3) + 0.2 * SHEAR),
    "one narrow axis": (3, 40, np.array([9.0, 8.0, 2.0])),
}


def as_sets(neighbors):
    for n in range(len(neighbors.mask)):
        there = np.asarray(neighbors.mask[n])
        pairs = np.c_[neighbors.receivers[n], neighbors.senders[n], neighbors.shifts[n]][there]
        yield set(map(tuple, pairs.tolist())), there.sum()


@pytest.mark.parametrize("kind", BOXES)
def test_lists_are_those_of_the_host(kind):
    """Of atoms outside of the box too, whose images are counted from where they are."""
    dim, atoms, box = BOXES[kind]
    at = RNG.uniform(-15, 15, size=(3, atoms, dim)).astype(np.float32)
    plan = plan_lists(at, 1.0, 0.4, box=box)
    lists = jax.jit(lambda x: make_lists(plan, x))(at)
    given = None if box is None else box if box.ndim == 1 else np.tile(box, (3, 1, 1))
    host = neighbor_lists(at, 1.4, given, None)
    assert not np.any(lists.overflow)
    for (device, count), (right, _) in zip(as_sets(lists.neighbors), as_sets(host), strict=True):
        assert device == right
        assert count == len(right)


def test_what_has_no_room_is_said():
    at = RNG.uniform(0, 9, size=(1, 300, 3)).astype(np.float32)
    plan = plan_lists(at, 1.0, 0.4, box=np.full(3, 9.0))
    dense = at / 3
    assert make_lists(plan, dense).overflow.all()
    few = plan._replace(pairs=8)
    lists = make_lists(few, at)
    assert lists.overflow.all()
    assert lists.neighbors.mask.all()


RC, SIDE, EDGE = 1.9, 5, 5.4
GRID = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3), -1).reshape(-1, 3) * (EDGE / SIDE)
START = (GRID + 0.03 * RNG.normal(size=(2, *GRID.shape))).astype(np.float32)
BOX = np.full(3, EDGE, np.float32)


def pair(strength, square):
    """Soft spheres with an end that is smooth."""
    return strength * jnp.where(square < RC**2, (1 - square / RC**2) ** 3, 0)


def by_lists(strength, positions, neighbors, box):
    vectors = potentials.pair_vectors(positions, neighbors, box)
    return 0.5 * jnp.sum(pair(strength, jnp.sum(vectors**2, -1)))


def by_all(strength, positions, box):
    return jnp.sum(pair(strength, potentials.distances(positions, box=box) ** 2))


SETTINGS = {
    "masses": 1.0,
    "kT": 1.0,
    "time_step": 0.02,
    "friction": 0.5,
    "num_frames": 6,
    "steps_per_frame": 10,
    "box": BOX,
}
STRENGTHS = jnp.array([20.0, 30.0, 5.0])


@pytest.mark.slow
@pytest.mark.parametrize("skin", [None, 0.3])
def test_dynamics_by_lists_are_those_by_all_pairs(skin):
    """Of several networks and replicas, over many times the skin: lists are made again."""
    run = [
        potentials.simulate(jax.random.key(0), energy, STRENGTHS, START, **SETTINGS, **more)
        for energy, more in ((by_all, {}), (by_lists, {"cutoff": RC, "skin": skin}))
    ]
    moved = np.abs(run[0].positions[..., -1, :, :] - START)
    assert moved.max() > 1.0
    assert run[1].sound.all()
    np.testing.assert_allclose(run[1].positions, run[0].positions, atol=2e-3)


def well(strength, positions, neighbors):
    """Draws atoms together, whatever their neighbors."""
    del neighbors
    return 0.5 * strength * jnp.sum((positions - EDGE / 2) ** 2)


def test_a_list_without_room_is_no_explosion():
    settings = {k: v for k, v in SETTINGS.items() if k != "box"}
    with pytest.warns(RuntimeWarning, match="of 2 of 6 trajectories had no more room"):
        run = potentials.simulate(
            jax.random.key(0), well, jnp.array([0.3, 3.0, 0.3]), START, cutoff=RC, **settings
        )
    assert (run.exploded < 0).all()
    np.testing.assert_array_equal(run.overflowed >= 0, [[False] * 2, [True] * 2, [False] * 2])
    np.testing.assert_array_equal(run.sound, run.overflowed < 0)
    frames = run.positions[1, 0, int(run.overflowed[1, 0]) // 10 :]
    assert len(frames) > 1
    np.testing.assert_array_equal(frames, np.broadcast_to(frames[:1], frames.shape))


@pytest.mark.slow
def test_a_run_with_lists_resumes_to_the_bit(tmp_path):
    """And with no other skin, for the lists of the one are not those of the other."""

    def run(frames, **more):
        settings = {**SETTINGS, "num_frames": frames, "cutoff": RC, "skin": 0.4, **more}
        return potentials.simulate(jax.random.key(0), by_lists, STRENGTHS, START, **settings)

    saved = {"checkpoint": tmp_path / "run"}
    run(2, **saved)
    resumed = run(4, **saved, resume=True)
    np.testing.assert_array_equal(resumed.positions, run(4).positions)
    with pytest.raises(ValueError, match=r"skin was 0\.4 and is now 0\.6"):
        run(6, **saved, resume=True, skin=0.6)


def test_atoms_that_outrun_their_lists_are_said():
    with pytest.warns(RuntimeWarning, match="atoms outran their lists of neighbors in"):
        potentials.simulate(
            jax.random.key(0), by_lists, STRENGTHS, START, cutoff=RC, skin=0.05, **SETTINGS
        )


@pytest.mark.slow
def test_reweighting_and_propagation_by_lists():
    frames = np.stack([START, START + 0.05 * RNG.normal(size=START.shape).astype(np.float32)], 1)
    found = [
        potentials.reweight(
            energy, STRENGTHS / 20, frames, np.zeros((2, 2)), kT=1.0, box=BOX, **more
        ).log_weights
        for energy, more in ((by_all, {}), (by_lists, {"cutoff": RC}))
    ]
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
    rdf = potentials.rdf(BOX, bins=10)
    more = [
        potentials.propagate(
            jax.random.key(1), energy, STRENGTHS[:2] / 20 + 1, START, [rdf], min_ess=0.9,
            **SETTINGS, **extra,
        )
        for energy, extra in ((by_all, {}), (by_lists, {"cutoff": RC}))
    ]  # fmt: skip
    np.testing.assert_array_equal(more[0].fresh, more[1].fresh)
    assert more[0].fresh.any()
    np.testing.assert_allclose(more[1].averages[0], more[0].averages[0], atol=0.05)


BAD = {
    "a skin alone": ({"skin": 0.3}, "give their cutoff too"),
    "a cut-off below zero": ({"cutoff": -1.0}, "cutoff must be"),
    "a skin below zero": ({"cutoff": RC, "skin": -0.1}, "skin must"),
    "a cut-off and a list": ({"cutoff": RC, "neighbors": np.zeros((2, 9), int)}, "not both"),
    "a cut-off that is a word": ({"cutoff": "far"}, "cutoff must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lists_are_refused_in_words(case):
    given, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=words):
        potentials.simulate(jax.random.key(0), by_lists, STRENGTHS, START, **{**SETTINGS, **given})


def test_a_plan_needs_frames():
    with pytest.raises(ValueError, match=r"positions must have shape \(frames, atoms, dim\)"):
        plan_lists(START[0], 1.0)
    with pytest.raises(TypeError, match="lists must be a plan"):
        potentials.langevin(by_lists, masses=1.0, kT=1.0, time_step=0.1, friction=1.0, lists=RC)
