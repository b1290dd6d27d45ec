"""Long visits that make draws too wide are warned of, and those that do not are not."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from stochgrad.federated._spread import (
    diagonal_spread,
    spread_of_draws,
    stationary_covariance,
)
from tests.conftest import Z
from tests.federated.toys import gaussian_mean, logistic, logistic_posterior

pytestmark = pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")


def hospitals(rows=20, count=3, link=lambda z: z):
    """An effect of each client's own, and one that all have in common; tau = 1."""
    rng = np.random.default_rng(0)
    clients = [
        (rng.normal(s, 1.0, rows).astype(np.float32), np.full(rows, s)) for s in range(count)
    ]

    def log_prior(p):
        return -0.5 * jnp.sum((p["own"] - p["common"]) ** 2) - 0.5 * p["common"] ** 2

    def log_likelihood(p, batch):
        y, s = batch
        return -0.5 * (y - link(p["own"][s])) ** 2

    return federated.posterior(log_prior, log_likelihood, clients, batch_size=rows)


START = {"own": jnp.zeros(3), "common": jnp.float32(0.0)}


def draw(target, surrogate, local_steps, step_size=1e-3, init=START, **options):
    settings = {"num_samples": 2, "progress": False, **options}
    return federated.sample(
        jax.random.key(0),
        target,
        surrogate=surrogate,
        local_steps=local_steps,
        step_size=step_size,
        init=init,
        **settings,
    )


def test_a_scalar_law_is_that_of_its_closed_form():
    """Visits of time t with curvatures a and b, in turn drawn with p and 1 - p."""
    a, b, p, t = 3.0, 0.5, 0.3, 0.7
    curvature, weight = np.array([a, b]), np.array([p, 1 - p])
    decay = np.exp(-2 * curvature * t)
    start = weight @ ((1 - decay) / curvature) / (1 - weight @ decay)
    inside = 1 / curvature + (start - 1 / curvature) * (1 - decay) / (2 * curvature * t)
    times = np.full(2, t)
    found = stationary_covariance(curvature[:, None, None], weight, times)
    np.testing.assert_allclose(found, [[weight @ inside]], rtol=1e-4)
    # short visits: the posterior's own variance, and to first order in t the variance of A
    mean, variance = weight @ curvature, weight @ (curvature - weight @ curvature) ** 2
    short = stationary_covariance(curvature[:, None, None], weight, times / 700)
    np.testing.assert_allclose(short * mean - 1, [[1e-3 * variance / mean]], rtol=0.02)


def test_what_only_one_client_informs_is_warned_of_under_first_order_surrogates():
    """h N T = 1e-3 * 20 * 100 = 2; the draws are as wide as the message says."""
    with pytest.raises(ValueError, match=r"visits are too long.*\['own'\].*h N T = 2:"):
        draw(hospitals(), "global_first_order", 100, on_unsafe="raise", reference=START)


@pytest.mark.slow
def test_the_spread_of_draws_is_the_one_that_is_predicted():
    target = federated.visiting(hospitals(), local_steps=100)
    made = federated.global_first_order(target, federated.find_reference(target, START))
    found = spread_of_draws(target, made, 1e-3)
    assert found is not None
    with pytest.warns(federated.StabilityWarning) as warned:
        draws = draw(
            hospitals(),
            "global_first_order",
            100,
            num_samples=1500,
            num_warmup=50,
            thin=50,
            num_chains=32,
        )
    before, after = (str(w.message) for w in warned)
    assert "standard deviations of the draws come out" in before
    assert "times the variance while client" in after
    assert after in draws.verdict.reasons
    own = np.asarray(draws.positions["own"], np.float64)
    mode = np.asarray(made.origin["own"], np.float64)
    precision = np.block([[21 * np.eye(3), -np.ones((3, 1))], [-np.ones((1, 3)), np.eye(1) * 4]])
    variance = np.linalg.inv(precision)[0, 0]
    square = ((own - mode) ** 2).mean(axis=(1, 2)) / variance
    error = square.std(ddof=1) / np.sqrt(len(square))
    # the worst direction is a contrast of the three, and they are alike
    assert abs(square.mean() - found.ratio**2) < Z * error + 0.05 * found.ratio**2
    assert square.mean() > 1.5


@pytest.mark.slow
def test_short_visits_and_the_curvature_itself_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", federated.StabilityWarning)
        draw(hospitals(), "global_first_order", 2, reference=START)
        draw(hospitals(), "global_quadratic", 100, reference=START)


@pytest.mark.slow
def test_quadratic_surrogates_of_gaussian_likelihoods_are_not_warned_of():
    """Their curvature is the same at a second point; nothing runs straight far away."""
    target, _, _ = gaussian_mean()
    options = {"probabilities": [0.8, 0.1, 0.1], "init": jnp.zeros(2)}
    visited = federated.visiting(target, probabilities=[0.8, 0.1, 0.1])
    made = federated.global_quadratic(visited, jnp.zeros(2))
    assert not federated.stability(visited, made).unsafe().any()
    with warnings.catch_warnings():
        warnings.simplefilter("error", federated.StabilityWarning)
        for surrogate in ("global_quadratic", made):
            draw(target, surrogate, 50, reference=jnp.zeros(2), **options)


@pytest.mark.slow
def test_quadratic_surrogates_of_logistic_likelihoods_still_are():
    target = logistic_posterior(logistic(skew=0.5), batch_size=20)
    options = {"probabilities": [0.91, 0.03, 0.03, 0.03], "init": jnp.zeros(3)}
    with pytest.warns(federated.StabilityWarning, match="unstable at"):
        draw(target, "global_quadratic", 50, step_size=1e-4, **options)


def test_kernels_whose_time_is_unknown_are_let_be_and_friction_slows_time():
    from stochgrad.federated._spread import step_time

    target = hospitals()
    assert step_time(stochgrad.sgld(target, 1e-3)) == 1e-3
    assert step_time(stochgrad.sghmc(target, 0.02, friction=5.0)) == pytest.approx(0.004)
    assert step_time(stochgrad.psgld(target, 1e-3)) is None


def test_a_server_that_knows_slopes_alone_warns_of_what_one_client_informs():
    """Three clients of 20 rows, an effect each: zeros in the slopes of the others say so."""
    from stochgrad.federated._precautions import warn_of_own_effects

    kernel = stochgrad.sgld(hospitals(), 1e-3)
    slopes = {"common": np.zeros(3), "own": np.diag([0.3, -2.0, 1.0])}
    third, rows = np.full(3, 1 / 3), np.full(3, 20)
    names = ["north", "south", "west"]
    with pytest.warns(federated.StabilityWarning, match=r"\['own'\]\[0\].*client north informs"):
        warn_of_own_effects(names, slopes, third, rows, kernel, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", federated.StabilityWarning)
        warn_of_own_effects(names, slopes, third, rows, kernel, 1)
        warn_of_own_effects(names, {"x": np.full((3, 4), 0.5)}, third, rows, kernel, 100)


def test_many_dimensions_are_compared_by_diagonals():
    """An effect for each of 120 clients: 121 dimensions."""
    own = np.eye(120) * 50.0
    shares = np.full(120, 1 / 120)
    long = diagonal_spread(np.zeros(120), own, 1.0, shares, shares, np.full(120, 0.1))
    short = diagonal_spread(np.zeros(120), own, 1.0, shares, shares, np.full(120, 1e-6))
    assert long is not None
    assert short is not None
    # nothing holds the effect for 119 of 120 visits, each of which adds 0.2 to its variance
    assert long.ratio > 4
    assert long.steps_to_forget == pytest.approx(5.0)
    assert short.ratio == pytest.approx(1.0, abs=0.01)
