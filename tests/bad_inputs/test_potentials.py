"""Every argument of ``stochgrad.potentials`` crossed with values of the wrong kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import potentials
from tests.bad_inputs.harness import refuses


def energy(k, positions):
    return 0.5 * k * jnp.sum(positions**2)


def fails(*args, **kwargs):
    raise RuntimeError("inside")


def init(key):
    return jax.random.normal(key)


RNG = np.random.default_rng(0)
R = RNG.normal(size=(6, 4, 3)).astype(np.float32)
DATA = potentials.configurations(R, -R)
KEY = jax.random.key(0)
TARGET = potentials.force_matching(energy, DATA, init=init, noise=1.0, batch_size=2)
SPECIES = potentials.configurations(R, -R, species=np.array([0, 1, 1, 0]))
ENERGIES = potentials.configurations(R, -R, energies=np.zeros(6))
FORCES = RNG.normal(size=(5, 6, 4, 3))
WITH_NAN = np.where(np.arange(3) == 1, np.nan, R)
MASKED = np.ma.masked_array(R, R > 0)
OBSERVABLE = potentials.rdf(np.full(3, 4.0))

NUMBERS = [None, "1", True, np.nan, np.inf, -1.0, 0.0, [1.0, 2.0], jnp.ones(2), object(), 1j, {}]
COUNTS = [None, "3", True, 0, -2, 2.5, np.nan, [1], 1.0]
FLAGS = [None, 1, 0, "yes", np.ones(2), []]
FUNCTIONS = [None, 1.0, "energy", R, [energy]]
ENERGY = [*FUNCTIONS, fails, int, lambda k, r: r, lambda k, r: (k, k), lambda k: k, lambda k, r: 1]
KEYS = [None, 0, np.zeros(2, np.uint32), jax.random.PRNGKey(0), jax.random.split(KEY), "key"]
ARRAYS = [None, "text", object(), [[1.0], [1.0, 2.0]], np.array(["a"] * 3), {}, fails, MASKED, True]
NETWORKS = [None, {}, "w", 1.0, np.zeros((0,)), np.array([np.nan, 1]), {"a": np.ones(2), "b": 1.0},
            [1.0, "a"], {"a": np.ones(2), "b": np.ones(3)}, np.array([object()]),
            fails]  # fmt: skip
PATHS = [1, b"x", object(), "", ["a"]]
NOT_DATA = [None, R, {"positions": R}, "data", potentials.Configurations, (R, R)]

DYNAMICS = {
    "key": KEY, "energy_fn": energy, "params": np.ones(2), "positions": R, "masses": 1.0,
    "kT": 1.0, "time_step": 0.1, "friction": 1.0, "num_frames": 1, "steps_per_frame": 1,
}  # fmt: skip
LANGEVIN = {k: DYNAMICS[k] for k in ("energy_fn", "masses", "kT", "time_step", "friction")}
MASSES = [*ARRAYS, 0.0, -1.0, np.nan, np.inf, [1.0, 0.0], np.ones((2, 2)), []]
OF_RUN = {
    "energy_fn": ENERGY, "params": NETWORKS, "masses": MASSES, "kT": NUMBERS,
    "time_step": NUMBERS, "friction": NUMBERS, "num_frames": COUNTS, "steps_per_frame": COUNTS,
    "num_warmup": COUNTS[:3] + COUNTS[4:], "progress": FLAGS, "resume": [*FLAGS, True],
    "checkpoint": PATHS, "static": ["bonds", None, 1, ["bonds"], [1]], "key": KEYS,
    "bonds": [np.zeros((3, 2), int), np.zeros(3, int), np.ones((4, 4), bool), "a", [object()]],
    "senders": [np.zeros(4, int)], "shifts": [np.zeros((7, 3))], "species": [[0, 1], [0.5] * 4],
    "mask": [np.array([True, True, True, False]), np.ones(3, bool)], "box": [np.zeros(3), [1, 1]],
}  # fmt: skip
STARTS = [*ARRAYS, R[0], R[:0], WITH_NAN, R[:, :0], np.ones((3, 2, 4, 3))]

CASES = {
    "configurations": (potentials.configurations, {"positions": R, "forces": R}, {
        "positions": [*ARRAYS, R[0], R[:0], WITH_NAN, np.zeros_like(R)],
        "forces": [*ARRAYS, R[:, :2], R[0], WITH_NAN],
        "energies": [*ARRAYS[1:], np.ones(5), np.full(6, np.nan), 1.0],
        "virials": [*ARRAYS[1:], np.ones((6, 2)), np.full((6, 3), np.inf)],
        "species": [*ARRAYS[1:], [0, 1], [-1, 0, 0, 0], [0.0] * 4, [True] * 4],
        "box": [*ARRAYS[1:], [1.0, 2.0], [0.0, 1, 1], [np.nan, 1, 1], np.zeros((6, 3, 3)), -R[0]],
        "mask": [*ARRAYS[1:], np.ones(4, bool), np.full((6, 4), 0.5), np.zeros((6, 4), bool)],
        "cutoff": NUMBERS[1:],
        "charges": [*ARRAYS, 1.0, np.ones(5), np.full(6, np.nan)],
    }),
    "data": (lambda rows: DATA[rows], {"rows": 0}, {
        "rows": [None, True, 6, -7, [9], [0.5], "a", (0, 1), ..., [], slice(6, 9), slice(0.5, 2),
                 np.ones(5, bool), np.zeros(6, bool), [[0]], np.nan, 1.0, object()],
    }),
    "force_matching": (
        potentials.force_matching,
        {"energy_fn": energy, "dataset": DATA, "init": init, "noise": 1.0, "batch_size": 2}, {
        "energy_fn": [*ENERGY, lambda k, r: k * jnp.sum(jnp.sqrt(r - r))],
        "dataset": NOT_DATA,
        "init": [None, "w", {}, 1, np.array(["a"]), np.nan, {"a": object()}, fails, int,
                 lambda: 1.0, lambda key: None, lambda key: "a", lambda key: jnp.nan, np.zeros(0)],
        "noise": [*ARRAYS, 0.0, -1.0, np.nan, np.inf, [1.0], {"energies": 1.0},
                  {"forces": None}, {"forces": potentials.learned}, potentials.Learned(-1.0)],
        "prior": [None, "wide", 0.0, -1.0, np.nan, True, [1.0], fails, lambda p: p[None],
                  lambda p: None, np.ones(2), object()],
        "temperature": NUMBERS,
        "batch_size": [None, "3", True, 0, -2, 2.5, 7],
        "order": [None, "random", 1, ["full"]],
    }),
    "learned": (potentials.learned, {}, {"mean": [*ARRAYS, 0.0, -1.0, np.nan, [1.0, 0.0], []]}),
    "predict": (potentials.predict, {"energy_fn": energy, "params": np.ones(2), "data": DATA}, {
        "energy_fn": ENERGY, "params": NETWORKS, "data": NOT_DATA, "batch_size": COUNTS,
    }),
    "force_rhat": (
        potentials.force_rhat,
        {"energy_fn": energy, "params": np.ones((2, 4), np.float32), "probe": DATA},
        {
        "energy_fn": ENERGY, "params": [*NETWORKS, np.ones((1, 9)), np.ones(9)], "probe": NOT_DATA,
    }),
    "novelty": (potentials.novelty, {"forces": FORCES}, {
        "forces": [*ARRAYS, FORCES[0], FORCES[:1], FORCES * np.nan, np.zeros((2, 1, 0, 3)),
                   np.zeros_like(FORCES)],
        "noise": [*ARRAYS[:8], 0.0, -1.0, np.nan, np.ones(2), np.array([1.0, 0, 1])],
        "mask": ["a", np.ones((6, 4)), np.ones(6, bool), np.zeros((6, 4), bool)],
        "known": ["a", FORCES[0], FORCES[:3], FORCES * np.nan, np.zeros_like(FORCES)],
        "known_mask": [np.ones((6, 4), bool)],
    }),
    "networks": (
        potentials.networks,
        {"key": KEY, "posterior": TARGET, "num_chains": 2, "train_steps": 0}, {
        "key": KEYS, "posterior": [None, "target", energy, DATA, stochgrad.Posterior],
        "method": ["sgld", 1.0, fails, lambda target: None, stochgrad.sgld, int,
                   stochgrad.sgld(TARGET, 1e-6), potentials.Approximation("none", None)],
        "num_chains": COUNTS, "train_steps": COUNTS[:3] + COUNTS[4:], "learning_rate": NUMBERS,
        "num_samples": COUNTS, "num_warmup": COUNTS[:3] + COUNTS[4:], "thin": COUNTS,
        "share_batches": FLAGS, "progress": FLAGS, "resume": [*FLAGS, True], "checkpoint": PATHS,
        "store": [*PATHS, "somewhere"],
        "init": [{}, "a", 1.0, np.ones(2), fails, lambda key: None,
                 {"params": np.ones(3), "noise": {}}, {"params": np.full(2, np.nan), "noise": {}}],
    }),
    "swag": (potentials.swag, {"learning_rate": 0.1, "num_steps": 20}, {
        "learning_rate": NUMBERS, "num_steps": [*COUNTS, 5], "thin": COUNTS, "rank": [*COUNTS, 1],
    }),
    "last_layer_laplace": (potentials.last_layer_laplace, {"last": bool}, {
        "last": FUNCTIONS, "ridge": NUMBERS,
    }),
    "langevin": (potentials.langevin, LANGEVIN, {
        "energy_fn": FUNCTIONS, "masses": MASSES, "kT": NUMBERS, "time_step": NUMBERS,
        "friction": NUMBERS, "static": ["bonds", None, ["bonds"]], "box": ["a", [np.nan] * 3],
    }),
    "simulate": (potentials.simulate, DYNAMICS, {**OF_RUN, "positions": STARTS}),
    "propagate": (
        potentials.propagate, {**DYNAMICS, "observables": [OBSERVABLE]}, {
        **OF_RUN, "positions": [*STARTS[:-1], np.ones((1, 2, 4, 3))], "min_ess": [*NUMBERS[:6], 2],
        "observables": [None, OBSERVABLE, [None], [fails], [potentials.Observable], "rdf",
                        [potentials.dihedrals((0, 1, 2, 9))]],
    }),
    "reweight": (
        potentials.reweight,
        {"energy_fn": energy, "params": np.ones(2), "positions": R[None], "kT": 1.0,
         "reference": np.zeros((1, 6))}, {
        "energy_fn": [*ENERGY, lambda k, r: k * jnp.nan], "params": NETWORKS, "kT": NUMBERS,
        "positions": [*ARRAYS, R, R[None, :0], WITH_NAN[None]],
        "reference": [*ARRAYS[:6], np.zeros(6), np.full((1, 6), np.nan), fails, lambda r: r],
        "sound": ["a", np.ones(1), np.ones(2, bool), np.zeros(1, bool)],
        "static": ["bonds", ["bonds"]], "pairs": [np.zeros((3, 2), int), "a"],
    }),
    "mean_energy": (potentials.mean_energy, {}, {"energy_fn": FUNCTIONS}),
    "displacement": (potentials.displacement, {"origin": R[0], "target": R[1]}, {
        "origin": ARRAYS, "target": [*ARRAYS, R[0, :3], R[0, :, :2], 1.0],
        "box": [*ARRAYS[1:], 4.0, [1.0, 1.0], [0.0, 1, 1], [np.nan, 1, 1], np.zeros((3, 3))],
    }),
    "distances": (potentials.distances, {"positions": R}, {
        "positions": [*ARRAYS, 1.0, R[0, 0]],
        "pairs": ["a", (0, 1), [(0, 4)], [(-1, 0)], [(0.0, 1.0)], [(0, 1, 2)]], "box": [4.0, [1.0]],
    }),
    "angle": (potentials.angle, {"positions": R, "atoms": (0, 1, 2)}, {
        "positions": [*ARRAYS, R[..., :1], R[0, 0]],
        "atoms": [None, 1, (0, 1), (0, 1, 4), (0, 1, -1), (0.0, 1.0, 2.0), "abc"],
        "box": [4.0, [1.0], np.zeros(3)],
    }),
    "dihedral": (potentials.dihedral, {"positions": R, "atoms": (0, 1, 2, 3)}, {
        "positions": [*ARRAYS, R[..., :2], R[0, 0]],
        "atoms": [None, 1, (0, 1, 2), (0, 1, 2, 4), (0, 1, 2, -1), (0.0, 1.0, 2.0, 3.0), "abcd"],
        "box": [4.0, [1.0], np.zeros(3)],
    }),
    "rdf": (potentials.rdf, {"box": np.ones(3)}, {
        "box": [*ARRAYS, 1.0, np.ones(4), [0.0, 1, 1], [np.nan, 1, 1], np.zeros((3, 3)), np.eye(4)],
        "r_max": [*NUMBERS[1:], 0.6], "bins": COUNTS, "species": [[0, 1], "ab", [[0, 1]]],
        "pair": [(0, 1), 3],
    }),
    "adf": (potentials.adf, {"cutoff": 1.0}, {
        "box": [*ARRAYS[1:], 1.0, np.ones(4)], "cutoff": NUMBERS, "bins": COUNTS,
    }),
    "dihedrals": (
        lambda atoms, **more: potentials.dihedrals(atoms, **more), {"atoms": (0, 1, 2, 3)}, {
        "atoms": [None, 1, (0, 1, 2), (0, 1, 2, -1), (0, 1, 2, 2), (0.0, 1.0, 2.0, 3.0), "abcd"],
        "bins": COUNTS, "box": [4.0, [1.0], np.zeros(3)],
    }),
    "average": (potentials.average, {"observable": OBSERVABLE, "positions": R}, {
        "observable": [None, fails, "rdf", potentials.Observable,
                       potentials.dihedrals((0, 1, 2, 9)),
                       potentials.Observable((np.ones(3),), fails),
                       potentials.Observable((np.ones(3),), lambda frame: frame[0, 0]),
                       potentials.Observable((np.ones(3),), lambda frame: None),
                       potentials.Observable((np.ones(3),), None),
                       potentials.Observable(None, lambda frame: frame[0])],
        "positions": [*ARRAYS, R[0, 0], R[:0], WITH_NAN],
        "weights": [*ARRAYS[1:], np.ones(5), -np.ones(6), np.full(6, np.nan)],
    }),
    "free_energy": (potentials.free_energy, {"probability": [0.5, 0.5]}, {
        "probability": [*ARRAYS, [-0.5, 1.0], np.nan, [np.nan, 1.0]], "kT": NUMBERS,
        "floor": [*NUMBERS[:6], [1.0, 2.0]],
    }),
    "intervals": (potentials.intervals, {"values": RNG.normal(size=(4, 3, 2))}, {
        "values": [*ARRAYS, np.ones(3), np.ones((0, 3)), np.ones((1, 3)), np.full((4, 3), np.nan)],
        "level": [*NUMBERS, 1.0, 2], "sound": ["a", np.ones((4, 3)), np.ones(4, bool)],
        "transform": [*FUNCTIONS, fails, lambda x: x * np.nan, lambda x: "a"],
        "measured": NUMBERS[1:], "common": FLAGS,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_bad_argument_is_named_in_a_sentence(name):
    """Foreign tracebacks, and calls that take what they cannot use."""
    function, good, bad = CASES[name]
    wrong = []
    for argument, values in bad.items():
        for value in values:
            word = {"rows": "data[", "observables": "observable"}.get(argument, argument)
            try:
                refuses(lambda a=argument, v=value: function(**{**good, a: v}), word)
            except BaseException as error:
                wrong.append(f"{argument}={value!r:.60}: {type(error).__name__} {error!s:.200}")
    assert not wrong, "\n".join(wrong)
