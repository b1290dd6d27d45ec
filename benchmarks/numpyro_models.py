"""Models like those of numpyro's examples, as they are, with ``batch_size``: which are taken?

``python benchmarks/numpyro_models.py`` prints the table and writes it to ``docs/results/numpyro_models.md``.
The models have the structure of numpyro's examples and tutorials, in other words and on small
simulated data. For each that is taken, the mean over one epoch's minibatches of the log density and
of its gradient is compared with those on all rows, at one position.
"""

import argparse
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.experimental.ode import odeint
from jax.scipy.special import expit
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer.reparam import LocScaleReparam

import stochgrad

RNG = np.random.default_rng(0)
N = 240
X = RNG.normal(size=(N, 3)).astype(np.float32)
MEAN = X @ np.array([1.0, -0.5, 0.2], np.float32)
Y = (MEAN + RNG.normal(size=N)).astype(np.float32)
BINARY = (RNG.random(N) < expit(MEAN)).astype(np.int32)
COUNTS = RNG.poisson(np.exp(0.5 * MEAN))
GROUP = np.arange(N) % 12
TRIALS = RNG.integers(20, 60, N)
HITS = RNG.binomial(TRIALS, 0.3)
SERIES = np.cumsum(RNG.normal(size=N)).astype(np.float32)


def pooled_batting(at_bats, hits):
    ability = numpyro.sample("ability", dist.Uniform(0, 1))
    with numpyro.plate("players", at_bats.shape[0]):
        numpyro.sample("hits", dist.Binomial(at_bats, probs=ability), obs=hits)


def partially_pooled_batting(at_bats, hits):
    mean = numpyro.sample("mean", dist.Normal(-1, 1))
    scale = numpyro.sample("scale", dist.HalfCauchy(1))
    with numpyro.plate("players", at_bats.shape[0]):
        ability = numpyro.sample("ability", dist.Normal(mean, scale))
        numpyro.sample("hits", dist.Binomial(at_bats, logits=ability), obs=hits)


def neural_network(x, y, width):
    first = numpyro.sample("first", dist.Normal(jnp.zeros((x.shape[1], width)), 1.0))
    second = numpyro.sample("second", dist.Normal(jnp.zeros((width, width)), 1.0))
    last = numpyro.sample("last", dist.Normal(jnp.zeros((width, 1)), 1.0))
    output = jnp.tanh(jnp.tanh(x @ first) @ second) @ last
    precision = numpyro.sample("precision", dist.Gamma(3.0, 1.0))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Normal(output, precision**-0.5).to_event(1), obs=y)


def forest_cover(features, cover):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([features.shape[1]]).to_event(1))
    with numpyro.plate("N", features.shape[0]) as rows:
        numpyro.sample("cover", dist.Bernoulli(logits=features[rows] @ w), obs=cover[rows])


def horseshoe(x):
    count = x.shape[1]
    local = numpyro.sample("local", dist.HalfCauchy(jnp.ones(count)))
    common = numpyro.sample("common", dist.HalfCauchy(jnp.ones(1)))
    raw = numpyro.sample("raw", dist.Normal(jnp.zeros(count), 1.0))
    return x @ numpyro.deterministic("coefficients", common * local * raw)


def horseshoe_normal(x, y):
    mean = horseshoe(x)
    precision = numpyro.sample("precision", dist.Gamma(3.0, 1.0))
    numpyro.sample("y", dist.Normal(mean, precision**-0.5), obs=y)


def horseshoe_binary(x, y):
    numpyro.sample("y", dist.Bernoulli(logits=horseshoe(x)), obs=y)


def smooth(time, count, width):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    length = numpyro.sample("length", dist.InverseGamma(10.0, 2.0))
    frequency = jnp.arange(1, count + 1) * jnp.pi / (2 * width)
    spectrum = scale * jnp.sqrt(jnp.sqrt(2 * jnp.pi) * length)
    spectrum = spectrum * jnp.exp(-0.25 * (length * frequency) ** 2)
    with numpyro.plate("basis", count):
        weight = numpyro.sample("weight", dist.Normal(0, 1))
    basis = jnp.sin(frequency * (time[:, None] + width)) / jnp.sqrt(width)
    return numpyro.deterministic("f", basis @ (spectrum * weight))


def birthdays(time, weekday, y):
    trend = handlers.scope(smooth, "trend")(time, 8, 3.0)
    week = handlers.scope(smooth, "week")(time, 4, 3.0)
    with numpyro.plate("days", 7):
        effect = numpyro.sample("effect", dist.Normal(0, 1))
    f = numpyro.deterministic("f", trend + jnp.exp(week) * effect[weekday])
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
    with numpyro.plate("obs", time.shape[0]):
        numpyro.sample("y", dist.Normal(f, sigma), obs=y)


def energy_conserving(data, y, batch=20):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([data.shape[1]]).to_event(1))
    with numpyro.plate("N", data.shape[0], subsample_size=batch):
        features = numpyro.subsample(data, event_dim=1)
        numpyro.sample("y", dist.Bernoulli(logits=features @ w), obs=numpyro.subsample(y, 0))


def normal_mean(data):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("data", len(data)):
        numpyro.sample("y", dist.Normal(mean, 1), obs=data)


def mortality(age, area, region_of_area, year, population, deaths):
    ages, areas, years = len(np.unique(age)), len(np.unique(area)), len(np.unique(year))
    regions = len(np.unique(region_of_area))
    scales = numpyro.sample("scales", dist.HalfNormal(jnp.ones(4)))
    centered = {name: LocScaleReparam(0) for name in ("region", "area", "age", "year")}
    with handlers.reparam(config=centered):
        with numpyro.plate("regions", regions):
            region = numpyro.sample("region", dist.Normal(0, scales[0]))
        with numpyro.plate("areas", areas):
            local = numpyro.sample("area", dist.Normal(region[region_of_area], scales[1]))
        with numpyro.plate("ages", ages):
            steps = numpyro.sample("age", dist.Normal(0, scales[2]))
        with numpyro.plate("years", years):
            drift = numpyro.sample("year", dist.Normal(0, scales[3]))
    rate = jnp.cumsum(steps)[age] + local[area] + jnp.cumsum(drift)[year] - 3
    with numpyro.plate("N", len(population)):
        rate = numpyro.deterministic("rate", expit(rate))
        numpyro.sample("deaths", dist.Binomial(population, rate), obs=deaths)


def proportions(design, bought):
    w = numpyro.sample("w", dist.MultivariateNormal(0.0, jnp.eye(design.shape[1])))
    logits = design.dot(w)
    with numpyro.plate("data", design.shape[0]):
        numpyro.sample("bought", dist.Bernoulli(logits=logits), obs=bought)


def stein_network(x, y, batch=20):
    precision = numpyro.sample("precision", dist.Gamma(1.0, 0.1))
    hidden = numpyro.sample("hidden", dist.Normal(0, 1).expand([x.shape[1], 5]).to_event(2))
    out = numpyro.sample("out", dist.Normal(0, 1).expand([5]).to_event(1))
    with numpyro.plate("data", x.shape[0], subsample_size=batch):
        xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(jax.nn.relu(xb @ hidden) @ out, precision**-0.5), obs=yb)


def admissions(department, male, applications, admitted):
    mean = numpyro.sample("mean", dist.Normal(0, jnp.array([4.0, 1.0])))
    scale = numpyro.sample("scale", dist.HalfNormal(jnp.ones(2)))
    factor = numpyro.sample("factor", dist.LKJCholesky(2, concentration=2))
    raw = numpyro.sample("raw", dist.Normal(jnp.zeros((len(np.unique(department)), 2)), 1))
    effect = (scale[:, None] * factor @ raw.T).T
    logits = mean[0] + effect[department, 0] + (mean[1] + effect[department, 1]) * male
    numpyro.sample("admitted", dist.Binomial(applications, logits=logits), obs=admitted)


def fishing(x, y):
    gate = numpyro.sample("gate", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    rate = numpyro.sample("rate", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    zero, mean = expit(jnp.dot(x, gate[:, None])).reshape(-1), jnp.exp(x @ rate)
    with numpyro.plate("obs", x.shape[0]):
        numpyro.sample("y", dist.ZeroInflatedPoisson(gate=zero, rate=mean), obs=y)


def divorce(marriage=None, age=None, rate=None):
    mean = numpyro.sample("a", dist.Normal(0, 0.2))
    if marriage is not None:
        mean = mean + numpyro.sample("marriage", dist.Normal(0, 0.5)) * marriage
    if age is not None:
        mean = mean + numpyro.sample("age", dist.Normal(0, 0.5)) * age
    sigma = numpyro.sample("sigma", dist.Exponential(1))
    numpyro.sample("rate", dist.Normal(mean, sigma), obs=rate)


def lung_capacity(patient, week, capacity):
    mean = numpyro.sample("mean", dist.Normal(0, 5).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(5).expand([2]).to_event(1))
    with numpyro.plate("patients", len(np.unique(patient))):
        intercept = numpyro.sample("intercept", dist.Normal(mean[0], scale[0]))
        slope = numpyro.sample("slope", dist.Normal(mean[1], scale[1]))
    sigma = numpyro.sample("sigma", dist.HalfNormal(5))
    estimate = intercept[patient] + slope[patient] * week
    with numpyro.plate("data", len(patient)):
        numpyro.sample("capacity", dist.Normal(estimate, sigma), obs=capacity)


def ordinal(x, y, levels):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    support = dist.constraints.ordered_vector
    cuts = numpyro.sample("cuts", dist.ImproperUniform(support, (), (levels - 1,)))
    numpyro.factor("cut_prior", dist.Normal(0, 3).log_prob(cuts).sum())
    with numpyro.plate("obs", len(y)):
        numpyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)


def waiting_times(time, censored):
    mean = numpyro.sample("mean", dist.HalfNormal(5))
    with numpyro.plate("obs", len(time)):
        with handlers.mask(mask=~censored):
            numpyro.sample("time", dist.Exponential(1 / mean), obs=time)
        numpyro.factor("longer", jnp.where(censored, -time / mean, 0.0))


def truncated(lower, y):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    with numpyro.plate("observations", y.shape[0]):
        numpyro.sample("y", dist.TruncatedNormal(mean, scale, low=lower), obs=y)


def mixture(y):
    share = numpyro.sample("share", dist.Beta(1, 1))
    means = numpyro.sample("means", dist.Normal(0, 3).expand([2]).to_event(1))
    with numpyro.plate("data", len(y)):
        component = numpyro.sample("component", dist.Bernoulli(share))
        numpyro.sample("y", dist.Normal(means[component], 1.0), obs=y)


def autoregressive(y):
    c = numpyro.sample("c", dist.Normal(0, 1))
    a, b = (numpyro.sample(name, dist.Normal(0, 0.5)) for name in "ab")
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))

    def step(carry, _):
        last, before = carry
        now = numpyro.sample("y", dist.Normal(c + a * last + b * before, sigma))
        return (now, last), None

    with handlers.condition(data={"y": y[2:]}):
        scan(step, (y[1], y[0]), jnp.arange(len(y) - 2))


def gaussian_process(x, y):
    variance, noise, length = (
        numpyro.sample(name, dist.LogNormal(0, 1)) for name in ("variance", "noise", "length")
    )
    distance = (x[:, None] - x) / length
    covariance = variance * jnp.exp(-0.5 * distance**2) + (noise + 1e-4) * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)


def hidden_states(labels, words):
    moves = numpyro.sample("moves", dist.Dirichlet(jnp.ones((3, 3))).to_event(1))
    emissions = numpyro.sample("emissions", dist.Dirichlet(jnp.ones((3, 5))).to_event(1))
    numpyro.sample("labels", dist.Categorical(moves[labels[:-1]]), obs=labels[1:])
    numpyro.sample("words", dist.Categorical(emissions[labels]), obs=words)


def predator_prey(y):
    rates = numpyro.sample("rates", dist.LogNormal(jnp.log(jnp.array([0.5, 0.02, 0.02, 0.8])), 0.1))
    start = numpyro.sample("start", dist.LogNormal(jnp.log(jnp.array([30.0, 5.0])), 0.5))

    def slope(z, t, a, b, c, d):
        return jnp.stack([(a - b * z[1]) * z[0], (c * z[0] - d) * z[1]])

    path = odeint(slope, start, jnp.arange(float(len(y))), *rates, mxstep=200)
    noise = numpyro.sample("noise", dist.LogNormal(-1, 0.5).expand([2]).to_event(1))
    numpyro.sample("y", dist.LogNormal(jnp.log(jnp.abs(path) + 1e-6), noise), obs=y)


def volatility(returns):
    step = numpyro.sample("step", dist.Exponential(50.0))
    s = numpyro.sample("s", dist.GaussianRandomWalk(step, num_steps=len(returns)))
    df = numpyro.sample("df", dist.Exponential(0.1))
    numpyro.sample("r", dist.StudentT(df, 0.0, jnp.exp(s)), obs=returns)


def funnel():
    scale = numpyro.sample("scale", dist.Normal(0, 3))
    numpyro.sample("x", dist.Normal(jnp.zeros(9), jnp.exp(scale / 2)))


WEEK = np.tile(np.arange(N // 12, dtype=np.float32), 12)
MODELS = {
    "baseball, pooled": (pooled_batting, (TRIALS, HITS)),
    "Bayesian neural network": (neural_network, (X, Y[:, None], 5)),
    "forest cover": (forest_cover, (X, BINARY)),
    "horseshoe, continuous": (horseshoe_normal, (X, Y)),
    "horseshoe, binary": (horseshoe_binary, (X, BINARY)),
    "birthdays (Hilbert space GP)": (birthdays, (X[:, 0], np.arange(N) % 7, Y)),
    "HMCECS, logistic": (energy_conserving, (X, BINARY)),
    "minipyro": (normal_mean, (Y,)),
    "mortality": (
        mortality,
        (np.arange(N) % 5, GROUP, np.arange(12) // 4, np.arange(N) // 60, TRIALS, HITS),
    ),
    "proportion test": (proportions, (X, BINARY)),
    "Stein network": (stein_network, (X, Y)),
    "UCB admissions": (admissions, (GROUP, BINARY, TRIALS, HITS)),
    "zero-inflated Poisson": (fishing, (X, COUNTS)),
    "divorce (regression)": (divorce, {"age": X[:, 0], "rate": Y}),
    "lung capacity (hierarchical)": (lung_capacity, (np.repeat(np.arange(12), 20), WEEK, Y)),
    "ordinal regression": (ordinal, (X[:, 0], np.clip(COUNTS, 0, 3), 4)),
    "censoring": (waiting_times, (np.minimum(np.abs(Y), 2.0), np.abs(Y) > 2)),
    "truncated distributions": (truncated, (Y - np.abs(X[:, 0]), Y)),
    "baseball, partially pooled": (partially_pooled_batting, (TRIALS, HITS)),
    "mixture, discrete": (mixture, (Y,)),
    "AR(2)": (autoregressive, (SERIES,)),
    "Gaussian process": (gaussian_process, (X[:, 0], Y)),
    "hidden Markov, supervised": (hidden_states, (RNG.integers(0, 3, N), RNG.integers(0, 5, N))),
    "predator and prey (ODE)": (predator_prey, (np.exp(RNG.normal(size=(N, 2))) * 10,)),
    "stochastic volatility": (volatility, (np.diff(SERIES, prepend=0.0),)),
    "funnel": (funnel, ()),
}


def epoch_error(target):
    """By how much an epoch's mean differs from all rows: log density and gradient, relatively."""
    position = target.initial(jax.random.key(1))
    score = jax.value_and_grad(target.log_density)
    epoch = -(-target.batches.size // target.batches.batch_size)

    @jax.jit
    def mean(state):
        def body(state, _):
            batch, state = target.batches.next(state)
            return state, score(position, batch)

        return jax.tree.map(lambda x: x.mean(0), jax.lax.scan(body, state, length=epoch)[1])

    value, gradient = mean(target.batches.init(jax.random.key(2)))
    full_value, full_gradient = jax.jit(score)(position, target.batches.full)
    norm = lambda tree: np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree)))
    difference = jax.tree.map(jnp.subtract, gradient, full_gradient)
    return abs(value - full_value) / abs(full_value), norm(difference) / norm(full_gradient)


def try_out(model, data, batch_size):
    """A row of the table: number of rows, what came of it, errors; and whether it was taken."""
    args, kwargs = ((), data) if isinstance(data, dict) else (data, {})
    try:
        target = stochgrad.from_numpyro(model, *args, batch_size=batch_size, **kwargs)
    except ValueError as error:
        return "", f"{error}", "", "", False
    density, gradient = epoch_error(target)
    return str(target.batches.size), "yes", f"{density:.0e}", f"{gradient:.0e}", True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("docs/results/numpyro_models.md"))
    options = parser.parse_args()
    warnings.simplefilter("error")
    lines, count = [], 0
    for name, (model, data) in MODELS.items():
        rows, answer, density, gradient, right = try_out(model, data, options.batch_size)
        count += right
        lines.append(f"| {name} | {rows} | {answer} | {density} | {gradient} |")
        print(lines[-1], flush=True)
    text = "\n".join(
        [
            "# numpyro's models as they are",
            "",
            "Made by `python benchmarks/numpyro_models.py`. Models with the structure of numpyro's "
            "examples and tutorials, written anew on small simulated data, are handed to "
            f"`stochgrad.from_numpyro(model, ..., batch_size={options.batch_size})` unchanged. For "
            "each that is taken: by how much the mean over one epoch of minibatches differs from "
            "all rows, of the log density and of its gradient, relatively, at one position in "
            "single precision. The others have no rows that enter one by one, or latent "
            "variables that a minibatch would leave without data, one model of each kind: they get "
            "the sentence that stands in the table, and are for NUTS.",
            "",
            f"{count} of {len(MODELS)} are taken.",
            "",
            "| model | rows | taken, or the sentence | log density | gradient |",
            "| --- | --- | --- | --- | --- |",
            *lines,
            "",
        ]
    )
    options.output.write_text(text)


if __name__ == "__main__":
    main()
