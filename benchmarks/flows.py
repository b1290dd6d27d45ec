"""Path gradients against total gradients and maximum likelihood, on three kinds of target.

The experiments of "Fast and Unified Path Gradient Estimators for Normalizing Flows" [Vaitl et al.
2024] at a size for one CPU core: Gaussian mixtures, lattice phi^4 theory and U(1) gauge theory in
two dimensions.

``python benchmarks/flows.py`` writes ``docs/results/flows.md`` and ``docs/images/flows_*.png``;
``--smoke`` is a short version of the same. With ``--target`` it is one kind of target, and the
parts of the others stay as they are.
"""

import argparse
import os
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import paramax
from flowjax.bijections import (
    Affine,
    Chain,
    Coupling,
    Invert,
    Permute,
    RationalQuadraticSpline,
    Scan,
)
from flowjax.distributions import StandardNormal, Transformed, Uniform
from jax.scipy.special import logsumexp
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullLocator
from paramax.utils import inv_softplus
from scipy.special import iv

import stochgrad
from stochgrad.flows import forward_kl, parameters, reverse_kl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEDS, POINTS, JUDGED = 3, 10, 10_000
RATE = {"reverse": 2e-3, "forward": 1e-3}
LAMBDA, CHAINS = 0.022, 1000
RIVAL = {"reverse": "total", "forward": "ml"}
NAMES = {"path": "path", "total": "total", "ml": "maximum likelihood"}
COLORS = {"path": "#b5341d", "total": "#1f6f8b", "ml": "#1f6f8b"}
ESS_TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
KL_TICKS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
KINDS = {
    "mixture": "Mixtures of Gaussians",
    "phi4": "Lattice φ⁴ theory",
    "gauge": "U(1) gauge theory in two dimensions",
}


class Problem(NamedTuple):
    """A density, a flow for it, exact or converged samples, and how to train.

    ``flow`` takes a key and whether the inverse is the cheap direction; ``samples`` a key and a
    number, and gives the samples with words on where they are from. ``rows`` is the number of
    samples of the density that forward training has, ``points`` how often is looked on the way, by
    as many draws and held-out samples as ``judged``. ``log_z`` is the density's normalizer where it
    is known; where not, the density is even.
    """

    name: str
    log_density: Callable
    flow: Callable
    samples: Callable
    about_flow: str
    draws: int
    rows: int
    steps: dict[str, int]
    log_z: float | None = None
    points: int = POINTS
    judged: int = JUDGED


class Curve(NamedTuple):
    """What one gradient has reached: arrays of shape (seeds, evaluations)."""

    steps: np.ndarray
    ess_q: np.ndarray
    ess_p: np.ndarray
    found: np.ndarray
    log_z: np.ndarray
    kl: np.ndarray
    seconds: float

    def of(self, way):
        """What is to rise: ESS, or minus the held-out divergence."""
        return self.ess_q if way == "reverse" else -self.kl

    def stopped(self, values):
        """Each seed's value where its held-out divergence was least."""
        return values[np.arange(SEEDS), np.argmin(self.kl, axis=1)]


def mixture(d, spline, draws, steps):
    """2^d Gaussians at the corners of a cube of half width 1, with variances of a half."""
    transformer = RationalQuadraticSpline(knots=8, interval=5) if spline else affine()

    def log_density(x):
        return jnp.sum(jnp.logaddexp(-((x - 1) ** 2), -((x + 1) ** 2)))

    def samples(key, count):
        sign_key, key = jax.random.split(key)
        signs = jax.random.rademacher(sign_key, (count, d), jnp.float32)
        return signs + jax.random.normal(key, (count, d)) / jnp.sqrt(2.0), "exact"

    return Problem(
        f"{2**d:,} modes, d = {d}",
        log_density,
        partial(alternating, StandardNormal((d,)), transformer, 6),
        samples,
        "6 couplings of two halves in turns, "
        + ("rational quadratic splines with 8 knots on (-5, 5)" if spline else "affine"),
        draws=draws,
        rows=1000,
        steps={"reverse": steps, "forward": steps // 2},
        log_z=d * np.log(2 * np.sqrt(np.pi)),
    )


def phi4(size, kappa, place, steps=1600):
    """Scalar fields on a periodic lattice: all even sites first, then all odd.

    At lambda = 0.022 the Binder cumulants of 8x8 and 16x16 lattices cross near kappa = 0.268, by
    the samples used here; the susceptibility of the 8x8 lattice is largest near 0.27.
    """
    i, j = np.indices((size, size))
    back = np.argsort(np.argsort(((i + j) % 2).reshape(-1), kind="stable"))

    def log_density(x):
        field = x[back].reshape(size, size)
        neighbors = jnp.roll(field, 1, 0) + jnp.roll(field, 1, 1)
        each = (1 - 2 * LAMBDA) * field**2 + LAMBDA * field**4 - 2 * kappa * field * neighbors
        return -jnp.sum(each)

    return Problem(
        f"{size}x{size}, κ = {kappa:g}, {place}",
        log_density,
        partial(alternating, StandardNormal((size**2,)), affine(), 8),
        partial(hamiltonian, log_density, size**2),
        "8 affine couplings of even and odd sites in turns",
        draws=128,
        rows=2000,
        steps={"reverse": steps, "forward": steps // 2},
    )


def affine():
    scale = paramax.Parameterize(lambda x: jax.nn.softplus(x) + 0.01, inv_softplus(0.99))
    return eqx.tree_at(lambda layer: layer.scale, Affine(), scale)


def alternating(base, transformer, count, key, invert, shrink=1.0):
    """Coupling layers that change one half given the other, in turns."""
    (d,) = base.shape
    swap = Permute(jnp.roll(jnp.arange(d), d // 2))

    def layer(key):
        coupling = Coupling(
            key,
            transformer=transformer,
            untransformed_dim=d // 2,
            dim=d,
            nn_width=64,
            nn_depth=1,
            nn_activation=jax.nn.silu,
        )
        last = coupling.conditioner.layers[-1].weight
        coupling = eqx.tree_at(lambda c: c.conditioner.layers[-1].weight, coupling, shrink * last)
        return Chain([coupling, swap])

    layers = Scan(eqx.filter_vmap(layer)(jax.random.split(key, count)))
    return Transformed(base, Invert(layers) if invert else layers)


def hamiltonian(log_density, d, key, count):
    """Draws of many chains far apart in time, with signs at random, under which all is the same."""
    per_chain = -(-count // CHAINS)
    start_key, run_key, sign_key = jax.random.split(key, 3)
    kernel = blackjax.hmc(log_density, 0.2, jnp.ones(d), 8)
    draws = stochgrad.sample(
        run_key,
        kernel,
        init=jax.random.normal(start_key, (CHAINS, d)),
        num_samples=per_chain,
        num_warmup=8,
        thin=50,
        num_chains=CHAINS,
        progress=False,
    )
    found = jnp.asarray(draws.positions)
    second = np.mean(found, axis=2) ** 2  # the slowest: the magnetisation's square
    kept = np.mean(
        [np.corrcoef(second[:, n], second[:, n + 1])[0, 1] for n in range(per_chain - 1)]
    )
    drift = np.mean(second[:, : per_chain // 2]) / np.mean(second[:, per_chain // 2 :]) - 1
    words = (
        f"Hamiltonian Monte Carlo, {CHAINS:,} chains of a draw each 50 trajectories of 8 steps of "
        "0.2 after 400 such, then a random sign, which the density does not see; the squared "
        f"magnetisation's correlation from draw to draw is {kept:.2f}, its mean is {drift:+.1%} "
        "in the first half of the draws against the second"
    )
    signs = jax.random.rademacher(sign_key, (CHAINS, per_chain, 1), found.dtype)
    return (signs * found).reshape(-1, d)[:count], words


def gauge(size, beta, count, draws, steps):
    """Plaquette angles on a torus, all but the last, which is minus the sum of the others."""
    d = size**2 - 1

    def log_density(x):
        return beta * (jnp.sum(jnp.cos(x)) + jnp.cos(jnp.sum(x)))

    edge = jnp.full(d, jnp.pi)
    base = paramax.non_trainable(Uniform(-edge, edge))
    spline = RationalQuadraticSpline(knots=8, interval=jnp.pi)
    return Problem(
        f"{size}x{size}, β = {beta:g}",
        log_density,
        partial(alternating, base, spline, count, shrink=0.01),
        partial(plaquettes, d, beta),
        f"{count} couplings of two halves in turns, rational quadratic splines with 8 knots on "
        "(-π, π), uniform base, last layers of the networks small at the start",
        draws=draws,
        rows=1000,
        steps={"reverse": steps, "forward": steps // 2},
        log_z=d * np.log(2 * np.pi) + np.log(np.sum(iv(np.arange(-40, 41), beta) ** (d + 1))),
    )


def plaquettes(d, beta, key, count):
    """Exact, by rejection: independent angles, kept with the last one's probability."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    kept, tried = [], 0
    while sum(map(len, kept)) < count:
        angles = rng.vonmises(0.0, beta, (count, d))
        accept = np.exp(beta * (np.cos(angles.sum(1)) - 1)) > rng.uniform(size=count)
        kept.append(angles[accept])
        tried += count
    share = sum(map(len, kept)) / tried
    found = jnp.asarray(np.concatenate(kept)[:count], jnp.float32)
    return found, f"exact, by rejection, {share:.0%} accepted"


def problems(kind):
    return {
        "mixture": lambda: [mixture(6, False, 256, 3000), mixture(12, True, 128, 800)],
        "phi4": lambda: [
            phi4(8, 0.3, "ordered"),
            phi4(8, 0.27, "near critical"),
            phi4(8, 0.2, "off critical"),
            phi4(16, 0.2, "off critical", 800),
        ],
        "gauge": lambda: [gauge(4, 3.0, 6, 128, 1200), gauge(8, 1.0, 4, 64, 800)],
    }[kind]()


def shorter(problem):
    """The same in a few steps."""
    return problem._replace(steps=dict.fromkeys(RATE, 12), points=3, judged=500)


def compare(problem, way, train, held_out):
    """The curves of both gradients, from the same starts with the same draws or minibatches."""
    flow = partial(problem.flow, invert=way == "forward")
    starts = [parameters(flow(jax.random.key(seed))) for seed in range(SEEDS)]
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    first = flow(jax.random.key(0))
    if way == "reverse":
        objectives = {
            name: reverse_kl(first, problem.log_density, name, num_samples=problem.draws)
            for name in ("path", "total")
        }
    else:
        score = jax.grad(problem.log_density)
        objectives = {
            name: forward_kl(first, train, score, name, batch_size=problem.draws)
            for name in ("path", "ml")
        }
    judge = judged_by(objectives["path"].model, problem, held_out)
    return {
        name: climb(objective, starts, problem, way, judge)
        for name, objective in objectives.items()
    }


def climb(objective, starts, problem, way, judge):
    """Adam from all starts side by side, and what was reached on the way."""
    points, every = problem.points, problem.steps[way] // problem.points
    rate = optax.cosine_decay_schedule(RATE[way], points * every)
    optimizer = optax.chain(optax.clip_by_global_norm(100.0), optax.adam(rate))
    run = partial(
        stochgrad.sample,
        jax.random.key(1),
        stochgrad.ascend(objective, optimizer),
        init=starts,
        thin=every,
        num_chains=SEEDS,
        progress=False,
    )
    run(num_samples=1)  # compile
    clock = time.process_time()
    positions = run(num_samples=points).positions
    seconds = (time.process_time() - clock) / SEEDS
    path = jax.tree.map(lambda s, p: np.concatenate([s[:, None], p], 1), starts, positions)
    seen = [
        [judge(jax.tree.map(lambda leaf: leaf[seed, at], path)) for at in range(points + 1)]
        for seed in range(SEEDS)
    ]
    ess_q, ess_p, found, log_z, kl = np.moveaxis(np.asarray(seen, np.float64), -1, 0)
    kl = np.where(np.isnan(kl), np.inf, kl)
    steps = every * np.arange(points + 1)
    return Curve(steps, np.nan_to_num(ess_q), np.nan_to_num(ess_p), found, log_z, kl, seconds)


def judged_by(model, problem, held_out):
    """What is known of a position: ESS under q and p, log Z twice, mean log weight under p.

    The first log Z is of the flow's weighted draws, the second of those with signs at random, where
    log Z is not known and the density is even.
    """
    log_densities, log_n = jax.vmap(problem.log_density), np.log(len(held_out))

    @jax.jit
    def judge(position):
        flow = model(position)
        x, log_q = flow.sample_and_log_prob(jax.random.key(2), held_out.shape[:1])
        log_w = log_densities(x) - log_q
        log_w = jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)
        log_z = found = logsumexp(log_w) - log_n
        ess_q = jnp.exp(2 * logsumexp(log_w) - logsumexp(2 * log_w) - log_n)
        if problem.log_z is None:
            both = jnp.logaddexp(log_q, flow.log_prob(-x)) - jnp.log(2.0)
            log_z = logsumexp(log_densities(x) - both) - log_n
        log_w = log_densities(held_out) - flow.log_prob(held_out)
        ess_p = jnp.exp(2 * log_n - logsumexp(log_w) - logsumexp(-log_w))
        return jnp.stack([ess_q, ess_p, found, log_z, jnp.mean(log_w)])

    return judge


def normalized(problem, curves):
    """Divergences and shares of Z, by the known log Z or that of the best reverse flow."""
    last = curves["reverse"]["path"]
    log_z = problem.log_z
    if log_z is None:
        log_z = last.log_z[np.argmax(last.ess_q[:, -1]), -1]
    return {
        way: {
            name: c._replace(kl=c.kl - log_z, found=np.exp(c.found - log_z))
            for name, c in pair.items()
        }
        for way, pair in curves.items()
    }


def to_the_best(ours, theirs, way):
    """In words, when each median reaches the rival's best; nothing where ours does not."""
    curves = [np.median(c.of(way), axis=0) for c in (ours, theirs)]
    if np.max(curves[0]) < np.max(curves[1]):
        return ""
    first = [int(np.argmax(curve >= np.max(curves[1]))) for curve in curves]
    cells = [
        f"{c.steps[at]:,} steps, {c.seconds * c.steps[at] / c.steps[-1]:.1f} s"
        for c, at in zip((ours, theirs), first, strict=True)
    ]
    return f"; at the rival's best median after {cells[0]}, the rival after {cells[1]}"


def number(value):
    return f"{value:.3f}" if value < 10 else f"{value:.3g}"


def seeds(values):
    return f"**{number(np.median(values))}** ({' '.join(map(number, np.sort(values)))})"


def row(way, name, curve):
    metrics = (curve.ess_q, curve.ess_p, curve.kl)
    early = [number(np.median(curve.stopped(v))) if way == "forward" else "" for v in metrics]
    cells = [
        way,
        NAMES[name],
        *(seeds(values[:, -1]) for values in metrics),
        f"{np.median(curve.found[:, -1]):.2f}",
        *early,
        f"{curve.seconds:.1f}",
        f"{1e3 * curve.seconds / curve.steps[-1]:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def against(metric, ours, theirs, higher=True):
    """Medians of a pair and for how many seeds ours is better."""
    a, b = np.median(ours), np.median(theirs)
    wins = int(np.sum(ours > theirs if higher else ours < theirs))
    return f"{metric} {number(a)} against {number(b)}, better for {wins} of {SEEDS} seeds"


def verdict(way, curves):
    """What the figures say of one pair, in a sentence."""
    ours, theirs = curves["path"], curves[RIVAL[way]]
    if way == "reverse":
        words = ["Reverse KL, path against total gradients: "]
        words += [against("final ESS under q", ours.ess_q[:, -1], theirs.ess_q[:, -1])]
    else:
        words = ["Forward KL, path gradients against maximum likelihood: "]
        words += [against("final held-out divergence", ours.kl[:, -1], theirs.kl[:, -1], False)]
        best = [c.stopped(c.kl) for c in (ours, theirs)]
        words += ["; ", against("where stopped", *best, False)]
        best = [c.stopped(c.ess_p) for c in (ours, theirs)]
        words += ["; ", against("held-out ESS there", *best)]
    words += [to_the_best(ours, theirs, way)]
    words += [f"; a step costs {ours.seconds / theirs.seconds:.2f} times as much."]
    return "- " + "".join(words)


def section(problem, origin, curves):
    steps = " and ".join(f"{problem.steps[way]:,} ({way})" for way in RIVAL)
    return [
        f"### {problem.name}",
        "",
        f"Flow: {problem.about_flow}; networks of one hidden layer of 64. {problem.draws} draws or "
        f"samples a step, {steps} steps. Samples of the density: {origin}; {problem.rows:,} to "
        "train with.",
        "",
        "| KL | gradient | ESS under q | ESS under p | KL(p, q) | Z found | where stopped: "
        "ESS under q | ESS under p | KL(p, q) | CPU s | ms a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(way, name, c) for way, pair in curves.items() for name, c in pair.items()),
        "",
        *(verdict(way, pair) for way, pair in curves.items()),
        "",
    ]


def picture(kind, found, path):
    """ESS against steps and seconds: two columns for each problem, a row for each divergence."""
    columns = 2 * len(found)
    figure, axes = plt.subplots(2, columns, figsize=(min(3.5 * columns, 17), 6.6))
    pairs = np.split(axes, len(found), axis=1)
    for pair, (problem, curves) in zip(pairs, found, strict=True):
        for (way, both), row in zip(curves.items(), pair, strict=True):
            draw(row, way, both)
        pair[0, 0].set_title(problem.name, loc="left", fontsize=11)
    for (way, metric), ax in zip(
        (("reverse KL", "ESS of own draws"), ("forward KL", "held-out KL(p, q), nats")),
        axes[:, 0],
        strict=True,
    ):
        ax.set_ylabel(f"{way}\n{metric}")
    figure.suptitle(f"{KINDS[kind]}: medians of {SEEDS} seeds, and each", x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(panels, way, both):
    for name, curve in both.items():
        values = np.clip(curve.ess_q, 1e-3, 0.9995) if way == "reverse" else curve.kl
        middle, color = np.median(values, axis=0), COLORS[name]
        for ax, x in zip(panels, (1.0, curve.seconds / curve.steps[-1]), strict=True):
            ax.plot(x * curve.steps[1:], values[:, 1:].T, color=color, linewidth=0.7, alpha=0.55)
            ax.plot(x * curve.steps[1:], middle[1:], color=color, linewidth=2.4)
        rival = next(np.median(c.of(way)[:, -1]) for n, c in both.items() if n != name)
        better = np.median(curve.of(way)[:, -1]) >= rival
        above = better == (way == "reverse")
        label = panels[0].annotate(
            NAMES[name],
            (curve.steps[-1], middle[-1]),
            (0, 9 if above else -9),
            textcoords="offset points",
            color=color,
            ha="right",
            va="bottom" if above else "top",
            fontweight="bold",
            zorder=5,
        )
        label.set_path_effects([withStroke(linewidth=3, foreground="white")])
    for ax, label in zip(panels, ("steps", "CPU seconds of training"), strict=True):
        scale = "logit" if way == "reverse" else "log"
        ax.set(yscale=scale, xlabel=label, xlim=(0, None))
        ticks = ESS_TICKS if way == "reverse" else KL_TICKS
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter("{x:g}")
        ax.margins(y=0.12)
        ax.grid(axis="y", color="0.9", linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
    if way == "forward":  # what runs away leaves through the top
        least = max(min(np.min(c.kl) for c in both.values()), 0.003)
        for ax in panels:
            ax.set_ylim(0.55 * least, 30 * least)


def work(kind, smoke, output):
    """One kind of target: the picture, and its part of the page."""
    found, lines = (
        [],
        [f"## {KINDS[kind]}", "", f"![{KINDS[kind]}](../images/flows_{kind}.png)", ""],
    )
    chosen = problems(kind)
    for problem in [shorter(chosen[0])] if smoke else chosen:
        found_samples, origin = problem.samples(jax.random.key(10), problem.rows + problem.judged)
        train, held_out = found_samples[: problem.rows], found_samples[problem.rows :]
        curves = {}
        for way in RIVAL:
            clock = time.perf_counter()
            curves[way] = compare(problem, way, train, held_out)
            print(f"{problem.name}, {way}: {time.perf_counter() - clock:.0f} s", flush=True)
        curves = normalized(problem, curves)
        print("\n".join(verdict(way, pair) for way, pair in curves.items()), flush=True)
        found.append((problem, curves))
        lines += section(problem, origin, curves)
    picture(kind, found, output / "images" / f"flows_{kind}.png")
    return "\n".join(lines)


INTRODUCTION = (
    "# What path gradients do for flows\n\n"
    "Made by `python benchmarks/flows.py`: the experiments of Vaitl et al. [2024] at a size for "
    "one CPU core.\n\n"
    f"Both gradients of a pair have the same flow, the same {SEEDS} starts, draws or minibatches, "
    "Adam with a learning rate that falls as a cosine to zero, from "
    f"{RATE['reverse']:g} for the reverse and {RATE['forward']:g} for the forward divergence, and "
    "the same number of steps. Training samples are common to all seeds. ESS is relative, of "
    f"{JUDGED:,} draws of the flow (under q) or {JUDGED:,} samples of the density that training "
    "has not seen (under p). KL(p, q) is the forward divergence in nats on the latter. Z found is "
    "the mean weight of the flow's draws over the density's normalizer, the median of seeds: where "
    "it is well below 1, the flow misses a part of the density, and its ESS under q is that of the "
    "rest. The normalizer is known for mixtures and gauge theory; for φ⁴ theory it is from the "
    "flow that path gradients of the reverse divergence trained best, its draws with signs at "
    "random. Figures are of the last step: the median in bold, and each seed in order. "
    '"Where stopped" are medians of where KL(p, q) was least, of '
    f"{POINTS + 1} looks: what early stopping would have given to either. CPU seconds are of one "
    "seed's training, without compilation; all seeds ran side by side in one process.\n"
)


def page(parts):
    return "\n".join([INTRODUCTION, *parts.values()])


def saved(path):
    """The parts of a page that there is already, by kind."""
    text = path.read_text() if path.exists() else ""
    parts = dict.fromkeys(KINDS)
    for kind, title in KINDS.items():
        match = re.search(rf"^## {re.escape(title)}$.*?(?=^## |\Z)", text, re.M | re.S)
        parts[kind] = match and match[0].rstrip("\n") + "\n"
    return {kind: part for kind, part in parts.items() if part}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(KINDS), help="one kind only")
    parser.add_argument("--smoke", action="store_true", help="a short run")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    options = parser.parse_args()
    begun = time.perf_counter()
    warnings.simplefilter("ignore")
    for folder in ("results", "images"):
        (options.output / folder).mkdir(parents=True, exist_ok=True)
    target = options.output / "results" / "flows.md"
    parts = saved(target)
    for kind in [options.target] if options.target else KINDS:
        parts[kind] = work(kind, options.smoke, options.output)
        target.write_text(page({kind: parts[kind] for kind in KINDS if kind in parts}))
    print(target.read_text())
    print(f"{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
