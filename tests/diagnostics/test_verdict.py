"""The verdict says no where draws are wrong, names what is, and says yes where they are right."""

import re
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad.core import Draws
from stochgrad.diagnostics import excursion_reasons

RNG = np.random.default_rng(0)
DATA = jnp.asarray(RNG.standard_normal((400, 2)) @ np.array([[1.0, 0.6], [0.0, 0.5]]), jnp.float32)
CORRELATION = np.array([[1.0, 0.9], [0.9, 1.0]])
ROOT = jnp.asarray(np.linalg.cholesky(np.linalg.inv(CORRELATION)).T, jnp.float32)


def target(batch_size=40):
    return stochgrad.posterior(
        lambda q: -0.5 * jnp.sum(q["w"] ** 2) / 100,
        lambda q, x: -0.5 * jnp.sum(((x - q["w"][None]) @ ROOT.T) ** 2, axis=1),
        DATA,
        batch_size=batch_size,
    )


def draws_of(sd=1.0, shift=0.0, chains=4, draws=500, **fields):
    """Independent draws of the posterior, wider or off."""
    precision = 400 * np.linalg.inv(CORRELATION) + np.eye(2) / 100
    mean = np.linalg.solve(precision, np.linalg.inv(CORRELATION) @ np.asarray(DATA).sum(0))
    root = np.linalg.cholesky(np.linalg.inv(precision))
    x = mean + (sd * RNG.standard_normal((chains, draws, 2)) + shift) @ root.T
    positions = {"w": x.astype(np.float32)}
    shape = (chains, draws)
    own = {"posterior": target(), "first_bad": np.full(chains, -1)} | fields
    return Draws(positions, {"log_density": np.zeros(shape)}, np.ones(shape, bool), **own)


def test_draws_of_the_posterior_are_ok():
    verdict = stochgrad.diagnose(draws_of())
    assert verdict.ok
    assert verdict.reasons == ()
    table = verdict.table
    assert list(table.index) == ["w[0]", "w[1]"]
    assert np.all(np.abs(table["virial"] + 1) < 5 * table["virial_se"])
    assert str(verdict).startswith("ok")


@pytest.mark.parametrize(("sd", "word"), [(1.4, "wide"), (0.6, "narrow")])
def test_draws_too_wide_or_narrow_are_named(sd, word):
    verdict = draws_of(sd).verdict
    assert not verdict.ok
    (reason,) = verdict.reasons
    assert f"draws are too {word} along" in reason
    ratio = float(re.search(r"is about (\S+) times", reason)[1])
    assert abs(ratio / sd - 1) < 0.15  # of 1,000 draws, the worst of two directions
    assert str(verdict).startswith("do not use")


def test_draws_that_are_off_are_named():
    (reason,) = draws_of(shift=0.5).verdict.reasons
    assert "draws are off by about" in reason


def test_chains_that_disagree_diverge_or_have_no_density_are_named():
    apart = draws_of()
    apart.positions["w"][0] += 1
    assert any("R-hat" in reason for reason in apart.verdict.reasons)
    lost = draws_of(first_bad=np.array([-1, 7, -1, -1]))
    assert "1 of 4 chains diverged" in lost.verdict.reasons[0]
    outside = replace(draws_of(), stats={"log_density": np.full((4, 500), -np.inf)})
    assert any("-inf" in reason for reason in outside.verdict.reasons)
    all_lost = draws_of(first_bad=np.zeros(4, int)).verdict
    assert not all_lost.ok
    assert "no chain is finite" in all_lost.reasons[-1]


def test_nuts_own_signs_are_read():
    stats = {"diverging": RNG.random((4, 500)) < 0.01, "energy": RNG.standard_normal((4, 500))}
    reasons = replace(draws_of(), stats=stats).verdict.reasons
    assert "transitions of NUTS diverged" in reasons[0]
    stats = {"energy": np.cumsum(RNG.standard_normal((4, 500)), axis=1)}
    assert "BFMI" in replace(draws_of(), stats=stats).verdict.reasons[0]


def test_what_was_known_before_is_a_reason():
    verdict = draws_of(notes=("the warm-up has not settled.",)).verdict
    assert verdict.reasons == ("the warm-up has not settled.",)


def test_sgld_at_a_step_too_large_is_found_out_by_gradients_alone():
    """Plain SGLD with R-hat near one: no other check but noise and the virial can see it."""
    kernel = stochgrad.sgld(target(batch_size=8), 2e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = stochgrad.sample(
            jax.random.key(0),
            kernel,
            init={"w": jnp.zeros(2)},
            num_samples=2000,
            num_warmup=200,
            thin=20,
            num_chains=4,
            progress=False,
        )
    reasons = draws.verdict.reasons
    assert any("too wide" in reason for reason in reasons)


def test_many_coordinates_and_few_draws_raise_no_false_alarm():
    d = 60
    wide = stochgrad.posterior(
        lambda q: -0.5 * jnp.sum(q**2), lambda q, x: 0.0 * x, jnp.ones(9), batch_size=3
    )
    x = RNG.standard_normal((4, 150, d)).astype(np.float32)
    draws = Draws(x, {}, np.ones((4, 150), bool), np.full(4, -1), posterior=wide)
    assert draws.verdict.ok


def test_other_things_are_refused():
    with pytest.raises(TypeError, match="draws must be a"):
        stochgrad.diagnose(np.zeros(3))


def scale_draws(thrown):
    """Draws of a log scale whose density is broad, of which the first is thrown to exp(thrown)."""
    broad = stochgrad.posterior(
        lambda s: -0.5 * (s / 0.9) ** 2 - jax.nn.softplus(s - 8.0),
        lambda s, x: 0.0 * x * s,
        jnp.ones(10),
        order="full",
    )
    broad = broad._replace(constrain=lambda s: {"scale": jnp.exp(s)})
    x = 0.9 * np.random.default_rng(1).standard_normal((4, 500)).astype(np.float32)
    x = np.minimum(x, 1.5)
    if thrown is not None:
        x[0, 0] = thrown
    shape = (4, 500)
    own = {"posterior": broad, "first_bad": np.full(4, -1)}
    return Draws(x, {"log_density": np.zeros(shape)}, np.ones(shape, bool), **own)


def test_one_draw_that_makes_the_spread_of_a_scale_is_named():
    (reason,) = excursion_reasons(scale_draws(4.5))
    share = float(re.search(r"makes? up (\d+)% of the variance of 'scale'", reason)[1]) / 100
    x = scale_draws(4.5).constrained()["scale"]
    squares = (x - np.median(x)) ** 2
    assert abs(share - squares.max() / squares.sum()) < 0.006
    assert excursion_reasons(scale_draws(None)) == []
    assert excursion_reasons(replace(scale_draws(4.5), attrs={"method": "NUTS"})) == []
