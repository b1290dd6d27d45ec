"""The groups of ArviZ's schema from the draws of a numpyro model, in memory and in files."""

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray

import stochgrad

N, CHAINS, DRAWS = 300, 2, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 2)).astype(np.float32)
Y = (X @ [1.0, -1.0] + RNG.normal(size=N)).astype(np.float32)
RANDOM = {"posterior_predictive", "prior", "prior_predictive"}
FIXED = {
    *("posterior", "sample_stats", "observed_data", "constant_data"),
    *("log_likelihood", "log_prior", "unconstrained_posterior"),
}

pytestmark = pytest.mark.filterwarnings("ignore:minibatch noise")  # a run for its shapes


def model(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    with numpyro.plate("rows", len(x), subsample_size=50):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(xb @ b, s), obs=yb)


@pytest.fixture(scope="module")
def draws():
    kernel = stochgrad.sgld(stochgrad.from_numpyro(model, X, Y), 1e-6)
    options = {"num_samples": DRAWS, "num_chains": CHAINS}
    return stochgrad.sample(jax.random.key(0), kernel, **options)


def test_all_groups(draws, key):
    assert set(draws.to_datatree("all").children) == FIXED
    fresh = draws.predict(key, X[:5], None)
    options = {"key": key, "predictions": fresh, "prior_draws": 50}
    tree = draws.to_datatree("all", **options)
    assert set(tree.children) == FIXED | RANDOM | {"predictions"}
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
    np.testing.assert_array_equal(tree["constant_data"]["x"], X)
    assert tree["constant_data"]["x"].dims[0] == "rows"
    for name in ("log_likelihood", "posterior_predictive"):
        assert tree[name]["y"].dims == ("chain", "draw", "rows")
    np.testing.assert_array_equal(tree["log_likelihood"]["y"], draws.log_likelihood()["y"])
    np.testing.assert_array_equal(tree["predictions"]["y"], fresh["y"])
    s = tree["posterior"]["s"]
    np.testing.assert_allclose(
        tree["log_prior"]["s"], dist.HalfNormal(2.0).log_prob(s.to_numpy()), rtol=1e-5
    )
    np.testing.assert_allclose(tree["unconstrained_posterior"]["s"], np.log(s), rtol=1e-4)
    prior = tree["prior"]["b"].to_numpy()
    assert prior.shape == (1, 50, 2)
    assert abs(prior.std() / 2 - 1) < 5.5 / np.sqrt(2 * prior.size)
    assert tree["prior_predictive"]["y"].shape == (1, 50, N)


def test_the_first_draws_may_be_those_of_the_warm_up(draws):
    kernel = stochgrad.sgld(stochgrad.from_numpyro(model, X, Y), 1e-6)
    options = {"num_samples": DRAWS - 2, "num_warmup": 2, "num_chains": CHAINS}
    later = stochgrad.sample(jax.random.key(0), kernel, **options)
    read = draws[2:].to_arviz(warmup=draws[:2])
    np.testing.assert_array_equal(read["posterior"]["s"], later.constrained()["s"])
    warmup = read["warmup_posterior"]
    np.testing.assert_array_equal(warmup["s"], draws.constrained()["s"][:, :2])
    assert read["warmup_sample_stats"]["lp"].shape == (CHAINS, 2)
    with pytest.raises(TypeError, match="warmup must be the Draws of a warm-up"):
        draws.to_datatree(warmup=2)


def test_files_hold_all_groups(draws, key, tmp_path):
    options = {"key": key, "prior_draws": 5}
    tree = draws.to_datatree("all", **options)
    tree.to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    tree.to_zarr(tmp_path / "draws.zarr", consolidated=False)
    for back in (
        xarray.open_datatree(tmp_path / "draws.nc"),
        xarray.open_datatree(tmp_path / "draws.zarr", engine="zarr", consolidated=False),
    ):
        assert set(back.children) == FIXED | RANDOM
        for name in back.children:
            for variable, values in tree[name].data_vars.items():
                np.testing.assert_array_equal(back[name][variable], values)
        back.close()
    draws.to_arviz("all", **options).to_netcdf(tmp_path / "arviz.nc")
    assert "log_likelihood" in az.from_netcdf(tmp_path / "arviz.nc")


def test_a_store_holds_what_each_row_and_draw_has(draws, key, tmp_path):
    groups = ["posterior", "log_likelihood", "posterior_predictive"]
    tree = draws.to_datatree(groups, key=key, store=tmp_path / "rows")
    np.testing.assert_array_equal(tree["log_likelihood"]["y"], draws.log_likelihood()["y"])
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == groups[1:]


def test_bad_input_gets_one_sentence(draws, key):
    with pytest.raises(ValueError, match=r"memory_bytes must be at least .* or take fewer"):
        draws.to_datatree(["prior_predictive"], key=key, memory_bytes=2**18)
    with pytest.raises(ValueError, match="groups: 'prior' needs key="):
        draws.to_datatree(["prior"])
    with pytest.raises(ValueError, match="groups must be of"):
        draws.to_datatree(["energy"])
    with pytest.raises(TypeError, match="groups must be 'all' or a list"):
        draws.to_datatree("posterior")
    with pytest.raises(ValueError, match=r"'predictions' needs predictions=draws.predict"):
        draws.to_datatree(["predictions"])


def test_names_with_a_slash_have_a_place_in_every_group(key, tmp_path):
    """numpyro's ``scope`` makes them, and neither xarray nor zarr has room for one."""
    scoped = numpyro.handlers.scope(model, prefix="part")
    draws = stochgrad.sample(
        key, stochgrad.sgld(stochgrad.from_numpyro(scoped, X, Y), 1e-6), num_samples=3
    )
    assert draws.predict(key)["part/y"].shape == (1, 3, N)
    tree = draws.to_datatree("all", key=key, prior_draws=4)
    stored = draws.to_datatree(["log_likelihood"], store=tmp_path / "rows")
    for name in ("observed_data", "log_likelihood", "posterior_predictive", "prior_predictive"):
        assert list(tree[name].data_vars) == ["part.y"]
    np.testing.assert_array_equal(
        stored["log_likelihood"]["part.y"], tree["log_likelihood"]["part.y"]
    )
    values = draws.log_likelihood(store=tmp_path / "again")["part/y"]
    np.testing.assert_array_equal(values[:], tree["log_likelihood"]["part.y"])
