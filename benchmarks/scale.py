"""What streaming, storing and saving cost.

``python benchmarks/scale.py`` prints the table and writes it to ``docs/results/scale.md``. Wall time
of runs of two lengths, the least of several rounds in which all take turns, and their difference.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from speed import RNG, perceptron

import stochgrad

SIZE, WIDTH = 240_000, 784


def took(run, length):
    begun = time.perf_counter()
    run(length)
    return time.perf_counter() - begun


def slopes(contenders, short, long, rounds):
    """Seconds for each further draw, of each contender, from the least times of either length."""
    for run in contenders.values():
        run(short)
    least = {name: [np.inf, np.inf] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            least[name] = [
                min(before, took(run, length))
                for before, length in zip(least[name], (short, long), strict=True)
            ]
    return {name: (b - a) / (long - short) for name, (a, b) in least.items()}


def streaming(folder, rounds):
    """A perceptron on ten times the rows that two super-blocks hold."""
    _, log_prior, log_likelihood, init = perceptron()
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (SIZE, WIDTH))
    for start in range(0, SIZE, 10_000):
        x[start : start + 10_000] = RNG.standard_normal((10_000, WIDTH), np.float32)
    x.flush()
    y = RNG.integers(0, 10, SIZE).astype(np.int32)
    np.save(folder / "y.npy", y)
    source = tuple(np.load(folder / name, mmap_mode="r") for name in ("x.npy", "y.npy"))
    make = lambda data, **options: stochgrad.sgld(
        stochgrad.posterior(log_prior, log_likelihood, data, batch_size=256, **options), 1e-7
    )
    resident = SIZE * WIDTH * 4 // 20
    kernels = {
        "in memory": make((np.asarray(x), y)),
        "streamed": make(source, order="streamed", resident_bytes=resident),
    }

    def run(kernel):
        return lambda n: stochgrad.sample(
            jax.random.key(0), kernel, init=init, num_samples=n, progress=False, collect=first
        )

    contenders = {name: run(kernel) for name, kernel in kernels.items()}
    found = slopes(contenders, 100, 1600, rounds)
    return (
        found,
        f"{SIZE * WIDTH * 4 / 1e6:.0f} MB of data, super-blocks of {resident / 1e6:.1f} MB",
    )


def first(state):
    return state.position["b2"]


def machinery(folder, rounds):
    """Storing all draws, a checkpoint a minute and a progress bar, on a step of 100 microseconds."""
    x = RNG.normal(size=(100_000, 50)).astype(np.float32)
    y = (RNG.random(100_000) < 0.5).astype(np.float32)

    def log_likelihood(t, batch):
        logit = batch[0] @ t
        return batch[1] * logit - jax.nn.softplus(logit)

    target = stochgrad.posterior(
        lambda t: -0.5 * jnp.sum(t**2), log_likelihood, (x, y), batch_size=4000
    )
    kernel = stochgrad.sghmc(target, 1e-4, 10.0)

    def run(n, **options):
        for name in ("draws.zarr", "state"):
            shutil.rmtree(folder / name, ignore_errors=True)
        stochgrad.sample(
            jax.random.key(0), kernel, init=jnp.zeros(50), num_samples=n, thin=10, **options
        )

    disk = {"store": folder / "draws.zarr", "checkpoint": folder / "state", "every": 60.0}
    contenders = {
        "neither": lambda n: run(n, progress=False),
        "progress bar": lambda n: run(n),
        "bar, store, checkpoint": lambda n: run(n, **disk),
    }
    found = slopes(contenders, 500, 6_500, rounds)
    return {name: seconds / 10 for name, seconds in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("docs/results/scale.md"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        streams, note = streaming(Path(folder), options.rounds)
        costs = machinery(Path(folder), options.rounds)
    lines = [
        "# What streaming, storing and saving cost",
        "",
        "Made by `python benchmarks/scale.py`: wall time that a further step takes, from the "
        f"least of {options.rounds} rounds in which all take turns, on 2 cores.",
        "",
        f"Multilayer perceptron, d = 79,510, batch 256, {note}:",
        "",
        "| data | µs a step | speed |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {seconds * 1e6:.0f} | {streams['in memory'] / seconds:.2f} |"
            for name, seconds in streams.items()
        ),
        "",
        "Logistic regression, d = 50, batch 4,000, all draws kept, one of ten steps:",
        "",
        "| with | µs a step | of neither |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {seconds * 1e6:.1f} | {seconds / costs['neither']:.3f} |"
            for name, seconds in costs.items()
        ),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
