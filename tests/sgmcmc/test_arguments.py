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
        ("sghmc", {"integrator": "LEAP"}, "integrator must be one of .* got 'LEAP'"),
    ],
)
def test_bad_numbers_get_one_sentence(factory, change, words):
    good = {"sgld": {"step_size": 0.1}, "sghmc": {"step_size": 0.1, "friction": 1.0}}[factory]
    with pytest.raises(ValueError, match=words):
        getattr(stochgrad, factory)(TARGET, **{**good, **change})


def test_a_mass_of_another_structure_is_refused():
    kernel = stochgrad.sghmc(TARGET, 0.1, 1.0, mass={"x": 1.0})
    with pytest.raises(ValueError, match="mass must be a number or have the position's structure"):
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
