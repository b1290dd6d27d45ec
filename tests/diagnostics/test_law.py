"""Predicted laws against exact moments, closed forms and long runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad.diagnostics import Problem, predict_law, weak_order
from stochgrad.diagnostics._stationary import (
    NoiseOrder,
    squared_autocorrelations,
    stationary_moments,
)
from stochgrad.kernels import LinearMaps, joint_maps, mode_maps
from tests.helpers import exact_gradient, gaussian_posterior, noisy_gradient

CURVATURE = np.array([[1.5, 0.5], [0.5, 0.8]])
PLACES = np.array([[1.0, -0.5], [-0.5, 1.0], [0.2, 0.1]])


def sghmc(integrator, friction=1.0, **options):
    return partial(stochgrad.sghmc, friction=friction, integrator=integrator, **options)


def place_density(q, j):
    away = q - jnp.asarray(PLACES, q.dtype)[j]
    return -0.5 * away @ jnp.asarray(CURVATURE, q.dtype) @ away


def places(order):
    """Three minibatches that differ in place alone, as a posterior of three rows."""
    return stochgrad.posterior(
        lambda q: jnp.float32(0),
        lambda q, rows: jax.vmap(lambda j: place_density(q, j) / 3)(rows),
        jnp.arange(3),
        batch_size=1,
        order=order,
    )


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("scheme", "order"),
    [
        ("SGLD", "iid"),
        ("BAOAB", "symmetric"),
        ("SGHMC", "reshuffled"),
        *(
            slow(scheme, order)
            for scheme in ["SGLD", "BAOAB", "OBABO", "LEAPFROG", "UBU", "MT3"]
            for order in ["iid", "reshuffled", "symmetric"]
        ),
    ],
)
def test_covariances_are_those_of_the_exact_moments(scheme, order, key):
    factory, h = stochgrad.sgld if scheme == "SGLD" else sghmc(scheme), 0.2
    exact = weak_order(factory, Problem(place_density, 2, 3, order), [h, h / 2])
    law = predict_law(key, factory(places(order), h), jnp.asarray(PLACES.mean(axis=0)))
    truth = np.linalg.inv(CURVATURE)
    found = np.linalg.norm(law.covariance - truth) / np.linalg.norm(truth)
    # iid minibatches: V is a mean over 1,024 of them, sd of about 0.02
    tolerance = {"rtol": 0.07} if order == "iid" else {"rtol": 1e-3, "atol": 1e-6}
    np.testing.assert_allclose(found, exact.position_error[0], **tolerance)


def epoch_by_hand(a, f, v, k, order):
    """The covariance of z' = az + fu averaged over an epoch or two, term by term."""
    period = k if order == "reshuffled" else 2 * k
    slots = [t if t < k else 2 * k - 1 - t for t in range(period)]
    together = np.array([[1.0 if s == t else -1 / (k - 1) for s in slots] for t in slots])
    powers = [np.linalg.matrix_power(a, t) for t in range(period + 1)]

    def added(steps):
        pushes = [powers[steps - 1 - t] @ f for t in range(steps)]
        return sum(
            together[t, s] * pushes[t] @ v @ pushes[s].T for t in range(steps) for s in range(steps)
        ) + np.zeros_like(a)

    start = np.zeros_like(a)
    for _ in range(300):
        start = powers[period] @ start @ powers[period].T + added(period)
    return sum(powers[t] @ start @ powers[t].T + added(t) for t in range(period)) / period


@pytest.mark.parametrize("order", ["reshuffled", "symmetric"])
@pytest.mark.parametrize("k", [2, 3, 7])
def test_sums_over_an_epoch_are_right_for_coupled_modes_and_all_at_once(order, k):
    rng = np.random.default_rng(0)
    curvature = np.array([0.2, 1.0, 2.0])
    each = [[[1 - 0.1 * c, 0.2, 0.05], [-0.3 * c, 0.8, 0.1], [-0.1, 0, 0]] for c in curvature]
    a, f = np.array(each), rng.normal(size=(3, 3, 1))
    root = rng.normal(size=(3, 3))
    v = root @ root.T
    silent = np.zeros((3, 3, 1))
    maps = LinearMaps(a, f, silent, np.array([0]), a[:, :1], silent[:, :1], 1)
    found = stationary_moments(maps, v, curvature, NoiseOrder(k, order))
    whole, push = np.zeros((9, 9)), np.zeros((9, 3))
    for i in range(3):
        whole[3 * i : 3 * i + 3, 3 * i : 3 * i + 3], push[3 * i : 3 * i + 3, i] = a[i], f[i, :, 0]
    by_hand = epoch_by_hand(whole, push, v, k, order)[::3, ::3]
    np.testing.assert_allclose(found.covariance, by_hand, rtol=1e-9)
    joint = LinearMaps(
        whole[None], push[None], np.zeros((1, 9, 1)), np.arange(0, 9, 3), whole[None, ::3],
        np.zeros((1, 3, 1)), 1,
    )  # fmt: skip
    together = stationary_moments(joint, v, np.diag(curvature), NoiseOrder(k, order))
    np.testing.assert_allclose(together.covariance, by_hand, rtol=1e-9)
    assert np.all(found.long_run == 0)


@pytest.mark.parametrize("factory", [stochgrad.sgld, sghmc("BAOAB", 0.5)], ids=["sgld", "baoab"])
def test_modes_are_the_whole_and_autocorrelations_sum_up(factory):
    rng = np.random.default_rng(1)
    curvature = np.array([0.5, 1.0, 2.5])
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    root = rng.normal(size=(3, 3))
    v, hessian = root @ root.T, turn @ np.diag(curvature) @ turn.T
    modes, joint = mode_maps(factory, 0.2, curvature), joint_maps(factory, 0.2, hessian)
    by_modes = stationary_moments(modes, v, curvature, NoiseOrder())
    at_once = stationary_moments(joint, turn @ v @ turn.T, hessian, NoiseOrder())
    for x, y in zip(by_modes[:3], at_once[:3], strict=True):
        np.testing.assert_allclose(turn @ x @ turn.T, y, rtol=1e-8, atol=1e-12)
    now, found = at_once.joint[0], []
    for _ in range(800):
        found.append(np.diag(now)[:3])
        now = joint.matrix[0] @ now
    rho = np.array(found) / found[0]
    squares = 2 * np.sum(rho**2, axis=0) - 1
    np.testing.assert_allclose(squared_autocorrelations(modes, by_modes, turn), squares, rtol=1e-6)
    alone = squared_autocorrelations(joint, at_once, np.eye(3))
    np.testing.assert_allclose(alone, squares, rtol=1e-6)
    times = np.diag(at_once.long_run) / np.diag(at_once.covariance)
    np.testing.assert_allclose(times, 2 * rho.sum(axis=0) - 1, rtol=1e-6)


def test_sgld_has_its_closed_form(key):
    curvatures, h, sd = np.array([1.0, 4.0]), 0.1, 3.0
    target = noisy_gradient(lambda q: -0.5 * jnp.sum(jnp.asarray(curvatures) * q**2), sd)
    law = predict_law(key, stochgrad.sgld(target, h), jnp.zeros(2))
    variance = (1 + h * sd**2 / 2) / curvatures / (1 - h * curvatures / 2)
    np.testing.assert_allclose(law.sd, np.sqrt(variance), rtol=0.03)  # V of 1,024 draws
    times = (2 - h * curvatures) / (h * curvatures)
    np.testing.assert_allclose(law.autocorrelation_time, times, rtol=1e-4)
    np.testing.assert_allclose(law.gradients_per_draw, 19, rtol=1e-4)
    np.testing.assert_allclose(law.gradients_per_draw_slowest, 19, rtol=1e-4)
    assert str(law).startswith("about 19 gradients an effective draw; sds up to 3")


def test_the_bias_of_the_mean_is_that_of_the_exact_chain(key):
    """The stationary law of SGLD on a skewed density, from its transition matrix on a grid."""
    h, sd = 0.1, 1.5
    x = np.linspace(-7, 7, 1001)
    log_p = -0.5 * x**2 - 0.05 * x**3 / 6 - 0.002 * x**4
    slope = -x - 0.025 * x**2 - 0.008 * x**3
    p = np.exp(log_p) / np.exp(log_p).sum()
    spread = 2 * h + (h * sd) ** 2
    step = np.exp(-((x[None] - (x + h * slope)[:, None]) ** 2) / (2 * spread))
    step /= step.sum(axis=1, keepdims=True)
    chain = p @ np.linalg.matrix_power(step, 1000)
    mean, width = p @ x, np.sqrt(p @ (x - p @ x) ** 2)
    bias = (chain @ x - mean) / width
    target = noisy_gradient(lambda q: -0.5 * q**2 - 0.05 * q**3 / 6 - 0.002 * q**4, sd)
    kernel = stochgrad.sgld(target, h)
    law = predict_law(key, kernel, jnp.float32(mean), covariance=np.array([[width**2]]))
    assert bias < -1e-3
    np.testing.assert_allclose(law.mean_bias, bias, rtol=0.12)
    wide = np.sqrt(chain @ (x - chain @ x) ** 2) / width - 1
    np.testing.assert_allclose(law.sd_bias, wide, rtol=0.12)


def regression(order, batch_size=5, size=40):
    """Rows whose curvatures differ: a control variate has noise off its center."""
    x = np.random.default_rng(0).normal(size=(size, 2)).astype(np.float32)
    y = x.sum(axis=1) + np.random.default_rng(1).normal(size=size).astype(np.float32)
    target = stochgrad.posterior(
        lambda b: -0.5 * jnp.sum(b**2),
        lambda b, rows: -0.5 * (rows[1] - rows[0] @ b) ** 2,
        (x, y),
        batch_size=batch_size,
        order=order,
    )
    hessian = x.T.astype(np.float64) @ x + np.eye(2)
    return target, hessian, jnp.asarray(np.linalg.solve(hessian, x.T @ y), jnp.float32)


def test_the_noise_of_a_control_variate_is_what_it_is_where_draws_are(key):
    target, hessian, center = regression("reshuffled")
    gradient = stochgrad.control_variate(target, center)
    inverse = np.linalg.inv(hessian)
    blocks = [np.asarray(target.batches.blocks.at(np.int32(j)).data[0], float) for j in range(8)]
    away = [8 * x.T @ x + np.eye(2) - hessian for x in blocks]
    v = np.mean([a @ inverse @ a for a in away], axis=0)
    maps = mode_maps(stochgrad.sgld, 0.002, np.linalg.eigvalsh(hessian))
    turn = np.linalg.eigh(hessian)[1]
    order = NoiseOrder(8, "reshuffled")
    moments = stationary_moments(maps, turn.T @ v @ turn, np.linalg.eigvalsh(hessian), order)
    law = predict_law(key, stochgrad.sgld(gradient, 0.002), center)
    exact = turn @ moments.covariance @ turn.T
    np.testing.assert_allclose(law.covariance, exact, rtol=1e-4)
    plain = predict_law(key, stochgrad.sgld(target, 0.002), center)
    assert 0 < law.noise_share < plain.noise_share / 2


def test_a_dense_mass_is_the_same_mass_and_a_tree_is_a_vector(key):
    target, _, center = regression("symmetric")
    make = partial(stochgrad.sghmc, integrator="OBABO")
    mass = np.array([20.0, 60.0])
    plain = predict_law(key, make(target, 0.2, 2 * mass, mass=mass), center)
    dense = predict_law(key, make(target, 0.2, 2 * np.diag(mass), mass=np.diag(mass)), center)
    np.testing.assert_allclose(plain.covariance, dense.covariance, rtol=1e-3)
    np.testing.assert_allclose(plain.autocorrelation_time, dense.autocorrelation_time, rtol=1e-3)
    tree = {"a": jnp.zeros(()), "b": jnp.zeros((1, 2))}
    q = exact_gradient(
        lambda p: -0.5 * (p["a"] ** 2 + jnp.sum(jnp.array([[4.0, 9.0]]) * p["b"] ** 2))
    )
    law = predict_law(key, make(q, 0.1, 1.0, mass={"a": 1.0, "b": 2.0}), tree)
    assert jax.tree.map(np.shape, law.sd) == jax.tree.map(jnp.shape, tree)
    np.testing.assert_allclose(law.sd["b"][0], [1 / 2, 1 / 3], rtol=0.02)


def test_many_coordinates_are_taken_by_themselves(key):
    size = 501
    curvatures = np.geomspace(1, 10, size).astype(np.float32)
    target = noisy_gradient(lambda q: -0.5 * jnp.sum(jnp.asarray(curvatures) * q**2), 1.0)
    law = predict_law(key, stochgrad.sgld(target, 0.05), jnp.zeros(size))
    assert not law.dense
    assert law.covariance.shape == (size,)
    exact = (1 + 0.025) / curvatures / (1 - 0.025 * curvatures)
    np.testing.assert_allclose(law.covariance, exact, rtol=0.01)
    np.testing.assert_allclose(law.gradients_per_draw, 39, rtol=1e-3)


def test_what_has_no_such_law_is_refused(key):
    target, _, center = regression("iid")
    with pytest.raises(ValueError, match="thermostat multiplies"):
        predict_law(key, stochgrad.sgnht(target, 0.01, 1.0), center)
    with pytest.raises(ValueError, match="cyclical"):
        predict_law(
            key, stochgrad.cyclical(stochgrad.sgld, target, 0.01, steps_per_cycle=5), center
        )
    owned = stochgrad.federated.posterior(
        lambda b: -0.5 * jnp.sum(b**2),
        lambda b, rows: -0.5 * jnp.sum((rows - b[None]) ** 2, axis=1),
        [np.ones((9, 2), np.float32), np.zeros((9, 2), np.float32)],
        batch_size=3,
    )
    with pytest.raises(ValueError, match="lasts as long as a visit"):
        predict_law(key, stochgrad.sgld(owned, 0.01), center)
    with pytest.raises(ValueError, match="schedule"):
        predict_law(key, stochgrad.sgld(target, lambda step: 0.01), center)
    with pytest.raises(ValueError, match="unstable"):
        predict_law(key, stochgrad.sgld(target, 1.0), center)
    with pytest.raises(TypeError, match="kernel must be"):
        predict_law(key, target, center)
    with pytest.raises(ValueError, match="hessian must have shape"):
        predict_law(key, stochgrad.sgld(target, 0.01), center, hessian=np.eye(3))
    saddle = exact_gradient(lambda q: q[0] ** 2 - q[1] ** 2)
    with pytest.raises(ValueError, match="not strictly concave"):
        predict_law(key, stochgrad.sgld(saddle, 0.01), jnp.zeros(2))


def measured_times(draws, times):
    """Integrated autocorrelation times, by the means of batches of 15 times: 3% too short."""
    draws = np.asarray(draws, np.float64)
    length = int(15 * max(times))
    count = draws.shape[1] // length
    batches = draws[:, : count * length].reshape(-1, length, draws.shape[-1])
    assert len(batches) > 600  # a relative error of 0.058
    return length * batches.mean(axis=1).var(axis=0, ddof=1) / draws.var(axis=(0, 1))


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")
@pytest.mark.parametrize("order", ["iid", "reshuffled", "symmetric"])
@pytest.mark.parametrize("gradient", ["minibatch", "control variate"])
@pytest.mark.parametrize("method", ["sgld", "BAOAB"])
def test_long_runs_of_a_logistic_regression_have_the_law(method, gradient, order, key):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.3], [0, 0, 0.5]])
    y = rng.random(500) < 1 / (1 + np.exp(-x @ [0.8, -0.5, 1.2]))
    x, y = x.astype(np.float32), y.astype(np.float32)
    target = stochgrad.posterior(
        lambda t: -0.125 * jnp.sum(t**2),
        lambda t, rows: rows[1] * (rows[0] @ t) - jnp.logaddexp(0, rows[0] @ t),
        (x, y),
        batch_size=50,
        order=order,
    )
    full = partial(target.log_density, batch=target.batches.full)
    center = jnp.zeros(3)
    for _ in range(8):
        hessian = -np.asarray(jax.hessian(full)(center), np.float64)
        center = center + jnp.asarray(np.linalg.solve(hessian, jax.grad(full)(center)), jnp.float32)
    density = jax.jit(jax.vmap(full))
    # the exact moments, by importance sampling from the Gaussian at the mode
    z = rng.normal(size=(100_000, 3))
    z = np.concatenate([z, -z])
    points = np.asarray(center) + z @ np.linalg.cholesky(np.linalg.inv(hessian)).T
    log_w = np.asarray(density(jnp.asarray(points, jnp.float32)), np.float64)
    log_w += 0.5 * np.sum(z**2, axis=1)
    w = np.exp(log_w - log_w.max())
    w /= w.sum()
    mean = w @ points
    exact = (points - mean).T @ ((points - mean) * w[:, None])
    sd = np.sqrt(np.diag(exact))

    estimate = target if gradient == "minibatch" else stochgrad.control_variate(target, center)
    largest = np.linalg.eigvalsh(hessian)[-1]
    kernel = {
        "sgld": lambda: stochgrad.sgld(estimate, 0.1 / largest),
        "BAOAB": lambda: stochgrad.sghmc(
            estimate, 0.1, 2.0 * hessian, mass=hessian, integrator="BAOAB"
        ),
    }[method]()
    law = predict_law(key, kernel, center, covariance=exact)
    chains = 16 if method == "sgld" else 4
    draws = stochgrad.sample(
        key, kernel, init=center, num_samples=100_000, num_chains=chains, num_warmup=2000
    ).positions
    times = measured_times(draws, law.autocorrelation_time)
    np.testing.assert_allclose(times, law.autocorrelation_time, rtol=0.15)
    values = np.asarray(draws, np.float64).reshape(-1, 3)
    count = len(values)
    of_sd = np.sqrt(law.square_autocorrelation_time / count / 2)
    second_order = 0.15 * law.sd_bias**2 + 0.1 * np.abs(law.sd_bias)
    off = values.std(axis=0) / sd - 1 - law.sd_bias
    assert np.all(np.abs(off) < 4 * of_sd + second_order + 0.002), (off, of_sd, law.sd_bias)
    of_mean = np.sqrt(law.autocorrelation_time / count)
    off = (values.mean(axis=0) - mean) / sd - law.mean_bias
    slack = 0.3 * np.abs(law.mean_bias) + 0.004
    assert np.all(np.abs(off) < 4 * of_mean + slack), (off, of_mean, law.mean_bias)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")
@pytest.mark.parametrize("kind", ["psgld", "frictions", "online"])
def test_long_runs_of_other_kernels_have_the_law(kind, key):
    target, mean, _ = gaussian_posterior(num_rows=100, dim=3, batch_size=10, order="iid")
    kernel = {
        "psgld": lambda: stochgrad.psgld(target, 2e-4),
        "frictions": lambda: stochgrad.sghmc(
            target,
            0.1,
            np.array([40.0, 100.0, 300.0]),
            mass=np.array([50.0, 100.0, 200.0]),
            integrator="BAOAB",
        ),
        "online": lambda: stochgrad.sghmc(
            target, 0.02, 100.0, noise_estimate="online", integrator="BAOAB"
        ),
    }[kind]()
    law = predict_law(key, kernel, jnp.asarray(mean))
    draws = stochgrad.sample(
        key, kernel, init=jnp.asarray(mean), num_samples=60_000, num_chains=4, num_warmup=3000
    ).positions
    found = np.asarray(draws, np.float64).std(axis=(0, 1))
    error = np.sqrt(law.square_autocorrelation_time / (2 * 240_000))
    # V has a relative error of 0.05, and the noise estimate one of its own
    assert np.all(np.abs(found / law.sd - 1) < 4 * error + 0.05 * law.sd_bias + 0.015)
