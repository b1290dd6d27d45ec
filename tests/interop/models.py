"""numpyro models of every kind that the library takes."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan

N = 53
RNG = np.random.default_rng(3)
X = RNG.normal(size=(N, 2)).astype(np.float32)
Y = (X @ np.array([1.0, -0.5]) + RNG.normal(size=N)).astype(np.float32)
G = RNG.integers(0, 4, N).astype(np.int32)
M = RNG.random(N) < 0.8


def regression(x, y=None, b=10):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("rows", x.shape[0], subsample_size=b):
        xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(xb @ w, sigma), obs=yb)


def by_index(x, y, b=10):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", x.shape[0], subsample_size=b) as rows:
        numpyro.sample("y", dist.Normal(x[rows] @ w, 1.0), obs=y[rows])


def closed_over(b=10):
    """Half of the data by numpyro.subsample, half by hand, none through the arguments."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", N, subsample_size=b) as rows:
        xb = numpyro.subsample(X, event_dim=1)
        numpyro.sample("y", dist.Normal(xb @ w, 1.0), obs=jnp.asarray(Y)[rows])


def derived(x, y, b=10):
    """What is subsampled is computed in the model."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", x.shape[0], subsample_size=b):
        mean = numpyro.subsample(x @ w, event_dim=0)
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=numpyro.subsample(y, event_dim=0))


def hierarchical(x, g, y, b=10):
    tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
    rho = numpyro.sample("rho", dist.Beta(2.0, 2.0))
    chol = numpyro.sample("chol", dist.LKJCholesky(2, 1.0))
    share = numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("groups", 4):
        a = numpyro.sample("a", dist.Normal(0.0, tau))
    numpyro.deterministic("spread", a - jnp.mean(a))
    with numpyro.plate("rows", x.shape[0], subsample_size=b):
        xb, gb, yb = (numpyro.subsample(v, event_dim=v.ndim - 1) for v in (x, g, y))
        mean = a[gb] + rho * (xb @ chol)[:, 0] + share[0]
        numpyro.deterministic("mean", mean)
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=yb)


def two_observed(x, y, b=10):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", x.shape[0], subsample_size=b):
        xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        numpyro.sample("x", dist.Normal(w, 1.0).expand([2]).to_event(1), obs=xb)
        numpyro.sample("y", dist.StudentT(3.0, w, 1.0), obs=yb)


def with_handlers(x, y, m, b=10):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with handlers.scale(scale=0.3):
        numpyro.sample("v", dist.Gamma(2.0, 2.0))
    with numpyro.plate("rows", x.shape[0], subsample_size=b):
        yb, mb = numpyro.subsample(y, event_dim=0), numpyro.subsample(m, event_dim=0)
        with handlers.mask(mask=mb), handlers.scale(scale=0.5):
            numpyro.sample("y", dist.Normal(w, 1.0), obs=yb)
    with handlers.block():
        numpyro.sample("hidden", dist.Normal(w, 1.0), obs=jnp.float32(5.0))


def with_factor(y, b=10):
    w = numpyro.sample("w", dist.Uniform(-2.0, 3.0))
    numpyro.factor("prior", -0.5 * w**4)
    with numpyro.plate("rows", y.shape[0], subsample_size=b):
        yb = numpyro.subsample(y, event_dim=0)
        numpyro.factor("likelihood", -0.5 * jnp.log1p((yb - w) ** 2))


def with_scan(y, b=10):
    def step(carry, t):
        z = numpyro.sample("z", dist.Normal(0.5 * carry, 1.0))
        return z, z

    _, z = scan(step, jnp.float32(0.0), jnp.arange(3))
    with numpyro.plate("rows", y.shape[0], subsample_size=b):
        numpyro.sample("y", dist.Normal(z[-1], 1.0), obs=numpyro.subsample(y, event_dim=0))


def two_plates(y, x, b=10):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("first", y.shape[0], subsample_size=b):
        numpyro.sample("y", dist.Normal(w, 1.0), obs=numpyro.subsample(y, event_dim=0))
    with numpyro.plate("second", x.shape[0], subsample_size=7 if b else None):
        xb = numpyro.subsample(x, event_dim=1)
        numpyro.sample("x", dist.Normal(w, 1.0).expand([2]).to_event(1), obs=xb)


TABLE = RNG.normal(size=(12, 9)).astype(np.float32)


def nested(table, b=5):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with (
        numpyro.plate("columns", table.shape[1], subsample_size=b and 4, dim=-1),
        numpyro.plate("rows", table.shape[0], subsample_size=b, dim=-2),
    ):
        numpyro.sample("t", dist.Normal(w, 1.0), obs=numpyro.subsample(table, event_dim=0))


def nested_in_full(table, b=5):
    """A subsampled plate inside one that is not."""
    with numpyro.plate("columns", table.shape[1], dim=-1):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", table.shape[0], subsample_size=b, dim=-2):
            numpyro.sample("t", dist.Normal(w, 1.0), obs=numpyro.subsample(table, event_dim=0))


MODELS = {
    "regression": (regression, (X,), {"y": Y}),
    "by index": (by_index, (X, Y), {}),
    "closed over": (closed_over, (), {}),
    "derived": (derived, (X, Y), {}),
    "hierarchical": (hierarchical, (X, G, Y), {}),
    "two observed": (two_observed, (X, Y), {}),
    "handlers": (with_handlers, (X, Y, M), {}),
    "factor": (with_factor, (), {"y": Y}),
    "scan": (with_scan, (Y,), {}),
    "two plates": (two_plates, (Y, X), {}),
    "nested": (nested, (TABLE,), {}),
    "nested in full": (nested_in_full, (TABLE,), {}),
}
