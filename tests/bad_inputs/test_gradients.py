"""Bad arguments of gradients, estimators and integrators: refused in a sentence that names them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flowjax import bijections as bij

import stochgrad
from stochgrad import Gradient, gradients, integrators
from stochgrad.federated import Diagonal, Full, LowRank, Surrogates
from stochgrad.kernels import systematic
from tests.bad_inputs.test_flows import (
    CLASS,
    KEY,
    NAN,
    NO_COUNT,
    NO_FUNCTION,
    NO_KEY,
    NO_TARGET,
    TEXT,
    fails,
    refuses,
)

TARGET = stochgrad.posterior(
    lambda t: -0.5 * jnp.sum(t**2),
    lambda t, x: -0.5 * jnp.sum((x - t) ** 2, axis=1),
    jnp.ones((6, 2)),
    batch_size=2,
)
NAMED = TARGET._replace(
    log_density=lambda p, b: TARGET.log_density(p["a"], b), initial=lambda key: {"a": jnp.zeros(2)}
)
NO_POSTERIOR = {
    "None": None,
    "function": fails,
    "class": stochgrad.Posterior,
    "gradient": gradients.minibatch(TARGET),
    "density": TARGET._replace(log_density=None),
    "batches": TARGET._replace(batches=None),
}
X = jnp.array([1.0, -2.0])
NO_POINT = {"None": None, "text": TEXT, "list": ["a"], "bools": jnp.ones(2, bool), "class": CLASS}
NO_SCORE = NO_POINT | {"shape": jnp.ones(3)}
NO_ROWS = {
    "None": None, "text": TEXT, "NaN": jnp.array([1.0, jnp.nan]), "scalar": jnp.float32(1.0),
    "objects": np.array([None, 1.0]), "masked": np.ma.array([1.0, 2.0], mask=[0, 1]),
    "function": fails,
}  # fmt: skip
NO_MATRIX = {"None": None, "text": TEXT, "row": jnp.ones(4), "few": jnp.ones((2, 1)),
             "NaN": jnp.full((4, 2), jnp.nan), "integers": jnp.ones((4, 2), int)}  # fmt: skip


def double(x):
    return 2.0 * x, jnp.log(2.0) * x.size


NO_MAP = NO_FUNCTION | {
    "fails": fails, "alone": lambda x: x, "shape": lambda x: (x[:1], jnp.sum(x)),
}  # fmt: skip
GOOD = Surrogates(X, jnp.ones((3, 2)), Full(jnp.ones((3, 2, 2))))


def score_of(**parts):
    return GOOD._replace(**parts).score(1, X)


def log_density_of(**arguments):
    return GOOD.log_density(**({"client": 0, "position": X} | arguments))


CALLS = [
    (gradients.minibatch, {}, {"posterior": NO_POSTERIOR}),
    (gradients.as_gradient, {}, {"target": NO_TARGET}),
    (
        stochgrad.control_variate, {"posterior": TARGET, "center": X},
        {"posterior": NO_POSTERIOR,
         "center": {"None": None, "text": TEXT, "NaN": X * jnp.nan, "shape": jnp.ones(3),
                    "integers": jnp.ones(2, int), "structure": {"b": X}, "class": CLASS,
                    "empty": {}, "function": fails}},
    ),
    (
        stochgrad.control_variate, {"posterior": NAMED},
        {"center": {"structure": {"b": X}, "leaf": {"a": X[:1]}, "more": {"a": X, "b": X},
                    "NaN": {"a": X * jnp.nan}, "array": X}},
    ),
    (
        stochgrad.svrg, {"posterior": TARGET},
        {"posterior": NO_POSTERIOR, "period": {k: v for k, v in NO_COUNT.items() if k != "None"}},
    ),
    (
        stochgrad.saga, {"posterior": TARGET},
        {"posterior": NO_POSTERIOR,
         "memory_limit": {"None": None, "text": TEXT, "bool": True, "zero": 0, "NaN": NAN}},
    ),
    (gradients.leave_one_out, {}, {"rewards": NO_ROWS | {"one": jnp.ones(1)}}),
    (
        gradients.score_function, {"rewards": X, "scores": X},
        {"rewards": NO_ROWS | {"matrix": jnp.ones((2, 2)), "three": jnp.ones(3)},
         "scores": NO_ROWS | {"three": jnp.ones(3), "empty": {}, "leaf": {"a": jnp.ones(3)}},
         "baseline": {"None": None, "name": "mean", "list": ["none"], "bool": True}},
    ),
    (
        gradients.directional_derivatives,
        {"function": lambda x: x, "position": X, "key": KEY, "count": 2},
        {"function": NO_FUNCTION | {"fails": fails}, "key": NO_KEY, "count": NO_COUNT,
         "position": {"None": None, "text": TEXT, "integers": jnp.ones(2, int), "empty": {}}},
    ),
    (
        gradients.leave_one_out_coefficients,
        {"total": jnp.ones((4, 2)), "score": jnp.ones((4, 2))},
        {"total": NO_MATRIX, "score": NO_MATRIX | {"shape": jnp.ones((5, 2))}},
    ),
    (
        gradients.by_inverse, {"inverse": double, "y": X, "score": X},
        {"inverse": NO_FUNCTION | {"fails": fails, "alone": lambda x: x}, "y": NO_POINT,
         "score": NO_POINT},
    ),
    (
        gradients.elementwise, {"forward": double, "x": X, "score": X},
        {"forward": NO_MAP, "x": NO_POINT, "score": NO_SCORE},
    ),
    (
        gradients.triangular, {"forward": double, "x": X, "score": X, "slope": X},
        {"forward": NO_MAP, "x": NO_POINT | {"scalar": jnp.float32(1.0)}, "score": NO_SCORE,
         "slope": NO_SCORE, "tolerance": {"text": TEXT, "zero": 0.0, "bool": True, "NaN": NAN}},
    ),
    (
        gradients.dense, {"forward": double, "x": X, "score": X, "name": "a layer"},
        {"forward": NO_MAP, "x": NO_POINT, "score": NO_SCORE},
    ),
    (
        gradients.path_log_density, {"value": X, "log_density": X, "score": X},
        {"value": NO_POINT, "score": NO_SCORE, "log_density": NO_SCORE,
         "score_coef": {"None": None, "text": TEXT, "bool": True, "shape": jnp.ones(3)}},
    ),
    (
        gradients.push_score, {"layer": bij.Affine(jnp.zeros(2)), "x": X, "score": X},
        {"layer": {"None": None, "class": bij.Affine, "function": fails, "number": 3},
         "x": NO_POINT | {"shape": jnp.ones(3)}, "score": NO_SCORE},
    ),
    (
        score_of, {},
        {"slope": {"None": None, "structure": {"a": jnp.ones((3, 2))}, "shape": jnp.ones((3, 4)),
                   "scalar": jnp.float32(0.0), "NaN": jnp.full((3, 2), jnp.nan)},
         "precision": {"text": TEXT, "array": jnp.ones((3, 2, 2)), "class": Full,
                       "clients": Full(jnp.ones((2, 2, 2))), "size": Full(jnp.ones((3, 4, 4))),
                       "NaN": Full(jnp.full((3, 2, 2), jnp.nan)), "list": Full([1.0]),
                       "diagonal": Diagonal(jnp.ones((3, 3))),
                       "rank": LowRank(jnp.ones((3, 1, 2)), jnp.ones((3, 2)), jnp.ones((3, 2))),
                       "rest": LowRank(jnp.ones((3, 1, 2)), jnp.ones((3, 1)), jnp.ones(3))},
         "origin": {"text": TEXT, "integers": jnp.ones(2, int), "NaN": X * jnp.nan}},
    ),
    (
        log_density_of, {},
        {"client": {"None": None, "beyond": 3, "negative": -1, "float": 1.0, "bool": True,
                    "array": jnp.ones(2, int)},
         "position": {"None": None, "shape": jnp.ones(3), "structure": {"a": X}}},
    ),
    (GOOD.scaled, {}, {"by": {"None": None, "number": 2.0, "short": jnp.ones(2), "text": TEXT}}),
    (
        systematic, {"key": KEY, "weights": X**2, "count": 3},
        {"key": NO_KEY, "count": NO_COUNT,
         "weights": NO_ROWS | {"negative": X, "empty": jnp.ones(0)}},
    ),
    (
        integrators.splitting, {},
        {"word": {"None": None, "number": 3, "list": ["B", "A", "O"], "letters": "BAX",
                  "empty": "", "no kick": "AO", "class": str}},
    ),
    (
        integrators.integrator_of, {},
        {"name": {"None": None, "number": 3, "list": ["BAOAB"], "letters": "XYZ",
                  "lower": "baoab"}},
    ),
]  # fmt: skip
WORDS = {"word": "splitting", "name": "integrator"}
CASES = [
    pytest.param(function, {**good, name: bad}, WORDS.get(name, name),
                 id=f"{function.__name__}-{name}-{kind}")
    for function, good, table in CALLS
    for name, kinds in table.items()
    for kind, bad in kinds.items()
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("function", "arguments", "name"), CASES)
def test_refused_in_words(function, arguments, name):
    refuses(lambda: function(**arguments), name)


@pytest.mark.parametrize("score", ["None", "fails", "alone", "vector", "structure"])
def test_what_a_gradient_returns_is_looked_at_when_it_runs(score):
    bad = {
        "None": None,
        "fails": fails,
        "alone": lambda x: x,
        "vector": lambda x: (x, x),
        "structure": lambda x: (jnp.sum(x), {"a": x}),
    }[score]
    optax = pytest.importorskip("optax")
    target = Gradient(lambda key, x: (), lambda key, x, s: (bad, s))
    kernel = stochgrad.ascend(target, optax.sgd(0.1))

    def run():
        return stochgrad.sample(KEY, kernel, init=X, num_samples=1, progress=False)

    refuses(run, "target")
