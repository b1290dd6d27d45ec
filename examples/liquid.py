"""Do credible intervals of a liquid's structure hold the truth? Where it is known, count.

The truth is a Lennard-Jones liquid: 64 atoms, density 0.77, temperature 1, in reduced units. A pair
network sees a dozen frames of it, with noise added to every force that is as large as the forces'
own spread, as a stochastic reference would have it. From the posterior of its weights come eight
networks, from each of them molecular dynamics, and from that a 90% interval of the radial
distribution function in every bin. The reference is the true liquid's, from a long run. All of it
is done again for each of several seeds, with other frames and other noise:

- eight chains of pSGLD, a network from the end of each;
- one chain of eight times as many steps, a network from each eighth of it;
- a Deep Ensemble, the trained networks that the eight chains started from;
- the Lennard-Jones form itself with two unknown coefficients, whose posterior is a Gaussian and is
  drawn from exactly: what the same intervals hold when model and posterior are beyond doubt.

A pair potential is a function of one number. It is worked out at 128 knots and interpolated by
cubics in between, in training as in dynamics, which is an order of magnitude faster than a network
evaluated for every pair.

Of ten seeds the eight chains hold 87% of the bins, one chain 93%, the Deep Ensemble 39%, the right
form 87%. Bins of one seed are right or wrong together, so that ten seeds do not tell the first from
90%; that the Deep Ensemble is far too sure they do tell.

Run ``python examples/liquid.py``; ``--smoke`` is a short version of the same.
"""

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import stochgrad
from stochgrad import potentials
from stochgrad.diagnostics import calibration, interval_coverage

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CUTOFF, CLOSEST, KNOTS = 2.1, 0.65, 128
CENTERS, WIDTH, HIDDEN = np.linspace(0.8, CUTOFF, 16, dtype=np.float32), 0.1, 32
FRAMES, BATCH, NOISE = 12, 4, 16.0  # the forces' own standard deviation is 16
CHAINS, LEVEL, BINS = 8, 0.9, 40
METHODS = ("8 chains", "1 chain", "Deep Ensemble", "right form")
SHADE = dict(zip(METHODS, ("#1f6f8b", "#b03a2e", "#8a7a3b", "#3b3b3b"), strict=True))


class Effort(NamedTuple):
    """How much of everything: the lengths of training, sampling and dynamics."""

    train_steps: int = 2000
    step_size: float = 5e-4
    draws: int = 40
    thin: int = 100
    warmup: int = 40
    replicas: int = 4
    md_frames: int = 40
    md_warmup: int = 10


SMOKE = Effort(train_steps=100, draws=16, thin=10, warmup=2, replicas=2, md_frames=4, md_warmup=1)
STEPS_PER_FRAME, TIME_STEP, FRICTION = 80, 0.005, 1.0


class Liquid(NamedTuple):
    """Frames with exact forces, the box, and the reference of each block of time."""

    train: potentials.Configurations
    test: potentials.Configurations
    edge: np.ndarray
    rdf: np.ndarray
    time: float


def load():
    """The liquid that ships with the examples."""
    raw = np.load(Path(__file__).parent / "data" / "lennard_jones.npz")
    box = np.full(3, raw["edge"], np.float32)
    together = partial(potentials.configurations, box=box, cutoff=CUTOFF)
    train = together(raw["positions"], raw["forces"])
    test = together(raw["test_positions"], raw["test_forces"])
    return Liquid(train, test, box, raw["rdf"].astype(np.float64), float(raw["time"]))


# --- pair potentials ------------------------------------------------------------------------------

SQUARES = np.linspace(CLOSEST**2, CUTOFF**2, KNOTS, dtype=np.float32)
STRIDE = SQUARES[1] - SQUARES[0]


def pair(params, r):
    """A wall and a network of radial basis functions, which end smoothly at the cut-off."""
    x = jnp.exp(-(((r - CENTERS) / WIDTH) ** 2))
    out = jnp.tanh(x @ params["w"] + params["b"]) @ params["out"]
    return (r**-12 + out) * (1 - (r / CUTOFF) ** 2) ** 2


def init(key):
    """Random weights."""
    one, other = jax.random.split(key)
    w = jax.random.normal(one, (len(CENTERS), HIDDEN)) / np.sqrt(len(CENTERS))
    out = jax.random.normal(other, (HIDDEN,)) / np.sqrt(HIDDEN)
    return {"w": w, "b": jnp.zeros(HIDDEN), "out": out}


def table(of_distance):
    """Values and slopes of a pair potential at the knots, evenly spaced in squared distance."""
    of_square = jax.value_and_grad(lambda s: of_distance(jnp.sqrt(s)))
    return jnp.stack(jax.vmap(of_square)(jnp.asarray(SQUARES)), -1)


def from_table(knots, positions, box):
    """Energy of a frame, by cubic Hermite interpolation between the knots."""
    one, other = np.triu_indices(positions.shape[0], 1)
    delta = potentials.displacement(positions[one], positions[other], box)
    square = jnp.sum(delta**2, -1)
    place = (square - SQUARES[0]) / STRIDE
    left = jnp.clip(jnp.floor(place), 0, KNOTS - 2).astype(jnp.int32)
    z, low, high = place - left, knots[left], knots[left + 1]
    value = (1 + 2 * z) * (1 - z) ** 2 * low[:, 0] + z**2 * (3 - 2 * z) * high[:, 0]
    slope = z * (1 - z) ** 2 * low[:, 1] + z**2 * (z - 1) * high[:, 1]
    return jnp.sum(jnp.where(square < SQUARES[-1], value + STRIDE * slope, 0))


def energy(params, positions, box):
    """Energy of a frame under a network."""
    return from_table(table(partial(pair, params)), positions, box)


def right_form(power, r, onset=1.7):
    """A power of the distance with the truth's own cut-off."""
    c, o, s = CUTOFF**2, onset**2, r**2
    switch = (c - s) ** 2 * (c + 2 * s - 3 * o) / (c - o) ** 3
    return r**-power * jnp.where(r < onset, 1, switch)


# --- posteriors -----------------------------------------------------------------------------------


def noisy(data, rng):
    """The same frames with noise of known size added to every force."""
    noise = NOISE * rng.normal(size=data.forces.shape)
    return dataclasses.replace(data, forces=(data.forces + noise).astype(np.float32))


def draw_networks(key, data, effort):
    """Networks of the three methods, the first two at the same number of gradients."""
    target = potentials.force_matching(
        energy,
        data,
        init=init,
        noise=potentials.learned(NOISE),
        prior="scaled",
        batch_size=BATCH,
    )
    method = partial(
        stochgrad.psgld,
        step_size=effort.step_size,
        regularizer=0.1,  # weights with a gradient near zero at first must not make huge steps
        correction=False,
        adapt_steps=5 * effort.thin,
    )
    sampled = partial(
        potentials.networks,
        posterior=target,
        method=method,
        num_samples=effort.draws,
        num_warmup=effort.warmup,
        share_batches=True,
    )
    key, first, second = jax.random.split(key, 3)
    many = sampled(
        first,
        num_chains=CHAINS,
        train_steps=effort.train_steps,
        learning_rate=1e-2,
        thin=effort.thin,
    )
    single = sampled(
        second,
        num_chains=1,
        train_steps=0,
        init=jax.tree.map(lambda x: x[:1], many.trained),
        thin=CHAINS * effort.thin,
    )
    return many, single


def right_form_tables(data, rng):
    """Draws of the two coefficients from their exact posterior, as tables."""
    basis = jnp.stack([table(partial(right_form, 12)), table(partial(right_form, 6))])
    x = np.asarray(potentials.predict(from_table, basis, data).forces, np.float64).reshape(2, -1)
    covariance = np.linalg.inv(x @ x.T / NOISE**2)
    mean = covariance @ (x @ data.forces.ravel() / NOISE**2)
    drawn = rng.multivariate_normal(mean, covariance, size=CHAINS)
    return jnp.einsum("dk,k...->d...", jnp.asarray(drawn, jnp.float32), basis)


def mixing(many, single, data):
    """R-hat of forces (its median and 90% quantile) of the chains, and of the chain's quarters."""
    one = single.members()["params"]
    quarters = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), one)
    for params in (many.params, quarters):
        yield np.quantile(potentials.force_rhat(energy, params, data), (0.5, 0.9))


class Drawn(NamedTuple):
    """What one seed gives: by method tables and noise scales, and how well chains mixed."""

    tables: dict
    sigma: dict
    rhat: dict
    ratio: float
    start: np.ndarray


def one_seed(seed, liquid, effort):
    """Choose frames, add noise, and draw from each posterior."""
    rng = np.random.default_rng(seed)
    data = noisy(liquid.train[rng.permutation(liquid.train.count)[:FRAMES]], rng)
    many, single = draw_networks(jax.random.key(seed), data, effort)
    ends = {
        "8 chains": many.members(1),
        "1 chain": single.members(CHAINS),
        "Deep Ensemble": jax.tree.map(jnp.asarray, many.trained),
    }
    as_table = jax.jit(jax.vmap(lambda params: table(partial(pair, params))))
    tables = {name: as_table(found["params"]) for name, found in ends.items()}
    sigma = {n: NOISE * np.exp(np.asarray(x["noise"]["forces"])) for n, x in ends.items()}
    tables["right form"] = right_form_tables(data, rng)
    sigma["right form"] = np.full(CHAINS, NOISE)
    rhat = dict(zip(METHODS, mixing(many, single, liquid.test[:10]), strict=False))
    ratio = float(np.nanmean(np.asarray(many.run.stats["noise_ratio"])))
    for name, (middle, most) in rhat.items():
        print(f"  seed {seed}, {name}: R-hat of forces {middle:.3f}, 90% below {most:.3f}")
    scale = ", ".join(f"{name} {x.mean():.2f}" for name, x in sigma.items())
    print(f"  noise found: {scale}; noise ratio of the steps {ratio:.3f}", flush=True)
    return Drawn(tables, sigma, rhat, ratio, data.positions[: effort.replicas])


# --- intervals ------------------------------------------------------------------------------------


def run_dynamics(seeds, liquid, effort):
    """Radial distribution functions of every network's replicas, of all seeds at once."""
    knots = jnp.concatenate([found.tables[name] for found in seeds for name in METHODS])
    start = np.repeat(np.stack([found.start for found in seeds]), CHAINS * len(METHODS), 0)
    run = potentials.simulate(
        jax.random.key(99),
        from_table,
        knots,
        start,
        masses=1.0,
        kT=1.0,
        time_step=TIME_STEP,
        friction=FRICTION,
        num_frames=effort.md_frames,
        steps_per_frame=STEPS_PER_FRAME,
        num_warmup=effort.md_warmup,
        box=jnp.asarray(liquid.edge),
    )
    g = potentials.average(potentials.rdf(liquid.edge, bins=BINS), run.positions)
    shape = (len(seeds), len(METHODS), CHAINS)
    return g.reshape(*shape, *g.shape[1:]), run.sound.reshape(*shape, -1)


class Scores(NamedTuple):
    """Of one method and seed."""

    found: potentials.Intervals
    coverage: float
    width: float
    nll: float
    rmse: float
    exploded: int


def judge(n, seeds, g, sound, liquid, effort):
    """Scores of each method for one seed: its intervals, and its forces on held-out frames."""
    truth = liquid.rdf.mean(0)
    where = truth > 0.05
    measured = liquid.time / (effort.md_frames * STEPS_PER_FRAME * TIME_STEP)
    observed = noisy(liquid.test, np.random.default_rng(1000 + n)).forces
    scores = {}
    for m, name in enumerate(METHODS):
        found = potentials.intervals(g[n, m], level=LEVEL, sound=sound[n, m], measured=measured)
        forces = potentials.predict(from_table, seeds[n].tables[name], liquid.test).forces
        noise = seeds[n].sigma[name].reshape(-1, 1, 1, 1)
        exact = observed - liquid.test.forces  # what the truth itself would score
        floor = np.mean(0.5 * (exact / NOISE) ** 2) + np.log(NOISE) + 0.5 * np.log(2 * np.pi)
        scores[name] = Scores(
            found,
            interval_coverage(truth, found.low, found.high, where),
            float(np.mean((found.high - found.low)[where])),
            calibration(observed, forces, noise).nll - floor,
            float(np.sqrt(np.mean((forces.mean(0) - liquid.test.forces) ** 2))),
            int((~sound[n, m]).sum()),
        )
    return scores


def report(scores, seeds):
    """One line a method."""
    print(
        f"\n{'method':14s} coverage  {'of each seed':{5 * len(scores)}s} width   nll excess  "
        "force error  R-hat 50%, 90%  exploded"
    )
    for name in METHODS:
        mine = [s[name] for s in scores]
        each = " ".join(f"{s.coverage:.2f}" for s in mine)
        mean = lambda field: np.mean([getattr(s, field) for s in mine])
        rhat = "-"
        if name in seeds[0].rhat:
            rhat = "{:.3f}, {:.3f}".format(*np.mean([s.rhat[name] for s in seeds], 0))
        print(
            f"{name:14s} {mean('coverage'):7.1%}   {each} {mean('width'):6.3f}  "
            f"{mean('nll'):11.5f}  {mean('rmse'):10.3f}   {rhat:>14s}  "
            f"{sum(s.exploded for s in mine):7d}"
        )
    print(f"Intervals are of {LEVEL:.0%}; what is counted are bins where the true g exceeds 0.05.")


def draw(scores, liquid, path):
    """Bands, the parts of their width, and coverage by method."""
    at = potentials.rdf(liquid.edge, bins=BINS).at[0]
    truth, found = liquid.rdf.mean(0), scores[0]["8 chains"].found
    where = truth > 0.05
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 4), dpi=120, constrained_layout=True, width_ratios=(1.2, 1, 1)
    )
    left.fill_between(at, found.low, found.high, color=SHADE["8 chains"], alpha=0.35, lw=0)
    left.plot(at, found.mean, color=SHADE["8 chains"], lw=1, label="8 chains, 90% intervals")
    left.plot(at, truth, ".", color="black", ms=4, label="the true liquid")
    left.set(xlabel="r", ylabel="g(r)", xlim=(0.8, at[-1]))
    left.legend(frameon=False)
    parts = {
        "epistemic": (found.epistemic, "-"),
        "dynamics, finite": (found.sampling, "--"),
        "reference, finite": (found.aleatoric, ":"),
    }
    for name, (sd, style) in parts.items():
        middle.plot(at[where], sd[where], style, color="#1f6f8b", label=name)
    middle.set(xlabel="r", ylabel="standard deviation of g(r)", yscale="log")
    middle.legend(frameon=False)
    for n, name in enumerate(METHODS):
        each = np.array([s[name].coverage for s in scores])
        beside = n + np.linspace(-0.18, 0.18, len(each))
        right.plot(beside, each, "o", color=SHADE[name], alpha=0.6, mew=0)
        right.plot([n - 0.3, n + 0.3], [each.mean()] * 2, color=SHADE[name], lw=2)
    right.axhline(LEVEL, color="gray", lw=1, ls=":")
    right.set(ylabel="share of bins inside", ylim=(0, 1.03), xticks=range(len(METHODS)))
    right.set_xticklabels([name.replace(" ", "\n", 1) for name in METHODS])
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main():
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short version")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("liquid.png"))
    asked = parser.parse_args()
    begun = time.perf_counter()
    effort, count = (SMOKE, 1) if asked.smoke else (Effort(), asked.seeds)
    liquid = load()
    seeds = [one_seed(seed, liquid, effort) for seed in range(count)]
    print(f"{time.perf_counter() - begun:.0f} s for the networks")
    g, sound = run_dynamics(seeds, liquid, effort)
    scores = [judge(n, seeds, g, sound, liquid, effort) for n in range(count)]
    report(scores, seeds)
    error = np.max(liquid.rdf.std(0, ddof=1)) / np.sqrt(len(liquid.rdf))
    print(f"The largest standard error of the true g in a bin is {error:.4f}.")
    draw(scores, liquid, asked.output)
    print(f"{time.perf_counter() - begun:.0f} s, picture in {asked.output}")


if __name__ == "__main__":
    main()
