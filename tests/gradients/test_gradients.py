"""Gradient estimates: exact where they must be, unbiased, with the variance that they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.conftest import Z
from tests.helpers import mean_and_error

N, B = 200, 20
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
Y = (np.random.default_rng(1).random(N) < 0.4).astype(np.float32)


def logistic(**options):
    return stochgrad.posterior(
        lambda t: -0.5 * jnp.sum(t**2),
        lambda t, b: b[1] * (b[0] @ t) - jax.nn.softplus(b[0] @ t),
        (X, Y),
        **{"batch_size": B, **options},
    )


def estimates(gradient, position, count, start=None):
    @jax.jit
    def run(state):
        def body(state, i):
            score, state = gradient.next(jax.random.key(i), position, state)
            return state, score(position)

        return jax.lax.scan(body, state, jnp.arange(count))[1]

    value, g = run(gradient.init(jax.random.key(1), position if start is None else start))
    return np.asarray(value, np.float64), np.asarray(g, np.float64)


def full(target, position):
    return jax.value_and_grad(target.log_density)(position, target.batches.full)


CENTER = jnp.array([0.2, -0.1, 0.4])
FAR = jnp.array([1.0, 1.0, -1.0])


FACTORIES = {
    "minibatch": stochgrad.gradients.minibatch,
    "control variate": lambda target: stochgrad.control_variate(target, CENTER),
    "svrg": lambda target: stochgrad.svrg(target, period=10**9),  # at its first anchor throughout
    "saga": stochgrad.saga,
}


@pytest.mark.parametrize("order", ["iid", "reshuffled", "symmetric", "full"])
@pytest.mark.parametrize("factory", list(FACTORIES))
def test_estimates_average_to_the_full_score(order, factory):
    target = logistic(order=order, batch_size=None if order == "full" else B)
    gradient = FACTORIES[factory](target)
    count = 20 * (N // B) if order != "iid" else 20_000
    value, g = estimates(gradient, FAR, count, start=CENTER)
    expected_value, expected = full(target, FAR)
    if factory == "saga":  # unbiased given its table
        value, g = one_step_estimates(gradient, target, FAR)
    if order == "iid" and factory != "saga":
        assert np.all(np.abs(g.mean(axis=0) - expected) < Z * g.std(axis=0) / np.sqrt(count))
        assert abs(value.mean() - expected_value) < Z * value.std() / np.sqrt(count)
    else:
        np.testing.assert_allclose(g.mean(axis=0), expected, rtol=1e-4, atol=2e-3)
        np.testing.assert_allclose(value.mean(), expected_value, rtol=1e-5)


def one_step_estimates(gradient, target, position):
    """The estimate from one state under each minibatch in turn: unbiased given the state."""
    state = gradient.init(jax.random.key(1), CENTER)
    blocks = target.batches.blocks
    found = []
    for block in range(blocks.count):
        batches = target.batches._replace(
            blocks=blocks._replace(next=lambda s, b=block: (jnp.int32(b), s))
        )
        step = stochgrad.saga(target._replace(batches=batches)).next
        score, _ = step(jax.random.key(0), position, state)
        found.append(score(position))
    value, g = zip(*found, strict=True)
    return np.asarray(value, np.float64), np.asarray(g, np.float64)


def test_saga_and_svrg_lose_their_noise_where_the_chain_rests():
    target = logistic()
    _, plain = estimates(stochgrad.gradients.minibatch(target), FAR, 100)
    for factory in (stochgrad.saga, stochgrad.svrg):
        _, g = estimates(factory(target), FAR, 200, start=CENTER)
        late = g[150:]  # by then the whole table and the anchor are where the chain is
        assert np.all(late.std(axis=0) < 1e-3 * plain.std(axis=0))
        assert np.all(g[0] != g[-1])


def test_the_anchor_of_svrg_moves_once_a_period():
    target = logistic(order="iid")
    gradient = stochgrad.svrg(target, period=7)
    state = gradient.init(jax.random.key(0), CENTER)
    anchors = []
    following = jax.jit(lambda at, state: gradient.next(jax.random.key(0), at, state)[1])
    for i in range(16):
        state = following(CENTER + i, state)
        anchors.append(float(state.anchor[0] - CENTER[0]))
    np.testing.assert_allclose(anchors, [0.0] * 7 + [7.0] * 7 + [14.0] * 2, atol=1e-5)


def test_the_table_of_saga_holds_the_last_gradients_and_their_mean():
    target = logistic()
    gradient = stochgrad.saga(target)
    state = gradient.init(jax.random.key(0), CENTER)
    blocks = target.batches.blocks

    @jax.jit
    def follow(key, at, state):
        every = jax.lax.map(
            lambda b: jax.grad(target.log_density)(at, blocks.at(b)), jnp.arange(N // B)
        )
        return every, gradient.next(key, at, state)[1]

    changed = set()
    for i in range(40):
        before = state.table[1]
        every, state = follow(jax.random.key(i), CENTER + 0.1 * (i + 1), state)
        (row,) = np.flatnonzero(np.any(np.asarray(before != state.table[1]), axis=1))
        np.testing.assert_allclose(state.table[1][row], every[row], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state.mean[1], state.table[1].mean(axis=0), rtol=1e-4, atol=1e-4)
        changed.add(int(row))
    assert len(changed) > 7  # of ten, drawn uniformly


@pytest.mark.slow
@pytest.mark.parametrize("order", ["reshuffled", "symmetric"])
def test_saga_is_right_under_sweeps(order):
    """Rows of uneven curvature, epochs about as long as the chain's memory. Were the table renewed
    in the order of the visits, swept chains would have variances of 0.77 and 0.83."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=500) * np.exp(rng.normal(size=500))).astype(np.float32)
    y = rng.normal(size=500).astype(np.float32)
    precision = 1 + np.sum(x**2)
    target = stochgrad.posterior(
        lambda w: -0.5 * w**2,
        lambda w, rows: -0.5 * (rows[1] - rows[0] * w) ** 2,
        (x, y),
        batch_size=10,
        order=order,
    )
    kernel = stochgrad.sghmc(
        stochgrad.saga(target),
        0.03 / np.sqrt(precision),
        np.sqrt(precision),
        integrator="BAOAB",
    )
    mean = np.sum(x * y) / precision
    draws = stochgrad.sample(
        jax.random.key(0),
        kernel,
        init=jnp.float32(mean),
        num_samples=1000,
        num_warmup=20,
        thin=100,
        num_chains=16,
    )
    variance, error = mean_and_error((draws.positions - mean) ** 2 * precision)
    tolerance = Z * error[0] + 1.5 * np.nanmean(draws.stats["noise_ratio"])  # noise, and no more
    assert abs(variance[0] - 1) < tolerance < 0.15


def test_gradients_that_cannot_be_are_refused(key):
    rows = logistic(layout="rows")
    with pytest.raises(ValueError, match="no fixed partition of minibatches: use layout='blocks'"):
        stochgrad.saga(rows)
    small = stochgrad.saga(logistic(), memory_limit=100)
    with pytest.raises(ValueError, match="takes 160 bytes a chain, more than memory_limit, 100"):
        stochgrad.sample(key, stochgrad.sgld(small, 0.01), init=CENTER, num_samples=1)
    with pytest.raises(TypeError, match="needs a center: "):
        stochgrad.control_variate(logistic(), None)
    with pytest.raises(ValueError, match="period must be an integer of at least 1"):
        stochgrad.svrg(logistic(), period=0)
    for factory in (stochgrad.saga, stochgrad.svrg):
        with pytest.raises(TypeError, match="needs a Posterior, got Gradient"):
            factory(stochgrad.gradients.minibatch(logistic()))


def test_a_control_variate_has_no_noise_at_its_center_and_little_nearby():
    target = logistic()
    gradient = stochgrad.control_variate(target, CENTER)
    _, at_center = estimates(gradient, CENTER, 50)
    assert np.abs(at_center - np.asarray(full(target, CENTER)[1])).max() < 1e-3
    near = CENTER + 0.05
    _, plain = estimates(stochgrad.gradients.minibatch(target), near, 400)
    _, centered = estimates(gradient, near, 400)
    assert np.all(centered.var(axis=0) < 0.01 * plain.var(axis=0))


def test_a_control_variate_needs_a_posterior():
    gradient = stochgrad.gradients.minibatch(logistic())
    with pytest.raises(TypeError, match="control_variate needs a Posterior, got Gradient"):
        stochgrad.control_variate(gradient, CENTER)
    with pytest.raises(TypeError, match="target must be a Posterior"):
        stochgrad.sgld(lambda q: q, 0.1)


def test_a_center_must_be_a_position_of_the_posterior():
    """One number in the place of three was subtracted from every coordinate's gradient."""
    target = logistic()
    for words, center in [
        ("center must be finite", CENTER.at[1].set(jnp.nan)),
        ("center does not fit the posterior", jnp.zeros(4)),
        ("center must be a floating-point array, got dtype int32", jnp.zeros(3, jnp.int32)),
    ]:
        with pytest.raises(ValueError, match=words):
            stochgrad.control_variate(target, center)
    named = target._replace(initial=lambda key: {"a": jnp.zeros(3)},
                            log_density=lambda p, b: target.log_density(p["a"], b))  # fmt: skip
    with pytest.raises(ValueError, match=r"it lacks \['a'\]; it has \['b'\]"):
        stochgrad.control_variate(named, {"b": CENTER})
    with pytest.raises(ValueError, match=r"center\['a'\] must have the shape \(3,\)"):
        stochgrad.control_variate(named, {"a": CENTER[:1]})
    broad = target._replace(
        log_density=lambda t, b: target.log_density(jnp.broadcast_to(t, (3,)), b)
    )
    gradient = stochgrad.control_variate(broad, jnp.float32(0.0))
    with pytest.raises(ValueError, match=r"center must have the shape \(3,\) of the chain"):
        gradient.init(jax.random.key(0), CENTER)


def test_one_draw_serves_several_evaluations():
    """What an integrator with several stages relies on."""
    gradient = stochgrad.gradients.minibatch(logistic())
    score, _ = gradient.next(jax.random.key(0), FAR, gradient.init(jax.random.key(1), FAR))
    np.testing.assert_array_equal(score(FAR)[1], score(FAR)[1])
    assert not np.array_equal(score(FAR)[1], score(CENTER)[1])


def test_find_center_finds_the_mode():
    target = logistic()
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        center = stochgrad.find_center(jax.random.key(0), target, init=jnp.zeros(3))
    mode = jnp.asarray(center.position)
    value, slope = full(target, mode)
    curvature = -jax.hessian(target.log_density)(mode, target.batches.full)
    off = np.linalg.solve(curvature, slope)  # how far the mode is
    np.testing.assert_allclose(center.log_density, value, rtol=1e-5)
    np.testing.assert_allclose(center.gradient_norm, np.linalg.norm(slope), rtol=1e-3)
    np.testing.assert_allclose(center.distance, np.sqrt(slope @ off), rtol=1e-2)
    assert np.all(np.abs(off) < 0.2 * np.sqrt(np.diag(np.linalg.inv(curvature))))


def test_find_center_says_when_it_fails():
    target = stochgrad.posterior(
        lambda t: jnp.sqrt(t) - 5 * t,
        lambda t, b: 0.0 * b + t,
        np.ones(4, np.float32),
        batch_size=2,
    )
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.warns(stochgrad.DivergenceWarning),
        pytest.raises(ValueError, match="find_center diverged"),
    ):
        stochgrad.find_center(jax.random.key(0), target, init=jnp.float32(1.0), learning_rate=3.0)
