"""Bad arguments of stochgrad.federated: each is refused in a sentence that names it."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from stochgrad.federated import Diagonal, Full, Surrogates
from tests.bad_inputs import harness
from tests.federated.toys import gaussian_mean, log_likelihood, log_prior, rows

refuses = partial(harness.refuses, errors=(TypeError, ValueError, OSError), quiet=False)


class Frame:
    """Something like a data frame."""

    columns = ("a", "b")


COUNTS = (0, -1, 2.5, True, "3", None, np.nan, [1, 2], 1j)
NUMBERS = (0.0, -1.0, np.nan, np.inf, True, "0.1", [0.1], 1j, np.ones(2))
FLAGS = (1, "yes", None, np.ones(2))
CHOICES = ("other", 3, None, ["full"], True)
FUNCTIONS = (3, "f", None, np.ones(3))
POSITIONS = (
    None,
    "zero",
    np.array([np.nan, 0.0]),
    np.array([1, 2]),
    np.zeros(0),
    {},
    jnp.zeros(7),
    np.array(["a", "b"]),
    lambda key: jnp.zeros(2),
    np.zeros(2, object),
)
POSTERIORS = (
    None,
    3,
    "posterior",
    federated.posterior,
    stochgrad.core.Posterior,
    [np.ones(3)],
)
SURROGATES_BAD = (
    None,
    3,
    np.ones((3, 2)),
    Surrogates,
    Surrogates(jnp.zeros(2), jnp.zeros((2, 2))),
    Surrogates(jnp.zeros(2), jnp.zeros((3, 3))),
    Surrogates(jnp.zeros(2), {"a": jnp.zeros((3, 2))}),
    Surrogates(jnp.zeros(2), jnp.full((3, 2), jnp.nan)),
    Surrogates(jnp.zeros(2), jnp.zeros((3, 2)), np.ones((3, 2, 2))),
    Surrogates(jnp.zeros(2), jnp.zeros((3, 2)), Full(jnp.zeros((3, 3, 3)))),
    Surrogates(jnp.zeros(2), jnp.zeros((3, 2)), Diagonal(jnp.full((3, 2), jnp.nan))),
)
CLIENTS = (
    None,
    3,
    "data",
    [],
    {"a": np.ones(3)},
    np.ones((2, 3)),
    [np.ones((3, 2)), np.ones((0, 2))],
    [np.ones((3, 2)), np.ones((3, 3))],
    [np.ones((3, 2)), None],
    [np.array([[1.0, np.nan]])],
    [np.array(["a", "b"])],
    [np.array([object()])],
    [np.ma.masked_array(np.ones(3), [0, 1, 0])],
    [Frame()],
    [[[1.0, 2.0], [3.0]]],
    [np.array(["2020-01-01"], "datetime64[D]")],
    [(np.ones(3), 1.0)],
    [np.float32(1.0)],
)
PROBABILITIES = (
    0.3,
    "abc",
    [0.5, 0.5],
    [0.5, 0.6, -0.1],
    [0.2, 0.3, np.nan],
    [0.2, 0.3, 0.4],
    [True, False, False],
    [[0.2, 0.3, 0.5]],
    [0.2, None, 0.8],
    {"a": 1.0},
)
STEPS = (0, -1, 2.5, True, "3", None, [1, 2], [1, 2, 0], [1, 2, 2.5], [[1], [2, 3]], 2**40, {})
KEYS = (0, None, np.array([0, 1], np.uint32), jax.random.split(jax.random.key(0), 2), "key")


@cache
def target():
    return gaussian_mean(batch_size=5)[0]


@cache
def plain():
    return stochgrad.posterior(log_prior, log_likelihood, rows()[0], batch_size=2)


AT = jnp.zeros(2)
FIRST = Surrogates(AT, jnp.ones((3, 2)))
SAMPLE = {"step_size": 1e-3, "init": AT, "num_samples": 2, "progress": False}


def fails(*args):
    raise KeyError("a failure of the user's own")


def table():
    """``(function, good arguments, {argument: bad values})`` for each public function."""
    posterior = {"posterior": (*POSTERIORS, "plain")}
    reference = {"reference": POSITIONS}
    yield (
        federated.posterior,
        {"log_prior": log_prior, "log_likelihood": log_likelihood, "clients": rows()}
        | {"batch_size": 5},
        {
            "log_prior": FUNCTIONS,
            "log_likelihood": FUNCTIONS,
            "clients": CLIENTS,
            "batch_size": (*COUNTS, 10_000),
            "order": (*CHOICES, "streamed"),
        },
    )
    yield (
        federated.visiting,
        {"posterior": target()},
        posterior | {"local_steps": STEPS, "probabilities": PROBABILITIES, "selection": CHOICES},
    )
    yield (
        federated.find_reference,
        {"posterior": target(), "init": AT},
        posterior | {"init": POSITIONS, "max_rounds": COUNTS, "tolerance": NUMBERS},
    )
    yield (
        federated.global_first_order,
        {"posterior": target(), "reference": AT},
        (posterior | reference),
    )
    yield (
        federated.global_quadratic,
        {"posterior": target(), "reference": AT},
        posterior
        | reference
        | {
            "form": CHOICES[:3],
            "rank": COUNTS,
            "curvature": (*FUNCTIONS, "other", fails, lambda p: 3, federated.Stability),
        },
    )
    yield federated.exact, {"posterior": target(), "reference": AT}, posterior | reference
    yield (
        federated.laplace_local,
        {"posterior": target(), "reference": AT},
        posterior | reference | {"form": (*CHOICES[:3], "low_rank"), "max_steps": COUNTS},
    )
    yield (
        federated.sampled,
        {"posterior": target(), "key": jax.random.key(0), "reference": AT},
        posterior
        | reference
        | {
            "key": KEYS,
            "form": (*CHOICES[:3], "low_rank"),
            "num_samples": (*COUNTS, 1),
            "step_size": NUMBERS,
        },
    )
    mean = jnp.ones((3, 2))
    yield (
        federated.gaussian,
        {"mean": mean, "precision": np.stack([np.eye(2)] * 3), "origin": AT},
        {
            "mean": (None, "a", 1.0, np.full((3, 2), np.nan), {}, np.ones((3, 2), int)),
            "precision": (
                None,
                "a",
                3.0,
                np.ones((3, 3)),
                np.full((3, 2, 2), np.nan),
                np.stack([-np.eye(2)] * 3),
                -np.ones((3, 2), np.float32),
                np.ones((2, 2, 2)),
                {"a": mean},
            ),
            "origin": ("a", np.full(2, np.nan), np.zeros(3, np.float32), {"a": AT}),
        },
    )
    bad = posterior | {"surrogates": SURROGATES_BAD}
    given = {"posterior": target(), "surrogates": FIRST}
    yield federated.fisher_merge, given, bad
    yield federated.stability, given, bad
    yield federated.capped, given, bad | {"far": FLAGS}
    yield (
        federated.gauss_newton,
        {"outputs": fails, "log_likelihood": fails},
        {"outputs": FUNCTIONS, "log_likelihood": FUNCTIONS},
    )
    yield (
        federated.with_visits,
        {"kernel": None},
        {"kernel": (3, None, "sgld", stochgrad.sgld, stochgrad.core.Kernel)},
    )
    yield (
        federated.fald,
        {"posterior": target(), "step_size": 0.1},
        posterior
        | {
            "step_size": (*NUMBERS, fails, lambda step: -1.0),
            "local_steps": COUNTS,
            "variance_reduced": FLAGS,
            "refresh_every": COUNTS,
            "common_noise": (*NUMBERS[1:], 1.5),
        },
    )
    yield (
        federated.qlsd,
        {"posterior": target(), "step_size": 0.1},
        posterior
        | {
            "step_size": (*NUMBERS, fails, lambda step: None),
            "levels": COUNTS,
            "refresh_every": COUNTS,
        },
    )
    yield (
        stochgrad.federated.conducive,
        {"target": target(), "surrogates": FIRST},
        {
            "target": (*POSTERIORS, "plain"),
            "surrogates": SURROGATES_BAD,
            "strength": NUMBERS[1:],
        },
    )
    yield (
        federated.conducive_svrg,
        {"posterior": target(), "surrogates": FIRST, "period": 2},
        bad | {"period": COUNTS, "strength": NUMBERS[1:], "control_variate": FLAGS},
    )
    yield (
        federated.sample,
        {"key": jax.random.key(0), "clients": target(), **SAMPLE},
        {
            "key": KEYS,
            "clients": (3, "a", "plain"),
            "method": CHOICES,
            "surrogate": (
                "other",
                3,
                None,
                Surrogates,
                fails,
                lambda *of: 3,
                *SURROGATES_BAD[4:7],
            ),
            "strength": NUMBERS[1:],
            "local_steps": STEPS,
            "probabilities": PROBABILITIES,
            "selection": CHOICES,
            "step_size": (*NUMBERS, fails),
            "control_variate": FLAGS,
            "surrogate_period": [x for x in COUNTS if x is not None],
            "reference": [x for x in POSITIONS if x is not None],
            "init": [x for x in POSITIONS if x is not None and not callable(x)],
            "on_unsafe": CHOICES,
            "num_samples": COUNTS[:5],
            "num_chains": COUNTS[:5],
            "number_of_draws": (3,),
            "prior": (log_prior,),
            "batch_size": (5,),
        },
    )
    without = {name: value for name, value in SAMPLE.items() if name != "step_size"}
    yield (
        federated.sample,
        {"key": jax.random.key(0), "clients": target(), **without},
        {"kernel": (3, "sgld", fails, lambda g: 3, stochgrad.core.Kernel)},
    )
    yield (
        federated.sample,
        {"key": jax.random.key(0), "clients": rows(), **SAMPLE, "batch_size": 5}
        | {"prior": log_prior, "likelihood": log_likelihood},
        {
            "prior": (*FUNCTIONS, fails, lambda p: p),
            "likelihood": (*FUNCTIONS, fails, lambda p, x: jnp.float32(0)),
            "clients": CLIENTS,
            "batch_size": COUNTS[:5],
            "order": CHOICES[:2],
        },
    )


LABELS = {"target": ("target", "posterior"), "prior": ("prior",)}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(21))
def test_bad_arguments_are_refused_by_name(number):
    """A foreign error, or an answer without meaning, would come of each."""
    cases = list(table())
    if number >= len(cases):
        return
    function, good, bad = cases[number]
    wrong = []
    for name, values in bad.items():
        for value in values:
            if isinstance(value, str) and value == "plain":
                value = plain()
            # the words that stand for an argument in what is said of it
            said = {"posterior": "poster", "target": "", "clients": "client"}.get(name, name)
            said = "surrogate" if name == "surrogates" else said
            try:
                refuses(lambda: function(**{**good, name: value}), said)
            except BaseException as error:
                first = f"{type(error).__name__}: {str(error)[:300]}"
                wrong.append(f"{name}={str(value)[:60]!r}: {first}")
    assert not wrong, f"{function.__name__}:\n" + "\n".join(wrong)


def test_valid_arguments_of_other_kinds_are_taken():
    lists = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]]
    made = federated.posterior(log_prior, log_likelihood, lists, batch_size=np.int64(1))
    assert made.batches.size == 3
    federated.visiting(made, local_steps=np.array([1, 2]), probabilities=(0.5, 0.5))
    federated.visiting(made, local_steps=(np.int32(1), 2), probabilities=jnp.array([0.5, 0.5]))
    federated.fald(made, jnp.float32(0.1), local_steps=np.int32(2), common_noise=np.float32(0.5))
    federated.gaussian(np.ones((2, 2), np.float32), [[[1, 0], [0, 1]], [[2.0, 0], [0, 2]]])


def test_a_gauss_newton_matrix_of_functions_that_fail_names_them():
    outputs, right = lambda w, x: x @ w, lambda f, x: -0.5 * f**2
    for kind, name in (
        ((fails, right), "outputs"),
        ((lambda w, x: jnp.sum(w), right), "outputs"),
        ((outputs, fails), "log_likelihood"),
        ((outputs, lambda f, x: jnp.sum(f)), "log_likelihood"),
    ):
        made = federated.gauss_newton(*kind)
        refuses(lambda: federated.global_quadratic(target(), AT, curvature=made), name)
