"""The loop: who runs in it, what it returns, and what it says when something is wrong."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import blackjax
import blackjax.util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad.core import Shared
from tests.conftest import Z
from tests.helpers import exact_gradient, gaussian_posterior, mean_and_error

ROOT = Path(__file__).parents[2]
RUN = {"num_samples": 5, "progress": False}


@functools.cache
def kernel(**options):
    return stochgrad.sghmc(gaussian_posterior(batch_size=5, **options)[0], 0.01, 5.0)


@pytest.mark.parametrize("num_chains", [1, 4])
def test_a_blackjax_kernel_runs_in_our_loop_unchanged(num_chains, key):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        nuts = blackjax.nuts(lambda q: -0.5 * jnp.sum(q["x"] ** 2), 0.5, jnp.ones(2))
        draws = stochgrad.sample(
            key,
            nuts,
            init={"x": jnp.ones(2)},
            num_samples=1000,
            num_warmup=50,
            num_chains=num_chains,
        )
    value, error = mean_and_error(draws.positions["x"] ** 2)
    assert np.all(np.abs(value - 1) < Z * error)
    assert 0.5 < draws.stats["acceptance_rate"].mean() <= 1
    stats = draws.to_datatree()["sample_stats"]
    assert {"diverging", "n_steps", "acceptance_rate", "energy"} <= set(stats.data_vars)


def test_our_kernel_runs_in_blackjaxs_loop_unchanged(key):
    target, mean, precision = gaussian_posterior(batch_size=5)
    state, (states, info) = blackjax.util.run_inference_algorithm(
        key, stochgrad.sghmc(target, 0.01, 5.0), 20_000, initial_position=jnp.zeros(2)
    )
    assert int(state.count.value) == 20_000
    value, error = mean_and_error(np.asarray(states.position)[None, 500:])
    assert np.all(np.abs(value - mean) < Z * error)
    assert info.noise_ratio.shape == (20_000,)


def test_same_key_same_draws_and_chains_do_not_depend_on_their_number(key):
    run = lambda n, **o: (
        stochgrad.sample(key, kernel(), init=jnp.zeros(2), num_chains=n, **{**RUN, **o}).positions
    )
    np.testing.assert_array_equal(run(2), run(2))
    np.testing.assert_allclose(run(2), run(3)[:2], rtol=1e-5)
    np.testing.assert_array_equal(run(2, num_samples=9)[:, :5], run(2))
    np.testing.assert_array_equal(run(2, num_samples=3, num_warmup=2), run(2)[:, 2:])
    assert not np.array_equal(run(2)[0], run(2)[1])


def test_thinning_keeps_every_nth_state(key):
    seen = stochgrad.sample(
        key, kernel(), init=jnp.zeros(2), **RUN, thin=4, collect=lambda s: s.count
    )
    np.testing.assert_array_equal(np.ravel(seen.positions.value), [4, 8, 12, 16, 20])


def test_chains_in_turn_equal_chains_at_once(key, monkeypatch):
    from stochgrad.core import _program

    runs = []
    for sequential in (False, True):
        monkeypatch.setattr(_program, "prefer_sequential", lambda *_, t=sequential: t)
        for share in (False, True):
            draws = stochgrad.sample(
                key,
                kernel.__wrapped__(),
                init=jnp.zeros(2),
                num_chains=3,
                share_batches=share,
                **RUN,
            )
            runs.append(draws.positions)
    np.testing.assert_allclose(runs[0], runs[2], rtol=1e-5)
    np.testing.assert_allclose(runs[1], runs[3], rtol=1e-5)


def test_sharing_shares_the_minibatches_and_nothing_else(key):
    def rows(share):
        draws = stochgrad.sample(
            key,
            kernel(),
            init=jnp.zeros(2),
            num_chains=3,
            share_batches=share,
            collect=lambda s: (s.gradient_state.words.value, s.momentum),
            **RUN,
        )
        return draws.positions

    words, momentum = rows(True)
    assert np.all(words[0] == words[1])
    assert not np.array_equal(momentum[0], momentum[1])
    words, _ = rows(False)
    assert not np.array_equal(words[0], words[1])


def test_starting_points_may_be_one_or_many_or_a_function(key):
    start = jnp.arange(6.0).reshape(3, 2) * 100
    first = lambda init, n: stochgrad.sample(
        key, stochgrad.sgld(exact_gradient(lambda q: -0.5 * jnp.sum(q**2) * jnp.ones(2)[0]), 1e-9),
        init=init, num_chains=n, num_samples=1,
    ).positions[:, 0]  # fmt: skip
    np.testing.assert_allclose(first(start, 3), start, atol=0.01)
    np.testing.assert_allclose(first(start[1], 3), jnp.stack([start[1]] * 3), atol=0.01)
    drawn = first(lambda k: jax.random.normal(k, (2,)), 3)
    assert len(np.unique(drawn)) == 6
    vector = stochgrad.sample(key, kernel(), init=jnp.zeros(2), num_chains=2, **RUN)
    assert vector.positions.shape == (2, 5, 2)
    target = stochgrad.posterior(
        lambda m: -0.5 * m**2, lambda m, b: -0.5 * (b - m) ** 2, jnp.ones(10), batch_size=5
    )
    scalar = stochgrad.sample(
        key, stochgrad.sgld(target, 0.01), init=jnp.zeros(3), num_chains=3, **RUN
    )
    assert scalar.positions.shape == (3, 5)
    fitting = kernel(dim=3)  # whose data tell that a position has three numbers
    run = stochgrad.sample(key, fitting, init=jnp.zeros(3), num_chains=3, **RUN)
    assert run.positions.shape == (3, 5, 3)


def test_what_is_collected_is_kept(key):
    draws = stochgrad.sample(
        key, kernel(), init=jnp.zeros(2), num_chains=2, collect=lambda s: jnp.sum(s.position), **RUN
    )
    assert draws.positions.shape == (2, 5)
    assert draws.collected
    assert list(draws.to_datatree()["posterior"].data_vars) == ["x"]


@pytest.mark.parametrize("num_chains", [1, 3])
def test_a_diverging_run_is_named_and_its_draws_kept(num_chains, key):
    target, *_ = gaussian_posterior(batch_size=5)
    with pytest.warns(stochgrad.DivergenceWarning, match=r"chain 0 at step \d+ .*step_size=100000"):
        draws = stochgrad.sample(
            key,
            stochgrad.sgld(target, 1e6),
            init=jnp.zeros(2),
            num_samples=50,
            num_chains=num_chains,
        )
    assert 1 <= draws.num_draws < 50
    assert np.all(draws.finite[:, :2])
    assert np.all(draws.first_bad > 0)
    assert draws.to_datatree()["sample_stats"]["diverging"].sum() >= 0


def test_one_bad_chain_does_not_stop_the_others(key):
    start = jnp.array([[0.0, 0.0], [jnp.finfo(jnp.float32).max, 0.0], [0.0, 0.0]])
    target = exact_gradient(lambda q: -0.25 * jnp.sum(q**4))
    with pytest.warns(stochgrad.DivergenceWarning, match="chain 1 at step 0"):
        draws = stochgrad.sample(
            key, stochgrad.sgld(target, 0.01), init=start, num_samples=20, num_chains=3
        )
    assert draws.num_draws == 20
    np.testing.assert_array_equal(draws.finite.all(axis=1), [True, False, True])
    assert draws.finite_chains().num_chains == 2
    assert list(draws.first_bad >= 0) == [False, True, False]


def test_a_divergence_deep_in_a_leaf_is_found(key):
    late = jnp.zeros(500).at[400].set(1.0)
    target = exact_gradient(lambda q: jnp.sum(late * jnp.exp(q)))
    with pytest.warns(stochgrad.DivergenceWarning, match="chain 0 by step"):
        draws = stochgrad.sample(
            key, stochgrad.sgld(target, 1.0), init=jnp.zeros(500), num_samples=50, thin=5
        )
    assert draws.num_draws < 50
    assert (draws.first_bad[0] + 1) % 5 == 0


def test_a_gradient_that_fails_at_the_start_is_named_whatever_the_thinning(key):
    none = lambda q, rows: jnp.zeros(rows.shape[0])
    target = stochgrad.posterior(
        lambda q: -jnp.sqrt(jnp.sum(q**2)), none, jnp.zeros(8), batch_size=4
    )
    with pytest.warns(stochgrad.DivergenceWarning, match="without a derivative"):
        stochgrad.sample(key, stochgrad.sgld(target, 0.1), init=jnp.zeros(2), num_samples=5, thin=7)


@pytest.mark.parametrize(
    ("layout", "thin", "share_batches"),
    [("blocks", 3, False), ("blocks", 10, False), ("blocks", 8, True), ("rows", 10, False)],
)
def test_the_loop_of_an_accelerator_makes_the_same_draws(
    key, monkeypatch, layout, thin, share_batches
):
    """There steps go in groups, and walks of a permutation are not in a loop of their own."""

    def draws():
        target = gaussian_posterior(num_rows=101, batch_size=10, layout=layout)[0]
        return stochgrad.sample(
            key,
            stochgrad.sghmc(target, 1e-3, 50.0),
            init=jnp.zeros(2),
            num_samples=3,
            thin=thin,
            num_chains=2,
            share_batches=share_batches,
            progress=False,
        ).positions

    expected = draws()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(draws(), expected, rtol=1e-5)  # rounded by other fusions


def test_minibatch_noise_that_dominates_is_said(key):
    target, *_ = gaussian_posterior(num_rows=1000, batch_size=5)
    with pytest.warns(stochgrad.GradientNoiseWarning, match="times the noise that the dynamics"):
        stochgrad.sample(
            key, stochgrad.sghmc(target, 0.01, 1.0), init=jnp.zeros(2), num_samples=200
        )


@pytest.mark.slow
def test_ctrl_c_returns_what_is_drawn(key):
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    one = kernel()
    run = lambda n: stochgrad.sample(
        key, one, init=jnp.zeros(2), num_samples=n, thin=50, num_chains=2
    )
    run(3)  # compiled before the clock starts
    timer.start()
    with pytest.warns(stochgrad.InterruptWarning, match="interrupted: returning the"):
        draws = run(10_000_000)
    assert 10 < draws.num_draws < 10_000_000
    np.testing.assert_array_equal(draws.positions[:, :3], run(3).positions)


@pytest.mark.slow
def test_chains_spread_over_devices_give_the_draws_of_one():
    code = """
import sys, jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from tests.core.test_loop import kernel
import stochgrad
for share in (False, True):
    draws = stochgrad.sample(jax.random.key(0), kernel(), init=jnp.zeros(2), num_samples=50,
        num_chains=4, share_batches=share, progress=False)
    sys.stderr.write(str(len(draws.state.position.sharding.device_set)))
    sys.stdout.buffer.write(draws.positions.tobytes())
"""
    runs = []
    for devices in (1, 2, 4):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(devices)],
            capture_output=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stderr.decode().strip()[-2:] == 2 * str(devices)
        runs.append(done.stdout)
    read = [np.frombuffer(r, np.float32) for r in runs]
    assert read[0].size == 2 * 4 * 50 * 2
    np.testing.assert_allclose(read[0], read[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(read[0], read[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be an integer of at least 1, got 0"),
        ({"num_samples": 2.0}, ValueError, "num_samples must be an integer"),
        ({"num_warmup": -1}, ValueError, "num_warmup must be an integer of at least 0"),
        ({"thin": 0}, ValueError, "thin must be an integer of at least 1"),
        ({"num_chains": 0}, ValueError, "num_chains must be an integer of at least 1"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an integer of at least 1"),
        ({"key": 0}, TypeError, "key must be a typed PRNG key"),
        ({"key": jnp.zeros(2, jnp.uint32)}, TypeError, "key must be a typed PRNG key"),
        ({"key": jax.random.split(jax.random.key(0))}, ValueError, "key must be a single key"),
        ({"kernel": 3}, TypeError, "kernel must have init and step"),
        ({"init": None}, ValueError, "init is needed"),
        ({"init": jnp.array([jnp.nan, 0.0])}, ValueError, "init must be finite"),
        ({"init": jnp.zeros(2, jnp.int32)}, ValueError, "init must be a floating-point array"),
        ({"init": {}}, ValueError, "init must hold at least one array"),
    ],
)
def test_bad_input_gets_one_sentence(change, error, words, key):
    call = {"key": key, "kernel": kernel(), "init": jnp.zeros(2), **RUN, **change}
    with pytest.raises(error, match=words):
        stochgrad.sample(call.pop("key"), call.pop("kernel"), **call)


def test_an_init_that_does_not_fit_a_numpyro_model_is_refused(key):
    from tests.interop import models as m

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        target = stochgrad.from_numpyro(m.regression, m.X, y=m.Y)
        with pytest.raises(ValueError, match="init does not match the model: it has shapes"):
            stochgrad.sample(key, stochgrad.sgld(target, 1e-5), init={"w": jnp.zeros(3)}, **RUN)


def test_a_bad_call_fails_before_anything_compiles(key):
    begun = time.perf_counter()
    bad = stochgrad.posterior(
        lambda q: -0.5 * jnp.sum(q**2),
        lambda q, b: jnp.sum(b * q[0]),
        jnp.ones((10, 2)),
        batch_size=2,
    )
    with pytest.raises(ValueError, match=r"one value per row, shape \(2,\), got shape \(\)"):
        stochgrad.sample(key, stochgrad.sgld(bad, 0.1), init=jnp.zeros(2), **RUN)
    assert time.perf_counter() - begun < 30  # a hang, not a speed, fails here


def test_shared_is_a_pytree():
    node = Shared(jnp.ones(2), optional=True)
    doubled = jax.tree.map(lambda x: 2 * x, node)
    assert doubled.optional
    assert float(doubled.value.sum()) == 4
    assert "optional=True" in repr(node)


def test_a_failing_device_is_named_with_the_draw(key):
    def fail(count):
        if count > 3:
            raise OSError("the disk is gone")
        return np.float32(0.0)

    inner = stochgrad.sgld(gaussian_posterior(batch_size=5)[0], 1e-4)

    def step(rng_key, state):
        nothing = jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), state.count.value)
        state, info = inner.step(rng_key, state)
        return state._replace(position=state.position + nothing), info

    with pytest.raises(
        RuntimeError, match=r"the device failed at draw 4: .*There was no checkpoint"
    ):
        stochgrad.sample(
            key, inner._replace(step=step), init=jnp.zeros(2), num_samples=9, chunk_size=2,
            progress=False,
        )  # fmt: skip
