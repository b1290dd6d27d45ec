"""Bad input to what leads from a model to a verdict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.bad_inputs.harness import Box, crossed, failures

NO_KEY = [None, 3, "key", np.zeros(2, np.uint32), jax.random.split(jax.random.key(0), 2)]
NO_COUNT = [None, 0, -1, 2.5, "3", True, np.nan]
NO_NUMBER = [None, 0.0, -1.0, np.nan, np.inf, "1", True, np.ones(2)]
NO_POSTERIOR = [None, 3, "target", Box(), np.ones(3), {}]
NO_START = ["0", [], {}, np.array([np.nan]), jnp.arange(3)]
NO_DRAWS = [None, 3, np.zeros((2, 3)), {}, Box(), "draws"]

TARGET = stochgrad.posterior(
    lambda q: -0.5 * q**2, lambda q, x: -0.5 * (x - q) ** 2, jnp.ones(40), batch_size=8
)
KEY, START = jax.random.key(0), jnp.float32(0.5)
SCALE, NONE = np.ones(3), np.zeros((3, 0))


def infer(key=KEY, model=TARGET, **options):
    return stochgrad.infer(key, model, **{"init": START, "progress": False, **options})


def warm_up(target=TARGET, key=KEY, **options):
    return stochgrad.warm_up(key, target, **{"init": START, **options})


def pathfinder(posterior=TARGET, key=KEY, **options):
    return stochgrad.pathfinder(key, posterior, **{"init": START, **options})


def mean_field(posterior=TARGET, key=KEY, **options):
    return stochgrad.mean_field(key, posterior, **{"init": START, **options})


def precision(scale=SCALE, basis=NONE, values=NONE[0], rate=1.0):
    return stochgrad.Precision(scale, basis, values, rate)


def nuts(posterior=TARGET, step_size=0.1, inverse_mass=SCALE[:1]):
    return stochgrad.nuts(posterior, step_size, inverse_mass).init(START, KEY)


TABLE = {
    "infer": crossed(
        infer,
        {},
        {
            "key": NO_KEY,
            "model": NO_POSTERIOR,
            "method": [None, "gibbs", 3],
            "batch_size": [8],
            "num_samples": [*NO_COUNT, 5],
            "num_chains": NO_COUNT,
            "target_ess": NO_NUMBER,
            "max_seconds": NO_NUMBER[1:],
            "max_gradients": NO_NUMBER[1:],
            "progress": [None, 1, "yes"],
            "init": NO_START,
        },
    ),
    "warm_up": crossed(
        warm_up,
        {},
        {
            "target": [*NO_POSTERIOR, stochgrad.Gradient(lambda k, q: None, lambda k, q, s: None)],
            "key": NO_KEY,
            "num_chains": NO_COUNT,
            "bias": NO_NUMBER,
            "rate": NO_NUMBER,
            "start": [None, "mode", 3],
            "max_windows": [*(x for x in NO_COUNT if x != 0), "all"],
            "max_seconds": NO_NUMBER[1:],
            "kernel_at": [3, "kernel"],
            "report": [None, 3, "print"],
            "init": NO_START,
        },
    ),
    "pathfinder": crossed(
        pathfinder,
        {},
        {
            "posterior": NO_POSTERIOR,
            "key": NO_KEY,
            "num_paths": NO_COUNT[1:],
            "num_draws": NO_COUNT,
            "max_iterations": NO_COUNT,
            "passes": [-1, 2.5, "3", None],
            "init": NO_START,
        },
    ),
    "mean_field": crossed(
        mean_field,
        {},
        {
            "posterior": NO_POSTERIOR,
            "key": NO_KEY,
            "num_steps": [*NO_COUNT, 5],
            "num_draws": NO_COUNT,
            "learning_rate": NO_NUMBER,
            "init": NO_START,
        },
    ),
    "precision": crossed(
        precision,
        {},
        {
            "scale": [None, "a", np.array([1.0, 0.0, 1.0]), np.array([np.nan, 1, 1]), 3.0, []],
            "basis": [None, "a", np.zeros((2, 1)), np.full((3, 0, 1), 0.0)],
            "values": [None, "a", np.ones(2), np.zeros((1, 1))],
            "rate": NO_NUMBER,
        },
    )
    + crossed(lambda factor: factor * precision(), {}, {"factor": [0.0, -1.0, np.nan]}),
    "nuts": crossed(
        nuts,
        {},
        {
            "posterior": NO_POSTERIOR,
            "step_size": NO_NUMBER,
            "inverse_mass": [None, "a", np.ones(2), np.array([0.0]), np.array([np.nan]), [-1.0]],
        },
    ),
    "diagnose": crossed(stochgrad.diagnose, {}, {"draws": NO_DRAWS})
    + crossed(stochgrad.diagnostics.bias_reasons, {}, {"draws": NO_DRAWS})
    + crossed(stochgrad.numpyro.to_draws, {}, {"mcmc": NO_DRAWS}),
    "sghmc": crossed(
        lambda **given: stochgrad.sghmc(TARGET, 0.1, **given).init(jnp.ones(3), KEY),
        {"mass": precision(), "friction": precision()},
        {
            "friction": [1.0, np.eye(3), precision(2 * SCALE)],
            "mass": [1.0, precision(SCALE[:2], NONE[:2])],
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_bad_input_gets_one_sentence(name):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        wrong = failures(TABLE[name])
    assert not wrong, "\n".join([f"{len(wrong)} of {len(TABLE[name])}", *wrong])
