"""What federated runs tell of a row, and a run of single-digit epsilon against one without privacy.

``python benchmarks/privacy.py`` writes ``benchmarks/results/privacy.json``; ``--smoke`` is a short
version of the same that writes nothing. Needs ``pip install 'stochgrad[privacy]'``.

Three runs are counted by the formula, without being run: that of docs/start/federated.md, the same with a
hospital of ten rows, and one of fifteen owners of 20,000 rows. The last one is run as well, for
three budgets, and its draws are held against the posterior that all rows have without clipping.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import stochgrad
from stochgrad import federated
from stochgrad.core import effective_draws

RESULTS = Path(__file__).parent / "results" / "privacy.json"
OWNERS, DIMENSION, NORM, DELTA, PRIOR_SD = 15, 4, 2.0, 1e-6, 10.0
SLOPES = 0.1  # of the budget, for the slopes of each of two stages


def log_prior(w):
    return -0.5 * jnp.sum((w / PRIOR_SD) ** 2)


def log_likelihood(w, batch):
    x, y = batch
    z = x @ w
    return y * z - jnp.logaddexp(jnp.zeros_like(z), z)


def counted(sizes, *, batch_size, order, step_size, norm, steps, delta):
    """The epsilon of each client, of steps with all clients together, in both adjacencies."""
    data = [np.zeros(n, np.float32) for n in sizes]
    options = {"order": order} | ({} if order == "full" else {"batch_size": batch_size})
    target = federated.posterior(lambda w: -w, lambda w, x: -w * x, data, **options)
    each = np.ceil(steps * np.array(sizes) / sum(sizes)).astype(int)
    of = partial(federated.privacy_of_steps, target, step_size, norm, each, delta=delta)
    both = {name: of(adjacency=name) for name in ("replace", "zero_out")}
    return {
        "rows": list(sizes),
        "batch_size": batch_size if order != "full" else "all",
        "step_size": step_size,
        "norm": norm,
        "delta": delta,
        "steps_of_all_chains": steps,
        "epsilon_replace": both["replace"].round(1).tolist(),
        "epsilon_zero_out": both["zero_out"].round(1).tolist(),
    }


def page():
    """The first run of docs/start/federated.md: 4 chains of 550 draws of 100 steps."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 3)).astype(np.float32)
    y = (rng.random(3000) < 1 / (1 + np.exp(-x @ [1.0, -1.0, 0.5]))).astype(np.float32)
    owner = np.where(y > rng.random(3000) * 1.5, 0, rng.integers(1, 4, 3000))
    sizes = np.bincount(owner).tolist()
    run = {"batch_size": 50, "order": "reshuffled", "step_size": 2e-4, "norm": 2.0, "delta": 1e-5}
    run["steps"] = 4 * 550 * 100
    return counted(sizes, **run), counted([*sizes, 10], **run)


def owners(rows, *, bounded):
    """Logistic regressions; of columns within one, no row's gradient is longer than the norm."""
    rng = np.random.default_rng(1)
    truth = np.array([-0.5, 0.8, -0.6, 0.3])
    clients = []
    for _ in range(OWNERS):
        shift = 0.3 * rng.normal(size=DIMENSION)
        x = rng.normal(size=(rows, DIMENSION)) + shift
        if bounded:
            x = np.clip(rng.uniform(-1, 1, size=(rows, DIMENSION)) + shift, -1, 1)
        x[:, 0] = 1.0
        y = rng.random(rows) < 1 / (1 + np.exp(-x @ truth))
        clients.append((x.astype(np.float32), y.astype(np.float32)))
    return clients


def posterior_of_all(clients, norm=None):
    """Mode and standard deviations without privacy, by Newton's method; of clipped rows, its mode."""
    x = np.concatenate([c[0] for c in clients]).astype(np.float64)
    y = np.concatenate([c[1] for c in clients]).astype(np.float64)
    w = np.zeros(DIMENSION)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        rows = (y - p)[:, None] * x
        if norm is not None:
            rows *= np.minimum(1, norm / np.linalg.norm(rows, axis=1, keepdims=True))
        precision = (x * (p * (1 - p))[:, None]).T @ x + np.eye(DIMENSION) / PRIOR_SD**2
        w = w + np.linalg.solve(precision, rows.sum(axis=0) - w / PRIOR_SD**2)
    return w, np.sqrt(np.diag(np.linalg.inv(precision))), precision


def stage(clients, reference, start, each, h, slope_noise, seed, warm):
    """Draws of one chain that visits every owner so many times, a step each time."""
    target = federated.posterior(log_prior, log_likelihood, clients, order="full")
    target = federated.visiting(target, selection="permuted")
    surrogates = federated.private_surrogates(
        jax.random.key(seed), target, reference, norm=NORM, noise_multiplier=slope_noise
    )
    gradient = federated.conducive(federated.clipped_minibatch(target, NORM), surrogates)
    draws = stochgrad.sample(
        jax.random.key(seed + 1),
        federated.with_visits(stochgrad.sgld(gradient, h)),
        init=start,
        num_samples=each * OWNERS - warm,
        num_warmup=warm,
        progress=False,
    )
    return target, draws


def run(clients, epsilon):
    """A private run that spends no more than epsilon, and what came of it.

    It begins at zero, with slopes there; the mean of the second half of a first stage, which is no
    news to whoever saw its draws, is the reference of the second.
    """
    mode, sd, precision = posterior_of_all(clients)
    h = 0.1 / np.linalg.eigvalsh(precision)[-1]
    cost = federated.langevin_cost(h, OWNERS, NORM, "replace")
    most = federated.most_cost(epsilon, DELTA)
    slope_noise = float(np.sqrt(1 / (SLOPES * most)))
    each = int((most - 2 / slope_noise**2) / cost)
    first = max(each // 6, 1)
    start, zero = time.perf_counter(), jnp.zeros(DIMENSION)
    _, before = stage(clients, zero, zero, first, h, slope_noise, 7, 0)
    half = np.asarray(before.positions)[0, first * OWNERS // 2 :]
    reference = jnp.asarray(half.mean(axis=0), jnp.float32)
    last = jnp.asarray(half[-1])
    target, draws = stage(clients, reference, last, each - first, h, slope_noise, 11, 0)
    seconds = time.perf_counter() - start
    steps = np.array([[first] * OWNERS, [each - first] * OWNERS])
    spent = federated.privacy_of_steps(
        target, h, NORM, steps, delta=DELTA, noise_multipliers=[slope_noise] * 2
    )
    x = np.asarray(draws.positions, np.float64)
    effective = np.array([float(effective_draws(x[:, :, i])) for i in range(DIMENSION)])
    clipped_mode, _, _ = posterior_of_all(clients, NORM)
    share = federated.clipped_share(target, jnp.asarray(mode, jnp.float32), NORM)
    return {
        "owners": OWNERS,
        "rows_of_each": len(clients[0][1]),
        "norm": NORM,
        "delta": DELTA,
        "adjacency": "replace",
        "epsilon_asked": epsilon,
        "epsilon_spent": float(spent.max().round(3)),
        "epsilon_of_the_same_zero_out": float(
            federated.privacy_of_steps(
                target,
                h,
                NORM,
                steps,
                delta=DELTA,
                adjacency="zero_out",
                noise_multipliers=[slope_noise * 2] * 2,  # of half the sensitivity
            )
            .max()
            .round(3)
        ),
        "steps_with_each_owner": each,
        "draws": x.shape[1],
        "step_size": h,
        "slope_noise_multiplier": slope_noise,
        "sd_over_that_without_privacy": (x.std(axis=(0, 1)) / sd).round(3).tolist(),
        "mean_off_in_sds": ((x.mean(axis=(0, 1)) - mode) / sd).round(3).tolist(),
        "standard_error_of_means_in_sds": (1 / np.sqrt(effective)).round(3).tolist(),
        "effective_draws": effective.round(0).tolist(),
        "share_of_rows_clipped": float(share.mean().round(5)),
        "shift_by_clipping_in_sds": ((clipped_mode - mode) / sd).round(3).tolist(),
        "noise_ratio": float(np.nanmean(np.asarray(draws.stats["noise_ratio"])).round(3)),
        "verdict": [str(reason) for reason in draws.verdict.reasons],
        "seconds": round(seconds, 1),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    first, with_hospital = page()
    rows = 400 if smoke else 20_000
    clients = owners(rows, bounded=True)
    found = {
        "versions": {"jax": jax.__version__, "stochgrad": stochgrad.__version__},
        "page": first,
        "page_with_a_hospital_of_ten_rows": with_hospital,
        "owners": [run(clients, e) for e in ((500.0,) if smoke else (1.0, 3.0, 9.3))],
        "owners_with_clipped_rows": run(owners(rows, bounded=False), 500.0 if smoke else 9.3),
    }
    print(json.dumps(found, indent=1))
    if not smoke:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
