"""Data that are read as they are needed."""

import os
import shutil
import subprocess
import sys
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import zarr

import stochgrad
from tests.conftest import Z


def log_prior(m):
    return -0.5 * jnp.sum(m**2)


def log_likelihood(m, x):
    return -0.5 * jnp.sum((x - m[None]) ** 2, axis=-1)


def rows(size, dim=3):
    return np.random.default_rng(1).normal(size=(size, dim)).astype(np.float32)


def streamed(x, batch_size=10, resident_bytes=2_000):
    return stochgrad.posterior(
        log_prior, log_likelihood, x, batch_size=batch_size, order="streamed",
        resident_bytes=resident_bytes,
    )  # fmt: skip


def visits(x, steps, thin=1, num_chains=1, share=False, **options):
    """The rows that a run sees, step by step, told by its gradient: each row has a number."""
    numbers = np.arange(len(x), dtype=np.float32)[:, None]
    target = stochgrad.posterior(
        lambda m: 0.0 * m[0], lambda m, i: m[0] * i[:, 0], numbers, **options
    )
    kernel = stochgrad.sgld(target, 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stochgrad.GradientNoiseWarning)
        return stochgrad.sample(
            jax.random.key(2), kernel, init=jnp.zeros(1), num_samples=steps, thin=thin,
            num_chains=num_chains, share_batches=share, progress=False,
            collect=lambda state: state.gradient,
        ).positions  # fmt: skip


class Recorded:
    """A source that notes which rows are asked for, and in which thread."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.asked, self.threads = [], set()

    def __getitem__(self, index):
        self.asked.append((index[0].start, index[0].stop))
        self.threads.add(threading.current_thread().name)
        return self.array[index]


@pytest.mark.parametrize(
    ("size", "batch_size", "resident"),
    [(1000, 10, 2_000), (1003, 10, 2_000), (97, 10, 10**6), (50, 50, 10**6)],
)
def test_every_row_comes_once_an_epoch_and_differently_each_time(size, batch_size, resident):
    """A super-block's minibatches, over whole epochs, hold the numbers 0 to N - 1 once each."""
    numbers = np.arange(size, dtype=np.float32)[:, None]
    batches = streamed(numbers, batch_size, resident).batches
    stream, advance, epochs = batches.stream, jax.jit(batches.next), []
    blocks = -(-size // stream.rows)
    number = minibatch = 0
    for _ in range(3):
        seen = []
        while len(seen) < -(-size // batch_size):
            block = stream.load((1, 2), number)
            assert int(block.first) == minibatch
            assert stream.holding(minibatch, (1, 2)) == number
            with stream.supplying(jax.tree.map(jnp.asarray, block)):
                state = batches.init(jax.random.key(0))
            for _ in range(int(block.batches)):
                batch, state = advance(state)
                assert np.all(np.isin(batch.weight, [0, stream.num_batches]))
                seen.append(np.asarray(batch.data)[np.asarray(batch.weight) > 0, 0])
                minibatch += 1
            number += 1
        np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(size))
        epochs.append(np.concatenate(seen))
    if blocks > 1:
        assert np.any(epochs[0] != epochs[1])
        assert np.any(epochs[1] != epochs[2])


@pytest.mark.parametrize(
    ("thin", "num_chains"),
    [
        (1, 1),
        (3, 2),
        pytest.param(7, 1, marks=pytest.mark.slow),
        pytest.param(200, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_sees_every_row_once_an_epoch(thin, num_chains):
    """The sum over an epoch of the gradients, each K times a minibatch's sum, is K times the sum.

    Whether a draw ends within a super-block or not.
    """
    size, batch_size = 2003, 10
    options = {"batch_size": batch_size, "order": "streamed", "resident_bytes": 4_000}
    epoch = -(-size // batch_size)
    x = rows(size)
    seen = visits(x, 3 * epoch, num_chains=num_chains, **options)[..., 0]
    assert seen.shape == (num_chains, 3 * epoch)
    sums = seen.reshape(num_chains, 3, epoch).sum(axis=-1) / epoch
    np.testing.assert_allclose(sums, np.arange(size).sum(), rtol=1e-5)
    thinned = visits(x, 3 * epoch // thin, thin, num_chains, **options)[..., 0]
    np.testing.assert_array_equal(thinned, seen[:, thin - 1 :: thin][:, : thinned.shape[1]])
    if num_chains > 1:
        assert np.any(seen[0] != seen[1])
        shared = visits(x, epoch, 1, num_chains, share=True, **options)
        np.testing.assert_array_equal(shared[0], shared[1])


@pytest.mark.parametrize(
    "kind",
    ["memmap", *(pytest.param(k, marks=pytest.mark.slow) for k in ("zarr", "parquet", "tree"))],
)
def test_any_source_gives_the_same_draws(tmp_path, kind):
    x = rows(600)
    source, data = streamed(x), None
    if kind == "memmap":
        np.save(tmp_path / "x.npy", x)
        data = np.load(tmp_path / "x.npy", mmap_mode="r")
    elif kind == "zarr":
        data = zarr.create_array(str(tmp_path / "x"), data=x, chunks=(64, 3))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({name: x[:, i] for i, name in enumerate("abc")})
        parquet.write_table(table, tmp_path / "x.parquet", row_group_size=100)
        data = stochgrad.ParquetColumns(tmp_path / "x.parquet", ["a", "b", "c"])
        with pytest.raises(ValueError, match=r"no column \['d'\]"):
            stochgrad.ParquetColumns(tmp_path / "x.parquet", "d")
        np.testing.assert_array_equal(data[95:305], x[95:305])
    else:  # the columns apart, of other types
        parts = {"a": x[:, :2].astype(np.float64), "b": x[:, 2]}
        other = stochgrad.posterior(
            log_prior,
            lambda m, x: log_likelihood(m, jnp.concatenate([x["a"], x["b"][:, None]], axis=1)),
            parts,
            batch_size=10,
            order="streamed",
            resident_bytes=2_000,
        )
    run = lambda target: stochgrad.sample(
        jax.random.key(0), stochgrad.sghmc(target, 0.003, 30.0), init=jnp.zeros(3),
        num_samples=150, progress=False,
    ).positions  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stochgrad.GradientNoiseWarning)
        expected = run(source)
        found = run(other if kind == "tree" else streamed(data))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_next_rows_are_read_in_the_background():
    source = Recorded(rows(400))
    kernel = stochgrad.sgld(streamed(source), 1e-5)
    source.threads.clear()  # the first row has been looked at
    stochgrad.sample(jax.random.key(0), kernel, init=jnp.zeros(3), num_samples=100, progress=False)
    assert all(name.startswith("stochgrad-reader") for name in source.threads)
    lengths = {stop - start for start, stop in source.asked}
    assert max(lengths) < 400


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["posterior", "numpyro"])
def test_the_posterior_of_streamed_data_is_right(tmp_path, kind):
    """Mean and variance of a Gaussian mean, in standard errors from the chains' own draws."""
    x = np.sort(rows(2000, 1) + 1, axis=0)  # sorted: without mixing, minibatches would be biased
    np.save(tmp_path / "x.npy", x)
    source = np.load(tmp_path / "x.npy", mmap_mode="r")
    if kind == "posterior":
        target, init = streamed(source, 50, 16_000), jnp.zeros(1)
    else:

        def model(x):
            m = numpyro.sample("m", dist.Normal(0.0, 1.0))
            with numpyro.plate("rows", x.shape[0], subsample_size=50):
                batch = numpyro.subsample(x, event_dim=1)
                numpyro.sample("x", dist.Normal(m, 1.0).expand([1]).to_event(1), obs=batch)

        target = stochgrad.from_numpyro(model, source, order="streamed", resident_bytes=16_000)
        init = None
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        center = stochgrad.find_center(jax.random.key(1), target, init=init, num_steps=600)
    assert center.distance < 0.5
    gradient = stochgrad.control_variate(target, center)
    draws = stochgrad.sample(
        jax.random.key(0),
        stochgrad.sghmc(gradient, 0.02, 60.0, integrator="BAOAB"),
        init=center, num_samples=2000, num_warmup=100, num_chains=4, progress=False,
    )  # fmt: skip
    (values,) = jax.tree.leaves(draws.positions)
    values = values.reshape(4, 2000)
    precision = 2001.0
    mean, sd = x.sum() / precision, precision**-0.5
    error = stochgrad.diagnostics.mcse(draws)
    (error,) = jax.tree.leaves(error)
    assert abs(values.mean() - mean) < Z * float(np.squeeze(error))
    n_eff = (sd / float(np.squeeze(error))) ** 2
    assert abs(values.var() / sd**2 - 1) < Z * np.sqrt(2 / n_eff)


def test_a_streamed_run_resumes_to_the_bit(tmp_path):
    kernel = stochgrad.sgld(streamed(rows(500)), 1e-5)
    run = lambda n, **options: stochgrad.sample(
        jax.random.key(0), kernel, init=jnp.zeros(3), num_samples=n, thin=7, num_chains=2,
        progress=False, **options,
    )  # fmt: skip
    whole = run(60)
    run(25, checkpoint=tmp_path / "c")
    again = run(60, checkpoint=tmp_path / "c", resume=True)
    np.testing.assert_array_equal(again.positions, whole.positions)


@pytest.mark.slow
def test_what_is_found_on_streamed_data_is_what_is_found_on_all():
    x = rows(800)
    whole = stochgrad.posterior(log_prior, log_likelihood, x, batch_size=20)
    parts = streamed(x, 20, 4_000)
    at = jnp.asarray([0.1, 0.2, 0.3])
    expected = jax.value_and_grad(whole.log_density)(at, whole.batches.full)
    with jax.numpy_dtype_promotion("standard"):
        center = stochgrad.find_center(jax.random.key(0), parts, init=jnp.zeros(3), num_steps=200)
    np.testing.assert_allclose(
        center.log_density,
        float(whole.log_density(jnp.asarray(center.position), whole.batches.full)),
        rtol=1e-5,
    )
    for a, b in zip(
        jax.tree.leaves(stochgrad.core.full_data_mean(
            parts, jax.value_and_grad(parts.log_density))(at)),
        jax.tree.leaves(expected), strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-4)
    mass = stochgrad.find_mass(jax.random.key(0), parts, at)
    np.testing.assert_allclose(mass, 801.0, rtol=1e-4)
    gradient = stochgrad.control_variate(parts, center)
    found = stochgrad.find_step_size(jax.random.key(0), gradient, at, friction=50.0)
    np.testing.assert_allclose(found.curvature, 801.0, rtol=1e-3)


def test_rows_stay_as_they_are_until_the_device_is_done_with_them():
    """A slow function and a fast reader: the memory of a super-block must not be used too soon."""
    numbers = np.arange(4000, dtype=np.float32)[:, None]
    target = streamed(numbers, 100, 4_000)

    def slowly(x, batch):
        wait = jax.lax.fori_loop(0, 200, lambda i, m: jnp.tanh(m @ m), jnp.eye(120) * x)
        return jnp.sum(batch.data * batch.weight[:, None]) + 0 * jnp.sum(wait)

    total = stochgrad.core.full_data_mean(target, slowly)(jnp.float32(0.5))
    np.testing.assert_allclose(total, numbers.sum(), rtol=1e-6)


def test_a_bad_row_is_named_and_the_state_is_saved(tmp_path):
    x = rows(500)
    x[317, 1] = np.nan
    path = tmp_path / "state"
    kernel = stochgrad.sgld(streamed(x), 1e-5)
    run = lambda kernel, **options: stochgrad.sample(
        jax.random.key(0), kernel, init=jnp.zeros(3), num_samples=200, progress=False,
        checkpoint=path, every=1e9, **options,
    )  # fmt: skip
    with pytest.raises(ValueError, match="data must be finite, but row 317 holds NaN or infinity"):
        run(kernel)
    mended = stochgrad.sgld(streamed(rows(500)), 1e-5)
    np.testing.assert_array_equal(
        run(mended, resume=True).positions,
        stochgrad.sample(
            jax.random.key(0), mended, init=jnp.zeros(3), num_samples=200, progress=False
        ).positions,
    )


@pytest.mark.slow
def test_a_source_that_changes_its_length_is_refused():
    source = Recorded(rows(500))
    kernel = stochgrad.sgld(streamed(source), 1e-5)
    read = Recorded.__getitem__

    class Shrinking(Recorded):
        def __getitem__(self, index):
            if len(self.asked) > 20:
                self.shape = (499, 3)
            return read(self, index)

    kernel = stochgrad.sgld(streamed(Shrinking(rows(500))), 1e-5)
    with pytest.raises(ValueError, match="data had 500 rows and now has 499"):
        stochgrad.sample(
            jax.random.key(0), kernel, init=jnp.zeros(3), num_samples=300, progress=False
        )


def test_what_streams_cannot_do_is_refused():
    target = streamed(rows(500))
    with pytest.raises(ValueError, match="streamed"):
        stochgrad.saga(target)
    with pytest.raises(ValueError, match="svrg passes over all data within the loop"):
        stochgrad.svrg(target)
    with pytest.raises(ValueError, match="holds 61 rows of 12 bytes, less than one minibatch"):
        streamed(rows(500), 100, 1_400)
    with pytest.raises(ValueError, match="batch_size must be from 1 to the number of rows, 500"):
        streamed(rows(500), 501)
    with pytest.raises(ValueError, match=r"a streamed posterior runs in stochgrad\.sample only"):
        stochgrad.sgld(target, 1e-4).init(jnp.zeros(3), jax.random.key(0))
    with pytest.raises(ValueError, match=r"order='streamed' needs stochgrad\.sample"):
        stochgrad.numpyro.SGLD(lambda: None, 1e-4, order="streamed")


MEMORY = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np, stochgrad

path, resident = sys.argv[1], int(sys.argv[2])
x = np.load(path, mmap_mode="r")

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def target(data, **options):
    return stochgrad.posterior(
        lambda m: -0.5 * jnp.sum(m**2), lambda m, x: -0.5 * jnp.sum((x - m) ** 2, axis=-1), data,
        batch_size=1000, **options)

def first(state):
    return state.position[0]

def run(kernel, steps):
    stochgrad.sample(
        jax.random.key(0), kernel, init=jnp.zeros(x.shape[1]), num_samples=steps,
        collect=first, chunk_size=50, progress=False)

kernel = stochgrad.sgld(target(x, order="streamed", resident_bytes=resident), 1e-9)
run(kernel, 20)  # compiles
import threading, time
before, peak, going = anonymous(), 0, True

def watch():
    global peak
    while going:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
run(kernel, 2 * len(x) // 1000)
going = False
thread.join()
print((peak - before) / resident)
"""


def test_a_kernel_that_takes_two_minibatches_a_step_is_refused_in_its_own_words(tmp_path):
    one = stochgrad.gradients.minibatch(streamed(rows(500)))

    def next(key, position, state):
        return one.next(key, position, one.next(key, position, state)[1])

    kernel = stochgrad.sgld(one._replace(next=next), 1e-4)
    options = {"init": jnp.zeros(3), "num_samples": 50, "progress": False}
    with pytest.raises(TypeError, match="kernels that use one minibatch per step") as info:
        stochgrad.sample(jax.random.key(0), kernel, checkpoint=tmp_path, **options)
    assert "The last checkpoint is at draw 0" in info.value.__notes__[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_under_two_super_blocks(tmp_path):
    """Ten times as many data as may be held; private memory of a process, every 2 ms."""
    size, dim = 1_280_000, 50  # 256 MB
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (size, dim))
    x[:] = np.random.default_rng(0).standard_normal((size, dim), np.float32)
    x.flush()
    resident = size * dim * 4 // 20  # two of them are a tenth of the data
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path / "x.npy"), str(resident)],
        capture_output=True, text=True,
        # else what is freed stays with the process, for blocks as small as these
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.0, done.stdout


def test_a_file_that_is_cut_off_is_refused_and_does_not_kill_the_process(tmp_path):
    """To read a memory-mapped file beyond its end is a bus error."""
    np.save(tmp_path / "x.npy", rows(5000))
    target = streamed(np.load(tmp_path / "x.npy", mmap_mode="r"))
    os.truncate(tmp_path / "x.npy", 4096)
    with pytest.raises(ValueError, match=r"data cannot be read, .*: its file has become short"):
        target.batches.stream.load((1, 2), 0)


def test_what_a_zarr_array_never_got_is_no_data(tmp_path):
    """Chunks that are missing read as the fill value: NaN is named, a lost folder refused."""
    path = tmp_path / "x"
    data = zarr.create_array(
        str(path), shape=(300, 3), chunks=(100, 3), dtype="f4", fill_value=np.nan
    )
    data[:200] = rows(200)
    stream = streamed(data, resident_bytes=10**6).batches.stream
    with pytest.raises(ValueError, match="data must be finite, but row 2"):
        stream.load((1, 2), 0)
    shutil.rmtree(path)
    with pytest.raises(ValueError, match="its file has become shorter or is gone"):
        stream.load((1, 2), 0)


def test_a_file_that_cannot_be_read_any_more_is_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        stream = streamed(file.create_dataset("x", data=rows(300))).batches.stream
        stream.load((1, 2), 0)
    with pytest.raises(ValueError, match="data cannot be read: "):
        stream.load((1, 2), 0)


def test_columns_that_are_no_numbers_are_refused(tmp_path):
    """Nulls became NaN, or any integer, and fractions were cut off."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "x": np.arange(6) + 0.5, "gap": [1, None, 3, 4, 5, 6], "text": list("abcdef"),
        "big": np.full(6, 2**40), "day": np.arange(6).astype("datetime64[D]"),
    }  # fmt: skip
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    for name, dtype, expected in (
        ("gap", np.float32, "column 'gap' of .* has 1 nulls"),
        ("gap", np.int32, "column 'gap' of .* has 1 nulls"),
        ("x", np.int32, r"column 'x' of .* holds 0.5, which dtype=int32 does not"),
        ("big", np.int32, "holds 1099511627776, which dtype=int32 does not"),
    ):
        with pytest.raises(ValueError, match=expected):
            stochgrad.ParquetColumns(path, name, dtype)[:6]
    for name in ("text", "day"):
        with pytest.raises(ValueError, match=f"columns must be of numbers, and '{name}'"):
            stochgrad.ParquetColumns(path, name)
    both = stochgrad.ParquetColumns(path, ["x", "big"], np.float64)
    np.testing.assert_array_equal(both[1:3, :1], [[1.5], [2.5]])
    with pytest.raises(TypeError, match="gives the rows of a slice"):
        both[3]
