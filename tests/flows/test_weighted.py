"""Weighted draws as all other draws: a verdict, ArviZ's groups, a report."""

import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.distributions import Normal

from stochgrad import flows


def log_density(x):
    return -0.5 * jnp.sum(x**2)


def of(scale, count, key):
    return flows.sample(key, Normal(jnp.zeros(2), scale), count, log_density)


@pytest.mark.slow
def test_a_verdict_says_yes_where_weights_are_good(key):
    weighted = of(1.2, 2000, key)
    assert weighted.verdict.ok
    assert np.isfinite(weighted.verdict.table["virial"]).all()


def test_groups_are_those_of_other_draws(key):
    weighted = of(1.2, 500, key)
    tree = weighted.to_draws(200).to_datatree()
    assert tree["posterior"]["x"].shape == (1, 200, 2)
    np.testing.assert_array_equal(tree["posterior"]["x"][0], weighted.resample(200))
    x = tree["posterior"]["x"].values
    wanted = -0.5 * np.sum(x**2, -1) * (1 - 1 / 1.44) + np.log(2 * np.pi * 1.44)
    np.testing.assert_allclose(tree["sample_stats"]["log_weight"], wanted, atol=1e-4)
    assert tree.attrs["pareto_khat"] == weighted.khat
    assert tree.attrs["log_z"] == weighted.log_z


def test_a_tail_too_heavy_is_in_the_verdict(key):
    with pytest.warns(flows.WeightsWarning, match="too heavy"):
        weighted = of(0.3, 2000, key)
    assert not weighted.verdict.ok
    assert "their tail is too heavy" in str(weighted.verdict)


def test_draws_worth_few_are_in_the_verdict(key):
    """2,000 draws of a flow five times too wide in two dimensions are worth some 80."""
    weighted = of(7.0, 2000, key)
    assert weighted.khat <= weighted.good_khat
    assert "fewer than 100: draw more" in str(weighted.verdict)
