"""What ten thousand clients of 5 to 5,000 rows cost in one process: memory, time and bytes.

A logistic regression of 20 coefficients; clients whose predictors have means of their own, rows
drawn log-uniformly. Chains visit one client after the other, by their numbers of rows, so that in a
run some clients are never seen. For each number of clients a process of its own prints its figures:
peak memory above that of a run with ten clients, over the bytes of the data; seconds; bytes for one
effective draw of the worst coordinate; and standard deviations against those of the law that is
predicted before the run and of the posterior, which is Laplace's.

``python benchmarks/many_clients.py`` writes ``benchmarks/results/many_clients.json`` and prints the
table of ``docs/start/federated.md``.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

COLUMNS, BATCH, LOCAL_STEPS, CHAINS = 20, 50, 5, 8
STEP = 0.05
"""Of Langevin dynamics, in units of one over the posterior's largest curvature."""


def sizes_of(count):
    """Rows of each client, log-uniform from 5 to 5,000."""
    random = np.random.default_rng(0)
    return np.exp(random.uniform(np.log(5), np.log(5001), count)).astype(int)


class Made(Sequence):
    """Clients whose rows are made when they are asked for, as others would be read from disk."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.weights = np.random.default_rng(1).normal(size=COLUMNS) / 2

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, s):
        if not 0 <= s < len(self.sizes):
            raise IndexError(s)
        random = np.random.default_rng([2, s])
        x = random.normal(size=(self.sizes[s], COLUMNS)) + 0.5 * random.normal(size=COLUMNS)
        p = 1 / (1 + np.exp(-x @ self.weights))
        y = random.random(self.sizes[s]) < p
        return x.astype(np.float32), y.astype(np.float32)


def log_prior(w):
    return -0.5 * jnp.sum(w**2)


def log_likelihood(w, batch):
    x, y = batch
    z = x @ w
    return y * z - jnp.logaddexp(0.0, z)


def peak():
    """Peak of the resident memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def curvature_of(clients, position):
    """The posterior's curvature, client by client in double precision."""
    total, w = np.eye(COLUMNS), np.asarray(position, np.float64)
    for x, _ in clients:
        p = 1 / (1 + np.exp(-x @ w))
        total += (x * (p * (1 - p))[:, None]).T @ x
    return total


def predicted(target, surrogates, step_size):
    """The worst standard deviation of draws over the posterior's, by the law."""
    from stochgrad.federated._spread import spread_of_draws

    return spread_of_draws(target, surrogates, step_size).ratio


def one(count, draws):
    """All figures of one number of clients, in this process."""
    from numpyro.diagnostics import effective_sample_size

    from stochgrad import federated

    warnings.simplefilter("ignore")
    clients, begun = Made(sizes_of(count)), time.perf_counter()
    rows = int(clients.sizes.sum())
    found = {"clients": count, "rows": rows, "data_bytes": rows * (COLUMNS + 1) * 4}
    target = federated.posterior(log_prior, log_likelihood, clients, batch_size=BATCH)
    found["layout_seconds"] = time.perf_counter() - begun
    reference = federated.find_reference(target, jnp.zeros(COLUMNS))
    matrix = curvature_of(clients, reference.position)
    step_size = float(STEP / np.linalg.eigvalsh(matrix)[-1])
    begun = time.perf_counter()
    made = federated.sample(
        jax.random.key(0),
        target,
        # ten clients are what the program itself takes, and it is to be the same
        surrogate="auto" if count > 10 else "global_first_order",
        local_steps=LOCAL_STEPS,
        step_size=step_size,
        reference=reference,
        num_samples=draws,
        num_warmup=draws // 10,
        thin=LOCAL_STEPS,
        num_chains=CHAINS,
        progress=False,
    )
    found["sample_seconds"] = time.perf_counter() - begun
    found["peak_bytes"] = peak()  # of all that was asked for; what follows judges it
    target = federated.visiting(target, local_steps=LOCAL_STEPS)
    surrogates = federated.global_first_order(target, reference)
    found["law"] = predicted(target, surrogates, step_size)
    x = np.asarray(made.positions, np.float64)
    sd = np.sqrt(np.diag(np.linalg.inv(matrix)))
    measured = np.sqrt(((x - x.mean(axis=(0, 1))) ** 2).mean(axis=(0, 1))) / sd
    effective = float(effective_sample_size(x).min())
    of_chains = np.log(x.std(axis=1) / sd).mean(axis=1)
    sent = made.stats["bytes_up"].astype(np.int64) + made.stats["bytes_down"].astype(np.int64)
    setup = made.attrs["setup_bytes_up"] + made.attrs["setup_bytes_down"]
    found |= {
        "surrogate": made.attrs["surrogate"],
        "sd": float(np.exp(np.log(measured).mean())),
        "sd_error": float(of_chains.std(ddof=1) / np.sqrt(CHAINS)),
        "sd_worst": float(measured[np.argmax(np.abs(np.log(measured)))]),
        "effective": effective,
        "seen": len(np.unique(made.stats["client"])),
        "visits": int(made.stats["visits"][:, -1].sum()),
        "visit_bytes_per_effective": float(sent[:, -1].sum() / effective),
        "setup_bytes_per_client": setup / count,
        "setup_bytes": setup,
    }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", type=int, help="this number of clients, in this process")
    parser.add_argument("--draws", type=int, default=4000)
    results = Path(__file__).parent / "results" / "many_clients.json"
    parser.add_argument("--output", type=Path, default=results)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.draws)))
        return
    rows = []
    for count in (10, 100, 1000, 10_000):
        command = [sys.executable, __file__, "--one", str(count), "--draws", str(options.draws)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    options.output.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n")
    print(
        "| clients | rows | data | peak above ten clients | of the data | layout, run | clients seen"
    )
    for r in rows[1:]:
        above = r["peak_bytes"] - rows[0]["peak_bytes"]
        print(
            f"| {r['clients']:,} | {r['rows']:,} | {r['data_bytes'] / 1e6:.0f} MB | "
            f"{above / 1e6:.0f} MB | {above / r['data_bytes']:.2f} | {r['layout_seconds']:.1f} s, "
            f"{r['sample_seconds']:.0f} s | {r['seen']:,} in {r['visits']:,} visits | "
            f"{r['setup_bytes'] / 1e6:.2f} MB | {r['visit_bytes_per_effective'] / 1e3:.1f} kB | "
            f"{r['law']:.2f} | {r['sd']:.3f} ± {r['sd_error']:.3f} | {r['surrogate']} |"
        )


if __name__ == "__main__":
    main()
