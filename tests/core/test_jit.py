"""Programs: what is compiled once, what is never mistaken for another, and what is let go."""

import gc
import logging
import pickle
import weakref
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad.core import hoisted_jit, number, remember


@contextmanager
def compilations():
    """A list that grows by one with each program that XLA compiles."""
    names = []

    class Handler(logging.Handler):
        def emit(self, record):
            if "Finished XLA compilation" in record.getMessage():
                names.append(record.getMessage())

    logger, handler = logging.getLogger("jax"), Handler()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with jax.log_compiles(True):
            yield names
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def normal_rows(scale, size=40):
    x = scale * np.random.default_rng(0).normal(size=(size, 2)).astype(np.float32)
    return stochgrad.posterior(
        lambda t: -0.5 * jnp.sum(t**2),
        lambda t, b: -0.5 * jnp.sum((b - t[None]) ** 2, 1),
        x,
        batch_size=10,
    )


def run(kernel, seed=0, **options):
    options = {"init": jnp.zeros(2), "num_samples": 5, "progress": False, **options}
    return stochgrad.sample(jax.random.key(seed), kernel, **options)


@pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")
def test_another_step_size_and_other_data_compile_nothing():
    first = run(stochgrad.sghmc(normal_rows(1.0), 0.01, 2.0, integrator="BAOAB"))
    with compilations() as names:
        again = run(stochgrad.sghmc(normal_rows(1.0), 0.01, 2.0, integrator="BAOAB"))
        other = run(
            stochgrad.sghmc(normal_rows(3.0), 0.02, 1.5, temperature=0.5, integrator="BAOAB")
        )
    assert names == []
    np.testing.assert_array_equal(first.positions, again.positions)
    assert not np.allclose(first.positions, other.positions)
    assert other.stats["step_size"][0, 0] == np.float32(0.02)


def test_another_thinning_and_another_warm_up_compile_nothing():
    kernel, online = stochgrad.sgld(normal_rows(1.0), 1e-3), stochgrad.moments()
    run(kernel, thin=2)
    run(kernel, collect=online)
    with compilations() as names:
        thinned = run(kernel, num_samples=4, num_warmup=2, thin=3)
        late = run(kernel, num_samples=3, num_warmup=2, collect=online)
    assert names == []
    mean = run(kernel, num_samples=5).positions[:, 2:].mean(1)
    np.testing.assert_allclose(late.summary.mean, mean[0], rtol=1e-4)
    assert thinned.positions.shape == (1, 4, 2)
    assert thinned.attrs["thin"] == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_warm_up_by_another_key_compiles_nothing():
    """Whatever rank of a mass its first approximation has."""
    target = normal_rows(1.0)
    with jax.numpy_dtype_promotion("standard"):
        stochgrad.warm_up(jax.random.key(0), target, init=jnp.zeros(2))
        with compilations() as names:
            stochgrad.warm_up(jax.random.key(1), target, init=jnp.zeros(2))
    assert names == []


@pytest.mark.filterwarnings("ignore")
def test_the_usual_recipe_compiles_nothing_the_second_time():
    target = normal_rows(1.0)

    def recipe(seed):
        key = jax.random.key(seed)
        center = stochgrad.find_center(key, target, init=jnp.zeros(2), num_steps=50)
        mass = stochgrad.find_mass(key, target, center)
        gradient = stochgrad.control_variate(target, center)
        report = stochgrad.find_step_size(
            key, gradient, center, friction=mass, mass=mass, integrator="BAOAB"
        )
        kernel = stochgrad.sghmc(
            gradient, report.step_size / (1 + seed), friction=mass, mass=mass, integrator="BAOAB"
        )
        draws = stochgrad.sample(key, kernel, init=center, num_samples=5, progress=False)
        stochgrad.diagnostics.temperatures(key, draws, gradient)

    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        recipe(0)
        with compilations() as names:
            recipe(1)
    assert names == []


TABLE = np.arange(3.0, dtype=np.float32)
LARGE = np.ones(5000, np.float32)


def by_inner_jit(table):
    inner = jax.jit(lambda x: x + jnp.sum(jnp.asarray(table)))
    return lambda x: inner(x)


def by_callback(factor):
    def host(x):
        return np.asarray(factor * x, np.float32)

    return lambda x: jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def times(factor, x):
    return np.asarray(factor * x, np.float32)


def by_partial_callback(factor):
    host = partial(times, factor)
    return lambda x: jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def by_rule(slope):
    @jax.custom_jvp
    def function(x):
        return slope * x

    @function.defjvp
    def _(primals, tangents):
        return function(primals[0]), 2 * slope * tangents[0]

    return jax.value_and_grad(lambda x: jnp.sum(function(x)))


PAIRS = {
    "literal": (lambda x: x * 2, lambda x: x * 3),
    "last digit of a literal": (lambda x: x * 1.0000001, lambda x: x * 1.0000002),
    "primitive": (jnp.sin, jnp.cos),
    "axis": (lambda x: x[:, None] + x[None], lambda x: (x[:, None] - x[None]) + x[:, None]),
    "type": (lambda x: x.astype(jnp.int32), lambda x: x.astype(jnp.uint8)),
    "order of arguments": (lambda x: x[0] - x[1], lambda x: x[1] - x[0]),
    "constant of a function within": (by_inner_jit(TABLE), by_inner_jit(TABLE + 1)),
    "large constant within": (by_inner_jit(LARGE), by_inner_jit(LARGE + 1)),
    "callback": (by_callback(2.0), by_callback(3.0)),
    "partial callback": (by_partial_callback(2.0), by_partial_callback(3.0)),
    "rule of a derivative": (by_rule(2.0), by_rule(3.0)),
    "number": (lambda x: x * number(2.0), lambda x: x * number(3.0)),
    "branch": (
        lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
        lambda x: jax.lax.cond(x[0] > 0, jnp.cos, jnp.sin, x),
    ),
    "length of a loop": (
        lambda x: jax.lax.fori_loop(0, 3, lambda i, x: 2 * x, x),
        lambda x: jax.lax.fori_loop(0, 4, lambda i, x: 2 * x, x),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_programs_that_differ_are_never_taken_for_each_other(pair):
    x = jnp.array([1.0, -2.0, 3.0])
    for function in PAIRS[pair]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            hoisted_jit(function)(x),
            function(x),
        )


def test_what_a_callback_holds_is_let_go():
    class Thing:
        factor = 2.0

    thing = Thing()
    run = hoisted_jit(by_callback_of(thing))
    np.testing.assert_array_equal(run(jnp.ones(2)), [2.0, 2.0])
    gone = weakref.ref(thing)
    del thing, run
    jax.clear_caches()
    gc.collect()
    assert gone() is None


def by_callback_of(thing):
    def host(x):
        return np.asarray(thing.factor * x, np.float32)

    return lambda x: jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_a_function_that_remembers_can_be_pickled():
    remember(times, "key", lambda: lambda: None)
    memory = times._stochgrad_memory
    assert len(memory) == 1
    assert len(pickle.loads(pickle.dumps(memory))) == 0


def test_other_shapes_get_a_program_of_their_own_and_a_trace_is_not_interrupted():
    double = hoisted_jit(lambda x: 2 * x)
    assert double(jnp.ones(3)).shape == (3,)
    assert double(jnp.ones((2, 2))).shape == (2, 2)
    np.testing.assert_array_equal(jax.jit(lambda x: double(x) + 1)(jnp.ones(2)), [3.0, 3.0])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(double(x)))(jnp.ones(2)), [2.0, 2.0])


def test_a_number_is_rounded_once_and_an_array_stays_one():
    assert number(0.1, jnp.float32) == np.float32(0.1)
    assert number(jnp.float32(0.5)).dtype == jnp.result_type(float)
    np.testing.assert_array_equal(number(np.array([1.0, 2.0]), jnp.float32), [1.0, 2.0])


def test_what_is_remembered_goes_with_its_owner():
    def owner():
        pass

    class Thing:
        pass

    thing = remember(owner, "key", Thing)
    assert remember(owner, "key", Thing) is thing
    for i in range(3):
        remember(owner, i, Thing, most=2)
    assert remember(owner, "key", Thing) is not thing
    gone = weakref.ref(thing)
    del thing, owner
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("collect", [None, lambda state: state.position])
def test_data_of_finished_runs_are_let_go(collect):
    def once(i):
        x = np.full((50_000, 2), i, np.float32)
        target = stochgrad.posterior(
            lambda t: -0.5 * jnp.sum(t**2),
            lambda t, b: -0.5 * jnp.sum(jax.nn.softplus(b - t[None]), 1),
            x,
            batch_size=10,
        )
        stochgrad.sample(
            jax.random.key(i),
            stochgrad.sgld(target, 1e-7),
            init=jnp.zeros(2),
            num_samples=3,
            progress=False,
            collect=collect,
        )

    def live():
        gc.collect()
        return sum(a.nbytes for a in jax.live_arrays())

    once(0)
    before = live()
    for i in range(3):
        once(i)
    assert live() - before < 50_000 * 8
