"""Training: what is kept, when it ends, what survives."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stochgrad
from stochgrad import Gradient


def hill(at=1.0, noise=0.1, breaks=None):
    """A noisy hill, with a cliff behind ``breaks``."""

    def next(key, position, state):
        shift = noise * jax.random.normal(key)

        def score(x):
            height = -0.5 * jnp.sum((x - at - shift) ** 2)
            if breaks is not None:
                height = jnp.where(jnp.all(x < breaks), height, jnp.nan)
            return height, -(x - at - shift)

        return score, state

    return Gradient(lambda key, x: (), next, initial=lambda key: jnp.zeros(2))


def test_it_climbs_and_reports(key):
    fit = stochgrad.fit(key, hill(), 400, learning_rate=0.1, every=40, progress=False)
    np.testing.assert_allclose(fit.model, 1.0, atol=0.1)
    assert fit.values.shape == fit.held_out.shape == (1, 10)
    assert fit.value == fit.held_out.max()
    assert fit.best_step == 40 * (1 + fit.held_out[0].argmax())


def test_patience_ends_it_the_same_way_whatever_the_chunks(key):
    """The best of two runs that were cut differently is one and the same."""
    options = {"learning_rate": optax.constant_schedule(0.2), "every": 5, "progress": False}
    climb = hill()
    long = stochgrad.fit(key, climb, 4000, patience=4, **options)
    last = int(np.sum(~np.isnan(long.held_out)))
    assert last < 800
    assert last - long.best_step // 5 == 4
    again = stochgrad.fit(key, climb, 4000, patience=4, **options)
    np.testing.assert_array_equal(long.position, again.position)


def test_restarts_run_side_by_side_and_the_best_is_returned(key):
    starts = iter([0.0, 50.0, 20.0])
    fit = stochgrad.fit(
        key, hill(), 50, init=lambda key: jnp.full(2, next(starts)), num_restarts=3, every=10,
        optimizer=optax.adam(0.05), progress=False,
    )  # fmt: skip
    assert fit.restart == 0
    assert fit.held_out.shape == (3, 5)
    assert fit.model.shape == (2,)


def test_training_that_breaks_returns_the_best_state_before(key):
    with pytest.warns(stochgrad.DivergenceWarning, match=r"training diverged at step \d+;"):
        fit = stochgrad.fit(
            Gradient(
                lambda key, x: (),
                lambda key, x, s: (lambda x: (jnp.sum(x), jnp.where(x < 2, 1.0, jnp.nan)), s),
                initial=lambda key: jnp.zeros(2),
            ),
            key, 1000, optimizer=optax.sgd(0.1), every=3, progress=False,
        )  # fmt: skip
    assert np.isfinite(fit.position).all()
    assert np.isfinite(fit.last).all()
    assert fit.value < 4.7


def test_it_goes_on_from_a_checkpoint(key, tmp_path):
    options = {"learning_rate": 0.1, "every": 20, "progress": False}
    climb = hill()
    whole = stochgrad.fit(key, climb, 200, **options)
    stochgrad.fit(key, climb, 200, checkpoint=tmp_path / "state", **options)
    again = stochgrad.fit(key, climb, 200, checkpoint=tmp_path / "state", resume=True, **options)
    np.testing.assert_array_equal(whole.position, again.position)
    np.testing.assert_array_equal(whole.held_out, again.held_out)


def test_held_out_is_what_it_is_judged_by(key):
    """Overfitting: the hill of the held-out objective is passed on the way to the other."""
    fit = stochgrad.fit(
        key, hill(at=3.0), 300, held_out=hill(at=1.0, noise=0.0), learning_rate=0.05, every=1,
        progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(fit.model, 1.0, atol=0.1)
    np.testing.assert_allclose(fit.last, 3.0, atol=0.3)


def test_a_module_that_can_be_called_is_a_position(key):
    """It was taken for a function of a key, and called."""

    class Line(eqx.Module):
        slope: jax.Array

        def __call__(self, x):
            return self.slope * x

    def next(key, line, state):
        return jax.value_and_grad(lambda line: -0.5 * (line(2.0) - 3.0) ** 2), state

    objective = Gradient(lambda key, line: (), next)
    line = Line(jnp.array(0.0))
    for restarts in (1, 2):
        fit = stochgrad.fit(
            key, objective, 200, init=line, optimizer=optax.sgd(0.1), num_restarts=restarts,
            every=100, progress=False,
        )  # fmt: skip
        np.testing.assert_allclose(fit.model.slope, 1.5, rtol=1e-5)
    assert line.slope == 0.0  # not donated


def test_what_is_not_finite_at_the_start_is_named(key):
    """A gradient that is no number ended in the advice to take a smaller step."""

    def next(key, x, state):
        return lambda x: (jnp.float32(0.0), {"a": x["a"], "b": x["b"] + jnp.nan}), state

    start = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    with pytest.warns(stochgrad.DivergenceWarning, match=r"start is not finite: \['b'\]"):
        stochgrad.fit(Gradient(lambda key, x: (), next), key, 2, init=start, progress=False)
    with pytest.raises(ValueError, match="held_out must be finite at the start"):
        stochgrad.fit(key, hill(), 2, held_out=hill(breaks=-1.0), progress=False)
    with pytest.raises(ValueError, match=r"init\['b'\] must be finite"):
        stochgrad.fit(
            Gradient(lambda key, x: (), next), key, 2, init=start | {"b": jnp.float32(jnp.nan)}
        )


def test_independence_starts_at_its_proposals(key):
    def propose(key):
        return {"x": 5.0 + jax.random.uniform(key)}, jnp.float32(0.0)

    kernel = stochgrad.independence(propose, lambda x: jnp.float32(0.0))
    run = stochgrad.sample(key, kernel, num_samples=3, num_chains=2, progress=False)
    assert np.all(run.positions["x"] > 5.0)


def test_bad_input(key):
    broken = hill(breaks=-1.0)
    for words, call in [
        ("objective must be finite at the start", lambda: stochgrad.fit(key, broken, 10)),
        ("num_steps must be", lambda: stochgrad.fit(key, hill(), 0)),
        ("learning_rate must be", lambda: stochgrad.fit(key, hill(), 10, learning_rate=-1.0)),
        ("init is needed", lambda: stochgrad.fit(key, hill()._replace(initial=None), 10)),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_independence_sampling_from_a_wide_proposal(key):
    """A skewed target; a wrong ratio or a forgotten old weight would show in mean and variance."""

    def weight(x):
        return 3 * x - jnp.exp(x) + 0.5 * (x / 1.5) ** 2

    def propose(key):
        x = 1.5 * jax.random.normal(key)
        return x, weight(x)

    run = stochgrad.sample(
        key, stochgrad.independence(propose, weight), init=jnp.float32(0.0), num_samples=4000,
        num_chains=50, num_warmup=50, progress=False,
    )  # fmt: skip
    x = run.positions.astype(np.float64)
    wanted = 0.9227843350984671, 0.39493406684822646  # digamma(3), trigamma(3)
    for got, want in zip((x.mean(1), x.var(1)), wanted, strict=True):
        assert abs(got.mean() - want) < 5.5 * got.std(ddof=1) / np.sqrt(50)
