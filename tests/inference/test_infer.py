"""One call: the method that fits, draws of the posterior, and a verdict."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import stochgrad

RNG = np.random.default_rng(0)
X = RNG.standard_normal((300, 2)).astype(np.float32)
Y = (X @ np.array([1.0, -0.5]) + 0.5 * RNG.standard_normal(300)).astype(np.float32)


def model(x, y, rows=None):
    w = numpyro.sample("w", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    with numpyro.plate("rows", len(y), subsample_size=rows):
        xb, yb = numpyro.subsample(x, 1), numpyro.subsample(y, 0)
        numpyro.sample("y", dist.Normal(xb @ w, 0.5), obs=yb)


def exact():
    precision = X.T.astype(float) @ X / 0.25 + np.eye(2) / 100
    return np.linalg.solve(precision, X.T @ Y / 0.25), np.linalg.inv(precision)


def check_law(draws):
    mean, covariance = exact()
    sd = np.sqrt(np.diag(covariance))
    w = draws.constrained()["w"]
    assert np.all(np.abs(w.mean((0, 1)) - mean) < 0.2 * sd)
    assert np.all(np.abs(w.std((0, 1)) / sd - 1) < 0.15)


@pytest.mark.parametrize("method", ["nuts", "sghmc"])
def test_both_methods_give_the_posterior(method):
    draws = stochgrad.infer(
        jax.random.key(0), model, X, Y, 30, method=method, num_samples=500, progress=False
    )
    assert draws.verdict.ok, draws.verdict
    assert draws.attrs["method"] == {"nuts": "NUTS", "sghmc": "SGHMC"}[method]
    assert (draws.num_chains, draws.num_draws) == (4, 500)
    check_law(draws)


def test_small_data_go_to_nuts_and_a_line_says_so(capsys):
    draws = stochgrad.infer(jax.random.key(0), model, X, Y, 30, num_samples=100)
    assert draws.attrs["method"] == "NUTS"
    said = capsys.readouterr().err
    for word in ("NUTS on all rows", "Pathfinder", "window 1", "effective draws", "verdict: ok"):
        assert word in said


def test_a_posterior_and_a_gradient_are_taken():
    target = stochgrad.posterior(
        lambda q: -0.5 * jnp.sum(q**2) / 100,
        lambda q, batch: -0.5 * (batch[1] - batch[0] @ q) ** 2 / 0.25,
        (X, Y),
        batch_size=30,
    )
    options = {"init": jnp.zeros(2), "num_samples": 200, "method": "sghmc", "progress": False}
    for given in (target, stochgrad.svrg(target)):
        draws = stochgrad.infer(jax.random.key(0), given, **options)
        mean, _ = exact()
        np.testing.assert_allclose(draws.positions.mean((0, 1)), mean, atol=0.02)


def test_a_budget_that_ends_early_is_a_reason():
    with pytest.warns(stochgrad.ConvergenceWarning, match="the budget ended before the goal"):
        draws = stochgrad.infer(
            jax.random.key(0),
            model,
            X,
            Y,
            30,
            method="sghmc",
            num_samples=50,
            target_ess=10_000,
            max_gradients=2000,
            progress=False,
        )
    assert not draws.verdict.ok
    assert draws.attrs["gradients"] <= 2000


def test_what_does_not_fit_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="method must be one of"):
        stochgrad.infer(key, model, X, Y, method="gibbs")
    with pytest.raises(TypeError, match="model must be"):
        stochgrad.infer(key, 3, X, Y)
    target = stochgrad.from_numpyro(model, X, Y, 30)
    with pytest.raises(TypeError, match="model is a posterior already"):
        stochgrad.infer(key, target, X)
    with pytest.raises(TypeError, match="key must be a typed PRNG key"):
        stochgrad.infer(0, model, X, Y)
    with pytest.raises(ValueError, match="NUTS needs all rows in memory"):
        stochgrad.nuts(stochgrad.from_numpyro(model, X, Y, 30, order="streamed"), 0.1, np.ones(2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:do not use")
def test_a_mode_that_no_chain_has_seen_is_named():
    """A mixture whose two means can change places: all chains in one order is no posterior."""
    y = np.where(RNG.random(100) < 0.5, -2, 2) + RNG.standard_normal(100)

    def mixture(y):
        mean = numpyro.sample("mean", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        parts = [dist.Normal(mean[i], 1.0) for i in range(2)]
        with numpyro.plate("rows", len(y)):
            numpyro.sample(
                "y", dist.MixtureGeneral(dist.Categorical(probs=np.full(2, 0.5)), parts), obs=y
            )

    with jax.numpy_rank_promotion("allow"):  # numpyro's mixtures promote
        draws = stochgrad.infer(
            jax.random.key(1), mixture, y.astype(np.float32), num_samples=200, progress=False
        )
    assert not draws.verdict.ok
    words = " ".join(draws.verdict.reasons)
    assert "the chains of the warm-up lie in modes of their own" in words
    assert "no chain has visited a place" in words or "R-hat is" in words


def centered(group, y, minibatch=None):
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    with numpyro.plate("groups", 10):
        effect = numpyro.sample("effect", dist.Normal(mean, scale))
    with numpyro.plate("rows", len(y), subsample_size=minibatch):
        i, yb = numpyro.subsample(group, 0), numpyro.subsample(y, 0)
        numpyro.sample("y", dist.Normal(effect[i], 3.0), obs=yb)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 4])
def test_a_centered_hierarchy_whose_neck_the_first_step_does_not_stand(seed, capsys):
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(10), 8)
    y = 1 + rng.normal(0, 0.5, 10)[group] + rng.normal(0, 3, 80)
    draws = stochgrad.infer(
        jax.random.key(seed), centered, group, y.astype(np.float32), minibatch=20, method="sghmc"
    )
    assert "again with half of them" in capsys.readouterr().err
    assert draws.verdict.ok, draws.verdict

    # the effects and the mean are normal given the scale: what is left is one integral
    scale = np.linspace(1e-3, 6, 6000)
    variance = scale**2 + 9 / 8
    gap = y.reshape(10, 8).mean(1)
    spread = np.sum((gap - gap.mean()) ** 2)
    log_p = -0.5 * (9 * np.log(variance) + np.log(variance + 250) + spread / variance)
    log_p -= 0.5 * 10 * gap.mean() ** 2 / (variance + 250) + scale**2 / 8
    weight = np.exp(log_p - log_p.max())
    weight /= weight.sum()
    mean = weight @ scale
    sd = np.sqrt(weight @ (scale - mean) ** 2)
    tail = weight @ (scale - mean) ** 4 / sd**4
    x = draws.constrained()["scale"].astype(float)
    effective = numpyro.diagnostics.effective_sample_size
    assert abs(x.mean() - mean) < 4 * sd / np.sqrt(effective(x))
    assert abs(x.var() / sd**2 - 1) < 4 * np.sqrt((tail - 1) / effective((x - mean) ** 2))
