"""Draws on disk."""

import json
import os
import socket
import subprocess
import sys
import threading
from typing import NamedTuple

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
import zarr

import stochgrad
from stochgrad.core._lock import LOCK, Lock, _birth
from tests.core import worker


def test_the_store_holds_the_draws_as_arviz_reads_them(tmp_path):
    path = tmp_path / "draws.zarr"
    memory = worker.run(150, 2)
    stored = worker.run(150, 2, store=path, chunk_size=40)
    assert not isinstance(stored.positions, np.ndarray)  # read when it is indexed
    np.testing.assert_array_equal(stored.positions, memory.positions)
    np.testing.assert_array_equal(stored[100:].positions, memory.positions[:, 100:])
    with xarray.open_datatree(path, engine="zarr") as tree:
        expected = memory.to_datatree()
        for group in ("posterior", "sample_stats"):
            xarray.testing.assert_equal(tree[group].to_dataset(), expected[group].to_dataset())
    assert list(arviz.summary(stored.to_arviz()).index) == ["x[0]", "x[1]", "x[2]"]


@pytest.mark.slow
def test_a_numpyro_model_is_stored_in_its_own_space_and_as_sampled(tmp_path):
    def model(y):
        sd = numpyro.sample("sd", dist.HalfNormal(1.0))
        numpyro.deterministic("variance", sd**2)
        with numpyro.plate("rows", len(y), subsample_size=10):
            numpyro.sample("y", dist.Normal(0.0, sd), obs=numpyro.subsample(y, 0))

    kernel = stochgrad.sgld(stochgrad.from_numpyro(model, jnp.ones(40)), 1e-4)
    run = lambda **options: stochgrad.sample(
        jax.random.key(0), kernel, num_samples=60, num_chains=2, progress=False, **options
    )
    memory, stored = run(), run(store=tmp_path / "d", chunk_size=25)
    np.testing.assert_array_equal(stored.positions["sd"], memory.positions["sd"])
    with xarray.open_datatree(tmp_path / "d", engine="zarr") as tree:
        for name, values in memory.constrained().items():
            np.testing.assert_allclose(tree["posterior"][name], values, rtol=1e-6)
        np.testing.assert_array_equal(tree["unconstrained_posterior"]["sd"], memory.positions["sd"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path, dtype):
    memory = worker.run(50, 1)
    stored = worker.run(50, 1, store=stochgrad.Store(tmp_path / "d", dtype))
    values = np.asarray(stored.positions)
    assert values.dtype == (np.float16 if dtype == "float16" else np.float32)
    digits = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(values, memory.positions, rtol=digits, atol=1e-7)
    assert np.any(values != memory.positions)


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    kernel = stochgrad.sgld(worker.target(), 1e-6)
    with pytest.raises(OSError, match="'x' is beyond what float16 holds"):
        stochgrad.sample(
            jax.random.key(0),
            kernel,
            init=jnp.full(3, 1e6),
            num_samples=5,
            progress=False,
            store=stochgrad.Store(tmp_path / "d", "float16"),
        )
    with pytest.raises(ValueError, match="dtype must be one of"):
        worker.run(5, store=stochgrad.Store(tmp_path / "e", "float8"))


def test_a_store_of_another_run_is_refused(tmp_path):
    worker.run(20, 2, store=tmp_path / "d")
    with pytest.raises(ValueError, match="a different run: num_chains was 2 and is now 1"):
        worker.run(20, 1, store=tmp_path / "d")
    with pytest.raises(ValueError, match="holds this run already"):
        worker.run(20, 2, store=tmp_path / "d")


@pytest.mark.slow
def test_a_disk_that_fills_up_is_reported_with_what_is_kept(tmp_path, monkeypatch):
    import stochgrad.core._store as module

    path, state = tmp_path / "d", tmp_path / "state"
    whole = worker.run(200, 2)
    worker.run(50, 2, store=path, checkpoint=state)
    append = module.Writer._append_to

    def full(self, name, group):
        if name == "sample_stats":
            raise OSError(28, "No space left on device")
        return append(self, name, group)

    with monkeypatch.context() as patch:
        patch.setattr(module.Writer, "_append_to", full)
        with pytest.raises(OSError, match=r"No space left on device\. It holds 50 draws per chain"):
            worker.run(200, 2, store=path, checkpoint=state, resume=True)
    with xarray.open_datatree(path, engine="zarr") as tree:
        assert tree["posterior"].sizes["draw"] == 50
    after = worker.run(200, 2, store=path, checkpoint=state, resume=True)
    np.testing.assert_array_equal(after.positions, whole.positions)


def chunk(path, name):
    """The first file of an array's chunks."""
    return next(file for file in sorted((path / name / "c").rglob("*")) if file.is_file())


def test_draws_are_where_the_checkpoint_counts_them_or_the_run_is_refused(tmp_path):
    """A store that was removed, added or left out gave exact zeros, marked finite."""
    store, state = tmp_path / "s", tmp_path / "c"
    whole = worker.run(40, 2)
    worker.run(30, 2, store=store, checkpoint=state)
    with pytest.raises(ValueError, match="counts 30 draws per chain that are in a store: pass"):
        worker.run(40, 2, checkpoint=state, resume=True)
    store.rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"/s' holds 0 draws per chain, and .* counts 30: put"):
        worker.run(40, 2, store=store, checkpoint=state, resume=True)
    with pytest.raises(ValueError, match="num_samples=20 is less than the 30 draws per chain"):
        worker.run(20, 2, store=tmp_path / "away", checkpoint=state, resume=True)
    moved = worker.run(40, 2, store=tmp_path / "away", checkpoint=state, resume=True)
    np.testing.assert_array_equal(moved.positions, whole.positions)

    worker.run(30, 2, checkpoint=tmp_path / "bare")
    with pytest.raises(ValueError, match=r"holds 30 draws per chain itself, .* without a store"):
        worker.run(40, 2, store=store, checkpoint=tmp_path / "bare", resume=True)
    assert not store.exists()
    with pytest.warns(stochgrad.CheckpointWarning, match="holds 40 draws per chain, and .* anew"):
        again = worker.run(40, 2, store=tmp_path / "away", checkpoint=tmp_path / "new", resume=True)
    np.testing.assert_array_equal(again.positions, whole.positions)


@pytest.mark.parametrize("how", ["missing", "flipped", "cut"])
@pytest.mark.parametrize("name", ["posterior/x", "sample_stats/lp"])
def test_a_damaged_store_names_the_file(tmp_path, name, how):
    """A chunk that is lost reads as the fill value, and one whose bits changed as other draws."""
    path, options = tmp_path / "d", {"checkpoint": tmp_path / "c"}
    draws = worker.run(30, 2, store=path, **options)
    file = chunk(path, name)
    if how == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if how == "flipped" else content[:-5])
    damage = rf"store='.*/d' is damaged: {name}/c/0/0.* \(.*\); put back a copy"
    if name == "posterior/x":
        with pytest.raises(OSError, match=damage):
            np.asarray(draws.positions)
    with pytest.raises(OSError, match=damage):
        worker.run(40, 2, store=path, resume=True, **options)
    assert not (path / ".stochgrad.lock").exists()


def test_what_was_never_written_is_no_number_and_not_finite(tmp_path):
    """zarr's fill value of zero looked like a draw; readers see NaN, marked as diverging."""
    path = tmp_path / "d"
    worker.run(30, 2, store=path)
    group = zarr.open_group(path, mode="r+")
    for name in ("posterior/x", "sample_stats/diverging"):
        group[name].resize((2, 35, *group[name].shape[2:]))
    assert np.all(np.isnan(group["posterior/x"][:, 30:]))
    assert np.all(group["sample_stats/diverging"][:, 30:])
    assert np.all(np.isfinite(group["posterior/x"][:, :30]))


def test_a_store_stays_where_it_is_when_the_directory_changes(tmp_path, monkeypatch):
    memory = worker.run(30, 2)
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path)
    stored = worker.run(30, 2, store="d")
    monkeypatch.chdir(tmp_path / "else")
    np.testing.assert_array_equal(stored.positions, memory.positions)


def test_a_kernels_own_divergences_are_not_taken_for_lost_numbers(tmp_path):
    """``finite`` of a stored run of blackjax was what did not diverge."""

    class Info(NamedTuple):
        is_divergent: jax.Array

    class State(NamedTuple):
        position: jax.Array

    def step(key, state):
        position = jax.random.normal(key, ())
        return State(position), Info(position > 0)

    kernel = stochgrad.core.Kernel(lambda position, key: State(position), step)
    run = lambda **options: stochgrad.sample(
        jax.random.key(0), kernel, init=jnp.zeros(()), num_samples=30, progress=False, **options
    )
    stored, memory = run(store=tmp_path / "d"), run()
    assert np.all(stored.finite)
    np.testing.assert_array_equal(stored.stats["is_divergent"], memory.positions > 0)


@pytest.mark.parametrize("kind", ["store", "checkpoint"])
def test_a_second_writer_is_refused_until_the_first_is_done_or_dead(tmp_path, kind):
    path = tmp_path / "d"
    path.mkdir()
    options = {kind: path}
    lock = Lock(path, "it")
    with pytest.raises(OSError, match=rf"{kind}='.*' is being written by process {os.getpid()}"):
        worker.run(30, 2, **options)
    lock.release()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = {"pid": sleeper.pid, "host": socket.gethostname(), "birth": _birth(sleeper.pid)}
    (path / LOCK).write_text(json.dumps(owner))
    try:
        with pytest.raises(OSError, match=f"is being written by process {sleeper.pid}"):
            worker.run(30, 2, **options)
    finally:
        sleeper.kill()
    worker.run(30, 2, **options)  # the first is dead, if not buried
    sleeper.wait()
    assert not list(path.glob(f"{LOCK}*"))


def test_a_lock_of_another_host_is_taken_over_when_it_is_not_renewed(tmp_path, monkeypatch):
    path, silence = tmp_path / LOCK, 0.4
    monkeypatch.setattr(stochgrad.core._lock, "_SILENCE", silence)
    text = json.dumps({"pid": 1, "host": "elsewhere", "birth": "1"})
    path.write_text(text)
    Lock(tmp_path, "it").release()
    path.write_text(text)
    over = threading.Event()

    def renew():
        while not over.wait(silence / 10):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(OSError, match="process 1 on elsewhere"):
            Lock(tmp_path, "it")
    finally:
        over.set()
        thread.join()


def test_a_run_that_fails_lets_its_places_go(tmp_path):
    options = {"store": tmp_path / "d", "checkpoint": tmp_path / "c"}
    bad = np.ones((50, 1), np.float32)
    bad[:, 0] = np.nan
    target = stochgrad.posterior(
        lambda m: -(m[0] ** 2),
        lambda m, x: -((x[:, 0] - m[0]) ** 2),
        bad,
        batch_size=10,
        order="streamed",
    )
    with pytest.raises(ValueError, match="holds NaN"):
        stochgrad.sample(
            jax.random.key(0), stochgrad.sgld(target, 1e-4), init=jnp.zeros(1), num_samples=5,
            progress=False, **options,
        )  # fmt: skip
    assert not list(tmp_path.rglob(f"{LOCK}*"))


def test_a_store_opens_without_the_script_that_made_it(tmp_path):
    run = worker.run(20, 2, store=tmp_path / "d")
    draws = stochgrad.open_draws(tmp_path / "d")
    assert draws.attrs["method"] == run.attrs["method"]
    assert (draws.num_chains, draws.num_draws) == (2, 20)
    expected = run.to_datatree()["posterior"]
    tree = draws.to_datatree()["posterior"]
    assert set(tree.data_vars) == set(expected.data_vars)
    for name in tree.data_vars:
        np.testing.assert_array_equal(tree[name], expected[name])
    np.testing.assert_array_equal(draws.first_bad, [-1, -1])
    with pytest.raises(ValueError, match="holds no draws: it must be the store"):
        stochgrad.open_draws(tmp_path)
    with pytest.raises(TypeError, match="path must be a path, got 3"):
        stochgrad.open_draws(3)
