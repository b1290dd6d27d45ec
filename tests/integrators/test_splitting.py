"""Words, the gradients they cost, and the covariances of their flows."""

from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

import stochgrad
from stochgrad.core import Gradient
from stochgrad.integrators import INTEGRATORS, splitting
from stochgrad.integrators._flows import noise_factor

ONE_GRADIENT = ["EM", "SGHMC", "LEAPFROG", "SSI", "LT", "OBABO", "BAOAB", "ABOBA", "OABAO", "UBU"]


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("AB", "'AB' has no O or U"),
        ("BAB", "'BAB' has no O or U"),
        ("OBO", "'OBO' has no A or U"),
        ("OAO", "'OAO' has no B"),
        ("BAXAB", "with 'X'"),
        ("leap", "with 'a', 'e', 'l', 'p'"),
        ("", "a splitting is a word over A, B, O and U, got ''"),
        ("AUB", "mixes U .* with 1 A and 0 O"),
        (3, "integrator must be one of"),
    ],
)
def test_what_is_no_splitting_is_named(word, words):
    with pytest.raises(ValueError, match=words):
        stochgrad.sghmc(counting_gradient([]), 0.1, 1.0, integrator=word)


def counting_gradient(calls):
    """A gradient that notes every evaluation as it is traced."""

    def next(key, position, state):
        def score(position):
            calls.append("score")
            return jax.value_and_grad(lambda q: -0.5 * jnp.sum(q**2))(position)

        return score, state

    return Gradient(lambda key, position: (), next)


@pytest.mark.parametrize(
    ("integrator", "expected"),
    [*((name, 1) for name in ONE_GRADIENT), ("BUB", 1), ("MT3", 3), ("BABAOABAB", 3), ("BAO", 1)],
)
def test_gradients_of_a_step_are_counted(integrator, expected):
    calls = []
    kernel = stochgrad.sghmc(counting_gradient(calls), 0.1, 1.0, integrator=integrator)
    key = jax.random.key(0)
    state = jax.eval_shape(kernel.init, jnp.zeros(2), key)
    calls.clear()
    jax.eval_shape(kernel.step, key, state)
    assert len(calls) == expected


def test_the_first_kick_of_a_chain_uses_the_gradient_at_its_start():
    """A BAOAB chain that began with a zero gradient would lose half a kick."""
    still = lambda key, tree: jax.tree.map(jnp.zeros_like, tree)
    kernel = stochgrad.sghmc(counting_gradient([]), 0.1, 1e-6, integrator="BAOAB", noise=still)
    state = kernel.init(jnp.float32(1.0), jax.random.key(0))._replace(momentum=jnp.float32(0.0))
    state, _ = kernel.step(jax.random.key(1), state)
    np.testing.assert_allclose(state.position, 1 - 0.1**2 / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("word", "symmetric"), [("BAOAB", True), ("UBU", True), ("BABO", False), ("BAO", False)]
)
def test_symmetric_words_are_recognized(word, symmetric):
    assert splitting(word).symmetric is symmetric
    assert splitting(word).keeps_gradient is (word in ("BAOAB", "BABO"))
    assert INTEGRATORS["SSI"].symmetric


@pytest.mark.parametrize("x", [1e-8, 1e-6, 1e-3, 0.3, 2.0, 15.0])
@pytest.mark.parametrize("traced", [False, True])
def test_covariances_of_the_noise_keep_their_digits(x, traced):
    """Against Van Loan's matrix exponential in double precision."""
    drift = np.zeros((3, 3))
    drift[0, 0], drift[1, 0], drift[2, 1] = -x, 1.0, 1.0  # S, its integral, its double integral
    noise = np.diag([2 * x, 0.0, 0.0])
    pieces = 16  # in one piece, exp(x) times exp(-x) would lose what digits the reference has
    block = expm(np.block([[-drift, noise], [np.zeros((3, 3)), drift.T]]) / pieces)
    flow, one = block[3:, 3:].T, block[3:, 3:].T @ block[:3, 3:]
    expected = np.zeros((3, 3))
    for _ in range(pieces):
        expected = flow @ expected @ flow.T + one
    found = jax.jit(lambda x: noise_factor(x, 3, jnp))(jnp.float32(x)) if traced else None
    numbers = found or noise_factor(x, 3, np)
    factor = np.zeros((3, 3))
    for i, row in enumerate(numbers):
        factor[i, : len(row)] = [float(value) for value in row]
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=2e-5 if traced else 1e-8)


@pytest.mark.parametrize("rate", [1e-6, 1e-3, 1.0])
def test_the_covariance_of_a_u_step_in_single_precision(rate):
    """One UBU step without force, through the public kernel, against the exact Ornstein-Uhlenbeck
    covariance of (q, p) after time h."""
    h = 1.0
    flat = Gradient(
        lambda key, position: (),
        lambda key, position, state: (lambda q: (jnp.zeros(()), jnp.zeros_like(q)), state),
    )
    columns = []
    for i in range(4):
        numbers = count()
        noise = lambda key, tree, i=i, n=numbers: jnp.full_like(tree, float(next(n) == i))
        kernel = stochgrad.sghmc(flat, h, rate, integrator="UBU", noise=noise)
        state = kernel.init(jnp.float32(0.0), jax.random.key(0))
        state, _ = kernel.step(jax.random.key(1), state._replace(momentum=jnp.float32(0.0)))
        columns.append([float(state.position), float(state.momentum)])
    columns = np.array(columns, np.float64).T
    drift = np.array([[0.0, 1.0], [0.0, -rate]])
    block = expm(h * np.block([[-drift, np.diag([0, 2 * rate])], [np.zeros((2, 2)), drift.T]]))
    expected = block[2:, 2:].T @ block[:2, 2:]
    np.testing.assert_allclose(columns @ columns.T, expected, rtol=2e-6)


def test_a_dense_mass_is_a_linear_change_of_coordinates():
    """With M = P, a Gaussian of precision P moves as a standard one: kinetic temperature and
    stationary covariance follow, whatever the correlation."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 3))
    precision = root @ root.T + 0.1 * np.eye(3)
    log_density = lambda q: (
        -0.5 * jnp.ravel(_flat(q) @ jnp.asarray(precision, jnp.float32) @ _flat(q))[0]
    )
    gradient = Gradient(
        lambda key, position: (),
        lambda key, position, state: (jax.value_and_grad(log_density), state),
    )
    kernel = stochgrad.sghmc(
        gradient, 0.5, 1.5 * precision, mass=precision, integrator="BAOAB", temperature=0.5
    )
    start = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    draws = stochgrad.sample(
        jax.random.key(0), kernel, init=start, num_samples=3000, num_warmup=50, num_chains=8, thin=3
    )
    assert {k: v.shape for k, v in draws.positions.items()} == {"a": (8, 3000, 2), "b": (8, 3000)}
    flat = np.concatenate([draws.positions["a"], draws.positions["b"][..., None]], axis=-1)
    white = flat.reshape(-1, 3) @ np.linalg.cholesky(precision)
    np.testing.assert_allclose(np.cov(white.T), 0.5 * np.eye(3), atol=0.05)
    # BAOAB on a standard Gaussian: E p^2 = T (1 - h^2 / 4)
    np.testing.assert_allclose(
        draws.stats["kinetic_temperature"].mean(), 0.5 * (1 - 0.5**2 / 4), rtol=0.03
    )


def _flat(q):
    return jnp.concatenate([q["a"], q["b"][None]])
