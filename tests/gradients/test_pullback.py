"""Targets of some of their weights, and of weights wider than what works with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stochgrad
from stochgrad import em
from stochgrad.gradients import minibatch
from tests.em.toys import small

X = np.random.default_rng(3).normal(1.0, 1.0, (60, 2)).astype(np.float32)
FULL = {"a": jnp.array([0.3, -0.2]), "deep": {"b": jnp.array(0.5)}, "c": jnp.array(2.0)}
CHOICE = {"a", "deep.b"}


def log_prior(p):
    return -0.5 * (jnp.sum(p["a"] ** 2) + p["deep"]["b"] ** 2 + p["c"] ** 2)


def log_likelihood(p, x):
    return -0.5 * jnp.sum((x - (p["a"] + p["deep"]["b"])[None]) ** 2 * p["c"], -1)


def target(**options):
    return stochgrad.posterior(log_prior, log_likelihood, X, **{"batch_size": 10, **options})


def free_of(what):
    return stochgrad.trainable(what, FULL, lambda name: name in CHOICE)


def by_parts(full):
    return {"a": full["a"], "deep.b": full["deep"]["b"]}


@pytest.mark.parametrize("make", [lambda t: t, minibatch, lambda t: stochgrad.saga(t)])
def test_the_gradient_is_that_part_of_the_whole_one(make, key):
    whole, free = make(target()), free_of(make(target()))
    if isinstance(free, stochgrad.Posterior):
        whole, free = minibatch(whole), minibatch(free)
    start = free.initial(key) if free.initial else free.posterior.initial(key)
    for found, kept in zip(start.values(), by_parts(FULL).values(), strict=True):
        np.testing.assert_array_equal(found, kept)
    score, _ = whole.next(key, FULL, whole.init(key, FULL))
    own, _ = free.next(key, start, free.init(key, start))
    np.testing.assert_array_equal(own(start)[0], score(FULL)[0])
    expected = by_parts(score(FULL)[1])
    for name, slope in own(start)[1].items():
        np.testing.assert_allclose(slope, expected[name], rtol=1e-6)


def test_draws_follow_the_conditional_law(key):
    """Given b = 0.5 and c = 2, a is normal: precision 1 + 2 n, mean 2 sum(x - b) over it."""
    only_a = stochgrad.trainable(
        target(order="full", batch_size=None), FULL, lambda name: name == "a"
    )
    draws = stochgrad.sample(
        key, stochgrad.nuts(only_a, 1.0, np.full(2, 1 / 121)), num_samples=1000, num_chains=2
    )
    a = draws.positions["a"].reshape(-1, 2)
    precision = 1 + 2 * len(X)
    error = np.sqrt(1 / precision / 1000)  # NUTS draws of a normal law are worth half as many
    assert np.all(np.abs(a.mean(0) - 2 * (X - 0.5).sum(0) / precision) < 4 * error)
    assert np.all(np.abs(a.var(0) * precision - 1) < 4 * np.sqrt(2 / 1000))


def test_a_step_computes_nothing_of_what_is_fixed():
    wide = {"in": jnp.ones((64, 256)), "out": jnp.ones((256, 8))}
    rows = jnp.ones((32, 64))
    density = lambda p, x: -0.5 * jnp.sum((jnp.tanh(x @ p["in"]) @ p["out"]) ** 2, -1)
    whole = stochgrad.posterior(lambda p: jnp.zeros(()), density, rows, batch_size=16)
    last = stochgrad.trainable(minibatch(whole), wide, lambda name: name == "out")

    def flops(gradient, position):
        def slope(position):
            key = jax.random.key(0)
            return gradient.next(key, position, gradient.init(key, position))[0](position)[1]

        return jax.jit(slope).lower(position).compile().cost_analysis()["flops"]

    first_layer = 2 * 16 * 64 * 256
    less = flops(minibatch(whole), wide) - flops(last, {"out": wide["out"]})
    assert less > 0.9 * first_layer


def test_what_is_fixed_may_be_of_integers(key):
    toy, theta = small(1), jnp.array([0.4, -0.3])
    scale = jnp.array(2, jnp.int8)
    model = toy.model()
    policy = em.Policy(
        lambda p, key, prompts: model.policy.sample(
            p["theta"] * p["scale"].astype(jnp.float32), key, prompts
        ),
        lambda p, *rest: model.policy.log_prob(p["theta"] * p["scale"].astype(jnp.float32), *rest),
    )
    params = {"theta": theta, "scale": scale}
    whole = em.mcmc_em(model._replace(policy=policy), toy.questions(), batch_size=1, order="full")
    free = stochgrad.trainable(whole, params, lambda name: name == "theta")
    fit = stochgrad.fit(key, free, 20, init={"theta": theta}, every=10, optimizer=optax.sgd(0.1))
    assert fit.model["scale"].dtype == jnp.int8
    assert not np.array_equal(fit.position["theta"], theta)


def test_small_updates_move_weights_that_are_kept_wide(key):
    params = {"a": jnp.full(2, 0.9), "deep": {"b": jnp.array(0.9)}, "c": jnp.array(0.9)}
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    climb = {"optimizer": optax.adam(1e-5), "every": 5, "progress": False}
    with jax.numpy_dtype_promotion("standard"):
        with pytest.warns(stochgrad.PrecisionWarning, match=r"mixed_precision\(objective, jnp.bf"):
            lost = stochgrad.fit(key, target(), 10, init=narrow, **climb)
        wide = stochgrad.fit(key, stochgrad.mixed_precision(target()), 10, init=params, **climb)
    jax.tree.map(np.testing.assert_array_equal, lost.last, narrow)
    for x, y in zip(jax.tree.leaves(wide.last), jax.tree.leaves(params), strict=True):
        assert x.dtype == jnp.float32
        assert np.all(np.abs(x - y) > 5e-5)  # ten steps of Adam are 1e-4 where signs agree


def test_the_narrow_gradient_is_that_at_the_rounded_weights(key):
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), FULL)
    with jax.numpy_dtype_promotion("standard"):
        for make in (lambda t: minibatch(stochgrad.mixed_precision(t)),
                     lambda t: stochgrad.mixed_precision(minibatch(t))):  # fmt: skip
            wide, narrow = make(target()), minibatch(target())
            score, _ = wide.next(key, FULL, wide.init(key, FULL))
            at_rounded, _ = narrow.next(key, rounded, narrow.init(key, rounded))
            value, slope = jax.tree.map(np.asarray, score(FULL))
            assert value.dtype == np.float32
            for x, y in zip(*map(jax.tree.leaves, (slope, at_rounded(rounded)[1])), strict=True):
                assert x.dtype == np.float32
                np.testing.assert_array_equal(x, np.asarray(y, np.float32))


def test_double_precision_stays_so(key):
    with jax.enable_x64(True):
        params = {"a": jnp.zeros(2), "deep": {"b": jnp.array(0.5)}, "c": jnp.array(2.0)}
        whole = stochgrad.posterior(
            log_prior, log_likelihood, X.astype(np.float64), batch_size=None, order="full"
        )
        for make in (lambda t: t, minibatch):
            free = stochgrad.trainable(make(whole), params, lambda name: name == "a")
            free = minibatch(free) if isinstance(free, stochgrad.Posterior) else free
            start = {"a": params["a"]}
            value, slope = free.next(key, start, free.init(key, start))[0](start)
            assert value.dtype == slope["a"].dtype == jnp.float64


def test_likelihoods_of_rows_are_those_of_the_whole(key):
    free = free_of(target())
    start = free.initial(key)
    seen, all_of_it = free.observations(), target().observations()
    batch = all_of_it.take(np.arange(7))
    jax.tree.map(
        np.testing.assert_array_equal,
        (seen.log_likelihood(start, batch), seen.log_prior(start)),
        (all_of_it.log_likelihood(FULL, batch), all_of_it.log_prior(FULL)),
    )


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: stochgrad.trainable(target(), FULL, lambda n: False), ValueError, "where must ch"),
        (lambda: stochgrad.trainable(target(), FULL, lambda n: True), ValueError, "and not all"),
        (lambda: stochgrad.trainable(target(), FULL, "a"), TypeError, "where must be a function"),
        (lambda: stochgrad.trainable(3, FULL, lambda n: n == "a"), TypeError, "Posterior"),
        (
            lambda: stochgrad.trainable(
                target(), {"a": jnp.arange(3), "c": jnp.ones(2)}, lambda n: n == "a"
            ),
            ValueError,
            "floating-point",
        ),
        (lambda: stochgrad.mixed_precision(target(), "b16"), TypeError, "dtype must be a type"),
        (lambda: stochgrad.mixed_precision(target(), jnp.float32), ValueError, "float16"),
        (lambda: stochgrad.mixed_precision(target(), jnp.int8), ValueError, "float16"),
        (lambda: stochgrad.mixed_precision(None), TypeError, "Posterior"),
    ],
)
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
