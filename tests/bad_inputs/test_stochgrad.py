"""Bad input of the samplers, of what tunes them, and of the loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stochgrad
from stochgrad import Gradient, Kernel, Online
from tests.bad_inputs.harness import Box, crossed, failures
from tests.helpers import gaussian_posterior

TARGET = gaussian_posterior(batch_size=5)[0]
KERNEL = stochgrad.sgld(TARGET, 0.01)
KEY = jax.random.key(0)
X = np.ones((20, 2), np.float32)
ZEROS = np.zeros(2, np.float32)

NO_NUMBER = ["0.1", None, True, np.nan, np.inf, -1.0, [0.1], {}, 1j, np.ones(3), Box(), b"1"]
NO_POSITIVE = [*NO_NUMBER, 0.0, 0, np.array(-1.0)]
NO_COUNT = [0, -1, 1.5, 2.0, "3", None, True, [1], np.ones(1, int), np.float32(2), Box(), np.nan]
NO_FLAG = ["yes", 1, 0, None, [], np.ones(2, bool), 1.0]
NO_KEY = [0, None, "key", jax.random.PRNGKey(0), jax.random.split(KEY, 2), np.uint32(3), KEY.dtype]
NO_FUNCTION = [None, 3, "f", jnp.ones(2), [len]]
NO_TARGET = [
    None,
    3,
    "target",
    Box(),
    X,
    lambda q: q,
    TARGET.log_density,
    stochgrad.Posterior,
    KERNEL,
]
NO_CHOICE = [None, 3, "", "other", ["normal"], True, Box()]
NO_POSITION = [
    "here", np.array([1, 2]), {}, np.array([np.nan, 0.0]), np.array([np.inf, 0]), np.zeros(3),
    {"w": ZEROS}, [None], np.array(["a", "b"]), np.array([1j, 0]), Box(), np.zeros((0,)),
    np.array([True, False]), np.zeros((3, 2)), lambda key: "here", lambda key: jnp.zeros(5),
    lambda: ZEROS, np.array([object(), object()]),
]  # fmt: skip
NO_NOISE = ["uniform", None, 3, True, ["normal"], Box()]
NO_SPREAD = [
    0.0, -1.0, np.nan, "1", True, np.array([1.0, -2.0]), {"w": 1.0}, np.array([np.inf, 1.0]),
    np.ones((3, 3)), [], np.array(["a", "b"]), Box(), np.array([True, True]), 1j,
]  # fmt: skip
NO_DATA = [
    None, "data", [], {}, 3, np.float32(1), np.array([["a", "b"]] * 20), np.full((20, 2), np.nan),
    np.array([None] * 20), np.ma.array(X, mask=X > 0), (X, X[:3]), X[:0], lambda: X,
    np.arange(20) + 2**40, 1.7e9 + np.arange(20.0), np.full(20, 1e300), [[1, 2], [3]],
    np.array(["2020-01-01"] * 20, "M8[D]"), Box(), np.array(3.0),
    [1, "a"], {"x": "text"}, np.array([{}] * 20),
]  # fmt: skip


def zero(position):
    return jnp.zeros(2)


def add(summary, position):
    return summary + position


def log_prior(q):
    return -0.5 * jnp.sum(q**2)


def log_likelihood(q, batch):
    return -0.5 * jnp.sum((batch - q[None]) ** 2, axis=1)


def run(**changes):
    """A short run with some arguments changed."""
    arguments = {"key": KEY, "kernel": KERNEL, "init": ZEROS, "num_samples": 2, "progress": False}
    return stochgrad.sample(**{**arguments, **changes})


def of_functions(**changes):
    """A run on a posterior of other functions."""
    functions = {"log_prior": log_prior, "log_likelihood": log_likelihood, **changes}
    target = stochgrad.posterior(**functions, data=X, batch_size=5)
    return run(kernel=stochgrad.sgld(target, 0.01))


def posterior(**changes):
    functions = {"log_prior": log_prior, "log_likelihood": log_likelihood, "data": X}
    return stochgrad.posterior(**{**functions, "batch_size": 5, **changes})


def sghmc_at_once(**changes):
    """A kernel and its first state, where trees of numbers meet the position."""
    kernel = stochgrad.sghmc(**{"target": TARGET, "step_size": 0.01, "friction": 1.0, **changes})
    return kernel.init(jnp.asarray(ZEROS), KEY)


def sgnht_at_once(**changes):
    kernel = stochgrad.sgnht(**{"target": TARGET, "step_size": 0.01, "diffusion": 1.0, **changes})
    return kernel.init(jnp.asarray(ZEROS), KEY)


NO_STEP_SIZE = [*NO_POSITIVE, lambda step: -1.0, lambda: 0.1, lambda step: "a", lambda step: None]
NO_STEP_SIZE += [lambda step: jnp.ones(2), optax.adam(0.1)]
NO_TEMPERATURE = [*NO_POSITIVE, lambda step: -1.0, lambda: 1.0]
NO_KERNEL = [
    None, 3, "sgld", Box(), stochgrad.sgld, TARGET, optax.adam(0.1), lambda q: q,
    Kernel(None, None), Kernel(KERNEL.init, 3), Kernel(lambda q: q, KERNEL.step),
    Kernel(KERNEL.init, lambda key: key), Kernel(lambda q, key: q, KERNEL.step),
    Kernel(KERNEL.init, lambda key, state: state), Kernel,
    Kernel(lambda q, key: 1 / 0, KERNEL.step),
    Kernel(KERNEL.init, lambda key, state: (state, "info")),
    Kernel(KERNEL.init, lambda key, state: (state._replace(position=jnp.zeros(5)), ())),
    stochgrad.sgld(Gradient(lambda key, q: (), lambda key, q, state: q), 0.1),
    stochgrad.sgld(Gradient(lambda key, q: (), lambda key, q, state: (lambda q: q, state)), 0.1),
]  # fmt: skip
NO_COLLECT = [
    3, "position", [len], Box(), jnp.ones(2), lambda: 0, lambda state: "a",
    lambda state: state.velocity, lambda state: None,
    Online(3, 4), Online(None, None), Online(zero, None), Online(zero, add, 3),
    Online(lambda: 0, add), Online(zero, lambda summary: summary),
    Online(zero, lambda summary, q: {"s": q}), Online(zero, lambda summary, q: "a"),
    Online(zero, add, lambda summary: "a"), Online(zero, add, lambda: True),
    Online(zero, add, lambda summary: jnp.zeros(2, bool)), Online,
]  # fmt: skip
DYNAMICS = {"step_size": NO_STEP_SIZE, "temperature": NO_TEMPERATURE, "noise": NO_NOISE}
OVER = {"kernel_factory": stochgrad.sgld, "target": TARGET, "step_size": 0.01}
LOOKING = {"key": KEY, "position": ZEROS}
SEARCH = {"posterior": TARGET, "key": KEY, "init": ZEROS, "num_steps": 10}

TABLE = {
    "posterior": crossed(
        posterior,
        {},
        {
            "log_prior": NO_FUNCTION,
            "log_likelihood": NO_FUNCTION,
            "data": NO_DATA,
            "batch_size": [*NO_COUNT, 21],
            "order": NO_CHOICE,
            "layout": NO_CHOICE,
            "resident_bytes": [],
            "mesh": [3, "mesh", Box(), True, jax.devices()],
        },
    )
    + crossed(
        partial(posterior, order="streamed"),
        {},
        {"resident_bytes": [*NO_COUNT, 4], "mesh": ["mesh"], "data": NO_DATA[:6]},
    ),
    "functions": crossed(
        of_functions,
        {},
        {
            "log_prior": [
                lambda q: q,
                lambda q: None,
                lambda q: "a",
                lambda: 0.0,
                lambda q: q["w"],
                lambda q: 1 / 0,
                lambda q, batch: 0.0,
                lambda q: (0.0, 1.0),
                lambda q: 1j,
                lambda q: {},
                lambda q: jnp.nan,
                lambda q: -jnp.inf,
                lambda q: float(q[0]),
                lambda q: np.sum(q) if q[0] > 0 else 0.0,
            ],
            "log_likelihood": [
                lambda q, b: 0.0,
                lambda q, b: None,
                lambda q: 0.0,
                lambda q, b: b,
                lambda q, b: b @ q["w"],
                lambda q, b: jnp.zeros(3),
                lambda q, b: "a",
                lambda q, b: jnp.full(len(b), jnp.nan),
                lambda q, b: np.asarray(b @ q),
                lambda q, b: jnp.ones(len(b), int),
                lambda q, b: [0.0] * len(b) + [1.0],
                lambda q, b: jnp.ones(len(b), bool),
                lambda q, b: jnp.ones(len(b), complex),
            ],
        },
    ),
    "sample": crossed(
        run,
        {},
        {
            "key": NO_KEY,
            "kernel": NO_KERNEL,
            "init": [*NO_POSITION, None],
            "num_samples": NO_COUNT,
            "num_warmup": [n for n in NO_COUNT if n != 0 or isinstance(n, bool)],
            "thin": NO_COUNT,
            "num_chains": NO_COUNT,
            "share_batches": NO_FLAG,
            "progress": NO_FLAG,
            "resume": NO_FLAG,
            "collect": NO_COLLECT,
            "chunk_size": [n for n in NO_COUNT if n is not None],
            "every": list(NO_NUMBER),
        },
    )
    + crossed(partial(run, num_chains=2), {}, {"init": [np.zeros((3, 2), np.float32)]}),
    "sgld": crossed(
        stochgrad.sgld, {"target": TARGET, "step_size": 0.01}, {"target": NO_TARGET, **DYNAMICS}
    ),
    "sghmc": crossed(
        sghmc_at_once,
        {},
        {
            "target": NO_TARGET,
            **DYNAMICS,
            "friction": [*NO_SPREAD, None],
            "mass": [*NO_SPREAD, None],
            "noise_estimate": [-1.0, np.nan, "on", True, {"w": 0.1}, np.ones((3, 3)), None, Box()],
            "integrator": [None, 3, "", "LEAP", "AXB", ["BAOAB"], True, "baoab", Box()],
        },
    ),
    "psgld": crossed(
        stochgrad.psgld,
        {"target": TARGET, "step_size": 0.01},
        {
            "target": NO_TARGET,
            **DYNAMICS,
            "decay": [*NO_NUMBER, 1.0, 2.0],
            "regularizer": NO_POSITIVE,
            "correction": NO_FLAG,
            "adapt_steps": [n for n in NO_COUNT if n is not None],
        },
    ),
    "sgnht": crossed(
        sgnht_at_once,
        {},
        {
            "target": NO_TARGET,
            **DYNAMICS,
            "diffusion": NO_POSITIVE,
            "per_coordinate": NO_FLAG,
            "thermal_mass": NO_POSITIVE,
            "mass": [*NO_SPREAD, None],
        },
    ),
    "cyclical": crossed(
        stochgrad.cyclical,
        {**OVER, "steps_per_cycle": 10},
        {
            "kernel_factory": [*NO_FUNCTION, KERNEL, lambda target: KERNEL, lambda *a, **k: None],
            "target": NO_TARGET,
            "step_size": NO_POSITIVE,
            "steps_per_cycle": [*NO_COUNT, 1],
            "exploration": [*NO_NUMBER, 1.0, 1.5],
            "temperature": NO_POSITIVE,
            "exploration_temperature": NO_NUMBER,
        },
    ),
    "replica_exchange": crossed(
        stochgrad.replica_exchange,
        {**OVER, "temperatures": (1.0, 2.0)},
        {
            "kernel_factory": [*NO_FUNCTION, KERNEL, lambda target: KERNEL, lambda *a, **k: None],
            "target": NO_TARGET,
            "step_size": [*NO_POSITIVE[:6], [0.1], [0.1, "a"], [0.1, -1.0], {}, []],
            "temperatures": [
                None,
                1.0,
                (1.0,),
                (2.0, 1.0),
                (1.0, 1.0),
                "12",
                (1.0, np.nan),
                [1.0, "a"],
                {},
                (0.0, 1.0),
                (True, 2.0),
                [],
            ],
            "swap_every": NO_COUNT,
            "energy_batches": [*NO_COUNT, 1],
        },
    ),
    "find_center": crossed(
        stochgrad.find_center,
        SEARCH,
        {
            "posterior": [*NO_TARGET, stochgrad.gradients.minibatch(TARGET)],
            "key": NO_KEY,
            "init": NO_POSITION,
            "num_steps": [*NO_COUNT, 9],
            "learning_rate": NO_POSITIVE,
            "optimizer": [3, "adam", optax.adam, Box(), lambda g: g],
            "passes": [n for n in NO_COUNT if n != 0 or isinstance(n, bool)],
        },
    ),
    "find_mass": crossed(
        stochgrad.find_mass,
        {"posterior": TARGET, **LOOKING},
        {
            "posterior": [*NO_TARGET, stochgrad.gradients.minibatch(TARGET)],
            "key": NO_KEY,
            "position": [p for p in NO_POSITION if not callable(p)] + [None, lambda key: ZEROS],
            "num_probes": NO_COUNT,
        },
    ),
    "find_step_size": crossed(
        stochgrad.find_step_size,
        {"target": TARGET, **LOOKING, "friction": 1.0},
        {
            "target": NO_TARGET,
            "key": NO_KEY,
            "position": [p for p in NO_POSITION if not callable(p)] + [None, lambda key: ZEROS],
            "friction": NO_SPREAD,
            "mass": [*NO_SPREAD, None],
            "integrator": [None, 3, "", "LEAP", ["BAOAB"], Box()],
            "bias": NO_POSITIVE,
            "temperature": NO_POSITIVE,
        },
    ),
    "online": crossed(stochgrad.moments, {}, {"full": NO_FLAG})
    + crossed(stochgrad.swag, {}, {"rank": [*NO_COUNT, 1]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_bad_input_gets_one_sentence(name):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        wrong = failures(TABLE[name])
    assert not wrong, "\n".join([f"{len(wrong)} of {len(TABLE[name])}", *wrong])
