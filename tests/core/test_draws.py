"""Results, and what ArviZ makes of them."""

import pickle
import subprocess
import sys
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray

import stochgrad
from tests.core import worker
from tests.helpers import gaussian_posterior


class State(NamedTuple):
    position: Any


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


@pytest.mark.parametrize(
    "index",
    [3, -1, np.int64(5), jnp.int32(7), [1, -2, 1], [], np.arange(100) % 7 == 0, range(3),
     slice(None, None, -3), slice(90, None), slice(5, 2)],
    ids=str,
)  # fmt: skip
def test_draws_are_indexed_as_numpy_does_it_and_the_axis_stays(draws, index):
    """A number dropped the draw axis, and ArviZ then failed."""
    some = draws[index]
    rows = np.arange(100)[index if isinstance(index, slice) else np.atleast_1d(index).tolist()]
    rows = np.atleast_1d(np.asarray(rows, int))
    if isinstance(index, np.ndarray):  # booleans
        rows = np.flatnonzero(index)
    np.testing.assert_array_equal(some.positions, draws.positions[:, rows])
    np.testing.assert_array_equal(some.stats["log_density"], draws.stats["log_density"][:, rows])
    assert some.finite.shape == (2, len(rows))
    assert dict(some.to_datatree()["posterior"].sizes)["draw"] == len(rows)


def test_a_stored_run_is_indexed_like_one_in_memory(tmp_path):
    memory, stored = worker.run(30, 2), worker.run(30, 2, store=tmp_path / "d")
    for index in (3, -1, [5, 2, -1], slice(None, None, -2), slice(4, 9, 3), np.arange(30) > 20, []):
        np.testing.assert_array_equal(stored[index].positions, memory[index].positions)


NAMES = {
    "group/m": "group.m",
    "a.b": "a.b",
    "chain": "chain_",
    "draw": "draw_",
    "": "x",
    "w_dim_0": "w_dim_0",
    "w": "w",
    "zarr.json": "zarr.json_",
    "..": ".._",
}


@pytest.mark.parametrize("in_store", [False, True])
def test_any_name_becomes_one_that_arviz_and_the_store_have_room_for(tmp_path, in_store):
    """xarray refuses slashes, with which numpyro's scope makes names, after the run."""
    kernel = stochgrad.core.Kernel(
        lambda position, key: State(position),
        lambda key, state: (State(jax.tree.map(lambda x: x + 1, state.position)), ()),
    )
    init = {name: jnp.full(2 if name == "w" else (), 10.0 * i) for i, name in enumerate(NAMES)}
    draws = stochgrad.sample(
        jax.random.key(0), kernel, init=init, num_samples=3, progress=False,
        store=tmp_path / "d" if in_store else None,
    )  # fmt: skip
    trees = [draws.to_datatree()]
    if in_store:
        trees.append(xarray.open_datatree(tmp_path / "d", engine="zarr"))
    for tree in trees:
        for i, (name, other) in enumerate(NAMES.items()):
            values = np.asarray(tree["posterior"].to_dataset()[other])
            np.testing.assert_array_equal(values.reshape(3, -1)[:, 0], 10.0 * i + np.arange(1, 4))
            np.testing.assert_array_equal(np.asarray(draws.positions[name]), values)
        assert tree["posterior"].to_dataset()["w"].dims == ("chain", "draw", "w_dim_0_")
    draws.to_arviz()
    trees[-1].close()


def test_a_scope_of_numpyro(tmp_path):
    def inner(x):
        with numpyro.plate("kinds", 2):
            m = numpyro.sample("m", dist.Normal(0, 1))
        with numpyro.plate("rows", len(x), subsample_size=10):
            numpyro.sample("y", dist.Normal(m[0], 1), obs=numpyro.subsample(x, 0))

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        model = numpyro.handlers.scope(inner, "group")
        target = stochgrad.from_numpyro(model, np.zeros(40, np.float32))
        draws = stochgrad.sample(
            jax.random.key(0), stochgrad.sgld(target, 1e-3), num_samples=5, progress=False,
            store=tmp_path / "d",
        )  # fmt: skip
        tree = draws.to_datatree(dims={"group/m": ["kind"]}, coords={"kind": ["a", "b"]})
    assert tree["posterior"]["group.m"].dims == ("chain", "draw", "kind")
    with xarray.open_datatree(tmp_path / "d", engine="zarr") as stored:
        np.testing.assert_array_equal(stored["posterior"]["group.m"], draws.positions["group/m"])


@pytest.mark.filterwarnings("ignore:.* never moved")  # a kernel that stays where it is
def test_two_arrays_of_one_name_are_refused(tmp_path):
    """One of them was left out in silence."""
    kernel = stochgrad.core.Kernel(
        lambda position, key: State(position), lambda key, state: (state, ())
    )
    init = {"a/b": jnp.zeros(()), "a.b": jnp.ones(())}
    run = lambda init, **options: stochgrad.sample(
        jax.random.key(0), kernel, init=init, num_samples=3, progress=False, **options
    )
    nested = {"a": {"b": jnp.zeros(())}, "a.b": jnp.ones(())}
    for position in (init, nested):
        with pytest.raises(ValueError, match=r"two arrays have the name 'a\.b'"):
            run(position, store=tmp_path / "d")
        with pytest.raises(ValueError, match=r"two arrays have the name 'a\.b'"):
            run(position).to_datatree()
    assert not (tmp_path / "d").exists()


def test_draws_can_be_pickled_with_their_names(draws):
    """Functions stay behind: what comes back is in the model's own space."""
    copy = pickle.loads(pickle.dumps(draws))
    np.testing.assert_array_equal(copy.constrained()["x"], draws.constrained()["x"])
    assert copy.attrs == draws.attrs
    assert copy.to_datatree().equals(draws.to_datatree())
    assert list(copy.verdict.table.index) == ["x[0]", "x[1]"]
