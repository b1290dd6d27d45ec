"""Models without minibatches: rows with latents of their own, and rows that do not factorize."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from .entry import Entry, r_data, single
from .hierarchies import HIERARCHY, group_effects


def schools(error, y, centered=True):
    """Coaching in eight schools (Rubin, 1981)."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(5.0))
    theta = group_effects("theta", mu, tau, len(y), centered, "latent")
    with numpyro.plate("schools", len(y)):
        numpyro.sample("y", dist.Normal(theta, error), obs=y)


def surgery(operations, deaths):
    """Mortality in twelve hospitals."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    with numpyro.plate("hospitals", len(deaths)):
        logits = numpyro.sample("logits", dist.Normal(mean, scale))
        numpyro.sample("deaths", dist.Binomial(operations, logits=logits), obs=deaths)


def smooth_levels(year, level):
    """A Gaussian process over years, marginal over its values."""
    center = numpyro.sample("center", dist.Normal(579.0, 5.0))
    length = numpyro.sample("length", dist.InverseGamma(5.0, 40.0))
    height = numpyro.sample("height", dist.HalfNormal(3.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    squared = ((year[:, None] - year[None]) / length) ** 2
    covariance = height**2 * jnp.exp(-0.5 * squared) + noise**2 * jnp.eye(len(year))
    numpyro.sample(
        "level", dist.MultivariateNormal(center * jnp.ones(len(year)), covariance), obs=level
    )


def two_states(y):
    """A hidden Markov chain of two states, summed out."""
    stay = numpyro.sample("stay", dist.Beta(8.0, 2.0).expand([2]).to_event(1))
    low = numpyro.sample("low", dist.Normal(0.0, 5.0))
    gap = numpyro.sample("gap", dist.LogNormal(1.0, 0.5))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    moves = jnp.log(jnp.array([[stay[0], 1.0 - stay[0]], [1.0 - stay[1], stay[1]]]))
    emission = dist.Normal(jnp.stack([low, low + gap]), sigma).log_prob(y[:, None])

    def forward(alpha, row):
        return jax.nn.logsumexp(alpha[:, None] + moves, axis=0) + row, None

    alpha, _ = jax.lax.scan(forward, emission[0] - jnp.log(2.0), emission[1:])
    numpyro.factor("y", jax.nn.logsumexp(alpha))


def volatility(y):
    """GARCH(1, 1): the variance of a day depends on the day before."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    base = numpyro.sample("base", dist.HalfNormal(1.0))
    shock = numpyro.sample("shock", dist.Uniform(0.0, 1.0))
    memory = numpyro.sample("memory", dist.Uniform(0.0, 1.0 - shock))

    def next_variance(variance, value):
        following = base + shock * (value - mu) ** 2 + memory * variance
        return following, variance

    _, variances = jax.lax.scan(next_variance, jnp.var(y), y)
    with numpyro.plate("days", len(y)):
        numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variances)), obs=y)


def schools_data():
    error = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
    return single(error), single([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def surgery_data():
    operations = [47, 148, 119, 810, 211, 196, 148, 215, 207, 97, 256, 360]
    return np.array(operations), np.array([0, 18, 8, 46, 8, 13, 9, 31, 14, 8, 29, 24])


def lake_data():
    d = r_data("datasets", "LakeHuron")
    return single(d["time"] - d["time"].iloc[0]), single(d["value"])


def two_states_data():
    rng = np.random.default_rng(41)
    state = 0
    states = []
    for _ in range(200):
        state = state if rng.random() < (0.9, 0.8)[state] else 1 - state
        states.append(state)
    return (single(rng.normal(np.where(states, 4.0, 1.0), 1.0)),)


def returns_data():
    rng = np.random.default_rng(42)
    variance, values = 1.0, []
    for _ in range(400):
        values.append(0.1 + np.sqrt(variance) * rng.normal())
        variance = 0.2 + 0.3 * (values[-1] - 0.1) ** 2 + 0.5 * variance
    return (single(values),)


def schools_noncentered(error, y):
    return schools(error, y, centered=False)


ENTRIES = [
    Entry(
        "schools_centered",
        schools,
        schools_data,
        8,
        None,
        ("mu", "tau", "theta"),
        twin="schools_noncentered",
    ),
    Entry(
        "schools_noncentered",
        schools_noncentered,
        schools_data,
        8,
        None,
        ("mu", "tau", "theta"),
        nuts={"target_accept_prob": 0.99},
    ),
    Entry("surgery", surgery, surgery_data, 12, None, ("mean", "scale", "logits"), nuts=HIERARCHY),
    Entry(
        "lake_gaussian_process",
        smooth_levels,
        lake_data,
        98,
        None,
        ("center", "length", "height", "noise"),
    ),
    Entry("two_states", two_states, two_states_data, 200, None, ("stay", "low", "gap", "sigma")),
    Entry("volatility", volatility, returns_data, 400, None, ("mu", "base", "shock", "memory")),
]
