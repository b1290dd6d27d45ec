"""Runs that are stopped, killed or refused, and what they leave on disk."""

import multiprocessing
import shutil
import signal
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import stochgrad
from tests.core import worker


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.positions, b.positions)
    assert a.stats.keys() == b.stats.keys()
    for name in a.stats:
        np.testing.assert_array_equal(*(np.asarray(x.stats[name], np.float32) for x in (a, b)))
    np.testing.assert_array_equal(a.finite, b.finite)


def launch(**options):
    """A run in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.core.worker"])
    process = context.Process(target=worker.main, args=(options,))
    process.start()
    return process


@pytest.mark.parametrize(
    ("num_chains", "stored"),
    [
        (2, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, False), (1, True), (2, False)]
        ),
    ],
)
def test_a_run_in_two_parts_is_the_run_in_one(tmp_path, stored, num_chains):
    whole = worker.run(120, num_chains)
    options = {"checkpoint": tmp_path / "state", "every": 0, "chunk_size": 30}
    if stored:
        options["store"] = tmp_path / "draws.zarr"
    first = worker.run(70, num_chains, **options)
    same(first, whole[:70])
    with pytest.raises(ValueError, match="holds this run already: pass resume=True"):
        worker.run(120, num_chains, **options)
    same(worker.run(120, num_chains, resume=True, **options), whole)
    same(worker.run(120, num_chains, resume=True, **options), whole)  # nothing left to do


@pytest.mark.slow
def test_every_kernels_state_can_be_saved(tmp_path):
    """Typed keys, bfloat16, nested states and what chains share, through a file and back."""
    target = worker.target()
    position = {"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros((), jnp.bfloat16)}
    coarse = stochgrad.posterior(
        lambda p: -jnp.sum(p["a"] ** 2) - p["b"] ** 2,
        lambda p, x: -((x.astype(p["b"].dtype) - p["b"]) ** 2) / 2,
        np.ones(40, np.float32),
        batch_size=10,
    )
    noisy = stochgrad.Gradient(
        lambda key, position: key,
        lambda key, position, state: (
            lambda p: (jnp.float32(0), -p + 0.1 * jax.random.normal(state, p.shape)),
            jax.random.split(state)[0],
        ),
    )
    cases = [
        (stochgrad.sgld(coarse, 1e-3), position),
        (stochgrad.sgld(noisy, 1e-2), jnp.zeros(2)),
        (
            stochgrad.replica_exchange(
                stochgrad.sgld, target, 1e-4, temperatures=[1.0, 2.0], swap_every=2
            ),
            jnp.zeros(3),
        ),
    ]
    for i, (kernel, init) in enumerate(cases):
        run = lambda n, kernel=kernel, init=init, **options: stochgrad.sample(
            jax.random.key(0), kernel, init=init, num_samples=n, num_chains=2, **options
        )
        path = tmp_path / str(i)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stochgrad.GradientNoiseWarning)
            warnings.simplefilter("ignore", stochgrad.PrecisionWarning)  # of positions in bfloat16
            run(7, checkpoint=path)
            same(run(15, checkpoint=path, resume=True), run(15))


@pytest.mark.slow
def test_killed_at_twenty_moments_no_draw_is_lost_doubled_or_changed(tmp_path):
    """SIGKILL at the opening or renaming of some file, or at some time, and on again."""
    reference = worker.run(400).positions
    rng = np.random.default_rng(7)
    options = {"store": str(tmp_path / "d.zarr"), "checkpoint": str(tmp_path / "c")}
    options |= {"every": 0.0, "chunk_size": 40, "resume": True}
    options |= {"cache": str(tmp_path / "cache")}
    kills = seen = rounds = 0
    while kills < 20:
        rounds += 1
        by_time = rounds % 3 == 0
        death = {} if by_time else {"die_at": int(rng.integers(1, 160))}
        process = launch(**options, **death)
        if by_time:
            process.join(float(rng.uniform(0.3, 2.0)))
            process.kill()
        process.join()
        if process.exitcode == 0:  # it came through: begin anew
            np.testing.assert_array_equal(stored(options["store"]), reference)
            shutil.rmtree(options["store"])
            shutil.rmtree(options["checkpoint"])
            seen = 0
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        draws = stored(options["store"])
        assert draws.shape[1] >= seen
        seen = draws.shape[1]
        np.testing.assert_array_equal(draws, reference[:, :seen])
    process = launch(**options, out=str(tmp_path / "out.npy"))
    process.join()
    assert process.exitcode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), reference)
    np.testing.assert_array_equal(stored(options["store"]), reference)


def stored(path):
    """The draws that a reader of the store sees."""
    if not (Path(path) / "zarr.json").exists():
        return np.zeros((4, 0, 3), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # killed before the first consolidation
        with xarray.open_datatree(path, engine="zarr") as tree:
            if "posterior" not in tree:
                return np.zeros((4, 0, 3), np.float32)
            sizes = {len(tree[group].draw) for group in tree.children}
            assert len(sizes) == 1
            return tree["posterior"]["x"].values


@pytest.mark.slow
def test_termination_saves_the_state(tmp_path):
    process = launch(checkpoint=str(tmp_path / "c"), num_samples=10**7, every=0.5)
    while not (tmp_path / "c" / "state.npz").exists():
        assert process.is_alive()
        time.sleep(0.05)
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGTERM


def test_another_run_is_refused_with_what_differs(tmp_path):
    options = {"checkpoint": tmp_path / "state", "resume": True}
    worker.run(5, 2, **options)

    def refused(expected, kernel, init=None, **changes):
        arguments = {"num_samples": 5, "num_warmup": 20, "thin": 2, "num_chains": 2, **changes}
        with pytest.raises(ValueError, match=expected):
            stochgrad.sample(
                jax.random.key(3),
                kernel,
                init=jnp.zeros(3) if init is None else init,
                progress=False,
                **arguments,
                **options,
            )

    refused("a different run: num_chains was 2 and is now 3", worker.kernel(), num_chains=3)
    refused("a different run: thin was 2 and is now 4", worker.kernel(), thin=4)
    other = stochgrad.sghmc(worker.target(), 0.02, 60.0, integrator="BAOAB")
    refused("a different run: step_size was 0.005 and is now 0.02", other)
    smaller = stochgrad.posterior(
        lambda m: -0.5 * jnp.sum(m**2),
        lambda m, x: -0.5 * jnp.sum((x - m[None]) ** 2, axis=-1),
        np.ones((450, 3), np.float32),
        batch_size=50,
    )
    refused(
        "data_size was 500 and is now 450",
        stochgrad.sghmc(smaller, 0.005, 60.0, integrator="BAOAB"),
    )
    shifted = worker.target()._replace(
        log_density=lambda p, b: worker.target().log_density(p + 1.0, b)
    )
    refused("program was", stochgrad.sghmc(shifted, 0.005, 60.0, integrator="BAOAB"))
    with pytest.raises(ValueError, match="resume=True needs checkpoint"):
        worker.run(5, resume=True)


def test_a_place_that_cannot_be_written_says_so_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"checkpoint='.*' cannot be written: Not a directory"):
        worker.run(5, checkpoint=tmp_path / "file" / "inside")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("x")
    with pytest.raises(ValueError, match="exists but is not a zarr group"):
        worker.run(5, store=tmp_path / "full")


@pytest.mark.slow
def test_a_full_disk_costs_a_warning_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    import stochgrad.core._checkpoint as module

    path, whole = tmp_path / "state", worker.run(60, 2)
    worker.run(20, 2, checkpoint=path)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_tree", full)
        with pytest.warns(stochgrad.CheckpointWarning, match="No space left on device"):
            same(worker.run(60, 2, checkpoint=path, resume=True), whole)
    same(worker.run(60, 2, checkpoint=path, resume=True), whole)


@pytest.mark.slow
def test_a_save_that_failed_leaves_its_draws_to_the_next(tmp_path, monkeypatch):
    import stochgrad.core._checkpoint as module

    path, whole, save, calls = tmp_path / "state", worker.run(120, 2), module.save_tree, []

    def full_once(*args):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_tree", full_once)
        with pytest.warns(stochgrad.CheckpointWarning, match="No space left on device"):
            worker.run(80, 2, checkpoint=path, every=0, chunk_size=20)
    same(worker.run(120, 2, checkpoint=path, resume=True), whole)


def test_a_device_that_fails_says_where_the_last_checkpoint_is(tmp_path):
    calls = 0

    def answer(x):
        nonlocal calls
        calls += 1
        if calls > 60:
            raise OSError("the device has fallen off the bus")
        return x

    def score(p):
        return jnp.float32(0), -jax.pure_callback(answer, jax.ShapeDtypeStruct((2,), p.dtype), p)

    failing = stochgrad.Gradient(
        lambda key, position: (), lambda key, position, state: (score, state)
    )
    with pytest.raises(
        RuntimeError, match=r"failed at draw 50: .*The last checkpoint is at draw 50"
    ):
        stochgrad.sample(
            jax.random.key(0),
            stochgrad.sgld(failing, 1e-2),
            init=jnp.zeros(2),
            num_samples=100,
            chunk_size=25,
            progress=False,
            checkpoint=tmp_path / "state",
            every=0,
        )


@pytest.mark.slow
def test_another_version_is_refused(tmp_path, monkeypatch):
    import stochgrad.core._fingerprint as module

    worker.run(5, 1, checkpoint=tmp_path / "state")
    monkeypatch.setattr(module, "package_version", lambda name: "9.9")
    with pytest.raises(ValueError, match=r"version of stochgrad was '.*' and is now '9\.9'"):
        worker.run(5, 1, checkpoint=tmp_path / "state", resume=True)


@pytest.mark.parametrize("how", ["empty", "garbage", "cut", "flipped", "missing", "another"])
@pytest.mark.parametrize("name", ["state.npz", "draws-0000000000.npz"])
def test_a_damaged_checkpoint_is_named_in_one_sentence(tmp_path, name, how):
    if (name, how) == ("state.npz", "missing"):
        return  # the state is what makes it a checkpoint
    worker.run(30, 2, checkpoint=tmp_path / "c")
    file = tmp_path / "c" / name
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "another":
        worker.run(30, 1, checkpoint=tmp_path / "other")
        shutil.copy(tmp_path / "other" / name, file)
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        wrong = {"empty": b"", "garbage": b"not numbers", "cut": content[: len(content) // 2]}
        file.write_bytes(wrong[how])
    expected = "is missing" if how == "missing" else "is damaged"
    if how == "another":
        expected = "a(nother| different) run"
    with pytest.raises(ValueError, match=expected) as raised:
        worker.run(40, 2, checkpoint=tmp_path / "c", resume=True)
    assert "checkpoint" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_keys_of_another_generator_run_and_resume(tmp_path):
    """A program compiled for one kind of key was used for the next."""
    kernel, runs = worker.kernel(), {}
    for name in ("threefry2x32", "rbg"):
        run = lambda n, name=name, **options: stochgrad.sample(
            jax.random.key(0, impl=name), kernel, init=jnp.zeros(3), num_samples=n, progress=False,
            **options,
        )  # fmt: skip
        runs[name] = run(15)
        run(7, checkpoint=tmp_path / name)
        same(run(15, checkpoint=tmp_path / name, resume=True), runs[name])
    assert np.all(runs["rbg"].positions != runs["threefry2x32"].positions)
    with pytest.raises(ValueError, match="generator of keys was 'key<rbg>' and is now"):
        stochgrad.sample(
            jax.random.key(0, impl="unsafe_rbg"), kernel, init=jnp.zeros(3), num_samples=15,
            progress=False, checkpoint=tmp_path / "rbg", resume=True,
        )  # fmt: skip


@pytest.mark.parametrize(
    "sizes", [(2**31, 0, 1), (2**30, 2**30, 1), (2**20, 0, 2**11), (10**30, 1, 1)]
)
def test_more_steps_than_can_be_counted_are_refused(sizes):
    """Step numbers are of 32 bits: beyond, the step at which a chain was lost came out wrong."""
    num_samples, num_warmup, thin = sizes
    with pytest.raises(ValueError, match="num_warmup, num_samples and thin make"):
        stochgrad.sample(
            jax.random.key(0), worker.kernel(), init=jnp.zeros(3), num_samples=num_samples,
            num_warmup=num_warmup, thin=thin, progress=False,
        )  # fmt: skip
