"""What is said after every run, and what is refused before it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.helpers import exact_gradient, gaussian_posterior

KEY = jax.random.key(0)


def density(log_density, **options):
    """A posterior without rows that say anything."""
    return stochgrad.posterior(
        log_density, lambda q, batch: jnp.zeros(len(batch)), jnp.zeros(4), order="full", **options
    )


def said(kernel, **run):
    """Categories of the warnings of a run, and their words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stochgrad.sample(KEY, kernel, progress=False, **run)
    return {warning.category: str(warning.message) for warning in caught}


def test_a_well_mixed_run_says_nothing():
    target, mean, _ = gaussian_posterior(order="full")
    kernel = stochgrad.sghmc(target, 0.1, 10.0, integrator="BAOAB")
    run = {"init": jnp.asarray(mean), "num_samples": 1000, "num_warmup": 50, "thin": 5}
    assert said(kernel, num_chains=4, **run) == {}


def test_chains_that_start_apart_and_stay_there_are_named_with_their_rhat():
    kernel = stochgrad.sgld(density(lambda q: -0.5 * jnp.sum(q**2)), 1e-6)
    starts = jnp.array([[-3.0, 0.0], [3.0, 0.0]])
    words = said(kernel, init=starts, num_samples=200, num_chains=2)[stochgrad.ConvergenceWarning]
    assert "R-hat is" in words
    assert "'x[0]'" in words


def test_one_chain_that_drifts_is_named_by_its_halves():
    kernel = stochgrad.sgld(density(lambda q: -0.5 * q**2), 1e-3)
    words = said(kernel, init=jnp.float32(9.0), num_samples=500)[stochgrad.ConvergenceWarning]
    assert "R-hat is" in words


def test_few_effective_draws_are_named():
    kernel = stochgrad.sgld(density(lambda q: -0.5 * jnp.sum(q**2)), 0.5)
    words = said(kernel, init=jnp.zeros(2), num_samples=6)[stochgrad.ConvergenceWarning]
    assert "6 effective draws" in words
    assert "fewer than 100" in words


def test_what_a_caller_collects_is_judged_too():
    kernel = stochgrad.sgld(density(lambda q: -0.5 * jnp.sum(q**2)), 1e-3)
    words = said(
        kernel, init=jnp.full(2, 9.0), num_samples=300, collect=lambda s: {"r": s.position[0] ** 2}
    )[stochgrad.ConvergenceWarning]
    assert "'r'" in words


def test_optimizers_are_no_samplers():
    import optax

    target, _, _ = gaussian_posterior(order="full")
    assert said(stochgrad.ascend(target, optax.sgd(1e-3)), init=jnp.ones(2), num_samples=5) == {}


def test_draws_outside_the_support_are_counted():
    target = density(lambda q: jnp.where(q > 0, -q, -jnp.inf))
    with pytest.warns(stochgrad.DivergenceWarning, match="log density is -inf or NaN at") as caught:
        draws = stochgrad.sample(
            KEY, stochgrad.sgld(target, 0.05), init=jnp.float32(1.0), num_samples=500,
            num_chains=4, progress=False,
        )  # fmt: skip
    share = np.mean(~np.isfinite(draws.stats["log_density"]))
    assert f"at {share:.2g} of the draws" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_start_without_density_is_refused(value):
    target = density(lambda q: jnp.where(q[0] > 0, -q[0], value))
    kernel = stochgrad.sgld(target, 0.05)
    starts = jnp.array([[1.0], [-1.0]])
    with pytest.raises(ValueError, match=r"init of chain 1 has a log density of (-inf|nan)"):
        stochgrad.sample(KEY, kernel, init=starts, num_samples=2, num_chains=2, progress=False)


def test_a_first_gradient_that_is_no_number_is_not_blamed_on_the_step_size():
    kernel = stochgrad.sgld(density(lambda q: -jnp.linalg.norm(q["w"]) - q["b"] ** 2), 0.01)
    start = {"b": jnp.float32(0.0), "w": jnp.zeros(2)}
    words = said(kernel, init=start, num_samples=3)[stochgrad.DivergenceWarning]
    assert "gradient at init['w'] is not finite" in words
    assert "step_size" not in words


def test_a_step_that_is_too_large_is_named_with_its_step():
    kernel = stochgrad.sgld(density(lambda q: -0.5 * jnp.sum(q**4)), 10.0)
    words = said(kernel, init=jnp.ones(2), num_samples=20)[stochgrad.DivergenceWarning]
    assert "diverged (non-finite position): chain 0 at step" in words
    assert "try step_size=1" in words


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_positions_of_half_precision_are_warned_of(dtype):
    kernel = stochgrad.sgld(density(lambda q: -(q.astype(jnp.float32) ** 2)), 1e-3)
    words = said(kernel, init=dtype(1.0), num_samples=20)[stochgrad.PrecisionWarning]
    assert jnp.dtype(dtype).name in words


@pytest.mark.parametrize(
    ("center", "scale", "warned"),
    [(1000.0, 1e-4, True), (1e6, 1e-3, True), (1000.0, 1.0, False), (0.0, 1e-6, False)],
)
def test_positions_that_rounding_moves_are_warned_of(center, scale, warned):
    kernel = stochgrad.sgld(density(lambda q: -0.5 * ((q - center) / scale) ** 2), 0.1 * scale**2)
    run = {"init": jnp.float32(center), "num_samples": 400, "num_chains": 4}
    assert (stochgrad.PrecisionWarning in said(kernel, **run)) == warned


def test_full_data_gradients_have_no_noise_to_warn_of():
    """Their differences are those of positions, which a low friction makes large."""
    target, mean, _ = gaussian_posterior(order="full")
    kernel = stochgrad.sghmc(target, 0.3, 0.01, integrator="BAOAB")
    run = {"init": jnp.asarray(mean), "num_samples": 200}
    assert stochgrad.GradientNoiseWarning not in said(kernel, **run)
    noisy, mean, _ = gaussian_posterior(batch_size=2)
    kernel = stochgrad.sghmc(noisy, 0.05, 0.01, integrator="BAOAB")
    assert stochgrad.GradientNoiseWarning in said(kernel, **run)


@pytest.mark.parametrize(
    "name", ["sgld", "sghmc", "psgld", "sgnht", "cyclical", "replica_exchange"]
)
@pytest.mark.filterwarnings("ignore::stochgrad.PrecisionWarning")  # steps that show the start
def test_every_sampler_starts_where_its_gradient_says(name):
    start = jnp.array([1.5, -2.0])
    gradient = exact_gradient(lambda q: -0.5 * jnp.sum(q**2))._replace(initial=lambda key: start)
    kernel = {
        "sgld": lambda: stochgrad.sgld(gradient, 1e-8),
        "sghmc": lambda: stochgrad.sghmc(gradient, 1e-8, 1.0),
        "psgld": lambda: stochgrad.psgld(gradient, 1e-12),
        "sgnht": lambda: stochgrad.sgnht(gradient, 1e-8, 1.0),
        "cyclical": lambda: stochgrad.cyclical(stochgrad.sgld, gradient, 1e-8, steps_per_cycle=4),
        "replica_exchange": lambda: stochgrad.replica_exchange(
            stochgrad.sgld, gradient, 1e-8, temperatures=(1.0, 2.0), swap_every=100
        ),
    }[name]()
    draws = stochgrad.sample(KEY, kernel, num_samples=2, progress=False)
    np.testing.assert_allclose(draws.positions[0], jnp.stack([start, start]), atol=1e-2)
