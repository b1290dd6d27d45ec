"""Effective draws per second and per gradient of all rows, beside NUTS, as the data grow."""

import time
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

from .compare import SEED, save

ROWS = {200: 25, 2000: 100, 20_000: 200, 300_000: 500}
"""Rows of the data and of a minibatch."""
GROUPS = 50


def regression(x, y, sub=None):
    b = numpyro.sample("b", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        xb = numpyro.subsample(x, event_dim=1)
        yb = numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Bernoulli(logits=xb @ b), obs=yb)


def hierarchy(group, x, y, sub=None):
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 2.5))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("groups", GROUPS):
        a = numpyro.sample("a", dist.Normal(mean, scale))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        i, xb, yb = (numpyro.subsample(v, event_dim=0) for v in (group, x, y))
        numpyro.sample("y", dist.Normal(a[i] + slope * xb, sigma), obs=yb)


def regression_data(rows):
    rng = np.random.default_rng(51)
    x = np.c_[np.ones(rows), rng.normal(size=(rows, 9))].astype(np.float32)
    probability = 1.0 / (1.0 + np.exp(-x @ rng.normal(0.0, 0.5, 10)))
    return x, (rng.random(rows) < probability).astype(np.int32)


def hierarchy_data(rows):
    rng = np.random.default_rng(52)
    group, x = np.arange(rows) % GROUPS, rng.normal(size=rows)
    y = rng.normal(1.0, 0.7, GROUPS)[group] + 0.4 * x + rng.normal(size=rows)
    return group, x.astype(np.float32), y.astype(np.float32)


MODELS = {
    "logistic regression, 10 parameters": (regression, regression_data),
    "hierarchy of 50 groups, centered": (hierarchy, hierarchy_data),
}


def effective_draws(draws):
    """The smallest bulk effective sample size of any component."""
    data = az.convert_to_dataset({name: np.asarray(value) for name, value in draws.items()})
    return min(float(value.min()) for value in az.ess(data).values())


def nuts(model, args):
    kernel = NUTS(model)
    mcmc = MCMC(
        kernel,
        num_warmup=500,
        num_samples=1000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    begin = time.perf_counter()
    mcmc.warmup(jax.random.key(SEED), *args, extra_fields=("num_steps",), collect_warmup=True)
    gradients = int(jnp.sum(mcmc.get_extra_fields()["num_steps"]))
    mcmc.run(mcmc.post_warmup_state.rng_key, *args, extra_fields=("num_steps",))
    draws = mcmc.get_samples(group_by_chain=True)
    jax.block_until_ready(draws)
    seconds = time.perf_counter() - begin
    gradients += int(jnp.sum(mcmc.get_extra_fields()["num_steps"]))
    return {"draws": effective_draws(draws), "passes": gradients, "seconds": seconds, "ok": True}


def minibatches(model, args, rows):
    from stochgrad import infer  # type: ignore[attr-defined]

    begin = time.perf_counter()
    draws = infer(
        jax.random.key(SEED),
        partial(model, sub=ROWS[rows]),
        *args,
        batch_size=ROWS[rows],
        method="sghmc",
        progress=False,
    )
    seconds = time.perf_counter() - begin
    return {
        "draws": effective_draws(draws.constrained()),
        "passes": draws.attrs["gradients"] * ROWS[rows] / rows,
        "seconds": seconds,
        "ok": bool(draws.verdict.ok),
    }


def run(rows=None):
    for title, (model, data) in MODELS.items():
        for size in rows or ROWS:
            args = data(size)
            for method, work in (
                ("sghmc", lambda: minibatches(model, args, size)),
                ("nuts", lambda: nuts(model, args)),
            ):
                try:
                    record = work()
                except Exception as error:
                    record = {"error": f"{type(error).__name__}: {error}"}
                save("beside NUTS", f"{title} | {size} | {method}", record)
                print(title, size, method, record, flush=True)
                jax.clear_caches()
