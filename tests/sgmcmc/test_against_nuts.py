"""Real posteriors against NUTS, in Monte Carlo standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

import stochgrad
from tests.conftest import Z
from tests.helpers import mean_and_error

N, D = 2000, 4
RNG = np.random.default_rng(5)
X = RNG.normal(size=(N, D)).astype(np.float32)
LATE = (RNG.random(N) < 1 / (1 + np.exp(-X @ np.array([1.0, -1.0, 0.5, 0.0])))).astype(np.float32)
GROUP = RNG.integers(0, 8, N).astype(np.int32)
EFFECT = np.linspace(-1, 1, 8)[GROUP]
GROUPED = (RNG.random(N) < 1 / (1 + np.exp(-X[:, 0] - EFFECT))).astype(np.float32)


def logistic(x, y, minibatch=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    with numpyro.plate("rows", len(x), subsample_size=minibatch):
        xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Bernoulli(logits=xb @ w), obs=yb)


def hierarchical(x, group, y, minibatch=None):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("group", 8):
        a = numpyro.sample("a", dist.Normal(0.0, scale))
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    with numpyro.plate("rows", len(x), subsample_size=minibatch):
        xb, gb, yb = (numpyro.subsample(v, event_dim=v.ndim - 1) for v in (x, group, y))
        numpyro.sample("y", dist.Bernoulli(logits=xb @ w + a[gb]), obs=yb)


def nuts(model, *args):
    mcmc = MCMC(
        NUTS(model),
        num_warmup=500,
        num_samples=2000,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), *args)
    return mcmc.get_samples(group_by_chain=True)


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "args"), [(logistic, (X, LATE)), (hierarchical, (X, GROUP, GROUPED))]
)
def test_moments_agree_with_nuts(model, args):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        reference = nuts(model, *args)
        target = stochgrad.from_numpyro(model, *args, minibatch=200)
        center = stochgrad.find_center(jax.random.key(1), target)
        kernel = stochgrad.sghmc(
            stochgrad.control_variate(target, center), step_size=0.006, friction=12.0
        )
        draws = stochgrad.sample(
            jax.random.key(2),
            kernel,
            init=center,
            num_samples=3000,
            num_warmup=300,
            thin=30,
            num_chains=4,
        )
    # second order in h: relative variance bias h^2 k / 4 with k of up to N p (1 - p) = 450, and
    # what minibatch noise adds, hV/2C, as the run itself reports
    bias = 0.006**2 * 450 / 4 + float(np.mean(draws.stats["noise_ratio"]))
    assert bias < 0.02
    for name, ours in draws.constrained().items():
        theirs = np.asarray(reference[name], np.float64)
        mean = theirs.mean(axis=(0, 1))
        (a, ea), (b, eb) = mean_and_error(ours), mean_and_error(theirs)
        sd = theirs.std(axis=(0, 1))
        assert np.all(np.abs(a - b) < Z * np.hypot(ea, eb) + bias * sd)
        (a, ea), (b, eb) = (mean_and_error((x - mean) ** 2) for x in (ours, theirs))
        assert np.all(np.abs(a - b) < Z * np.hypot(ea, eb) + bias * sd**2)


@pytest.mark.optimized
@pytest.mark.slow
def test_conjugate_linear_regression():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(500, 3)).astype(np.float32)
    y = (x @ np.array([1.0, 2.0, -1.0]) + rng.normal(size=500)).astype(np.float32)
    target = stochgrad.posterior(
        lambda w: -0.5 * jnp.sum(w**2),
        lambda w, b: -0.5 * (b[1] - b[0] @ w) ** 2,
        (x, y),
        batch_size=60,  # 500 is no multiple: the last minibatch is partial
    )
    precision = x.T @ x + np.eye(3)
    mean, covariance = np.linalg.solve(precision, x.T @ y), np.linalg.inv(precision)
    kernel = stochgrad.sghmc(stochgrad.control_variate(target, jnp.asarray(mean)), 0.004, 25.0)
    draws = stochgrad.sample(
        jax.random.key(0),
        kernel,
        init=jnp.asarray(mean),
        num_samples=4000,
        num_warmup=50,
        thin=20,
        num_chains=8,
    )
    value, error = mean_and_error(draws.positions)
    assert np.all(np.abs(value - mean) < Z * error)
    centered = draws.positions - mean.astype(np.float32)
    products = centered[..., :, None] * centered[..., None, :]
    value, error = mean_and_error(products.reshape(*products.shape[:2], 9))
    bias = 0.004**2 * np.linalg.eigvalsh(precision).max() / 4 + np.mean(draws.stats["noise_ratio"])
    assert np.all(np.abs(value - covariance.ravel()) < Z * error + bias * np.diag(covariance).max())
    assert bias < 0.01
