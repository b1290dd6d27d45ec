"""Draws on disk."""

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray

import stochgrad
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
    with pytest.raises(ValueError, match="another run: num_chains was 2 and is now 1"):
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
