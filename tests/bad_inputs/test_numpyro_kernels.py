"""Bad input of the kernels for numpyro's MCMC."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import stochgrad
import stochgrad.numpyro as sn
from tests.bad_inputs.harness import Box, crossed, failures
from tests.bad_inputs.test_stochgrad import (
    NO_COUNT,
    NO_FLAG,
    NO_FUNCTION,
    NO_NOISE,
    NO_POSITIVE,
    NO_SPREAD,
    NO_STEP_SIZE,
    NO_TEMPERATURE,
)

Y = np.random.default_rng(0).normal(size=40).astype(np.float32)


def model(y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", len(y), subsample_size=10):
        numpyro.sample("y", dist.Normal(w[0], 1.0), obs=numpyro.subsample(y, 0))


def begun(kernel, *first, **settings):
    """The first state of a kernel, as MCMC asks for it."""

    def begin(**changes):
        arguments = {"model": model, **settings, **changes}
        init_params = arguments.pop("init_params", None)
        made = kernel(arguments.pop("model"), *first, **arguments)
        return made.init(jax.random.key(0), 10, init_params, (Y,), {})

    begin.__name__ = kernel.__name__
    return begin


BASE = {
    "model": [*NO_FUNCTION, Box()],
    "gradient": [None, 3, "", "saga ", ["svrg"], True],
    "batch_size": [0, -1, 2.5, "10", True, 41, [10], {"other": 10}, {"rows": 0}, {"rows": "a"}],
    "order": [None, 3, "random", "streamed", ["iid"]],
    "layout": [None, 3, "columns"],
    "num_steps": NO_COUNT,
    "share_batches": NO_FLAG,
}
NO_SITE = [v for v in NO_SPREAD if not isinstance(v, dict)] + [{"v": 1.0}, {"w": np.ones(3)}]

TABLE = {
    "SGLD": crossed(
        begun(sn.SGLD, step_size=0.01),
        {},
        {
            **BASE,
            "step_size": [v for v in NO_STEP_SIZE if v is not None],
            "temperature": NO_TEMPERATURE,
            "noise": NO_NOISE,
            "init_params": [
                {"v": jnp.zeros(2)},
                {"w": jnp.zeros(3)},
                {},
                {"w": jnp.full(2, jnp.nan)},
                jnp.zeros(2),
            ],
        },
    ),
    "SGHMC": crossed(
        begun(sn.SGHMC, step_size=0.01, friction=1.0, mass=1.0, gradient="minibatch"),
        {},
        {
            "step_size": [v for v in NO_STEP_SIZE if v is not None],
            "friction": NO_SITE,
            "mass": NO_SITE,
            "noise_estimate": [-1.0, "on", np.nan, True, {"v": 0.1}],
            "integrator": [None, 3, "", "LEAP", ["BAOAB"]],
            "temperature": NO_TEMPERATURE,
        },
    ),
    "PSGLD": crossed(
        begun(sn.PSGLD, step_size=0.01),
        {},
        {"step_size": NO_STEP_SIZE, "decay": [1.0, -1, "a", None], "correction": NO_FLAG},
    ),
    "SGNHT": crossed(
        begun(sn.SGNHT, step_size=0.01, diffusion=1.0),
        {},
        {"step_size": NO_STEP_SIZE, "diffusion": NO_POSITIVE, "per_coordinate": NO_FLAG},
    ),
    "Cyclical": crossed(
        begun(sn.Cyclical, stochgrad.sgld, step_size=0.01, steps_per_cycle=10),
        {},
        {"step_size": NO_POSITIVE, "steps_per_cycle": [*NO_COUNT, 1], "exploration": [1.0, "a"]},
    ),
    "ReplicaExchange": crossed(
        begun(sn.ReplicaExchange, stochgrad.sgld, step_size=0.01, temperatures=(1.0, 2.0)),
        {},
        {"temperatures": [None, 1.0, (2.0, 1.0), "12"], "swap_every": NO_COUNT},
    ),
}


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that answers equal arguments with its first result; what fails is tried anew."""
    results = {}

    def call(*args, **options):
        words = repr((args, options))
        if words not in results:
            results[words] = function(*args, **options)
        return results[words]

    return call


@pytest.fixture(scope="module")
def posteriors():
    """The good model is read once, not again for every bad setting of a kernel."""
    return once(stochgrad.from_numpyro)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_bad_input_gets_one_sentence(name, posteriors, monkeypatch):
    monkeypatch.setattr("stochgrad.interop.numpyro._sg_kernel.from_numpyro", posteriors)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        wrong = failures(TABLE[name])
    assert not wrong, "\n".join([f"{len(wrong)} of {len(TABLE[name])}", *wrong])
