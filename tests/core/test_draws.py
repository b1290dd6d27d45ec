"""Results, and what ArviZ makes of them."""

import subprocess
import sys

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.helpers import gaussian_posterior


@pytest.fixture(scope="module")
def draws():
    target, *_ = gaussian_posterior(batch_size=5)
    kernel = stochgrad.sghmc(target, 0.01, 5.0)
    return stochgrad.sample(
        jax.random.key(3), kernel, init=jnp.zeros(2), num_samples=100, thin=2, num_chains=2
    )


def test_arviz_reads_draws(draws):
    data = draws.to_arviz(dims={"x": ["axis"]}, coords={"axis": ["east", "north"]})
    table = az.summary(data)
    assert list(table.index) == ["x[east]", "x[north]"]
    np.testing.assert_allclose(
        np.asarray(table["mean"], float), draws.positions.mean(axis=(0, 1)), atol=0.006
    )
    assert dict(data.posterior["x"].sizes) == {"chain": 2, "draw": 100, "axis": 2}


def test_a_datatree_says_where_it_came_from(draws):
    tree = draws.to_datatree()
    assert set(tree.children) == {"posterior", "sample_stats"}
    stats = set(tree["sample_stats"].data_vars)
    assert {"lp", "step_size", "gradient_norm", "noise_ratio", "diverging"} <= stats
    assert "kinetic_temperature" in stats
    attrs = tree["posterior"].attrs
    assert attrs["inference_library"] == "stochgrad"
    assert attrs["method"] == "SGHMC"
    assert (attrs["step_size"], attrs["friction"], attrs["thin"]) == (0.01, 5.0, 2)
    assert (attrs["batch_size"], attrs["data_size"], attrs["order"]) == (5, 20, "reshuffled")
    assert attrs["share_batches"] == 0
    assert attrs["seed"] == [0, 3]
    assert attrs["jax_version"] == jax.__version__


def test_a_datatree_can_be_written_and_read(draws, tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    draws.to_datatree().to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "draws.nc", engine="h5netcdf") as tree:
        np.testing.assert_array_equal(tree["posterior"]["x"], draws.positions)


def test_a_range_of_draws(draws):
    tail = draws[60:]
    assert tail.num_draws == 40
    np.testing.assert_array_equal(tail.positions, draws.positions[:, 60:])
    assert tail.stats["log_density"].shape == (2, 40)
    assert "2 chains of 40 draws" in repr(tail)


def test_numpyro_names_dims_and_coords():
    from tests.interop import models as m

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        target = stochgrad.from_numpyro(m.hierarchical, m.X, m.G, m.Y)
        draws = stochgrad.sample(
            jax.random.key(0), stochgrad.sghmc(target, 1e-3, 20.0), num_samples=20, num_chains=2
        )
        tree = draws.to_datatree(coords={"groups": list("abcd")})
    posterior = tree["posterior"]
    assert posterior["a"].dims == ("chain", "draw", "groups")
    assert list(posterior["groups"].values) == list("abcd")
    assert posterior["spread"].dims == ("chain", "draw", "spread_dim_0")
    assert np.all(posterior["tau"] > 0)
    assert posterior["share"].shape == (2, 20, 3)
    np.testing.assert_allclose(posterior["share"].sum("share_dim_0"), 1, rtol=1e-5)


def test_dims_of_the_wrong_length_are_refused(draws):
    with pytest.raises(ValueError, match="dims of 'x' must be at most 1 names"):
        draws.to_datatree(dims={"x": ["a", "b"]})


def test_importing_stochgrad_imports_none_of_the_heavy_libraries():
    code = (
        "import sys, stochgrad; print([m for m in ('numpyro', 'arviz', 'blackjax', 'optax', "
        "'xarray', 'pandas', 'matplotlib', 'tqdm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert out.stdout.strip() == "[]"


def test_the_module_says_its_versions():
    out = subprocess.run(
        [sys.executable, "-m", "stochgrad"], capture_output=True, check=True, text=True
    )
    assert f"stochgrad {stochgrad.__version__}" in out.stdout
    assert f"jax {jax.__version__}" in out.stdout
