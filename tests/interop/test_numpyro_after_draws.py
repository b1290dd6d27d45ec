"""Predictions, likelihoods and priors of numpyro models, however they read their rows."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import log_likelihood

import stochgrad

N, CHAINS, DRAWS = 4500, 2, 3  # more than a block of rows
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 2)).astype(np.float32)
G = np.arange(N, dtype=np.int32) % 5
Y = (X @ [1.0, -1.0] + RNG.normal(size=N)).astype(np.float32)


def latents(groups=5):
    b = numpyro.sample("b", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    with numpyro.plate("groups", groups):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    return a, b, s


def subsampled(x, g, y=None):
    a, b, s = latents()
    with numpyro.plate("rows", len(x), subsample_size=50):
        xb, gb = numpyro.subsample(x, event_dim=1), numpyro.subsample(g, event_dim=0)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        mean = numpyro.deterministic("mean", xb @ b + a[gb])
        numpyro.sample("y", dist.Normal(mean, s), obs=yb)


def indexed(x, g, y=None):
    a, b, s = latents()
    with numpyro.plate("rows", len(x)) as i:
        mean = numpyro.deterministic("mean", x[i] @ b + a[g[i]])
        numpyro.sample("y", dist.Normal(mean, s), obs=None if y is None else y[i])


def plain(x, g, y=None):
    a, b, s = latents(int(np.max(g)) + 1)
    mean = numpyro.deterministic("mean", x @ b + a[g])
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(mean, s), obs=y)


def without_plate(x, g, y=None):
    a, b, s = latents()
    numpyro.sample("y", dist.Normal(x @ b + a[g], s), obs=y)


MODELS = {
    "subsampled": subsampled,
    "indexed": indexed,
    "plain": plain,
    "without plate": without_plate,
}


def run(model, *args, batch_size=50, **options):
    target = stochgrad.from_numpyro(model, *args, batch_size=batch_size, **options)
    kernel = stochgrad.sgld(target, 1e-6)
    options = {"num_samples": DRAWS, "num_chains": CHAINS}
    return stochgrad.sample(jax.random.key(0), kernel, **options)


pytestmark = pytest.mark.filterwarnings("ignore:minibatch noise")  # a run for its shapes


@pytest.fixture(scope="module", params=[*MODELS, "all rows"])
def kind(request):
    model = MODELS.get(request.param, indexed)
    whole = {"batch_size": None, "order": "full"} if request.param == "all rows" else {}
    return model, run(model, X, G, Y, **whole)


def in_numpyro(draws):
    return {name: jnp.asarray(value) for name, value in draws.constrained().items()}


def test_likelihoods_are_numpyros_own(kind):
    model, draws = kind
    whole = stochgrad.numpyro.all_rows(model)
    expected = log_likelihood(whole, in_numpyro(draws), X, G, Y, batch_ndims=2)["y"]
    np.testing.assert_allclose(draws.log_likelihood()["y"], expected, rtol=1e-4, atol=1e-4)
    other = draws.log_likelihood(X[:30], G[:30], Y[:30])["y"]
    np.testing.assert_allclose(other, expected[..., :30], rtol=1e-4, atol=1e-4)


def test_predictions_have_the_law_of_numpyros_own(kind, key):
    """Same mean of each row; residuals of unit variance, and independent."""
    model, draws = kind
    found = draws.predict(key)
    assert list(found) == ["y"]
    assert found["y"].shape == (CHAINS, DRAWS, N)
    values = in_numpyro(draws)
    mean = np.einsum("nk,cdk->cdn", X, values["b"]) + values["a"][..., G]
    residual = (found["y"] - mean) / values["s"][..., None]
    error = 5.5 / np.sqrt(residual.size)
    assert abs(residual.mean()) < error
    assert abs(residual.var() - 1) < np.sqrt(2) * error
    between = np.corrcoef(residual.reshape(-1, N))
    assert np.abs(between[np.triu_indices(len(between), 1)]).max() < 5.5 / np.sqrt(N)
    if model is not without_plate:
        np.testing.assert_allclose(
            draws.predict(key, sites=["mean"])["mean"], mean, rtol=1e-4, atol=1e-4
        )
    fresh = draws.predict(key, X[:30] + 100, G[:30])["y"]
    assert fresh.shape == (CHAINS, DRAWS, 30)
    moved = fresh - mean[..., :30] - 100 * values["b"].sum(-1, keepdims=True)
    assert np.abs(moved / values["s"][..., None]).max() < 5.5


def test_other_observations_give_the_density_of_a_model_that_has_them(kind, key):
    """What simulated data are sampled given: the posterior as if they had been passed."""
    model, draws = kind
    target, other = draws.posterior, (Y + 1.0).astype(np.float32)
    whole = target.batches.batch_size >= target.batches.size
    options = {"order": "full"} if whole else {"batch_size": 50}
    expected = stochgrad.from_numpyro(model, X, G, other, **options)
    log_density = target.observations().given({"y": jnp.asarray(other)})
    position = jax.tree.map(lambda x: x[0, 0], draws.positions)
    state = target.batches.init(key)
    for _ in range(3):
        batch, state = target.batches.next(state)
        np.testing.assert_allclose(
            log_density(position, batch), expected.log_density(position, batch), rtol=1e-5
        )


def test_one_key_gives_one_prediction_at_any_memory(key):
    """To rounding: fewer draws at once are multiplied in another order."""
    draws = run(subsampled, X, G, Y)
    whole = draws.predict(key)["y"]
    blocks = draws.predict(key, memory_bytes=2**20)["y"]
    np.testing.assert_allclose(blocks, whole, atol=1e-5)


def test_a_panel_inside_of_a_scan_is_predicted_and_not_repeated(key):
    """numpyro's handlers do not reach into a scan: a prediction was what had been observed."""

    def panel(y):
        level = numpyro.sample("level", dist.Normal(0.0, 5.0))

        def step(carry, row):
            with numpyro.plate("series", 40, subsample_size=8):
                seen = numpyro.subsample(row, event_dim=0)
                numpyro.sample("y", dist.Normal(level, 1.0), obs=seen)
            return carry, None

        scan(step, None, y)

    y = RNG.normal(size=(6, 40)).astype(np.float32)
    draws = run(panel, y, batch_size=None)
    level = draws.constrained()["level"][..., None, None]
    found = draws.predict(key)["y"]
    assert found.shape == (CHAINS, DRAWS, 6, 40)
    residual = found - level
    assert abs(residual.var() - 1) < 5.5 * np.sqrt(2 / residual.size)
    assert len(np.unique(found)) > 0.99 * found.size
    likelihood = draws.log_likelihood()["y"]
    np.testing.assert_allclose(likelihood, dist.Normal(level, 1.0).log_prob(y), rtol=1e-4)


def test_two_plates_are_taken_whole(key):
    def table(y):
        level = numpyro.sample("level", dist.Normal(0.0, 5.0))
        with (
            numpyro.plate("columns", 30, subsample_size=10, dim=-1),
            numpyro.plate("rows", 20, subsample_size=5, dim=-2),
        ):
            seen = numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", dist.Normal(level, 1.0), obs=seen)

    y = RNG.normal(size=(20, 30)).astype(np.float32)
    draws = run(table, y, batch_size=None)
    level = draws.constrained()["level"][..., None, None]
    np.testing.assert_allclose(
        draws.log_likelihood()["y"], dist.Normal(level, 1.0).log_prob(y), rtol=1e-4
    )
    assert draws.predict(key)["y"].shape == (CHAINS, DRAWS, 20, 30)
    with pytest.raises(ValueError, match="rows cannot be told apart in this model"):
        draws.log_likelihood(rows=[0])


def test_events_and_several_sites(key):
    def model(z, k):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("rows", len(z), subsample_size=9):
            zb, kb = numpyro.subsample(z, event_dim=1), numpyro.subsample(k, event_dim=0)
            numpyro.sample("z", dist.Normal(m, 1.0).to_event(1), obs=zb)
            numpyro.sample("k", dist.Poisson(jnp.exp(m[0])), obs=kb)
            numpyro.factor("extra", -0.5 * kb**2.0)

    z, k = RNG.normal(size=(60, 2)).astype(np.float32), RNG.poisson(1.0, 60).astype(np.int32)
    draws = run(model, z, k, batch_size=None)
    found = draws.predict(key)
    assert {name: value.shape[2:] for name, value in found.items()} == {"z": (60, 2), "k": (60,)}
    assert found["k"].dtype.kind == "i"
    likelihood = draws.log_likelihood()
    assert {name: value.shape[2:] for name, value in likelihood.items()} == {
        "z": (60,), "k": (60,), "extra": (60,)
    }  # fmt: skip
    m = draws.constrained()["m"][..., None, :]
    np.testing.assert_allclose(
        likelihood["z"], dist.Normal(m, 1.0).to_event(1).log_prob(z), rtol=1e-4
    )


def test_streamed_rows_are_read_as_they_are_needed(tmp_path, key):
    def model(x, y):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("rows", len(x), subsample_size=50):
            xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", dist.Normal(xb @ b, 1.0), obs=yb)

    for name, value in {"x": X, "y": Y}.items():
        np.save(tmp_path / f"{name}.npy", value)
    x, y = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy")
    draws = run(model, x, y, order="streamed")
    mean = np.einsum("nk,cdk->cdn", X, draws.constrained()["b"])
    expected = dist.Normal(mean, 1.0).log_prob(Y)
    np.testing.assert_allclose(draws.log_likelihood()["y"], expected, rtol=1e-4, atol=1e-4)
    some = draws.log_likelihood(rows=[7, 8, 4000])["y"]
    np.testing.assert_allclose(some, expected[..., [7, 8, 4000]], rtol=1e-4, atol=1e-4)
    assert draws.predict(key)["y"].shape == (CHAINS, DRAWS, N)


def test_bad_input_gets_one_sentence(key):
    draws = run(subsampled, X, G, Y)
    with pytest.raises(ValueError, match="the model observes nothing with these arguments"):
        draws.log_likelihood(X[:5], G[:5])
    with pytest.raises(TypeError, match="cannot be called with the 1 positional arguments"):
        draws.predict(key, X[:5])
    with pytest.raises(ValueError, match=r"argument 0 .*"):
        draws.predict(key, X[:5] * np.nan, G[:5])
    with pytest.raises(ValueError, match="sites must be"):
        draws.predict(key, sites=["no site"])
