"""Data larger than the memory they are given, and a run that is killed half-way.

Simulates a table of clicks on disk (logistic regression, 5,000,000 rows of 20 numbers, 400 MB),
samples its posterior with two 16 MB super-blocks in memory, kills the run without warning, goes on
from its checkpoint, and draws what happened.

    python examples/large.py            # some two minutes on two cores
    python examples/large.py --smoke    # a small table, under a minute
"""

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xarray

import stochgrad

DIM = 20
RNG = np.random.default_rng(20)
TRUTH = RNG.normal(scale=0.3, size=DIM).astype(np.float32)


def simulate(folder, size):
    """A table of clicks: sorted by time, over which habits drift, as a real log would be."""
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (size, DIM))
    y = np.lib.format.open_memmap(folder / "y.npy", "w+", np.float32, (size,))
    for first in range(0, size, 100_000):
        rows = slice(first, min(first + 100_000, size))
        some = RNG.standard_normal((rows.stop - first, DIM), np.float32)
        some[:, 0] += 2 * first / size - 1
        some[:, -1] = 1
        x[rows] = some
        y[rows] = RNG.random(len(some)) < 1 / (1 + np.exp(-some @ TRUTH))
    x.flush()
    y.flush()


def log_prior(w):
    """Standard normal coefficients."""
    return -0.5 * jnp.sum(w**2)


def log_likelihood(w, batch):
    """Of each row's click."""
    x, y = batch
    logit = x @ w
    return y * logit - jax.nn.softplus(logit)


def target(folder, resident_bytes):
    """The posterior, its data on disk."""
    data = tuple(np.load(folder / name, mmap_mode="r") for name in ("x.npy", "y.npy"))
    return stochgrad.posterior(
        log_prior, log_likelihood, data, batch_size=2000, order="streamed",
        resident_bytes=resident_bytes,
    )  # fmt: skip


def run(folder, resident_bytes, num_samples):
    """The whole job, which goes on wherever it was stopped: the same call each time."""
    posterior = target(folder, resident_bytes)
    center = stochgrad.find_center(
        jax.random.key(0), posterior, init=jnp.zeros(DIM), num_steps=1000, learning_rate=0.02
    )
    gradient = stochgrad.control_variate(posterior, center)
    mass = stochgrad.find_mass(jax.random.key(1), posterior, center)
    kernel = stochgrad.sghmc(gradient, 0.4, 2 * mass, mass=mass, integrator="BAOAB")
    return stochgrad.sample(
        jax.random.key(2),
        kernel,
        init=center,
        num_samples=num_samples,
        thin=4,
        num_chains=2,
        store=folder / "draws.zarr",
        checkpoint=folder / "checkpoint",
        every=2.0,
        resume=True,
    )


class Watch:
    """Notes, ten times a second, private memory and how many draws a reader of the store sees."""

    def __init__(self, folder):
        self.folder, self.notes, self.going = folder, [], True
        self.begun = time.monotonic()
        self.pid = None
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self):
        while self.going:
            time.sleep(0.1)
            pid = self.pid
            self.notes.append((time.monotonic() - self.begun, private(pid), self.draws()))

    def draws(self):
        if not (self.folder / "draws.zarr" / "posterior").exists():
            return 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with xarray.open_datatree(self.folder / "draws.zarr", engine="zarr") as tree:
                    return tree["posterior"].sizes["draw"] if "posterior" in tree else 0
            except (KeyError, OSError, ValueError):
                return 0


def private(pid):
    """Megabytes of private memory of a process; NaN where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return float("nan")
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
    return kilobytes[0] / 1024 if kilobytes else float("nan")


def laplace(folder, size):
    """The posterior's Gaussian approximation at its mode: two Newton steps from the truth."""
    x, y = (np.load(folder / name, mmap_mode="r") for name in ("x.npy", "y.npy"))
    w = TRUTH.astype(np.float64)
    for _ in range(2):
        g, h = -w, np.eye(DIM)
        for first in range(0, size, 100_000):
            a = np.asarray(x[first : first + 100_000])
            p = 1 / (1 + np.exp(-a @ w.astype(np.float32)))
            g = g + a.T @ (y[first : first + 100_000] - p)
            h = h + (a * (p * (1 - p))[:, None]).T @ a
        w = w + np.linalg.solve(h, g)
    return w, np.sqrt(np.diag(np.linalg.inv(h)))


def picture(path, notes, killed, draws, mode, sd, megabytes, resident):
    """Draws over time, memory over time, and the posterior they add up to."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    when, memory, seen = (np.array(column) for column in zip(*notes, strict=True))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    left.plot(when, seen, color="C0")
    left.axvline(killed, color="C3", ls="--", lw=1)
    left.text(killed, left.get_ylim()[1] * 0.97, " killed", color="C3", va="top")
    left.set(xlabel="seconds", ylabel="draws a chain that a reader sees")
    left.set_title("Killed, and on again")
    middle.plot(when, memory, color="C1")
    middle.text(
        when[-1], np.nanmax(memory), "process, jax and all ", va="bottom", ha="right", color="C1"
    )
    for value, name, color in (
        (megabytes, "data", "0.4"),
        (2 * resident, "two super-blocks", "C2"),
    ):
        middle.axhline(value, color=color, lw=1)
        middle.text(0, value, f" {name}", va="bottom", color=color)
    middle.set(xlabel="seconds", ylabel="MB", ylim=(0, megabytes * 1.1))
    middle.set_title("Private memory")
    z = (draws - mode) / sd
    middle_of, low, high = z.mean(axis=0), *np.quantile(z, [0.05, 0.95], axis=0)
    place = np.arange(DIM)
    right.fill_between([-0.5, DIM - 0.5], -1.645, 1.645, color="0.9", label="Gaussian at the mode")
    right.errorbar(
        place, middle_of, yerr=[middle_of - low, high - middle_of], fmt="o", ms=4, label="draws"
    )
    right.plot(place, (TRUTH - mode) / sd, "x", color="C3", label="truth")
    right.set(xlabel="coefficient", ylabel="posterior sds from the mode", xlim=(-0.5, DIM - 0.5))
    right.set_xticks(place[::2])
    right.set_title("90% intervals")
    right.legend(fontsize=8, ncols=3, loc="lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    """Simulate, sample, kill, go on, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small table")
    parser.add_argument("--output", type=Path, default=Path("examples/output/large.png"))
    options = parser.parse_args()
    size, resident, num_samples = (
        (200_000, 2**20, 1000) if options.smoke else (5_000_000, 2**24, 4000)
    )
    folder = Path(tempfile.mkdtemp())
    try:
        simulate(folder, size)
        megabytes = size * (DIM + 1) * 4 / 2**20
        print(
            f"{size:,} rows on disk, {megabytes:.0f} MB; super-blocks of {resident / 2**20:.0f} MB"
        )
        watch = Watch(folder)
        context = multiprocessing.get_context("spawn")
        first = context.Process(target=run, args=(folder, resident, num_samples))
        first.start()
        watch.pid = first.pid
        while watch.draws() < num_samples // 3 and first.is_alive():
            time.sleep(0.1)
        first.kill()
        first.join()
        killed, seen = time.monotonic() - watch.begun, watch.draws()
        print(f"killed after {killed:.0f} s: the store holds {seen} draws a chain")

        second = context.Process(target=run, args=(folder, resident, num_samples))
        second.start()
        watch.pid = second.pid
        second.join()
        watch.going = False
        watch.thread.join()
        if second.exitcode:
            sys.exit(second.exitcode)
        with xarray.open_datatree(folder / "draws.zarr", engine="zarr") as tree:
            draws = tree["posterior"]["x"].values
        flat = draws.reshape(-1, DIM)
        print(f"on again, and done: {draws.shape[1]} draws for each of {draws.shape[0]} chains")
        mode, sd = laplace(folder, size)
        shift = np.sqrt(np.mean(((flat.mean(axis=0) - mode) / sd) ** 2))
        ratio = np.median(flat.std(axis=0) / sd)
        print(
            f"against the Gaussian at the mode: means differ by {shift:.3f} sds (rms), "
            f"sds {ratio:.3f} times (median)"
        )
        resident_mb = resident / 2**20
        picture(options.output, watch.notes, killed, flat, mode, sd, megabytes, resident_mb)
        print(f"wrote {options.output}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
