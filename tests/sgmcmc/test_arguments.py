"""What the factories refuse, and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.helpers import gaussian_posterior

TARGET = gaussian_posterior(batch_size=5)[0]


@pytest.mark.parametrize(
    ("factory", "change", "words"),
    [
        ("sgld", {"step_size": 0.0}, "step_size must be a positive number, got 0"),
        ("sgld", {"step_size": -0.1}, "step_size must be a positive number, got -0.1"),
        ("sgld", {"step_size": float("nan")}, "step_size must be a positive number, got nan"),
        ("sgld", {"step_size": "big"}, "step_size must be a positive number, got 'big'"),
        ("sgld", {"step_size": lambda step: -1.0}, "step_size at step 0 must be a positive number"),
        ("sgld", {"temperature": 0.0}, "temperature must be a positive number"),
        ("sgld", {"noise": "uniform"}, "noise must be one of"),
        ("sghmc", {"friction": 0.0}, "friction must be a positive number, got 0"),
        ("sghmc", {"friction": -1.0}, "friction must be a positive number, got -1"),
        ("sghmc", {"mass": 0.0}, "mass must be a positive number"),
        ("sghmc", {"mass": jnp.array([1.0, -2.0])}, "mass must be a positive number, got -2"),
        (
            "sghmc",
            {"friction": 20.0},
            "friction \\* step_size / mass must be below 2 .* got 2 with",
        ),
        ("sghmc", {"mass": 0.05}, "friction \\* step_size / mass must be below 2"),
        ("sghmc", {"noise_estimate": -1.0}, "noise_estimate must be a non-negative number"),
        ("sghmc", {"noise_estimate": 2.0}, "noise_estimate must not exceed friction"),
        (
            "sghmc",
            {"integrator": "LEAP"},
            "integrator must be one of .* got 'LEAP': .*'E', 'L', 'P'",
        ),
        ("sghmc", {"noise_estimate": "on"}, "noise_estimate must be a number, a tree or 'online'"),
        ("sghmc", {"temperature": lambda step: -1.0}, "temperature at step 0 must be"),
        ("psgld", {"decay": 1.0}, "decay must be below 1, got 1"),
        ("psgld", {"regularizer": 0.0}, "regularizer must be a positive number"),
        ("psgld", {"adapt_steps": 0}, "adapt_steps must be an integer of at least 1"),
        ("sgnht", {"diffusion": 0.0}, "diffusion must be a positive number"),
        ("sgnht", {"thermal_mass": -1.0}, "thermal_mass must be a positive number"),
        ("sgnht", {"mass": 0.0}, "mass must be a positive number"),
        ("cyclical", {"steps_per_cycle": 1}, "steps_per_cycle must be an integer of at least 2"),
        ("cyclical", {"exploration": 1.0}, "exploration must be below 1"),
        ("replica_exchange", {"temperatures": (1.0,)}, "temperatures must be two or more"),
        ("replica_exchange", {"temperatures": (2.0, 1.0)}, "temperatures must rise"),
        ("replica_exchange", {"step_size": [0.1]}, "step_size must be one number, or 2, got 1"),
        (
            "replica_exchange",
            {"energy_batches": 1},
            "energy_batches must be an integer of at least",
        ),
    ],
)
def test_bad_numbers_get_one_sentence(factory, change, words):
    good = {
        "sghmc": {"friction": 1.0},
        "sgnht": {"diffusion": 1.0},
        "cyclical": {"steps_per_cycle": 10},
        "replica_exchange": {"temperatures": (1.0, 2.0)},
    }.get(factory, {})
    over = (stochgrad.sgld,) if factory in ("cyclical", "replica_exchange") else ()
    with pytest.raises(ValueError, match=words):
        getattr(stochgrad, factory)(*over, TARGET, **{"step_size": 0.1, **good, **change})


def test_a_mass_of_another_structure_is_refused():
    kernel = stochgrad.sghmc(TARGET, 0.1, 1.0, mass={"x": 1.0})
    with pytest.raises(ValueError, match="mass must be a number or have the position's structure"):
        stochgrad.sample(jax.random.key(0), kernel, init=jnp.zeros(2), num_samples=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mass": np.array([[1.0, 0.5], [0.0, 1.0]])}, "mass must be a symmetric matrix"),
        (
            {"mass": np.array([[1.0, 2.0], [2.0, 1.0]])},
            "mass must be a symmetric positive definite",
        ),
        ({"mass": np.eye(3)}, "mass must be .* a 2 x 2 matrix: got shape .3, 3. where .* .2,."),
        (
            {
                "mass": np.array([[2.0, 0.5], [0.5, 1.0]]),
                "friction": np.array([[1.0, 0.0], [0.0, 3.0]]),
                "noise_estimate": np.array([[0.2, 0.1], [0.1, 0.2]]),
            },
            "cannot be made diagonal together",
        ),
        ({"noise_estimate": np.array([[2.0, 0.0], [0.0, 0.1]])}, "noise_estimate must not exceed"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(settings, words):
    kernel = stochgrad.sghmc(TARGET, 0.1, **{"friction": 1.0, **settings})
    with pytest.raises(ValueError, match=words):
        stochgrad.sample(jax.random.key(0), kernel, init=jnp.zeros(2), num_samples=1)


def test_a_friction_tree_that_is_unstable_is_refused():
    with pytest.raises(ValueError, match="must be below 2"):
        stochgrad.sghmc(TARGET, 0.1, jnp.array([1.0, 30.0]))
    kernel = stochgrad.sghmc(TARGET, 0.1, {"x": jnp.array([1.0, 30.0])}, mass={"x": 1.0})
    with pytest.raises(ValueError, match="must be below 2"):
        kernel.init({"x": jnp.zeros(2)}, jax.random.key(0))


def test_a_schedule_sets_the_step_size_of_each_step():
    kernel = stochgrad.sgld(TARGET, lambda step: 0.01 / (1.0 + jnp.asarray(step, jnp.float32)))
    draws = stochgrad.sample(
        jax.random.key(0), kernel, init=jnp.zeros(2), num_samples=5, num_warmup=2, num_chains=2
    )
    np.testing.assert_allclose(draws.stats["step_size"], [0.01 / np.arange(3, 8)] * 2, rtol=1e-6)
