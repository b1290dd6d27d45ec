"""Estimators and allocators of MCMC-EM on problems where all is in closed form.

    python benchmarks/em_toy.py [--part learning|bias|gvm|vade] [--smoke]

Sixty-four questions with 24 rationales each, log-linear, so that log-likelihood, accuracy and
gradients are sums of 24 terms. Writes docs/images/em_toy_*.png, and its tables between the marks of
docs/results/estimators_em.md.
"""

import argparse
import re
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import lax
from scipy.optimize import minimize
from scipy.stats import binom

import stochgrad
from stochgrad import em

matplotlib.use("Agg")
import matplotlib.pyplot as plt

QUESTIONS, RATIONALES, WEIGHTS = 64, 24, 20
BUDGET = 64
RATES = (0.01, 0.03, 0.1)
SEEDS, STEPS, EARLY = 5, 2000, 50
HARD = 0.01


class Toy(NamedTuple):
    """Logits base + features @ theta; which rationales are right; where learning starts."""

    features: np.ndarray
    base: np.ndarray
    right: np.ndarray
    start: np.ndarray

    def log_probs(self, theta):
        return jax.nn.log_softmax(jnp.asarray(self.base) + jnp.asarray(self.features) @ theta)

    def solved(self, theta):
        return jnp.sum(jnp.exp(self.log_probs(theta)), axis=1, where=self.right)

    def log_likelihood(self, theta):
        return jnp.mean(jax.nn.logsumexp(self.log_probs(theta), axis=1, where=self.right))

    def model(self):
        def pick(table, tokens):
            return jnp.take_along_axis(table, tokens, axis=1)[:, 0]

        def log_prob(theta, prompts, tokens, mask):
            return pick(self.log_probs(theta)[prompts], tokens)

        def sample(theta, key, prompts):
            table = self.log_probs(theta)
            ends = jnp.cumsum(jnp.exp(table), axis=1)[prompts]
            u = jax.random.uniform(key, prompts.shape) * ends[:, -1]
            z = jnp.sum(ends <= u[:, None], axis=1, keepdims=True).astype(jnp.int32)
            z = jnp.minimum(z, RATIONALES - 1)
            return em.Rationales(z, pick(table[prompts], z), jnp.ones(z.shape, bool))

        def verify(tokens, mask, answers):
            return jnp.asarray(self.right)[answers, tokens[:, 0]]

        return em.verified(em.Policy(sample, log_prob), verify)

    def gradient(self, estimator, questions, allocator):
        number = jnp.arange(QUESTIONS, dtype=jnp.int32)
        return em.mcmc_em(
            self.model(),
            em.Questions(number, number),
            batch_size=questions,
            estimator=estimator,
            allocator=allocator,
            order="full" if questions == QUESTIONS else "reshuffled",
        )


def toy(kind, seed=0):
    """One of three problems, each with an own start whose p spreads over orders of magnitude."""
    rng = np.random.default_rng(seed)
    shape = (QUESTIONS, RATIONALES)
    features = rng.normal(size=(*shape, WEIGHTS)) / np.sqrt(WEIGHTS)
    if kind == "separable":  # the best one to six by a hidden score
        score = features @ rng.normal(size=WEIGHTS)
        place = np.argsort(np.argsort(-score, axis=1), axis=1)
        right = place < rng.integers(1, 7, QUESTIONS)[:, None]
    else:
        right = rng.random(shape) < 0.12
        right[:, 0] = True
    if kind != "pinned":
        made = Toy(features.astype(np.float32), np.zeros(shape, np.float32), right, None)
        return made._replace(start=spread_out(made))
    # a base that no theta undoes: right answers have 0.5 down to 0.002, rationales vary a little
    p = rng.permutation(np.geomspace(0.5, 0.002, QUESTIONS))[:, None]
    noise = np.exp(0.5 * rng.normal(size=shape))
    inside, outside = np.where(right, noise, 0), np.where(right, 0, noise)
    base = np.log(
        p * inside / inside.sum(1, keepdims=True)
        + (1 - p) * outside / outside.sum(1, keepdims=True)
    )
    arrays = (features.astype(np.float32), base.astype(np.float32))
    return Toy(*arrays, right, np.zeros(WEIGHTS, np.float32))


def spread_out(made, tries=300, low=0.002, high=0.5):
    """Of random parameters, those under which p comes closest to low, middle and high quantiles."""
    rng = np.random.default_rng(1)
    found = rng.normal(size=(tries, WEIGHTS)) * rng.uniform(1, 3, size=(tries, 1))
    p = np.asarray(jax.jit(jax.vmap(made.solved))(jnp.asarray(found, jnp.float32)))
    quantiles = np.log(np.quantile(p, [0.02, 0.5, 0.98], axis=1))
    wanted = np.log([low, np.sqrt(low * high), high])[:, None]
    return found[np.argmin(np.sum((quantiles - wanted) ** 2, axis=0))].astype(np.float32)


PROBLEMS = {
    "separable": "Separable: one theta makes all right",
    "non-separable": "Non-separable: random right sets",
    "pinned": "Non-separable, and hard questions stay hard",
}


class Method(NamedTuple):
    estimator: em.Estimator
    questions: int
    color: str
    line: str | tuple = "-"

    @property
    def allocator(self):
        return em.uniform(BUDGET // self.questions)

    @property
    def layout(self):
        return f"{self.questions} x {BUDGET // self.questions}"


METHODS = {
    "TRICE": Method(em.trice(), 64, "#0b3c8c"),
    "TRICE, leave-one-out": Method(em.trice("leave_one_out"), 64, "#7b2fbf", (0, (4, 1))),
    "TRICE, no control": Method(em.trice("none"), 64, "#3f8fd9", "--"),
    "TRICE, optimal": Method(em.trice("optimal"), 64, "#0aa5b5", "-."),
    "TRICE, 16 questions": Method(em.trice(), 16, "#7f8fd0", ":"),
    "STaR": Method(em.star(), 64, "#d62f1f"),
    "RAFT": Method(em.raft(), 16, "#f08a24"),
    "ReST-EM": Method(em.rest_em(), 16, "#b5651d", "--"),
    "REINFORCE": Method(em.reinforce(), 16, "#1c7c3c"),
    "GRPO": Method(em.grpo(), 16, "#6fb536", "--"),
    "BNPO": Method(em.bnpo(), 16, "#8a9a1f", ":"),
    "max@4": Method(em.maxk(4), 16, "#9146b8"),
}


# ----------------------------------------------------------------------------- learning


def train(made, method, steps, rate, key):
    """Parameters after each step."""
    gradient = made.gradient(method.estimator, method.questions, method.allocator)
    kernel = stochgrad.ascend(gradient, optax.adam(rate))
    start_key, key = jax.random.split(key)
    start = jnp.asarray(made.start)

    def step(state, key):
        state, _ = kernel.step(key, state)
        return state, state.position

    state = kernel.init(start, start_key)
    path = lax.scan(step, state, jax.random.split(key, steps))[1]
    return jnp.concatenate([start[None], path])


def judge(made, theta):
    p = made.solved(theta)
    return (
        made.log_likelihood(theta),
        jnp.mean(p),
        jnp.quantile(p, 0.05),
        jnp.sum(p < HARD).astype(jnp.float32),
    )


def looks(steps):
    few = np.unique(np.round(np.geomspace(1, steps, 40)).astype(int))
    return np.unique(np.concatenate([[0, min(EARLY, steps)], few]))


def curves(made, method, steps):
    """The four measures at each look, by learning rate and seed: (4, rates, seeds, looks)."""
    at = jnp.asarray(looks(steps))

    def one(rate, key):
        path = train(made, method, steps, rate, key)
        return jax.vmap(partial(judge, made))(path[at])

    keys = jax.random.split(jax.random.key(7), SEEDS)
    run = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    return np.stack(run(jnp.asarray(RATES), keys))


def optimum(made):
    """The highest log-likelihood of six starts of BFGS with full gradients, and all six."""
    value = jax.jit(jax.value_and_grad(lambda theta: -made.log_likelihood(theta)))

    def both(theta):
        f, g = value(jnp.asarray(theta, jnp.float32))
        return float(f), np.asarray(g, np.float64)

    rng = np.random.default_rng(2)
    starts = [3.0 * i * rng.normal(size=WEIGHTS) / 5 for i in range(5)]
    found = [minimize(both, x, jac=True, method="BFGS") for x in (made.start, *starts)]
    best = min(found, key=lambda r: r.fun)
    return jnp.asarray(best.x, jnp.float32), [-r.fun for r in found]


def spread(values, digits=3):
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def learning_table(made, found, steps):
    at = list(looks(steps))
    early, end = at.index(min(EARLY, steps)), len(at) - 1

    def best(values, column):
        rate = int(np.argmax(values[:, :, column].mean(axis=1)))
        return rate, f"{spread(values[rate, :, column])} ({RATES[rate]:g})"

    lines = [
        "| estimator | questions x proposals | log-likelihood "
        f"after {at[early]} steps | after {steps} | accuracy after {at[early]} | after {steps} "
        "| 5% quantile of p | questions with p < 0.01 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (ll, accuracy, low, hard) in found.items():
        rate, last = best(ll, end)
        cells = [best(ll, early)[1], last, best(accuracy, early)[1], best(accuracy, end)[1]]
        cells += [spread(low[rate, :, end], 4), f"{hard[rate, :, end].mean():.1f}"]
        lines.append(f"| {name} | {METHODS[name].layout} | " + " | ".join(cells) + " |")
    theta = jnp.asarray(made.start)
    first = [float(x) for x in judge(made, theta)]
    lines += [
        "",
        f"At the start: log-likelihood {first[0]:.3f}, accuracy {first[1]:.3f}, "
        f"5% quantile of p {first[2]:.4f}, {first[3]:.0f} questions with p < {HARD:g}.",
    ]
    return lines


def rates_table(found, steps):
    lines = [
        "| estimator | " + " | ".join(f"at {rate:g}" for rate in RATES) + " |",
        "| --- " * (len(RATES) + 1) + "|",
    ]
    for name, (ll, accuracy, _, _) in found.items():
        cells = [
            f"{spread(ll[i, :, -1])}, {accuracy[i, :, -1].mean():.3f}" for i in range(len(RATES))
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def apart(values, gap, low, high):
    """Places for labels: in order, no two closer than the gap, between low and high."""
    order = np.argsort(values)
    placed = np.clip(np.asarray(values, float)[order], low, high)
    for _ in range(400):
        for i in range(len(placed) - 1):
            lack = gap - (placed[i + 1] - placed[i])
            if lack > 0:
                placed[i], placed[i + 1] = placed[i] - lack / 2, placed[i + 1] + lack / 2
        placed = placed + max(0, low - placed[0]) - max(0, placed[-1] - high)
    out = np.empty(len(placed))
    out[order] = placed
    return out


def finished(figure, title, path):
    """Give the figure its title, write it and let it go."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def label_ends(ax, ends, size=8.5, gap=0.062):
    """Names beside the right edge, with a thin line to where each curve ends."""
    heights = []
    ax.get_ylim()  # brings the scale up to date
    for x, y, _, _ in ends:
        heights.append(ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1])
    places = apart(np.clip(heights, 0, 1), gap, 0.0, 1.0)
    for (_, _, name, color), height, place in zip(ends, heights, places, strict=True):
        ax.annotate(
            name,
            xy=(1.0, np.clip(height, 0, 1)),
            xycoords="axes fraction",
            xytext=(1.06, place),
            textcoords="axes fraction",
            color=color,
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 0,
            },
        )


def plain(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.7)
    ax.set_axisbelow(True)


def learning_picture(results, steps, path):
    figure, axes = plt.subplots(2, 2, figsize=(13, 9.2))
    figure.subplots_adjust(left=0.065, right=0.875, top=0.9, bottom=0.065, wspace=0.52, hspace=0.27)
    at = looks(steps)
    for column, kind in enumerate(("separable", "non-separable")):
        made, found, best = results[kind]
        for row, ax in enumerate(axes[:, column]):
            ends = []
            for name, measures in found.items():
                values = measures[row]
                rate = np.argmax(values[:, :, 1:].mean(axis=(1, 2)))
                y = values[rate].mean(axis=0)
                low, high = values[rate].min(axis=0), values[rate].max(axis=0)
                if kind == "separable":
                    y, low, high = ((-v if row == 0 else 1 - v) for v in (y, low, high))
                method = METHODS[name]
                x = BUDGET * at[1:]
                ax.plot(x, y[1:], method.line, color=method.color, linewidth=1.9)
                ax.fill_between(x, low[1:], high[1:], color=method.color, alpha=0.08, linewidth=0)
                ends.append((x[-1], y[-1], name, method.color))
            ax.set_xscale("log")
            ax.set_xlim(BUDGET * 2, BUDGET * steps)
            ax.set_xlabel("sampled rationales")
            plain(ax)
            if kind == "separable":
                ax.set_yscale("log")
                ax.invert_yaxis()
                ax.set_ylabel(
                    "minus log-likelihood, nats a question"
                    if row == 0
                    else "share of wrong answers"
                )
            else:
                if row == 0:
                    ax.set_ylim(-4.3, -1.65)
                ax.set_ylabel("log-likelihood, nats a question" if row == 0 else "accuracy: mean p")
                level = float(judge(made, best)[row])
                ax.axhline(level, color="0.25", linewidth=1, linestyle=(0, (1, 2)))
                ax.text(
                    BUDGET * 2.2,
                    level,
                    "maximum likelihood",
                    color="0.25",
                    fontsize=8.5,
                    va="bottom",
                )
            if row == 0:
                ax.set_title(PROBLEMS[kind], loc="left", fontsize=11, fontweight="bold")
            label_ends(ax, ends)
    finished(
        figure,
        f"Learning from 64 rationales a step: up is better. Mean and range of {SEEDS} seeds, each "
        "method in each panel at the best of three learning rates",
        path,
    )


def learning(smoke, output):
    steps = 60 if smoke else STEPS
    results, blocks = {}, {}
    for kind in PROBLEMS:
        made = toy(kind)
        found = {}
        for name, method in METHODS.items():
            clock = time.perf_counter()
            found[name] = curves(made, method, steps)
            print(f"{kind}, {name}: {time.perf_counter() - clock:.1f} s", flush=True)
        best, found_best = optimum(made)
        results[kind] = made, found, best
        lines = learning_table(made, found, steps)
        if kind != "separable":
            ll, accuracy, low, hard = (float(x) for x in judge(made, best))
            apart_ = max(found_best) - min(found_best)
            lines[-1] += (
                f" At maximum likelihood: {ll:.3f}, accuracy {accuracy:.3f}, 5% quantile "
                f"{low:.4f}, {hard:.0f} questions (six starts of BFGS end within {apart_:.1g} nats)."
            )
        blocks[f"learning {kind}"] = lines
        blocks[f"rates {kind}"] = rates_table(found, steps)
    learning_picture(results, steps, output / "images" / "em_toy_learning.png")
    return blocks


# ----------------------------------------------------------------------------- bias, variance


def estimating(made, method, count, settled=True, allocator=None):
    """A function of theta: independent estimates, with chains at the posterior for long."""
    gradient = made.gradient(method.estimator, method.questions, allocator or method.allocator)

    def one(theta, key):
        start_key, chain_key, key = jax.random.split(key, 3)
        state = gradient.init(start_key, theta)
        if settled:
            logits = jnp.where(made.right, made.log_probs(theta), -jnp.inf)
            tokens = jax.random.categorical(chain_key, logits)[:, None].astype(jnp.int32)
            memory = state.memory._replace(
                tokens=tokens,
                log_likelihood=jnp.zeros(QUESTIONS),
                history=past_visits(start_key, made, theta, state.memory.history),
            )
            state = state._replace(memory=memory)
        score, _ = gradient.next(key, theta, state)
        return score(theta)[1]

    keys = jax.random.split(jax.random.key(11), count)
    run = jax.jit(lambda theta: lax.map(partial(one, theta), keys, batch_size=250))
    return lambda theta: np.asarray(run(jnp.asarray(theta, jnp.float32)), np.float64)


def past_visits(key, made, theta, history, visits=60):
    """What visits of chains at the posterior, with one proposal each, leave behind."""
    posterior = jax.nn.softmax(jnp.where(made.right, made.log_probs(theta), -jnp.inf), axis=1)
    p, differ = made.solved(theta), 1 - jnp.sum(posterior**2, axis=1)

    def visit(history, key):
        moved, changed = jax.random.uniform(key, (2, QUESTIONS)) < jnp.stack([p, differ])
        return history.add(moved | True, moved, changed), None

    return lax.scan(visit, history, jax.random.split(key, visits))[0]


def moments(found):
    """Mean, trace of the covariance, and the latter's standard error."""
    mean = found.mean(axis=0)
    square = np.sum((found - mean) ** 2, axis=1)
    return mean, square.mean(), square.std() / np.sqrt(len(found))


def cosine(mean, noise, exact):
    """Cosine with the exact gradient, with the noise taken off the length; its standard error."""
    length = np.sqrt(max(mean @ mean - noise, 1e-30))
    size = np.linalg.norm(exact)
    error = np.sqrt(noise / max(len(exact) - 1, 1)) / length
    return float(np.clip(mean @ exact / length / size, -1, 1)), error


def replayed(made, path, copies):
    """TRICE as it runs: mean estimates of many memories that follow one path of parameters."""
    gradient = made.gradient(em.trice("none"), QUESTIONS, em.uniform(1))

    def copy(key):
        start_key, key = jax.random.split(key)

        def step(state, given):
            key, theta = given
            score, state = gradient.next(key, theta, state)
            return state, score(theta)[1]

        state = gradient.init(start_key, path[0])
        return lax.scan(step, state, (jax.random.split(key, len(path)), path))[1]

    @jax.jit
    def sums(keys):
        found = jax.vmap(copy)(keys)
        return found.sum(axis=0), (found**2).sum(axis=0)

    keys = jax.random.split(jax.random.key(5), copies).reshape(-1, 50)
    first, second = 0.0, 0.0
    for block in keys:
        a, b = sums(block)
        first, second = first + np.asarray(a, np.float64), second + np.asarray(b, np.float64)
    mean = first / copies
    return mean, np.sum(second / copies - mean**2, axis=1) / copies


UNSURE = 0.25
BIAS_AT = (0, 10, 30, 100, 300, 1000)
SHOWN = ("TRICE", "STaR", "RAFT", "ReST-EM", "REINFORCE", "GRPO", "BNPO", "max@4")
AS_RUN = "TRICE as it runs"


def bias(smoke, output):
    count, copies = (500, 50) if smoke else (4000, 200)
    at = [t for t in BIAS_AT if t <= (30 if smoke else 1000)]
    results, blocks = {}, {}
    for kind in ("separable", "non-separable"):
        made = toy(kind)
        path = train(made, METHODS["TRICE, leave-one-out"], max(at), 0.03, jax.random.key(3))
        exact = np.asarray(jax.vmap(jax.grad(made.log_likelihood))(path), np.float64)
        rows = {}
        mean, noise = replayed(made, path, copies)
        rows[AS_RUN] = [cosine(mean[t], noise[t], exact[t]) for t in at]
        for name in SHOWN:
            rows[name], draw = [], estimating(made, METHODS[name], count)
            for t in at:
                mean, variance, _ = moments(draw(path[t]))
                rows[name].append(cosine(mean, variance / count, exact[t]))
        results[kind] = rows, [float(made.log_likelihood(path[t])) for t in at]
        lines = [
            "| steps of TRICE before | " + " | ".join(str(t) for t in at) + " |",
            "| --- " * (len(at) + 1) + "|",
            "| *log-likelihood there* | " + " | ".join(f"{x:.2f}" for x in results[kind][1]) + " |",
        ]
        for name, row in rows.items():
            title = "TRICE, chains at the posterior" if name == "TRICE" else name
            cells = [f"{c:.2f} ± {e:.2f}" if e < 1 else "lost in noise" for c, e in row]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        blocks[f"bias {kind}"] = lines
        print(kind, "\n".join(lines), flush=True)
    points, lines = variances(smoke)
    blocks["variance"] = lines
    bias_picture(results, points, at, output / "images" / "em_toy_bias.png")
    return blocks


def variances(smoke):
    """Variance of TRICE's control variates along exact ascent of the separable problem."""
    made, count = toy("separable"), 500 if smoke else 4000
    optimizer = optax.adam(0.1)

    def step(carry, _):
        theta, state = carry
        descent = jax.tree.map(jnp.negative, jax.grad(made.log_likelihood)(theta))
        updates, state = optimizer.update(descent, state)
        return (theta + updates, state), theta

    start = jnp.asarray(made.start)
    path = lax.scan(step, (start, optimizer.init(start)), length=200 if smoke else 6000)[1]
    wrong = 1 - np.asarray(jax.jit(jax.vmap(lambda t: jnp.mean(made.solved(t))))(path))
    wanted = np.geomspace(wrong[0], max(wrong[-1], 0.001), 7)
    names = ("TRICE, no control", "TRICE, leave-one-out", "TRICE, optimal", "TRICE")
    points = {name: [] for name in names}
    draws = {name: estimating(made, METHODS[name], count) for name in names}
    lines = [
        "| mean p | no control variate | leave-one-out | optimal | auto |",
        "| --- | --- | --- | --- | --- |",
    ]
    for level in wanted:
        t = int(np.argmin(np.abs(np.log(wrong / level))))
        cells = []
        for name in names:
            _, variance, error = moments(draws[name](path[t]))
            points[name].append((wrong[t], variance, error))
            cells.append(f"{variance:.3g} ± {error:.1g}")
        lines.append(f"| {1 - wrong[t]:.4f} | " + " | ".join(cells) + " |")
    print("\n".join(lines), flush=True)
    return points, lines


def bias_picture(results, points, at, path):
    figure, axes = plt.subplots(1, 3, figsize=(16, 5))
    figure.subplots_adjust(left=0.045, right=0.91, top=0.83, bottom=0.12, wspace=0.55)
    for ax, (kind, (rows, _)) in zip(axes, results.items(), strict=False):
        ends = []
        for name, row in rows.items():
            method = METHODS["TRICE" if name == AS_RUN else name]
            color, line = (method.color, method.line) if name != AS_RUN else ("#3f8fd9", "--")
            value, error = np.array(row).T
            # a cosine with more noise than this says nothing
            seen = error < UNSURE
            x, y = np.arange(len(at))[seen], value[seen]
            ax.errorbar(
                x, y, error[seen], fmt=line, color=color, linewidth=1.9, marker="o", markersize=3.5
            )
            label = "TRICE at posterior" if name == "TRICE" else name
            ends.append((len(at) - 1, y[-1], label, color))
        ax.set_xticks(np.arange(len(at)), [str(t) for t in at])
        ax.set_xlim(-0.15, len(at) - 0.85)
        ax.set_xlabel("steps of TRICE before")
        ax.set_ylabel("cosine with the exact gradient")
        ax.set_ylim(min(c for row in rows.values() for c, e in row if e < UNSURE) - 0.05, 1.05)
        plain(ax)
        ax.set_title(PROBLEMS[kind], loc="left", fontsize=11, fontweight="bold")
        label_ends(ax, ends)
    ax, ends = axes[2], []
    for name, row in points.items():
        x, y, error = np.array(row).T
        method = METHODS[name]
        ax.errorbar(x, y, error, fmt=method.line, color=method.color, marker="o", markersize=4)
        title = {"TRICE": "auto"}.get(name, name.removeprefix("TRICE, "))
        ends.append((x[-1], y[-1], title, method.color))
    ax.set(xscale="log", yscale="log", xlabel="1 - mean p", ylabel="variance of the gradient")
    ax.invert_xaxis()
    ax.set_xlim(right=min(x))
    plain(ax)
    ax.set_title("TRICE's noise as the model learns", loc="left", fontsize=11, fontweight="bold")
    label_ends(ax, ends)
    finished(
        figure,
        "What the expected gradients point at, along a path of TRICE; and how its noise dies out",
        path,
    )


# ----------------------------------------------------------------------------- allocation


class Closed(NamedTuple):
    """Of each question: p, mean gradient at right rationales, its variance there, mean norm."""

    p: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    norm: np.ndarray


def closed(made, theta):
    prob = np.exp(np.asarray(made.log_probs(theta), np.float64))
    slope = made.features - np.einsum("qr,qrd->qd", prob, made.features)[:, None]
    p = np.sum(prob, axis=1, where=made.right)
    posterior = np.where(made.right, prob, 0) / p[:, None]
    mean = np.einsum("qr,qrd->qd", posterior, slope)
    size = np.sum(slope**2, axis=2)
    variance = np.sum(posterior * size, axis=1) - np.sum(mean**2, axis=1)
    return Closed(p, mean, variance, np.sum(posterior * np.sqrt(size), axis=1))


def solved_moments(chance):
    """E[s_i / S^2], E[s_i s_j / S^2] and E[s_i / S] of independent s_i with sum S."""
    count = len(chance)
    law = np.zeros((count, count, count + 1))
    law[:, :, 0] = 1.0
    for k in range(count):
        shifted = np.concatenate([np.zeros((count, count, 1)), law[:, :, :-1]], axis=2)
        new = (1 - chance[k]) * law + chance[k] * shifted
        new[k], new[:, k] = law[k], law[:, k]
        law = new
    number = np.arange(count + 1.0)
    one, two = 1 / (number + 1), 1 / (number + 2)
    alone = np.diagonal(law, axis1=0, axis2=1).T  # without i
    pairs = np.outer(chance, chance) * (law @ two**2)
    single = chance * (alone @ one**2)
    np.fill_diagonal(pairs, single)
    return single, pairs, chance * (alone @ one)


def exact_variance(counts, about):
    """Variance of raft("all") with fixed numbers of proposals, in closed form.

    With A_i accepted, binomial, and S questions solved, the law of total variance gives
    sum_i E[s_i/S^2] V_i E[1/A_i | A_i > 0] + tr Cov(sum_i s_i mu_i / S).
    """
    chance = 1 - (1 - about.p) ** counts
    inverse = np.zeros(len(counts))
    for i, (n, p) in enumerate(zip(counts, about.p, strict=True)):
        a = np.arange(1, n + 1)
        inverse[i] = np.sum(binom.pmf(a, n, p) / a) / chance[i] if n else 0.0
    single, pairs, first = solved_moments(chance)
    inner = np.sum(single * about.variance * inverse)
    mean = first @ about.mean
    outer = np.sum(pairs * (about.mean @ about.mean.T)) - mean @ mean
    return inner + outer, inner, mean


def rounded(share, total):
    """Whole numbers with a sum, at least one each: largest remainders."""
    share = np.maximum(share / share.sum() * total, 1.0)
    share = share / share.sum() * total
    counts = np.maximum(np.floor(share), 1).astype(int)
    rest = total - counts.sum()
    for i in np.argsort(counts - share)[: max(rest, 0)]:
        counts[i] += 1
    for i in np.argsort(share - counts):
        if counts.sum() <= total:
            break
        counts[i] -= counts[i] > 1
    return counts


def rule(about, alpha=1e-3, beta=2.0):
    """GVM's shares from exact p and G."""
    return about.norm / np.sqrt(about.p + alpha / about.p ** (beta - 1))


def after_pilot(share, number):
    """The numbers that gvm would ask for, if its pilot were exact: half, then what is missing."""
    pilot = number // 2
    target = share / share.sum() * number * len(share)
    missing = np.maximum(target - pilot, 0)
    ends = np.round(np.cumsum(missing) / missing.sum() * pilot * len(share)).astype(int)
    return pilot + np.diff(ends, prepend=0)


RAFT_ALL = Method(em.raft("all"), QUESTIONS, "#f08a24")


def allocated(made, theta, exact, allocator, count):
    """Variance and its error; mean squared distance from the exact gradient and its error."""
    found = estimating(made, RAFT_ALL, count, settled=False, allocator=allocator)(theta)
    square = np.sum((found - exact) ** 2, axis=1)
    return *moments(found)[1:], square.mean(), square.std() / np.sqrt(count)


def with_p(p):
    """A toy whose questions have the given p at theta = 0, right rationales alike."""
    made = toy("pinned")
    base = np.where(
        made.right,
        np.log(p / made.right.sum(1))[:, None],
        np.log((1 - p) / (~made.right).sum(1))[:, None],
    )
    return made._replace(base=base.astype(np.float32))


def places(smoke):
    """Where allocations are compared: name, toy, theta, proposals a question."""
    made, few = toy("non-separable"), (8,) if smoke else (8, 16, 32)
    easy = with_p(np.random.default_rng(4).permutation(np.geomspace(0.9, 0.1, QUESTIONS)))
    return [
        ("at the start", made, jnp.asarray(made.start), few),
        ("at maximum likelihood", made, optimum(made)[0], few),
        ("all p from 0.1 to 0.9", easy, jnp.zeros(WEIGHTS), few if smoke else (16, 32, 64)),
    ]


def gvm(smoke, output):
    count = 500 if smoke else 20_000
    results = {}
    lines = [
        "| where | proposals a question | uniform, closed form | uniform | GVM | the rule at exact p "
        "and G, closed form | after an exact pilot, closed form | GVM over uniform | GVM over the "
        "rule | squared error: uniform | GVM |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    show = lambda value, error: f"{value:.3g} ± {error:.1g}"
    for where, made, theta, numbers in places(smoke):
        about = closed(made, theta)
        exact = about.mean.mean(axis=0)
        for number in numbers:
            even = allocated(made, theta, exact, em.uniform(number), count)
            found = allocated(made, theta, exact, em.gvm(number), count)
            wanted = rounded(rule(about), number * QUESTIONS)
            here = {
                "uniform": even[:2],
                "gvm": found[:2],
                "uniform exact": exact_variance(np.full(QUESTIONS, number), about)[0],
                "rule exact": exact_variance(wanted, about)[0],
                "pilot exact": exact_variance(after_pilot(rule(about), number), about)[0],
            }
            results[where, number] = here
            ratio = lambda name: (
                f"{100 * (here['gvm'][0] / here[name] - 1):+.1f} ± "
                f"{100 * here['gvm'][1] / here[name]:.1f}%"
            )
            lines.append(
                f"| {where} | {number} | {here['uniform exact']:.3g} | {show(*even[:2])} | "
                f"{show(*found[:2])} | {here['rule exact']:.3g} | {here['pilot exact']:.3g} | "
                f"{ratio('uniform exact')} | {ratio('rule exact')} | {show(*even[2:])} | "
                f"{show(*found[2:])} |"
            )
            print(lines[-1], flush=True)
    gvm_picture(results, output / "images" / "em_toy_gvm.png")
    number = 8 if smoke else 32
    _, made, theta, _ = places(smoke)[1]
    return {"gvm": lines, "gvm takes": takes(made, theta, number, count)}


def published(number, alpha=1e-3, floor=0.1):
    """The rule with p as the pilot has it: what it did not solve gets the floor only."""
    pilot = number // 2

    def counts(key, round, past, tally, present):
        p = tally.successes / jnp.maximum(tally.tries, 1.0)
        safe = jnp.where(p > 0, p, 1.0)
        norm = tally.norms / jnp.maximum(tally.successes, 1.0)
        share = jnp.where(p > 0, norm / jnp.sqrt(safe + alpha / safe), 0.0)
        missing = jnp.maximum(share / jnp.sum(share) * number * QUESTIONS - pilot, 0.0)
        missing = (1 - floor) * missing / jnp.sum(missing) + floor / QUESTIONS
        share = jnp.where(round == 0, jnp.ones(QUESTIONS), missing)
        ends = jnp.round(jnp.cumsum(share) / jnp.sum(share) * pilot * QUESTIONS)
        return jnp.diff(ends.astype(jnp.int32), prepend=0)

    return em.Allocator(pilot, 2, counts, directions=4, least=pilot)


def takes(made, theta, number, count):
    """What each part of gvm costs: the pilot's half, the floor, noise in p and in norms."""
    about = closed(made, theta)
    share, exact = rule(about), about.mean.mean(axis=0)
    base = exact_variance(rounded(share, number * QUESTIONS), about)[0]
    lines = ["| how the numbers are found | variance over the rule's |", "| --- | --- |"]
    known = {
        "uniform": np.full(QUESTIONS, number),
        "exact p and G, but a half goes to the pilot": after_pilot(share, number),
    }
    for title, counts in known.items():
        lines.append(
            f"| {title} (closed form) | {100 * (exact_variance(counts, about)[0] / base - 1):+.1f}% |"
        )
    for title, allocator in {
        "gvm: p and G from the pilot": em.gvm(number),
        "gvm with 64 directions for norms": em.gvm(number, directions=64),
        "gvm with a floor of 0.1": em.gvm(number, floor=0.1),
        "as published: s / n, a floor of 0.1": published(number),
    }.items():
        value, error, *_ = allocated(made, theta, exact, allocator, count)
        lines.append(f"| {title} | {100 * (value / base - 1):+.1f} ± {100 * error / base:.1f}% |")
    return lines


def gvm_picture(results, path):
    places = list(dict.fromkeys(where for where, _ in results))
    figure, axes = plt.subplots(1, len(places), figsize=(16, 4.6))
    figure.subplots_adjust(left=0.045, right=0.87, top=0.82, bottom=0.12, wspace=0.75)
    styles = {
        "uniform": ("uniform", "0.35", "-"),
        "gvm": ("GVM, from its pilot", "#d62f1f", "-"),
        "pilot exact": ("rule after exact pilot", "#f08a24", "--"),
        "rule exact": ("rule, exact p and G", "#0b3c8c", "--"),
    }
    for ax, where in zip(np.atleast_1d(axes), places, strict=True):
        numbers = [n for w, n in results if w == where]
        ends = []
        for key, (name, color, line) in styles.items():
            value = np.array([np.atleast_1d(results[where, n][key])[0] for n in numbers])
            base = np.array([results[where, n]["uniform exact"] for n in numbers])
            error = np.array([np.append(results[where, n][key], 0.0)[1] for n in numbers])
            ax.errorbar(
                numbers,
                value / base,
                error / base,
                fmt=line,
                color=color,
                marker="o",
                markersize=4,
            )
            ends.append((numbers[-1], value[-1] / base[-1], name, color))
        ax.set_xscale("log", base=2)
        ax.set_xticks(numbers, [str(n) for n in numbers])
        ax.set_xlim(right=numbers[-1] * 1.02)
        ax.set_xlabel("proposals a question")
        ax.set_ylabel("variance over uniform's")
        ax.set_title(where[0].upper() + where[1:], loc="left", fontsize=11, fontweight="bold")
        plain(ax)
        label_ends(ax, ends)
    finished(
        figure, "Where proposals go: variance of a mean over accepted proposals, uniform = 1", path
    )


# ----------------------------------------------------------------------------- vade


def vade(smoke, output):
    """Shares of proposals where p is fixed and runs from hardly ever to almost always."""
    visits, copies = (20, 20) if smoke else (60, 200)
    odds = np.linspace(-6, 6, QUESTIONS)
    p = 1 / (1 + np.exp(-odds))
    made = with_p(p)
    theta = jnp.zeros(WEIGHTS)
    allocator = em.vade(4)
    gradient = made.gradient(em.trice("none"), QUESTIONS, allocator)

    def copy(key):
        start_key, key = jax.random.split(key)

        def step(state, key):
            after = gradient.next(key, theta, state)[1]
            return after, after.memory.tries - allocator.decay * state.memory.tries

        return lax.scan(step, gradient.init(start_key, theta), jax.random.split(key, visits))[1]

    counts = np.asarray(jax.jit(jax.vmap(copy))(jax.random.split(jax.random.key(2), copies)))
    late = counts[:, visits // 2 :].mean(axis=(0, 1))
    error = counts[:, visits // 2 :].mean(axis=1).std(axis=0) / np.sqrt(copies)
    edges = [0, 0.01, 0.05, 0.2, 0.8, 0.95, 0.99, 1]
    lines = [
        "| p | questions | uniform's share | share of vade | proposals a visit and question |",
        "| --- | --- | --- | --- | --- |",
    ]
    for low, high in pairwise(edges):
        inside = (p >= low) & (p < high)
        share = late[inside].sum() / late.sum()
        lines.append(
            f"| {low:g} to {high:g} | {inside.sum()} | {inside.mean():.1%} | {share:.1%} | "
            f"{late[inside].mean():.2f} |"
        )
    print("\n".join(lines), flush=True)
    figure, ax = plt.subplots(figsize=(8, 4.2))
    figure.subplots_adjust(left=0.09, right=0.77, top=0.84, bottom=0.14)
    ax.axhline(4, color="0.35", linewidth=1.5)
    ideal = 0.5 * 4 + 0.5 * 4 * QUESTIONS * p * (1 - p) / np.sum(p * (1 - p))
    ax.plot(odds, ideal, "--", color="#0b3c8c", linewidth=1.6)
    ax.errorbar(odds, late, error, fmt="o", color="#d62f1f", markersize=4)
    ticks = np.array([0.002, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.998])
    ax.set_xticks(np.log(ticks / (1 - ticks)), [f"{t:g}" for t in ticks])
    ax.set_xlim(-6.2, 6.2)
    ax.set_ylim(0, None)
    ax.set_xlabel("p of the question")
    ax.set_ylabel("proposals a visit")
    plain(ax)
    ends = [
        (6, 4, "uniform", "0.35"),
        (6, late[-1], "vade, measured", "#d62f1f"),
        (6, ideal[-1], "p known", "#0b3c8c"),
    ]
    label_ends(ax, ends)
    finished(
        figure, "VADE sends proposals where p is near a half", output / "images" / "em_toy_vade.png"
    )
    return {"vade": lines}


# ----------------------------------------------------------------------------- the page

PARTS = {"learning": learning, "bias": bias, "gvm": gvm, "vade": vade}


def enter(page, blocks):
    """Put tables between their marks in the page."""
    text = page.read_text()
    for name, lines in blocks.items():
        mark = re.compile(rf"(<!-- em_toy: {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
        if not mark.search(text):
            print(f"no place in {page.name} for: {name}")
        body = "\n" + "\n".join(lines) + "\n\n"
        text = mark.sub(lambda found: found[1] + body + found[2], text)
    page.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), help="one part only")
    parser.add_argument("--smoke", action="store_true", help="a short run, that leaves the page")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    options = parser.parse_args()
    for folder in ("results", "images"):
        (options.output / folder).mkdir(parents=True, exist_ok=True)
    page = options.output / "results" / "estimators_em.md"
    for name in [options.part] if options.part else PARTS:
        clock = time.perf_counter()
        blocks = PARTS[name](options.smoke, options.output)
        print(f"{name}: {time.perf_counter() - clock:.0f} s", flush=True)
        for block, lines in blocks.items():
            print(f"\n{block}\n" + "\n".join(lines), flush=True)
        if page.exists() and not options.smoke:
            enter(page, blocks)


if __name__ == "__main__":
    main()
