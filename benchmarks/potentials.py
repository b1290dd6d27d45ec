"""What it costs to sample network potentials, and to run dynamics under many of them.

    python benchmarks/potentials.py

Two ratios, each of the best of several alternating rounds, compilation left out, on the coarse-
grained alanine dipeptide of the examples (5,000 frames, 54-64-64-1 network, minibatches of 64),
with two devices of one CPU core each:

- a step of 8 pSGLD chains over a step of 8 Adam runs, vmapped alike, each kernel adapted;
- molecular dynamics of 8 networks x 16 replicas in one program over a loop that runs network after
  network, replicas vmapped; and over a loop over networks and replicas, one trajectory at a time.
"""

import argparse
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stochgrad
from stochgrad import potentials

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _alanine import KT, MASSES, energy_of, load


def seconds_of_steps(kernel, init, steps: int, chains: int, share: bool) -> float:
    """Of a second run, whose programs are compiled."""
    run = partial(
        stochgrad.sample,
        jax.random.key(1),
        kernel,
        init=init,
        num_samples=4,
        thin=steps // 4,
        num_chains=chains,
        share_batches=share,
        progress=False,
    )
    return run().timings["sample"]


def sampling(target, start, steps: int, rounds: int, share: bool) -> None:
    """Microseconds a step of each kernel, and their ratios to Adam's."""
    kernels = {
        "Adam": stochgrad.ascend(target, optax.adam(1e-4)),
        "pSGLD": stochgrad.psgld(target, 1e-6, correction=False, adapt_steps=10),
        "pSGLD, discrete noise": stochgrad.psgld(
            target, 1e-6, correction=False, adapt_steps=10, noise="discrete"
        ),
        "SGHMC, BAOAB": stochgrad.sghmc(target, 1e-4, 10.0, mass=1.0, integrator="BAOAB"),
    }
    best = dict.fromkeys(kernels, np.inf)
    for _ in range(rounds + 1):  # the first compiles
        for name, kernel in kernels.items():
            best[name] = min(best[name], seconds_of_steps(kernel, start, steps, 8, share))
    print(f"8 chains, minibatches {'shared' if share else 'of their own'}:")
    for name, seconds in best.items():
        ratio = seconds / best["Adam"]
        print(f"  {name:24s} {seconds / steps * 1e6:8.0f} us a step   {ratio:5.2f} x Adam")


def dynamics(energy, params, starts, steps: int, rounds: int) -> None:
    """Throughput in one program over that of loops."""
    options = {
        "masses": MASSES,
        "kT": KT,
        "time_step": 0.003,
        "friction": 5.0,
        "num_frames": 4,
        "steps_per_frame": steps // 4,
    }

    def simulated(params, starts):
        begun = time.perf_counter()
        potentials.simulate(jax.random.key(2), energy, params, starts, **options)
        return time.perf_counter() - begun

    def one(n):
        return jax.tree.map(lambda x: x[n : n + 1], params)

    count = jax.tree.leaves(params)[0].shape[0]
    seconds = {
        "one program": lambda: simulated(params, starts),
        "loop over networks": lambda: sum(simulated(one(n), starts) for n in range(count)),
        "loop over trajectories": lambda: (
            count * len(starts) / 4 * sum(simulated(one(n), starts[:1]) for n in range(4))
        ),
    }
    best = dict.fromkeys(seconds, np.inf)
    for _ in range(rounds + 1):
        for name, run in seconds.items():
            best[name] = min(best[name], run())
    print(f"{count} networks x {len(starts)} replicas:")
    for name, taken in best.items():
        each = taken / steps / count / len(starts) * 1e6
        ratio = taken / best["one program"]
        print(f"  {name:24s} {each:8.2f} us a step and system   {ratio:5.2f} x one program")


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)  # chains and networks are spread over both cores
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore", stochgrad.GradientNoiseWarning)  # steps are timed, not drawn
    steps, rounds = (40, 1) if asked.smoke else (asked.steps, asked.rounds)
    data = load()
    energy, init = energy_of(data.train)
    target = potentials.force_matching(
        energy,
        data.train,
        init=init,
        noise=potentials.learned(np.full(10, 200.0)),
        prior="scaled",
        batch_size=64,
    )
    found = potentials.networks(
        jax.random.key(0),
        target,
        train_steps=20 if asked.smoke else 2000,
        learning_rate=3e-3,
        share_batches=True,
    )
    start = jax.tree.map(jnp.asarray, found.trained)
    for share in (True, False):
        sampling(target, start, steps, rounds, share)
    dynamics(energy, found.members()["params"], data.train.positions[:16], steps, rounds)


if __name__ == "__main__":
    main()
