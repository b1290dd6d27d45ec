"""Strict numerics for every test; a program that many tests need is compiled once."""

import os
import shutil
import tempfile

import jax
import pytest

from stochgrad.core import _jit

FALSE_ALARM = 1e-5
"""Probability, for the whole suite, that a right library fails one of its statistical tests."""

Z = 5.5
"""Standard errors allowed in a statistical test: 4e-8 two-sided, for up to 250 comparisons."""


MANY = 400
"""Programs after which a process lets all go: beside 2,500 the next compiles half as fast."""

CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
"""Every program is kept on disk, in a directory that goes with the session."""

QUICK_TO_COMPILE = "xla_cpu_use_fusion_emitters", False
"""What tests ask of XLA beside the least optimization: a program then compiles four times as fast.

Two thirds of the suite were compilation. A program runs two to three times slower for it, so that a
test that runs for long has the mark ``optimized``. Neither is asked for where XLA_FLAGS is set.
"""

programs = []


def _knows(option):
    """Whether XLA has an option: one that it does not know in XLA_FLAGS ends the process."""
    try:
        jax.jit(lambda: 0, compiler_options=dict([option])).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def pytest_configure(config):
    if "XLA_FLAGS" not in os.environ:  # a worker has its controller's
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        if _knows(QUICK_TO_COMPILE):
            name, value = QUICK_TO_COMPILE
            os.environ["XLA_FLAGS"] = f"--{name}={value}".lower()
        jax.config.update("jax_disable_most_optimizations", True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a worker has its controller's
        config.programs = tempfile.mkdtemp(prefix="stochgrad-tests-")
        for name, value in {**CACHE, "jax_compilation_cache_dir": config.programs}.items():
            os.environ[name.upper()] = str(value)
            jax.config.update(name, value)


def pytest_unconfigure(config):
    if hasattr(config, "programs"):
        shutil.rmtree(config.programs, ignore_errors=True)


def _count(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        programs.append(duration)


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture(autouse=True, scope="module")
def _let_programs_go():
    yield
    if len(programs) > MANY:
        programs.clear()
        jax.clear_caches()
        _jit._executables.clear()


@pytest.fixture(autouse=True)
def _optimize(request):
    """Full optimization for a test that asks for it."""
    quickly = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", quickly and not optimized)


@pytest.fixture(autouse=True)
def _strict(request):
    """No silent promotion in our code; numpyro, flowjax, optax's schedules do promote."""
    if any(
        name in request.module.__name__ for name in ("numpyro", "example", "flows", "fit", "center")
    ):
        yield
        return
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def key():
    return jax.random.key(20260501)
