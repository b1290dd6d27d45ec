"""Predictions and pointwise log likelihoods of plain posteriors: every row, at any memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import stochgrad
from tests.helpers import run_on_devices

N, CHAINS, DRAWS = 5000, 2, 7
RNG = np.random.default_rng(0)
X = RNG.normal(size=N).astype(np.float32)
Y = (2 * X + RNG.normal(size=N)).astype(np.float32)


def log_prior(b):
    return -0.5 * b**2


def log_likelihood(b, rows):
    return -0.5 * (rows["y"] - b * rows["x"]) ** 2


def predict(key, b, rows):
    return {"y": b * rows["x"] + jax.random.normal(key, rows["x"].shape)}


def target(order="symmetric", data=None, **options):
    size = None if order == "full" else 70  # a last minibatch that is not whole
    data = {"x": X, "y": Y} if data is None else data
    options = {"predict": predict, "batch_size": size, "order": order, **options}
    return stochgrad.posterior(log_prior, log_likelihood, data, **options)


def draws_of(posterior, num_samples=DRAWS):
    kernel = stochgrad.sgld(posterior, 1e-6)
    starts = jnp.linspace(1.9, 2.1, CHAINS)
    options = {"num_samples": num_samples, "num_chains": CHAINS, "init": starts}
    return stochgrad.sample(jax.random.key(0), kernel, **options)


def exact(draws, x=X, y=Y):
    b = np.asarray(draws.positions)[..., None]
    return -0.5 * (y - b * x) ** 2


pytestmark = pytest.mark.filterwarnings("ignore:minibatch noise")  # a run for its shapes


@pytest.fixture(scope="module")
def draws():
    return draws_of(target())


@pytest.mark.parametrize(
    "posterior",
    [
        lambda: target("full"),
        lambda: target("reshuffled"),
        lambda: target("iid", layout="rows"),
        lambda: target("streamed"),
        lambda: stochgrad.federated.posterior(
            log_prior,
            log_likelihood,
            [{"x": X[:1200], "y": Y[:1200]}, {"x": X[1200:], "y": Y[1200:]}],
            batch_size=70,
        ),
    ],
    ids=["full", "reshuffled", "rows", "streamed", "clients"],
)
def test_each_row_has_its_own_density(posterior):
    """Whatever way the rows lie in memory."""
    draws = draws_of(posterior(), 3)
    found = draws.log_likelihood()["log_likelihood"]
    assert found.shape == (CHAINS, 3, N)
    np.testing.assert_allclose(found, exact(draws), rtol=1e-5, atol=1e-5)
    rows = [4999, 0, 17, 17, 18]
    some = draws.log_likelihood(rows=rows)["log_likelihood"]
    np.testing.assert_array_equal(some, found[..., rows])


def test_predictions_are_the_same_at_any_memory(draws, key):
    whole = draws.predict(key)["y"]
    assert whole.shape == (CHAINS, DRAWS, N)
    little = draws.predict(key, memory_bytes=2**20)["y"]
    np.testing.assert_array_equal(whole, little)
    noise = whole - np.asarray(draws.positions)[..., None] * X
    error = 5.5 / np.sqrt(noise.size)
    assert abs(noise.mean()) < error
    assert abs(noise.var() - 1) < np.sqrt(2) * error
    flat = noise.reshape(-1, N)
    between = np.corrcoef(flat)[np.triu_indices(len(flat), 1)]
    assert np.abs(between).max() < 5.5 / np.sqrt(N)  # no two draws share their noise


def test_other_rows(draws, key):
    x = np.linspace(0, 1, 9, dtype=np.float32)
    assert draws.predict(key, {"x": x})["y"].shape == (CHAINS, DRAWS, 9)
    found = draws.log_likelihood({"x": x, "y": x})["log_likelihood"]
    np.testing.assert_allclose(found, exact(draws, x, x), rtol=1e-5, atol=1e-6)


def test_a_store_holds_what_memory_does_not(draws, key, tmp_path):
    whole = draws.predict(key)
    stored = draws.predict(key, memory_bytes=2**18, store=tmp_path / "predictions")
    np.testing.assert_array_equal(stored["y"][:], whole["y"])
    tree = xarray.open_datatree(tmp_path / "predictions", engine="zarr")
    array = tree["posterior_predictive"]["y"]
    assert array.dims == ("chain", "draw", "row")
    np.testing.assert_array_equal(array, whole["y"])
    assert [path.name for path in tmp_path.iterdir()] == ["predictions"]
    with pytest.raises(ValueError, match=r"store=.* is there already: give another, or remove it"):
        draws.predict(key, store=tmp_path / "predictions")


def test_a_store_that_was_cut_short_is_not_there(draws, key, tmp_path, monkeypatch):
    from stochgrad.core import _by_rows

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_by_rows._Site, "put", fail)
    with pytest.raises(KeyboardInterrupt):
        draws.predict(key, store=tmp_path / "predictions")
    assert not list(tmp_path.iterdir())


def test_bad_input_gets_one_sentence(draws, key, tmp_path):
    with pytest.raises(ValueError, match=r"memory_bytes must be at least .*give store="):
        draws.predict(key, memory_bytes=2**18)
    with pytest.raises(ValueError, match=r"memory_bytes must be at least .*one draw and 4096 rows"):
        draws.predict(key, memory_bytes=1000)
    with pytest.raises(TypeError, match="key must be a typed PRNG key"):
        draws.predict(0)
    with pytest.raises(ValueError, match=r"rows must be from 0 to 4999"):
        draws.log_likelihood(rows=[5000])
    with pytest.raises(TypeError, match="rows must be a list of numbers"):
        draws.log_likelihood(rows=[0.5])
    with pytest.raises(TypeError, match="one argument, of the structure of its data"):
        draws.predict(key, X, Y)
    with pytest.raises(ValueError, match="log_likelihood fails on"):
        draws.log_likelihood({"x": X})
    with pytest.raises(TypeError, match="sites must be a list of names"):
        draws.predict(key, sites="y")
    with pytest.raises(ValueError, match="sites must be one of"):
        draws.predict(key, sites=["z"])
    with pytest.raises(ValueError, match="the posterior cannot predict"):
        draws_of(target("full", predict=None), 2).predict(key)
    whole = stochgrad.posterior(
        log_prior, log_likelihood, {"x": X, "y": Y}, order="full", predict=lambda key, b, rows: b
    )
    with pytest.raises(ValueError, match="predict must return one value per row"):
        draws_of(whole, 2).predict(key)
    nameless = stochgrad.posterior(
        log_prior,
        log_likelihood,
        {"x": X, "y": Y},
        order="full",
        predict=lambda key, b, rows: rows["y"],
    )
    with pytest.raises(ValueError, match=r"an array without a name, .* the data's 'x'"):
        draws_of(nameless, 2).predict(key)
    collected = stochgrad.sample(
        key, stochgrad.sgld(target(), 1e-6), init=2.0, num_samples=2, collect=lambda s: s.position
    )
    with pytest.raises(ValueError, match="these draws are not positions"):
        collected.log_likelihood()


@pytest.mark.slow
def test_over_several_devices():
    """Draws are spread over them, and are the same."""
    run_on_devices(
        4,
        """
        import numpy as np, jax, stochgrad
        from tests.core import test_after_draws as t
        draws = t.draws_of(t.target())
        found = draws.log_likelihood()["log_likelihood"]
        np.testing.assert_allclose(found, t.exact(draws), rtol=1e-5, atol=1e-5)
        assert draws.predict(jax.random.key(1))["y"].shape == (t.CHAINS, t.DRAWS, t.N)
        """,
    )


@pytest.mark.slow
def test_memory_stays_under_what_is_allowed(tmp_path):
    """640 MB of predictions, and 500 rows of as many likelihoods, in 64 MB each."""
    run_on_devices(
        1,
        f"""
        import resource, arviz, jax, jax.numpy as jnp, numpy as np, stochgrad
        from tests.core import test_after_draws as t

        def peak():
            return 2**10 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        x = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
        draws = t.draws_of(t.target(data={{"x": x, "y": x}}, batch_size=1000), 400)
        stochgrad.diagnostics.loo(draws[:20], rows=10)
        draws[:2].predict(jax.random.key(1), rows=np.arange(5000))
        before, most = peak(), 2**26
        stochgrad.diagnostics.loo(draws, rows=500, memory_bytes=most)
        assert peak() - before < most, peak() - before
        draws.predict(jax.random.key(1), store={str(tmp_path / "rows")!r}, memory_bytes=most)
        assert peak() - before < most, peak() - before
        """,
    )
