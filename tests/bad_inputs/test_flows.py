"""Bad arguments of flows, training and guides: each is refused in a sentence that names it."""

from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flowjax import bijections as bij
from flowjax.distributions import Normal, StandardNormal, Transformed

import stochgrad
from stochgrad import Gradient, flows
from stochgrad.numpyro import AutoFlow, PathGradientELBO, as_flow
from tests.bad_inputs import harness

refuses = partial(harness.refuses, quiet=False)

KEY = jax.random.key(0)
FLOW = Normal(jnp.zeros(2))
CONDITIONAL = Transformed(
    StandardNormal((2,)),
    bij.EmbedCondition(
        bij.Coupling(
            KEY, transformer=bij.Affine(), untransformed_dim=1, dim=2, cond_dim=1, nn_width=2,
            nn_depth=1,
        ),
        eqx.nn.Linear(3, 1, key=KEY),
        (3,),
    ),
)  # fmt: skip


def density(x):
    return -0.5 * jnp.sum(x**2)


def fails(*args):
    raise KeyError("no such thing")


TEXT, CLASS, NAN = "abc", dict, float("nan")
NO_FUNCTION = {"None": None, "number": 3.0, "text": TEXT, "array": jnp.ones(2)}
NO_DENSITY = NO_FUNCTION | {
    "fails": fails,
    "vector": lambda x: x,
    "pair": lambda x: (density(x), 0.0),
    "integer": lambda x: jnp.int32(1),
    "none": lambda x: None,
    "other dimension": lambda x: jnp.sum(x @ jnp.ones(3)),
}
NO_FLOW = {
    "None": None, "function": density, "class": Normal, "array": jnp.ones(2), "text": TEXT,
    "bijection": bij.Affine(jnp.zeros(2)), "NaN": Normal(jnp.array([jnp.nan, 0.0])),
}  # fmt: skip
NO_COUNT = {
    "None": None, "zero": 0, "negative": -1, "float": 2.5, "bool": True, "text": TEXT,
    "array": jnp.ones(2),
}  # fmt: skip
NO_NUMBER = {"None": None, "text": TEXT, "bool": True, "NaN": NAN, "array": jnp.ones(2)}
NO_KEY = {"None": None, "number": 0, "legacy": jax.random.PRNGKey(0), "two": jax.random.split(KEY)}
NO_FLAG = {"None": None, "number": 1, "text": "yes"}
NO_CONDITION = {"one too many": jnp.zeros(3), "text": TEXT}
NO_SAMPLES = {
    "None": None, "text": TEXT, "NaN": jnp.full((3, 2), jnp.nan), "columns": jnp.ones((3, 3)),
    "empty": jnp.ones((0, 2)), "scalar": jnp.float32(1.0), "bools": jnp.ones((3, 2), bool),
    "objects": np.array([[None, 1.0]]), "tree": {"x": jnp.ones((3, 2))}, "function": density,
}  # fmt: skip
NO_ESTIMATOR = {
    "None": None,
    "name": "stl",
    "bool": True,
    "above": 1.5,
    "NaN": NAN,
    "list": ["path"],
}
NO_OPTIMIZER = {
    "factory": optax.adam, "class": optax.GradientTransformation, "text": "adam", "number": 0.1,
}  # fmt: skip


def hill(x):
    return jax.value_and_grad(density)(x)


HILL = Gradient(lambda key, x: (), lambda key, x, s: (hill, s), initial=lambda key: jnp.zeros(2))


def scored(score):
    return HILL._replace(next=lambda key, x, s: (score, s))


NO_TARGET = {
    "None": None, "function": density, "class": Gradient, "next": HILL._replace(next=None),
    "init": HILL._replace(init=3), "initial": HILL._replace(initial=jnp.zeros(2)),
}  # fmt: skip
POSTERIOR = stochgrad.posterior(density, lambda x, y: -0.5 * (y - x[0]) ** 2, jnp.ones(4),
                                order="full")  # fmt: skip


def model():
    numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def guide():
    at = numpyro.param("at", jnp.zeros(2))
    numpyro.sample("x", dist.Normal(at, 1.0).to_event(1))


def set_up(**arguments):
    """A guide as far as SVI's start takes it."""
    guide = AutoFlow(**({"model": model, "flow": FLOW} | arguments))
    numpyro.handlers.seed(guide, 0)()


def chains(target):
    return stochgrad.mala(target, 0.1)


MODES = {
    "flow": FLOW, "log_density": density, "key": KEY, "chains": chains, "init": jnp.zeros((8, 2)),
    "num_chains": 8, "progress": False,
}  # fmt: skip
COUNTS = (
    "num_draws", "thin", "num_steps", "batch_size", "num_samples", "num_metropolis",
    "num_weighted", "most_rounds",
)  # fmt: skip
NOT_MADE = {k: v for k, v in NO_FLOW.items() if k not in ("function", "class")}
DRAWS = flows.sample(KEY, FLOW, 200, density)
ELBO = PathGradientELBO()
REVERSE = {"flow": FLOW, "log_density": density, "estimator": "path", "num_samples": 4}
OF_REVERSE = {
    "flow": NO_FLOW, "log_density": NO_DENSITY, "num_samples": NO_COUNT,
    "condition": NO_CONDITION,
}  # fmt: skip
LOG_Z = {"text": TEXT, "bool": True, "NaN": NAN, "array": jnp.ones(2)}
CONTINUOUS = {"vector_field": lambda x, t: -x, "shape": (2,)}
CALLS = [
    (flows.reverse_kl, REVERSE, OF_REVERSE | {"estimator": NO_ESTIMATOR}),
    (
        flows.renyi_bound, REVERSE | {"alpha": 0.5},
        OF_REVERSE | {"estimator": NO_ESTIMATOR, "num_importance": NO_COUNT,
                      "alpha": NO_NUMBER | {"one": 1, "negative": -1.0}},
    ),
    (
        flows.alpha_divergence, REVERSE,
        OF_REVERSE | {"alpha": NO_NUMBER | {"negative": -1.0}, "log_z": LOG_Z,
                      "estimator": {"number": 0.5, "auto": "auto"}},
    ),
    (flows.jensen_shannon, REVERSE, OF_REVERSE | {"log_z": LOG_Z, "estimator": {"score": "score"}}),
    (
        flows.forward_kl, {"flow": FLOW, "samples": jnp.ones((3, 2)), "estimator": "ml"},
        {"flow": NO_FLOW, "samples": NO_SAMPLES, "estimator": NO_ESTIMATOR | {"auto": "auto"},
         "batch_size": {"many": 9, "zero": 0, "text": TEXT}, "condition": NO_CONDITION},
    ),
    (
        flows.forward_kl, {"flow": FLOW, "samples": jnp.ones((3, 2))},
        {"score_of_target": {"None": None, "fails": fails, "scalar": density, "text": TEXT,
                             "rows": jnp.ones((2, 2)), "NaN": jnp.full((3, 2), jnp.nan)}},
    ),
    (
        flows.jeffreys,
        {"flow": FLOW, "log_density": density, "samples": jnp.ones((3, 2)), "forward": "ml"},
        OF_REVERSE | {"samples": NO_SAMPLES, "forward": {"auto": "auto", "None": None},
                      "reverse": {"name": "stl", "None": None}, "batch_size": {"many": 9}},
    ),
    (
        flows.fit_modes, MODES,
        dict.fromkeys(COUNTS, NO_COUNT)
        | {"flow": NOT_MADE, "log_density": NO_DENSITY, "key": NO_KEY, "num_chains": NO_COUNT,
           "chains": NO_FUNCTION | {"none": lambda target: None},
           "init": {"None": None, "text": TEXT, "shape": jnp.zeros((8, 3)), "fails": fails,
                    "one": jnp.zeros(2), "NaN": jnp.full((8, 2), jnp.nan)},
           "learning_rate": NO_NUMBER, "forward": {"name": "total", "None": None},
           "modes": {"number": 3.0, "text": TEXT, "fails": fails, "numbers": lambda x: x + 2.0,
                     "pair": lambda x: (x, x)},
           "tolerance": NO_NUMBER | {"above": 2.0}, "progress": NO_FLAG},
    ),
    (
        flows.mixture_of_normals, {"samples": jnp.ones((3, 2)), "num_components": 2},
        {"samples": {k: v for k, v in NO_SAMPLES.items() if k != "columns"},
         "num_components": NO_COUNT | {"many": 4},
         "defensive": NO_NUMBER | {"one": 1.0, "negative": -0.1}},
    ),
    (
        stochgrad.mala, {"target": POSTERIOR, "step_size": 0.1},
        {"target": NO_TARGET | {"gradient": HILL}, "step_size": NO_NUMBER | {"zero": 0.0},
         "temperature": NO_NUMBER | {"zero": 0.0}},
    ),
    (
        flows.draw_with_score, {"flow": FLOW, "key": KEY, "num_samples": 3},
        {"flow": NO_FLOW, "key": NO_KEY, "num_samples": NO_COUNT, "condition": NO_CONDITION},
    ),
    (
        flows.draw_with_score, {"flow": CONDITIONAL, "key": KEY, "num_samples": 3},
        {"condition": {"None": None, "shape": jnp.ones(2), "NaN": jnp.full(3, jnp.nan),
                       "text": TEXT}},
    ),
    (flows.parameters, {}, {"flow": {k: v for k, v in NO_FLOW.items() if k != "NaN"}}),
    (
        flows.sample, {"flow": FLOW, "key": KEY, "num_samples": 9, "log_density": density},
        {"flow": NO_FLOW, "key": NO_KEY, "num_samples": NO_COUNT, "condition": NO_CONDITION,
         "log_density": NO_DENSITY | {"NaN": lambda x: density(x) * jnp.nan}},
    ),
    (
        flows.ess_under_target,
        {"flow": FLOW, "samples": jnp.ones((3, 2)), "log_density": density},
        {"flow": NO_FLOW, "samples": NO_SAMPLES, "log_density": NO_DENSITY},
    ),
    (
        flows.metropolis, {"flow": FLOW, "log_density": density},
        {"flow": NO_FLOW, "log_density": NO_DENSITY, "condition": NO_CONDITION},
    ),
    (
        flows.through, {"flow": FLOW, "posterior": POSTERIOR},
        {"flow": NO_FLOW | {"base": StandardNormal((2,))},
         "posterior": {"None": None, "gradient": HILL, "class": stochgrad.Posterior},
         "condition": NO_CONDITION},
    ),
    (DRAWS.resample, {}, {"num_samples": {k: v for k, v in NO_COUNT.items() if k != "None"}}),
    (
        DRAWS.expectation, {},
        {"function": NO_FUNCTION | {"fails": fails, "pair": lambda x: (x, x),
                                    "NaN": lambda x: x * jnp.nan}},
    ),
    (
        flows.Continuous, CONTINUOUS,
        {"vector_field": NO_FUNCTION | {"fails": fails, "shape": lambda x, t: x[:1],
                                        "pair": lambda x, t: (x, x)},
         "shape": {"None": None, "number": 2, "negative": (-1,), "float": (2.0,), "text": TEXT},
         "cond_shape": {"number": 2, "text": TEXT}, "num_steps": NO_COUNT,
         "solver": {"class": diffrax.Tsit5, "text": "Tsit5", "number": 3}},
    ),
    (
        stochgrad.ascend, {"target": HILL, "optimizer": optax.sgd(0.1)},
        {"target": NO_TARGET, "optimizer": NO_OPTIMIZER | {"None": None}},
    ),
    (
        stochgrad.fit, {"objective": HILL, "key": KEY, "num_steps": 2, "progress": False},
        {
            "objective": {"None": None, "function": density, "class": Gradient}, "key": NO_KEY,
            "num_steps": NO_COUNT, "num_restarts": NO_COUNT, "every": NO_COUNT,
            "held_out_draws": NO_COUNT, "optimizer": NO_OPTIMIZER,
            "patience": {k: v for k, v in NO_COUNT.items() if k != "None"},
            "progress": NO_FLAG, "resume": NO_FLAG | {"without checkpoint": True},
            "checkpoint": {"number": 3, "empty": ""},
            "learning_rate": NO_NUMBER | {"zero": 0.0, "fails": fails, "text": lambda t: TEXT},
            "init": {"shape": jnp.zeros(3), "structure": {"a": jnp.zeros(2)}, "text": TEXT,
                     "NaN": jnp.full(2, jnp.nan), "fails": fails, "integers": jnp.zeros(2, int),
                     "class": CLASS, "of keys": lambda key: {"a": jnp.zeros(2)}},
            "held_out": {"function": density, "class": Gradient, "fails": scored(fails),
                         "other": HILL._replace(initial=lambda key: {"a": jnp.zeros(2)}),
                         "vector": scored(lambda x: (x, x)),
                         "NaN": scored(lambda x: (jnp.nan * density(x), x))},
        },
    ),
    (
        stochgrad.independence,
        {"propose": lambda key: (jnp.zeros(2), 0.0), "log_weight": density},
        {"propose": NO_FUNCTION | {"fails": fails, "alone": lambda key: jnp.zeros(2),
                                   "vector": lambda key: (jnp.zeros(2), jnp.zeros(2)),
                                   "integers": lambda key: (jnp.zeros(2, int), 0.0)},
         "log_weight": NO_FUNCTION},
    ),
    (
        PathGradientELBO, {"num_particles": 4},
        {"num_particles": NO_COUNT | {"few": 3},
         "vectorize_particles": {"text": TEXT, "None": None},
         "score_coef": {"None": None, "name": "path", "above": 2.0, "bool": True, "NaN": NAN},
         "objective": {"None": None, "name": "iwae", "list": ["renyi"]}, "alpha": {"for elbo": 0.5},
         "estimators": {"text": "score", "list": ["x"], "name": {"x": "stl"},
                        "number": {3: "score"}}},
    ),
    (
        PathGradientELBO, {"num_particles": 4, "objective": "renyi"},
        {"alpha": {"text": TEXT, "bool": True, "NaN": NAN, "one": 1, "negative": -1.0},
         "score_coef": {"between": 0.5}, "estimators": {"score": {"x": "score"}}},
    ),
    (
        PathGradientELBO, {"num_particles": 4, "objective": "jensen_shannon"},
        {"num_particles": {"one": 1}, "alpha": {"number": 0.5}},
    ),
    (
        as_flow, {"distribution": dist.Normal(0.0, 1.0)},
        {"distribution": NO_FUNCTION | {"class": dist.Normal, "fails": fails,
                                        "batch": dist.Normal(jnp.zeros(2), 1.0)},
         "params": {"without a function": 3.0}},
    ),
    (
        ELBO.loss, {"rng_key": KEY, "param_map": {"at": jnp.zeros(2)}, "model": model,
                    "guide": guide},
        {"rng_key": {"None": None, "number": 0}, "param_map": {"None": None, "list": [1.0]},
         "model": NO_FUNCTION, "guide": NO_FUNCTION},
    ),
    (
        ELBO.variances, {"rng_key": KEY, "param_map": {"at": jnp.zeros(2)}, "model": model,
                         "guide": guide},
        {"num_particles": NO_COUNT},
    ),
    (
        set_up, {},
        {"model": NO_FUNCTION,
         "flow": {"None": None, "number": 3, "class": Normal, "fails": fails,
                  "base": StandardNormal((2,)), "dimension": Normal(jnp.zeros(3)),
                  "no flow": lambda dim: dim, "NaN": Normal(jnp.full(2, jnp.nan)),
                  "conditional": CONDITIONAL},
         "condition": {"number": 3.0, "for none": lambda: jnp.zeros(2)},
         "prefix": {"None": None, "number": 3}, "init_loc_fn": {"text": TEXT}},
    ),
]  # fmt: skip
CASES = [
    pytest.param(function, {**good, name: bad}, name, id=f"{function.__name__}-{name}-{kind}")
    for function, good, table in CALLS
    for name, kinds in table.items()
    for kind, bad in kinds.items()
]


@pytest.mark.slow
@pytest.mark.parametrize(("function", "arguments", "name"), CASES)
def test_refused_in_words(function, arguments, name):
    refuses(lambda: function(**arguments), name)
