"""Samplers beside the bare gradient and blackjax's scan."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

import stochgrad
from stochgrad.core import Posterior

from .. import speed
from .device import gaussian, kernels, second_moment
from .measure import Figure, against, rate, sampling, seconds, wall

BARE, RIVAL = "bare gradient", "blackjax sgld, scan"


def floor(target, init, chains: int, steps: int, small: bool) -> dict:
    """Gradients on one fixed minibatch, shared, and no sampler."""
    batch, _ = target.batches.next(target.batches.init(jax.random.key(0)))
    loop = speed.bare_gradient(jax.grad(target.log_density), batch, init, chains, inner=steps)
    return rate(partial(wall, loop), steps, small)


class Regression(NamedTuple):
    """A logistic regression and the steps that are timed at once."""

    dim: int
    batch_size: int
    steps: int
    target: Posterior
    work: tuple
    small: bool

    def ours(self, kernel, chains: int, share: bool, states: int) -> dict:
        """``states``: how many arrays of the position's size a step reads, and writes."""
        run = sampling(kernel, jnp.zeros(self.dim), chains, self.steps, share)
        number = chains * self.dim
        rows = self.batch_size * (self.dim + 1) * (1 if share else chains)
        # the gradient is written by a product and read by the update
        least = 4 * ((2 * states + 2) * number + rows)
        # products called one by one: positions and rows once more, logits in and out twice
        products = least + 4 * (number + rows + 4 * self.batch_size * chains)
        figures = rate(run, self.steps, self.small)
        operations = 4 * self.batch_size * number
        return against(figures, self.small, operations, memory=least, products=products)

    def floor(self, chains: int) -> dict:
        return floor(self.target, jnp.zeros(self.dim), chains, self.steps, self.small)

    def rival(self, chains: int) -> dict:
        data, log_prior, log_likelihood, _ = self.work
        run = speed.blackjax_scan(
            log_prior,
            lambda t, row: log_likelihood(t, row),
            data,
            self.batch_size,
            jnp.zeros(self.dim),
            chains,
            1e-6,
        )
        return {"steps_per_s": 2 * self.steps / seconds(run, 2 * self.steps, repeat=2)}

    def contenders(self, chains: int) -> dict[str, Callable[[], dict]]:
        sgld, sghmc = stochgrad.sgld(self.target, 1e-6), stochgrad.sghmc(self.target, 1e-4, 10.0)
        entries = {
            BARE: partial(self.floor, chains),
            "sgld, shared": partial(self.ours, sgld, chains, True, 1),
            "sghmc, shared": partial(self.ours, sghmc, chains, True, 2),
        }
        if chains <= 1024:
            entries[RIVAL] = partial(self.rival, chains)
        if chains <= 4096:  # minibatches of their own for more do not fit in memory
            entries["sgld, own"] = partial(self.ours, sgld, chains, False, 1)
            entries["sghmc, own"] = partial(self.ours, sghmc, chains, False, 2)
        return entries


def logistic(small: bool) -> Iterator[Figure]:
    """N = 1,000,000, minibatches of 500, 1 to 65,536 chains."""
    size, batch_size, steps = (10_000, 100, 10) if small else (1_000_000, 500, 100)
    sizes = [(50, 4096), (50, 256), (250, 4096), (250, 256), (50, 65_536), (50, 1), (250, 65_536)]
    sizes += [(50, 16), (250, 1), (250, 16), (50, 1024), (250, 1024)]

    @cache
    def regression(dim):
        work = speed.logistic(size, dim)
        data, log_prior, log_likelihood, _ = work
        target = stochgrad.posterior(log_prior, log_likelihood, data, batch_size=batch_size)
        return Regression(dim, batch_size, steps, target, work, small)

    for dim, chains in [(10, 16)] if small else sizes:
        for name, measure in regression(dim).contenders(chains).items():
            yield Figure({"dim": dim, "chains": chains, "name": name}, measure)


def network(small: bool) -> Iterator[Figure]:
    """784-100-10, 79,510 weights, minibatches of 256, each chain its own."""
    data, log_prior, log_likelihood, init = speed.perceptron()
    target = stochgrad.posterior(log_prior, log_likelihood, data, batch_size=256)
    steps = 4 if small else 50

    def ours(noise, chains):
        kernel = stochgrad.sghmc(target, 1e-4, 10.0, noise=noise)
        figures = rate(sampling(kernel, init, chains, steps), steps, small)
        moved = 4 * chains * (6 * 79_510 + 256 * 785)
        # forward and backward in the weights, and backward in the hidden layer
        operations = chains * 256 * (4 * 784 * 100 + 6 * 100 * 10)
        return against(figures, small, operations, memory=moved)

    for chains in [2] if small else [1, 16, 128]:
        case = lambda name, chains=chains: {"chains": chains, "name": name}
        yield Figure(case(BARE), partial(floor, target, init, chains, steps, small))
        for noise in ("quantized", "normal", "discrete"):
            yield Figure(case(f"sghmc, {noise}"), partial(ours, noise, chains))


def layouts(small: bool) -> Iterator[Figure]:
    """Contiguous blocks against gathered rows, minibatches of their own."""
    size, batch_size = (10_000, 100) if small else (1_000_000, 500)
    chains, steps = (16, 10) if small else (256, 50)
    data, log_prior, log_likelihood, _ = speed.logistic(size, 50)

    def figures(layout):
        target = stochgrad.posterior(
            log_prior, log_likelihood, data, batch_size=batch_size, layout=layout
        )
        run = sampling(stochgrad.sgld(target, 1e-6), jnp.zeros(50), chains, steps)
        return rate(run, steps, small)

    for layout in ("blocks", "rows"):
        yield Figure({"layout": layout, "chains": chains}, partial(figures, layout))


def cast(tree, dtype):
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if floating(x) else x, tree)


def rounded(key, x):
    """Single precision to bfloat16, up or down at random so that the mean is right."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    high = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(high, jnp.float32).astype(jnp.bfloat16)


def rounded_states(small: bool) -> dict:
    """A bare Langevin step on N(0, 1) whose state is bfloat16, rounded at random."""
    chains, steps, h = (2000 if small else 1_000_000), 300, 0.1

    @jax.jit
    def run(key):
        def step(i, x):
            noise_key, round_key = jax.random.split(jax.random.fold_in(key, i))
            x = x.astype(jnp.float32)
            y = (1 - h / 2) * x + jnp.sqrt(h) * jax.random.normal(noise_key, x.shape)
            return rounded(round_key, y)

        return jax.lax.fori_loop(0, steps, step, jnp.zeros(chains, jnp.bfloat16))

    squares = run(jax.random.key(1)).astype(jnp.float32) ** 2
    expected = 1 / (1 - h / 4)
    moment, error = float(squares.mean()), float(squares.std() / chains**0.5)
    z = (moment - expected) / error
    return {"second_moment": moment, "expected": expected, "z_together": z}


def precision(small: bool) -> Iterator[Figure]:
    """Gradients in bfloat16 with states in float32, against float32."""
    data, log_prior, log_likelihood, init = speed.perceptron()
    steps = 4 if small else 50

    def likelihood(dtype, params, batch):
        return log_likelihood(cast(params, dtype), cast(batch, dtype)).astype(jnp.float32)

    def figures(dtype, chains):
        target = stochgrad.posterior(log_prior, partial(likelihood, dtype), data, batch_size=256)
        kernel = stochgrad.sghmc(target, 1e-4, 10.0)
        return rate(sampling(kernel, init, chains, steps), steps, small)

    for chains in [2] if small else [128, 16]:
        for dtype in (jnp.float32, jnp.bfloat16):
            case = {"work": "network", "chains": chains, "gradients": jnp.dtype(dtype).name}
            yield Figure(case, partial(figures, dtype, chains))
    for dtype in (jnp.float32, jnp.bfloat16):
        kernel, expected = kernels(gaussian(dtype), "normal")["sgld"]
        case = {"work": "N(0, 1), sgld", "gradients": jnp.dtype(dtype).name}
        yield Figure(case, partial(second_moment, kernel, expected, small))
    yield Figure(
        {"work": "N(0, 1), bfloat16 states rounded at random"}, partial(rounded_states, small)
    )
