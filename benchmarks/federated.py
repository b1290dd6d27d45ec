"""Bytes that federated samplers send until their posterior means are right, on the flights by carrier.

Sixteen carriers own their flights, from 29 to 52,747, and none sees another's. A logistic regression
of being late, the same for all, is sampled from its pooled posterior by FSGLD and its rivals.

``python benchmarks/federated.py`` writes ``docs/results/federated.md`` and
``docs/images/federated_bytes.png``; ``--smoke`` is a short version of the same.
"""

import argparse
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import stochgrad
from stochgrad import federated
from stochgrad.federated import require_clients
from stochgrad.federated._qlsd import qlsd_costs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from flights import load

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ERROR, PRIOR_SD, BATCH = 0.1, 2.0, 500
CHOOSING, REPORTED = 8, 16  # chains
TOLERANCES = (0.1, 0.2, np.inf)  # how wrong sds may be: root mean square of the log of ratios
COLORS = {
    "FSGLD, curvature": "#b5341d",
    "FSGLD, first order": "#e8894a",
    "DSGLD": "#7a7a7a",
    "FALD": "#3a7d44",
    "VR-FALD*": "#7b4fa3",
    "QLSD++": "#1f6f8b",
}
# step sizes in units of 1 / (rows * variance of a label), about one over the largest curvature
GRID = {
    "FSGLD, curvature": [
        {"h": 0.05, "T": T, "thin": 60, "form": form, "rank": rank, "draws": 400}
        for form, rank, T in (
            ("low_rank", 5, 60),
            ("low_rank", 10, 60),
            ("low_rank", 10, 120),
            ("full", 0, 120),
            ("full", 0, 600),
            ("full", 0, 1200),
        )
    ],
    "FSGLD, first order": [{"h": 0.1, "T": T, "draws": 900} for T in (3, 6, 10, 15)],
    "DSGLD": [
        *({"h": h, "T": 1, "thin": 50, "draws": 1500} for h in (3e-4, 1e-3, 3e-3, 1e-2)),
        {"h": 1e-4, "T": 10, "thin": 50, "draws": 1500},
    ],
    "FALD": [
        *({"h": h, "T": 1, "draws": 3000} for h in (0.01, 0.03, 0.1)),
        {"h": 0.01, "T": 5, "draws": 1000},
    ],
    "VR-FALD*": [
        *({"h": h, "T": 1, "draws": 900} for h in (0.4, 0.6, 0.8, 1.0, 1.4)),
        *({"h": h, "T": T, "draws": 900} for h, T in ((0.05, 2), (0.2, 2), (0.03, 5))),
    ],
    "QLSD++": [
        {"h": h, "levels": levels, "draws": 1000}
        for h in (0.4, 0.6, 0.8, 1.0, 1.4)
        for levels in (6, 16)
    ],
}


class Problem(NamedTuple):
    """The posterior in whitened coordinates, and what is known of it in those of the model."""

    target: stochgrad.core.Posterior
    whitening: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    unit: float
    words: str


class Curve(NamedTuple):
    """What one run has reached after some bytes."""

    settings: dict
    bytes: np.ndarray
    error: np.ndarray
    sd_ratio: float
    sd_error: float

    @property
    def reached(self):
        """Bytes from which on the error stays below the target."""
        above = np.flatnonzero(~(self.error <= ERROR))
        last = above[-1] + 1 if len(above) else 0
        return self.bytes[last] if last < len(self.bytes) else np.inf


def dummies(index):
    levels = np.unique(index, return_inverse=True)[1]
    return np.eye(levels.max() + 1)[levels][:, 1:]


def problem(batch_size):
    """Late or not, from weather, distance, month, hour and airport: October is left out."""
    rows, _, held_out = load()
    rows = {name: v[~held_out] for name, v in rows.items()}
    y = rows["late"].astype(np.float64)
    parts = [np.ones((len(y), 1)), rows["x"]]
    x = np.concatenate([*parts, *(dummies(rows[name]) for name in ("month", "hour", "origin"))], 1)
    values, vectors = np.linalg.eigh(x.T @ x / len(y))
    whitening = (vectors / np.sqrt(values)) @ vectors.T
    mode, hessian = newton(x, y)
    mean, sd, gap = moments(x, y, mode, hessian)

    inverse_root = jnp.asarray(whitening, jnp.float32)
    z, carrier = (x @ whitening).astype(np.float32), rows["carrier"]
    owners = range(carrier.max() + 1)
    clients = [{"z": z[carrier == s], "late": rows["late"][carrier == s]} for s in owners]

    def log_prior(v):
        return -0.5 * jnp.sum((inverse_root @ v / PRIOR_SD) ** 2)

    def log_likelihood(v, batch):
        logit = batch["z"] @ v
        return batch["late"] * logit - jax.nn.softplus(logit)

    sizes = [len(c["late"]) for c in clients]
    whitened = np.linalg.eigvalsh(whitening @ hessian @ whitening)
    words = (
        f"{len(y):,} flights of {len(clients)} carriers ({min(sizes):,} to {max(sizes):,} each), "
        f"{x.shape[1]} coefficients: intercept, six of weather, log distance, month, hour, airport; "
        f"prior N(0, {PRIOR_SD:g}²), no effect of carriers. All methods work in coordinates whitened by "
        f"the pooled second moments of the predictors, which brings the condition number from "
        f"{np.linalg.cond(hessian):,.0f} to {whitened[-1] / whitened[0]:.1f}. The posterior they "
        f"are held against is Laplace's, mended by importance weights ({gap})."
    )
    target = federated.posterior(log_prior, log_likelihood, clients, batch_size=batch_size)
    return Problem(target, whitening, mean, sd, 1 / (len(y) * y.var()), words)


def newton(x, y):
    """The posterior's mode, and minus the Hessian there."""
    theta = np.zeros(x.shape[1])
    for _ in range(12):
        p = 1 / (1 + np.exp(-x @ theta))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + np.eye(len(theta)) / PRIOR_SD**2
        theta = theta + np.linalg.solve(hessian, x.T @ (y - p) - theta / PRIOR_SD**2)
    return theta, hessian


def moments(x, y, mode, hessian, pairs=100, together=20):
    """Mean and sd of the posterior by weighted draws from Laplace's, in pairs about the mode."""
    root = np.linalg.cholesky(np.linalg.inv(hessian))
    half = np.random.default_rng(0).normal(size=(pairs, len(mode)))
    z = np.concatenate([half, -half])
    theta = mode + z @ root.T

    def log_density(theta):
        logit = x @ theta.T
        soft = np.maximum(logit, 0) + np.log1p(np.exp(-np.abs(logit)))
        return y @ logit - soft.sum(axis=0) - 0.5 * np.sum((theta / PRIOR_SD) ** 2, axis=1)

    parts = np.split(theta, len(theta) // together)
    log_weight = np.concatenate([log_density(part) for part in parts]) + 0.5 * np.sum(z**2, axis=1)
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    laplace = np.sqrt(np.diag(root @ root.T))
    shift = weight @ (theta - mode)
    stretch = np.sqrt(weight @ (theta - mode - shift) ** 2 / np.mean((theta - mode) ** 2, axis=0))
    rms = np.sqrt(np.mean((shift / laplace) ** 2))
    bent = np.sqrt(np.mean((stretch - 1) ** 2))
    words = f"means move by {rms:.3f} sd and sds by {bent:.1%}, root mean square over coefficients"
    return mode + shift, laplace * stretch, words


def run(problem, reference, method, settings, seed, chains, shrink=1):
    """One run of several chains, and what it reached after how many bytes."""
    T = settings.get("T", 1)
    options = {
        "num_samples": max(settings["draws"] // shrink, 20),
        "thin": settings.get("thin", T),
        "num_chains": chains,
        "progress": False,
    }
    key, step_size = jax.random.key(seed), settings["h"] * problem.unit
    if method == "QLSD++":
        draws = quantized(key, problem.target, step_size, settings["levels"], reference, options)
    else:
        draws = federated.sample(
            key,
            problem.target,
            method=method.split(",")[0],
            surrogate=surrogate_of(settings),
            reference=reference,
            local_steps=T,
            step_size=step_size,
            on_unsafe="ignore",  # what runs away shows in the errors
            **options,
        )
    sent = sum(draws.stats[f"bytes_{way}"] for way in ("up", "down")).astype(np.float64)
    sent += reference.bytes_up + reference.bytes_down
    if method.startswith("FSGLD"):
        clients = require_clients(problem.target).count
        sent += surrogate_bytes(settings, clients, len(problem.mean), draws.stats["client"])
    return curve(problem, settings, draws.positions, np.median(sent, axis=0))


def surrogate_of(settings):
    if "form" not in settings:
        return "global_first_order"
    chosen = {name: settings[name] for name in ("form", "rank") if settings[name]}
    return partial(federated.global_quadratic, **chosen)


def surrogate_bytes(settings, clients, d, visited):
    """Each client sends its surrogate; one that is visited is sent the sum, the first time.

    The sum of low-rank matrices is none; a symmetric matrix has d (d + 1) / 2 numbers.
    """
    matrix, rank = d * (d + 1) // 2, settings.get("rank", 0)
    own = d + {None: 0, "full": matrix, "low_rank": rank * (d + 1) + d}[settings.get("form")]
    total = d + (matrix if "form" in settings else 0)
    seen = [np.maximum.accumulate(visited == s, axis=1) for s in range(clients)]
    return 4 * (clients * own + total * np.sum(seen, axis=0))


def quantized(key, target, step_size, levels, reference, options):
    """QLSD++ with any number of levels."""
    kernel = federated.qlsd(target, step_size, levels=levels)
    draws = stochgrad.sample(key, kernel, init=reference, **options)
    up, down = qlsd_costs(target, reference.position, levels)["rounds"]
    rounds = draws.stats["rounds"].astype(np.int64)
    stats = {**draws.stats, "bytes_up": up * rounds, "bytes_down": down * rounds}
    return replace(draws, stats=stats)


def curve(problem, settings, positions, sent):
    """Errors of the draws so far, their first fifth discarded: medians over chains."""
    theta = positions.astype(np.float64) @ problem.whitening.T
    theta = (theta - problem.mean) / problem.sd
    count = theta.shape[1]
    last = np.unique(np.geomspace(5, count, 300).astype(int))
    first = last // 5
    means, squares = (
        (total[:, last - 1] - np.where(first[:, None] > 0, total[:, first - 1], 0))
        / (last - first)[:, None]
        for total in (np.cumsum(theta, axis=1), np.cumsum(theta**2, axis=1))
    )
    error = np.median(np.sqrt(np.mean(means**2, axis=2)), axis=0)
    log_sd = 0.5 * np.log(np.maximum(squares[:, -1] - means[:, -1] ** 2, 1e-12))
    ratio = np.exp(np.median(np.mean(log_sd, axis=1)))
    spread = np.median(np.sqrt(np.mean(log_sd**2, axis=1)))
    return Curve(
        settings, sent[last - 1], np.where(np.isfinite(error), error, np.inf), ratio, spread
    )


def best(curves, tolerance):
    """The setting that reached the target first, of those whose sds are right; else the rightest."""
    right = [c for c in curves if c.sd_error <= tolerance]
    chosen = min(right, key=lambda c: (c.reached, c.error[-1]), default=None)
    return (chosen or min(curves, key=lambda c: c.sd_error)).settings


def in_words(settings):
    words = [f"h = {settings['h']:g}"]
    if "T" in settings:
        words.append(f"T = {settings['T']}")
    if settings.get("thin", np.inf) < settings.get("T", 1):
        words.append(f"a draw each {settings['thin']} steps")
    if "form" in settings:
        rank = f"rank {settings['rank']}" if settings["rank"] else settings["form"]
        words.append(f"{rank} curvature")
    if "levels" in settings:
        words.append(f"{settings['levels']} levels")
    return ", ".join(words)


def of_bytes(value):
    return f"{value / 1e6:.2f} MB" if value < 1e7 else f"{value / 1e6:.0f} MB"


def row(method, c, ours):
    if np.isfinite(c.reached):
        to, ratio = of_bytes(c.reached), f"{c.reached / ours:.1f}"
    else:
        to = f"not within {of_bytes(c.bytes[-1])} ({c.error[-1]:.2f} there)"
        ratio = f"> {c.bytes[-1] / ours:.1f}"
    settings = in_words(c.settings)
    return f"| {method} | {settings} | {to} | {ratio} | {c.sd_ratio:.2f} | {c.sd_error:.2f} |"


def table(title, curves):
    ours = curves["FSGLD, curvature"].reached
    return [
        f"## {title}",
        "",
        f"| method | settings | bytes to an error of {ERROR:g} | of FSGLD's | sd / true sd | rms of log sd |",
        "| --- | --- | --- | --- | --- | --- |",
        *(row(method, c, ours) for method, c in curves.items()),
        "",
    ]


def picture(right, anyhow, path):
    """Error against bytes; dashed with settings whose sds are wrong, for the best two rivals."""
    figure, ax = plt.subplots(figsize=(9.5, 5.8))
    ax.axhline(ERROR, color="0.45", linewidth=1)
    ax.text(21, ERROR * 1.03, "target", color="0.35", fontsize=9)
    lines = [(method, c, "-") for method, c in right.items()]
    lines += [(method, anyhow[method], "--") for method in ("VR-FALD*", "QLSD++")]
    for method, c, line in lines:
        width = 2.4 if method == "FSGLD, curvature" else 1.6
        label = method if line == "-" else f"{method}, sds {c.sd_ratio:.1f} times too large"
        ax.plot(c.bytes / 1e6, c.error, line, label=label, color=COLORS[method], linewidth=width)
        ax.plot(c.reached / 1e6, ERROR, "o", color=COLORS[method], markersize=6, zorder=3)
    ax.set(xscale="log", yscale="log", xlim=(0.03, 30), ylim=(0.04, 1.5))
    ax.set_xlabel("MB sent for one chain, with all preparations")
    ax.set_ylabel("error of the means / posterior sd")
    for ticks, put in (
        ([0.03, 0.1, 0.3, 1, 3, 10, 30], ax.set_xticks),
        ([0.05, 0.1, 0.2, 0.5, 1], ax.set_yticks),
    ):
        put(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_title(
        "Flights of 16 carriers that keep their data: one posterior, many ways to reach it"
    )
    title = "solid: sds right within 10%, or as right as they get"
    ax.legend(frameon=False, fontsize=9, title=title, title_fontsize=9, alignment="left")
    ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short run")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    options = parser.parse_args()
    begun, shrink = time.perf_counter(), 20 if options.smoke else 1
    warnings.simplefilter("ignore")  # of steps far too large, which the grids try as well
    posed = problem(BATCH)
    zero = jnp.zeros(len(posed.mean))
    reference = federated.find_reference(posed.target, zero, max_rounds=5)
    off = (posed.whitening @ np.asarray(reference.position, np.float64) - posed.mean) / posed.sd

    found = {tolerance: {} for tolerance in TOLERANCES}
    for method, grid in GRID.items():
        curves = []
        for settings in grid[:1] if options.smoke else grid:
            clock = time.perf_counter()
            c = run(posed, reference, method, settings, 0, CHOOSING, shrink)
            curves.append(c)
            print(row(method, c, 1e5), f"{time.perf_counter() - clock:.0f} s", flush=True)
        again = {}
        for tolerance, chosen in found.items():
            settings = best(curves, tolerance)
            name = str(settings)
            if name not in again:
                again[name] = run(posed, reference, method, settings, 1, REPORTED, shrink)
            chosen[method] = again[name]

    about = (
        f"{posed.words}\n\n"
        f"All chains start at the same reference, found from zero in {reference.rounds} rounds over all "
        f"clients ({of_bytes(reference.bytes_up + reference.bytes_down)}, counted for all; "
        f"{np.sqrt(np.mean(off**2)):.2f} sd from the mean). The error is the root mean square over coefficients of "
        "mean of the draws so far, without their first fifth, minus the posterior's, in posterior sds: "
        f"median of {REPORTED} chains. It is reached where it stays below {ERROR:g}. Bytes are of both directions, for one chain, "
        "with a client's surrogate, and the sum of all sent to each client when it is first visited, a "
        "symmetric matrix as half of one. All take minibatches of "
        f"{BATCH} rows of a client. Settings were chosen from grids ({sum(map(len, GRID.values()))} runs) "
        "with one seed, and figures are of another; where no setting of a method has such sds, it is the one whose sds are best. h is in units of 1 / (rows * variance of a label), "
        "about one over the largest curvature; T are local steps."
    )
    lines = [
        "# Bytes to the posterior, by federated method",
        "",
        "Made by `python benchmarks/federated.py`.",
        "",
        about,
        "",
        *table("Fewest bytes of the settings whose sds are right within 10%", found[0.1]),
        *table("Within 20%", found[0.2]),
        *table("Without a look at the sds", found[np.inf]),
    ]
    text = "\n".join(lines)
    print(text)
    for folder in ("results", "images"):
        (options.output / folder).mkdir(parents=True, exist_ok=True)
    (options.output / "results" / "federated.md").write_text(text)
    picture(found[0.1], found[np.inf], options.output / "images" / "federated_bytes.png")
    print(f"{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
