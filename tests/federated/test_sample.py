"""One call for FSGLD and its rivals."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from stochgrad.federated._qlsd import quantized, quantized_bits
from tests.conftest import Z
from tests.federated.toys import (
    gaussian_mean,
    log_likelihood,
    log_prior,
    logistic,
    logistic_likelihood,
    logistic_posterior,
    rows,
)
from tests.helpers import mean_and_error

pytestmark = pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")

SMALL = {"init": jnp.zeros(2), "num_samples": 20, "num_chains": 2, "progress": False}


def two_clients():
    """The toy of the closed forms: precisions 1 and 4, means 0 and 1, no prior."""
    x = [np.array([[0.0, 1.0]], np.float32), np.array([[1.0, 4.0]], np.float32)]

    def likelihood(theta, row):
        return -0.5 * row[:, 1] * (row[:, 0] - theta) ** 2

    return federated.posterior(lambda theta: 0.0 * theta, likelihood, x, order="full")


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize(("local_steps", "bias"), [(1, 0.0), (5, -0.0518), (20, -0.1936)])
def test_fald_drifts_as_its_closed_form_says(local_steps, bias):
    """Two Gaussian clients, gamma = 0.05 (methods: computed exactly). Ours is h = gamma / 2."""
    kernel = federated.fald(two_clients(), 0.025, local_steps=local_steps)
    draws = stochgrad.sample(
        jax.random.key(0),
        kernel,
        init=jnp.float32(0.8),
        num_samples=2000,
        num_warmup=100,
        thin=local_steps * (20 // local_steps),
        num_chains=64,
        progress=False,
    )
    mean, error = mean_and_error(draws.positions)
    assert abs(mean[0] - (0.8 + bias)) < Z * error[0] + 1e-4
    ratio = {1: 1.067, 5: 1.183, 20: 1.516}[local_steps]
    square, error = mean_and_error((draws.positions - mean) ** 2)
    assert abs(square[0] * 5 - ratio) < Z * 5 * error[0] + 1e-3


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("method", ["FSGLD", "DSGLD", "FALD", "VR-FALD*", "QLSD++"])
@pytest.mark.filterwarnings("ignore:draws depend:stochgrad.federated.StabilityWarning")  # DSGLD
def test_every_method_samples_the_posterior_where_it_has_no_bias(method):
    target, _, mean = gaussian_mean(sizes=(8, 12, 20), batch_size=4)
    draws = federated.sample(
        jax.random.key(1),
        target,
        method=method,
        step_size=0.02 / 41,
        init=jnp.zeros(2),
        num_samples=1500,
        num_warmup=200,
        thin=100,
        num_chains=16,
        progress=False,
    )
    found, error = mean_and_error(draws.positions)
    assert np.all(np.abs(found - mean) < Z * error)
    if method != "DSGLD":  # what the clients do not know of each other is noise, and spreads it
        assert np.all(np.abs(draws.positions.var(axis=(0, 1)) * 41 - 1) < 0.1)


@cache
def skewed():
    """A federation with labels split unevenly, and draws by dynamics on all data."""
    data = logistic(dim=5, clients=8, num_rows=2000, skew=1.0)
    target = logistic_posterior(data, batch_size=50)
    reference = federated.find_reference(target, jnp.zeros(5))
    hessian = -jax.hessian(target.log_density)(reference.position, target.batches.full)
    stiff = float(jnp.linalg.eigvalsh(hessian)[-1]) ** 0.5
    kernel = partial(stochgrad.sghmc, step_size=0.2 / stiff, friction=10.0, integrator="BAOAB")
    run = {"num_samples": 1500, "num_warmup": 50, "thin": 20, "num_chains": 16, "progress": False}
    whole = stochgrad.posterior(
        lambda w: -0.125 * jnp.sum(w**2),
        logistic_likelihood,
        tuple(np.concatenate(column) for column in zip(*data, strict=True)),
        order="full",
    )
    truth = stochgrad.sample(jax.random.key(3), kernel(whole), init=reference.position, **run)
    return target, reference, kernel, run, truth


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize(
    ("surrogate", "local_steps"),
    [("global_first_order", 20), ("global_first_order", 1000), ("global_quadratic", 1000)],
)
@pytest.mark.filterwarnings("ignore::stochgrad.federated.StabilityWarning")
def test_label_skew_does_not_move_the_posterior_at_any_length_of_visits(local_steps, surrogate):
    """Logistic regression, against dynamics on all data: within 0.05 sds in mean, 10% in sd."""
    target, reference, kernel, run, truth = skewed()
    draws = federated.sample(
        jax.random.key(2),
        target,
        surrogate=surrogate,
        reference=reference,
        local_steps=local_steps,
        kernel=kernel,
        **run,
    )
    mean, error = mean_and_error(draws.positions)
    expected, other = mean_and_error(truth.positions)
    sd = truth.positions.std(axis=(0, 1))
    assert np.all(np.abs(mean - expected) / sd < 0.05 + Z * np.hypot(error, other) / sd)
    ratio = draws.positions.std(axis=(0, 1)) / sd
    assert np.all(np.abs(ratio - 1) < 0.1 + Z * 0.01)


@pytest.mark.slow
def test_what_is_sent_is_counted():
    """A visit sends the state there and back, a draw within a visit comes on top."""
    target, _, _ = gaussian_mean(batch_size=5)
    run = partial(federated.sample, jax.random.key(0), target, **SMALL)
    draws = run(step_size=1e-3, local_steps=4, thin=4)
    assert draws.stats["visits"][0].tolist() == list(range(1, 21))
    assert draws.stats["bytes_up"][0].tolist() == [8 * n for n in range(1, 21)]
    within = run(step_size=1e-3, local_steps=4, thin=2)
    assert within.stats["bytes_down"][0, -1] == 8 * 10
    assert within.stats["bytes_up"][0, -1] == 8 * 10 + 8 * 10
    moving = run(kernel=lambda g: stochgrad.sghmc(g, 0.01, 1.0), local_steps=4, thin=4)
    assert moving.stats["bytes_down"][0, -1] == 16 * 20
    rounds = draws.attrs["setup_bytes_up"] // 24 - 1  # one of them for the surrogates
    assert rounds >= 2
    averaged = run(step_size=1e-3, method="FALD", local_steps=4, thin=4)
    assert averaged.stats["bytes_up"][0, -1] == 3 * 8 * 20
    quantized_run = run(step_size=1e-3, method="QLSD++")
    assert quantized_run.stats["bytes_up"][0, -1] == 3 * 20 * np.ceil(quantized_bits(2, 16) / 8)
    tree = draws.to_datatree()
    assert {"client", "visits", "bytes_up", "bytes_down"} <= set(tree["sample_stats"])


def test_the_quantizer_is_unbiased_and_on_its_grid():
    x = jnp.array([1.0, -2.0, 0.0, 0.3])
    keys = jax.random.split(jax.random.key(0), 20_000)
    q = np.asarray(jax.vmap(lambda key: quantized(key, x, 4))(keys))
    error = q.std(axis=0) / np.sqrt(len(q))
    assert np.all(np.abs(q.mean(axis=0) - x) < Z * error + 1e-6)
    steps = q * 4 / np.linalg.norm(x)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert not np.any(np.asarray(quantized(keys[0], jnp.zeros(4), 4)))
    assert quantized_bits(1000, 1) < quantized_bits(1000, 16) <= 32 * 1000


def test_data_prior_and_likelihood_are_enough():
    draws = federated.sample(
        jax.random.key(0),
        rows(),
        prior=log_prior,
        likelihood=log_likelihood,
        batch_size=5,
        step_size=1e-3,
        **SMALL,
    )
    assert draws.positions.shape == (2, 20, 2)
    assert draws.attrs["method"] == "FSGLD, SGLD"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either step_size"),
        ({"step_size": 0.1, "kernel": stochgrad.sgld}, "either step_size"),
        ({"step_size": -0.1}, "step_size"),
        ({"step_size": 0.1, "method": "SGD"}, "method must be one of"),
        ({"step_size": 0.1, "surrogate": "best"}, "surrogate must be one of"),
        ({"step_size": 0.1, "on_unsafe": "pray"}, "on_unsafe must be one of"),
        ({"step_size": 0.1, "strength": -1.0}, "strength"),
        ({"step_size": 0.1, "local_steps": 0}, "local_steps"),
        ({"step_size": 0.1, "batch_size": 3}, "leave it out"),
        ({"kernel": stochgrad.sgld, "method": "FALD"}, "own dynamics"),
        ({"step_size": 0.1, "method": "QLSD++", "local_steps": 2}, "every step"),
        ({"step_size": 0.1, "method": "FALD", "local_steps": [1, 2, 3]}, "one number"),
    ],
)
def test_a_call_that_cannot_be_is_refused(options, message):
    target, _, _ = gaussian_mean(batch_size=5)
    with pytest.raises(ValueError, match=message):
        federated.sample(jax.random.key(0), target, **SMALL, **options)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="prior and likelihood are needed"):
        federated.sample(jax.random.key(0), rows(), step_size=0.1, num_samples=3)
    with pytest.raises(ValueError, match="init is needed"):
        federated.sample(
            jax.random.key(0), gaussian_mean()[0], step_size=0.1, num_samples=3, progress=False
        )
    with pytest.raises(ValueError, match="common_noise"):
        federated.fald(gaussian_mean()[0], 0.1, common_noise=2.0)


def kernels(gradient):
    yield stochgrad.sgld(gradient, 1e-3)
    yield stochgrad.sghmc(gradient, 0.02, 2.0, integrator="BAOAB")
    yield stochgrad.sgnht(gradient, 0.02, 1.0)
    yield stochgrad.replica_exchange(
        partial(stochgrad.sghmc, friction=2.0), gradient, 0.02, temperatures=(1.0, 2.0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_every_dynamics_takes_a_conducive_gradient(number):
    """Chains of their own, one after the other or together, in chunks or not: the same draws."""
    target, _, _ = gaussian_mean(batch_size=5)
    target = federated.visiting(target, local_steps=3)
    surrogates = federated.global_quadratic(target, jnp.zeros(2))
    gradient = stochgrad.federated.conducive(target, surrogates)
    kernel = list(kernels(gradient))[number]
    run = partial(stochgrad.sample, jax.random.key(0), kernel, init=jnp.zeros(2), progress=False)
    several = run(num_samples=12, num_chains=3)
    chunked = run(num_samples=12, num_chains=3, chunk_size=5)
    np.testing.assert_array_equal(several.positions, chunked.positions)
    assert np.unique(several.positions[:, -1, 0]).size == 3
    shared = run(num_samples=12, num_chains=3, share_batches=True)
    assert shared.finite.all()


@pytest.mark.slow
def test_resuming_with_another_kernel_settings_or_data_is_refused_by_name(tmp_path):
    data = rows()
    target = lambda data: federated.posterior(log_prior, log_likelihood, data, batch_size=5)
    settings = {"step_size": 1e-3, "checkpoint": tmp_path / "run", "resume": True}
    run = lambda data, **more: federated.sample(
        jax.random.key(0),
        target(data),
        reference=jnp.zeros(2),
        **{**SMALL, **settings, **more},
    )
    first = run(data, num_samples=10)
    assert not any(name.startswith("data of client") for name in first.attrs)
    longer = run(data)
    whole = run(data, checkpoint=None, resume=False)
    np.testing.assert_array_equal(longer.positions, whole.positions)
    other = [x.copy() for x in data]
    other[1][3] += 0.25
    for more, message in (
        ({"step_size": 2e-3}, "step_size was 0.001 and is now 0.002"),
        ({"strength": 0.5}, "strength was 1.0 and is now 0.5"),
        ({"local_steps": 3}, "local_steps was"),
        (
            {"step_size": None, "kernel": lambda g: stochgrad.sghmc(g, 0.01, friction=1.0)},
            "method was 'FSGLD, SGLD' and is now 'FSGLD, SGHMC'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(data, **more)
    with pytest.raises(ValueError, match=r"data of client 1 was '.*' and is now") as refusal:
        run(other)
    assert "client 0" not in str(refusal.value)


def test_one_position_for_each_chain_is_where_chains_start():
    """Not a position of another shape, from which the reference would be searched."""
    target, _, _ = gaussian_mean(batch_size=5)
    starts = jnp.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    draws = federated.sample(
        jax.random.key(0),
        target,
        step_size=1e-7,
        init=starts,
        num_samples=1,
        num_chains=3,
        progress=False,
    )
    np.testing.assert_allclose(draws.positions[:, 0], starts, atol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "FALD", "probabilities": [0.2, 0.3, 0.5]}, "leave probabilities"),
        ({"method": "FALD", "local_steps": 2.5}, "local_steps"),
        ({"method": "FALD", "surrogate": "exact"}, "surrogate and strength are for"),
        ({"method": "QLSD++", "strength": 0.5}, "surrogate and strength are for"),
    ],
)
def test_what_a_method_would_not_heed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        federated.sample(
            jax.random.key(0), gaussian_mean(batch_size=5)[0], step_size=1e-3, **SMALL, **options
        )
