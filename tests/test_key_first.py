"""The key is the first argument; the order of version 0.1 works, and warns."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.test_docs import NAMESPACES


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_functions_that_take_a_key_take_it_first(namespace):
    module = importlib.import_module(f"stochgrad{namespace}")
    for name in module.__all__:
        value = getattr(module, name)
        if not inspect.isfunction(value):
            continue
        parameters = inspect.signature(value).parameters
        if "key" in parameters and parameters["key"].kind is not inspect.Parameter.KEYWORD_ONLY:
            assert next(iter(parameters)) == "key", name


def test_the_earlier_order_gives_the_same_and_warns():
    target = stochgrad.posterior(
        lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(9), order="full"
    )
    key = jax.random.key(0)
    new = stochgrad.find_mass(key, target, jnp.float32(0.5))
    by_name = stochgrad.find_mass(target, key=key, position=jnp.float32(0.5))
    with pytest.warns(DeprecationWarning, match="first argument of find_mass"):
        old = stochgrad.find_mass(target, key, jnp.float32(0.5))
    np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(by_name, new)
