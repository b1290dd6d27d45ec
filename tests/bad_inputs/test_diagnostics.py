"""Every argument of ``stochgrad.diagnostics`` crossed with values of the wrong kind."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import diagnostics
from stochgrad.diagnostics import Problem, gaussian
from tests.bad_inputs.harness import refuses


def fails(*args, **kwargs):
    raise RuntimeError("inside")


def draws_of(x, h=0.1):
    shape = np.shape(jax.tree.leaves(x)[0])[:2] if jax.tree.leaves(x) else (1, 1)
    finite = np.ones(shape, bool)
    for leaf in jax.tree.leaves(x):
        finite &= np.isfinite(leaf).all(tuple(range(2, np.ndim(leaf))))
    return stochgrad.Draws(x, {}, finite, np.full(shape[0], -1), attrs={"step_size": h})


RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 20, 3)).astype(np.float32)
DRAWS, FINE = draws_of(X), draws_of(X[:, :, ::-1], 0.05)
WITH_NAN = draws_of(np.where(np.arange(20)[:, None] == 3, np.nan, X))
TARGET = stochgrad.posterior(
    lambda q: -0.5 * jnp.sum(q**2),
    lambda q, x: -0.5 * jnp.sum((x - q[None]) ** 2, 1),
    np.ones((4, 3), np.float32),
    batch_size=2,
)
OTHER = stochgrad.posterior(lambda q: -0.5 * q["a"] ** 2, lambda q, x: x, np.ones(4), batch_size=2)
KEY = jax.random.key(0)

NUMBERS = [None, "1", True, np.nan, np.inf, -1.0, 0.0, [1.0, 2.0], object(), 1j]
COUNTS = [None, "3", True, 0, -2, 2.5, [1], 1.0]
FLAGS = [None, 1, "yes", np.ones(2)]
FUNCTIONS = [1.0, "sgld", X, [fails]]
KEYS = [None, 0, np.zeros(2, np.uint32), jax.random.PRNGKey(0), jax.random.split(KEY)]
ARRAYS = [None, "text", object(), [[1.0], [1.0, 2.0]], np.array(["a"] * 3), {}, fails, True,
          np.ma.masked_array(np.ones(3), [True, False, False])]  # fmt: skip
NO_DRAWS = [None, X, {"x": X}, "draws", stochgrad.Draws, fails, 1.0, WITH_NAN, draws_of({}),
            draws_of(X[:, :0])]  # fmt: skip
NO_TARGET = [None, "target", fails, stochgrad.sgld(TARGET, 0.1), OTHER, 1.0, jnp.sum]
CENTERS = [None, "mode", fails, jnp.ones(2), {"a": jnp.ones(3)}, np.nan * np.ones(3)]
MATRICES = [*ARRAYS[1:], np.ones(3), np.ones((2, 2)), np.nan * np.eye(3)]
sghmc = partial(stochgrad.sghmc, friction=1.0)

CASES = {
    "mcse": (diagnostics.mcse, {}, {"draws": NO_DRAWS}),
    "rhat": (diagnostics.rhat, {}, {"draws": [*NO_DRAWS, draws_of(X[:1]), draws_of(X[:, :1])]}),
    "ksd": (diagnostics.ksd, {"draws": DRAWS, "target": TARGET, "key": KEY}, {
        "draws": [*NO_DRAWS, draws_of(X[:1, :1])], "target": NO_TARGET, "key": KEYS,
        "scores": [None, "some", 1, ["full"]],
    }),
    "temperatures": (diagnostics.temperatures, {"draws": DRAWS, "target": TARGET, "key": KEY}, {
        "draws": NO_DRAWS, "target": NO_TARGET, "key": KEYS, "per_chain": FLAGS,
    }),
    "knn_divergence": (diagnostics.knn_divergence, {"draws": DRAWS, "reference": FINE}, {
        "draws": [*NO_DRAWS, draws_of(X[..., :2])], "reference": [*NO_DRAWS, draws_of(X[..., :2])],
        "k": [*COUNTS, 40],
    }),
    "richardson": (diagnostics.richardson, {"coarse": DRAWS, "fine": FINE}, {
        "coarse": [*NO_DRAWS[:7], FINE], "fine": [*NO_DRAWS[:7], DRAWS, draws_of(X[..., :2], 0.01)],
        "order": NUMBERS,
        "function": [*FUNCTIONS, fails, np.mean, lambda x: x * np.nan, lambda x: "a"],
    }),
    "calibration": (diagnostics.calibration, {"observed": X[0], "draws": X, "noise": 1.0}, {
        "observed": [*ARRAYS, X[0, 0], X[0] * np.nan, X[:, 0]],
        "draws": [*ARRAYS, X[0], X * np.inf, X[:0]],
        "noise": [*ARRAYS[1:], 0.0, -1.0, np.nan, np.ones(7)],
        "levels": [*ARRAYS[1:], 0.5, [0.0], [1.0], [0.5, 0.4], [np.nan], []],
        "where": [*ARRAYS[1:7], np.ones(20), np.ones(3, bool), np.zeros(20, bool),
                  np.ones((20, 3, 1), bool)],
    }),
    "interval_coverage": (
        diagnostics.interval_coverage, {"truth": X[0], "low": X[0] - 1, "high": X[0] + 1}, {
        "truth": [*ARRAYS, X, X[0] * np.nan], "low": [*ARRAYS, X, X[0] * np.nan, X[0] + 2],
        "high": [*ARRAYS, X, X[0] * np.nan, X[0] - 2],
        "where": [*ARRAYS[1:7], np.ones((20, 3)), np.zeros((20, 3), bool), np.ones(3, bool)],
    }),
    "minibatch_gaussian": (diagnostics.minibatch_gaussian, {}, {
        "order": [None, "random", 1, ["iid"], True],
    }),
    "weak_order": (
        diagnostics.weak_order,
        {"kernel_factory": sghmc, "problem": gaussian, "step_sizes": [0.1, 0.05]}, {
        "kernel_factory": [None, 1.0, "sghmc", fails, int, lambda g, h, noise=None: None,
                           lambda: None, stochgrad.sghmc],
        "problem": [None, Problem, TARGET, fails, Problem(None), Problem(fails),
                    Problem(lambda q, j: q), Problem(lambda q, j: jnp.sum(q) * jnp.nan),
                    Problem(gaussian.log_density, 0), Problem(gaussian.log_density, 1, 9),
                    Problem(gaussian.log_density, 1, 2, "random"),
                    Problem(gaussian.log_density, 1, 0), Problem(gaussian.log_density, 1.5)],
        "step_sizes": [*ARRAYS, 0.1, [0.1], [0.05, 0.1], [0.1, 0.0], [0.1, -0.1], [np.nan, 0.1]],
        "time": [*NUMBERS[1:], 0.07],
    }),
    "predict_law": (
        diagnostics.predict_law,
        {"kernel": stochgrad.sgld(TARGET, 0.01), "key": KEY, "center": jnp.ones(3)}, {
        "kernel": [None, 1.0, TARGET, stochgrad.sgld, fails, stochgrad.sgnht(TARGET, 0.1, 1.0),
                   stochgrad.sgld(TARGET, lambda step: 0.1), stochgrad.sgld(TARGET, 5.0),
                   stochgrad.core.Kernel(fails, fails)],
        "key": KEYS, "center": CENTERS, "hessian": [*MATRICES, -np.eye(3)],
        "covariance": [*MATRICES, -np.eye(3)],
    }),
    "sandwich": (diagnostics.sandwich, {"target": TARGET, "key": KEY, "center": jnp.ones(3)}, {
        "target": NO_TARGET[:4], "key": KEYS, "center": CENTERS, "hessian": MATRICES,
        "score_covariance": MATRICES, "step_size": [*NUMBERS[1:], 2.5], "friction": NUMBERS,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_bad_argument_is_named_in_a_sentence(name):
    """Foreign tracebacks, and calls that take what they cannot use."""
    function, good, bad = CASES[name]
    wrong = []
    for argument, values in bad.items():
        for value in values:
            try:
                refuses(lambda a=argument, v=value: function(**{**good, a: v}), argument)
            except BaseException as error:
                wrong.append(f"{argument}={value!r:.60}: {type(error).__name__} {error!s:.200}")
    assert not wrong, "\n".join(wrong)
