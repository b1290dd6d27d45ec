"""The device itself: its ceilings, whether it samples the right law, and its noise."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import stochgrad
from stochgrad.core import Noise, Posterior
from stochgrad.core._noise import discrete, normal, quantized

from .measure import PRECISIONS, Figure, copy_bandwidth, matmul_flops, seconds

STEP, FRICTION = 0.3, 0.7


def ceilings(small: bool) -> Iterator[Figure]:
    yield Figure({"of": "copy"}, lambda: {"bytes_per_s": copy_bandwidth(small)})
    for kind in PRECISIONS:
        yield Figure(
            {"of": f"matmul {kind}"}, lambda kind=kind: {"flops": matmul_flops(kind, small)}
        )


def gaussian(dtype=jnp.float32):
    """N(0, 1) as a posterior whose gradient is worked out in ``dtype``."""
    return stochgrad.posterior(
        lambda q: -0.5 * (q.astype(dtype) ** 2).astype(jnp.float32),
        lambda q, batch: jnp.zeros(batch.shape[0]),
        jnp.zeros(8),
        order="full",
    )


def kernels(target: Posterior, noise: Noise) -> dict:
    """Kernels on N(0, 1), each with the second moment of its stationary law."""
    h, friction = STEP, FRICTION
    underdamped = 2 * (2 - h * friction) / (4 - 2 * h * friction - h**2)
    return {
        "sgld": (stochgrad.sgld(target, h, noise=noise), 1 / (1 - h / 2)),
        "sghmc": (stochgrad.sghmc(target, h, friction, noise=noise), underdamped),
    }


SQUARES = stochgrad.Online(lambda q: jnp.zeros(()), lambda total, q: total + q**2)


def second_moment(kernel, expected: float, small: bool, seeds: int = 3) -> dict:
    """Mean square over chains that have forgotten their start, against what it should be."""
    chains, draws = (2000 if small else 20_000), 200
    means, errors = [], []
    for seed in range(seeds):
        run = stochgrad.sample(
            jax.random.key(seed),
            kernel,
            init=jnp.zeros(chains),
            num_samples=draws,
            num_warmup=300,
            num_chains=chains,
            collect=SQUARES,
            progress=False,
        )
        of_chain = np.asarray(run.summary, np.float64) / draws
        means.append(of_chain.mean())
        errors.append(of_chain.std(ddof=1) / np.sqrt(chains))
    z = (np.array(means) - expected) / errors
    return {
        "second_moment": float(np.mean(means)),
        "expected": expected,
        "z": z.tolist(),
        "z_together": float(z.sum() / np.sqrt(seeds)),
    }


def correct(small: bool) -> Iterator[Figure]:
    noises: tuple[Noise, ...] = ("normal", "quantized")
    for noise in noises:
        for name, (kernel, expected) in kernels(gaussian(), noise).items():
            yield Figure(
                {"kernel": name, "noise": noise}, partial(second_moment, kernel, expected, small)
            )


def noise(small: bool) -> Iterator[Figure]:
    size = 2**20 if small else 2**27
    by_jax = lambda key, size: jax.random.normal(key, (size,))
    generators = {
        "normal": (normal, "threefry2x32"),
        "quantized": (quantized, "threefry2x32"),
        "discrete": (discrete, "threefry2x32"),
        "jax.random.normal, threefry": (by_jax, "threefry2x32"),
        "jax.random.normal, rbg": (by_jax, "rbg"),
    }

    def figures(generate, impl):
        took = seconds(jax.jit(lambda key: generate(key, size)), jax.random.key(0, impl=impl))
        return {"numbers_per_s": size / took, "share": 4 * size / took / copy_bandwidth(small)}

    for name, entry in generators.items():
        yield Figure({"generator": name}, partial(figures, *entry))
