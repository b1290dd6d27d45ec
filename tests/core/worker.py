"""A run in a process of its own, for tests that kill it or start several.

``python worker.py '{"checkpoint": ..., ...}'``, or ``main`` in a forked process, runs the model
below and saves the draws.
"""

import functools
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xarray  # noqa: F401  for processes that are forked from one that has imported it
import zarr  # noqa: F401

import stochgrad


def target(**options):
    """A Gaussian mean in three dimensions, by minibatches."""
    x = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    return stochgrad.posterior(
        lambda m: -0.5 * jnp.sum(m**2),
        lambda m, x: -0.5 * jnp.sum((x - m[None]) ** 2, axis=-1),
        x,
        batch_size=50,
        **options,
    )


@functools.cache
def kernel():
    return stochgrad.sghmc(target(), 0.005, 60.0, integrator="BAOAB")


def run(num_samples=400, num_chains=4, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stochgrad.GradientNoiseWarning)
        return stochgrad.sample(
            jax.random.key(3),
            kernel(),
            init=jnp.zeros(3),
            num_samples=num_samples,
            num_warmup=20,
            thin=2,
            num_chains=num_chains,
            progress=False,
            **options,
        )


def die_at(count: int) -> None:
    """Kill this process, as SIGKILL does, at the n-th opening or renaming of a file from now."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        writes = os.O_WRONLY | os.O_RDWR
        written = event == "os.rename" or (event == "open" and args[2] & writes)
        if written:
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(options):
    process, address = options.pop("process", None), options.pop("address", None)
    out, death = options.pop("out", None), options.pop("die_at", None)
    if cache := options.pop("cache", None):
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if process is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, 2, process)
    if death is not None:
        kernel()
        die_at(death)
    draws = run(**options)
    if out is not None:
        np.save(Path(out), np.asarray(draws.positions))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
