"""How near an accelerator's ceilings the sampler comes.

``python benchmarks/gpu.py`` on a machine with an accelerator prints the tables and writes them to
``docs/gpu.md``. Steps a second against the number of chains and the dimension, beside what memory
bandwidth and arithmetic, measured in the same run, allow; blackjax's scan on the same work; noise
generators; contiguous blocks against gathered rows; single precision against bfloat16 states with
stochastic rounding. ``--smoke`` runs small sizes on whatever device there is, to see that it works.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

import stochgrad
from stochgrad.core._noise import discrete, normal

RNG = np.random.default_rng(0)


def seconds(function, *args, repeat=5):
    """Least wall time of a call, after one that compiles."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begun)
    return min(times)


def bandwidth(size):
    """Bytes a second of a copy that is read and written once."""
    x = jnp.zeros(size, jnp.float32)
    return 2 * x.nbytes / seconds(jax.jit(lambda x: x + 1), x)


def arithmetic(n):
    """Single-precision operations a second of a matrix product."""
    a = jnp.ones((n, n), jnp.float32)
    return 2 * n**3 / seconds(jax.jit(jnp.matmul), a, a)


def logistic(size, dim):
    x = RNG.standard_normal((size, dim), np.float32)
    y = (RNG.random(size) < 0.5).astype(np.float32)

    def log_prior(w):
        return -0.5 * jnp.sum(w**2)

    def log_likelihood(w, batch):
        logit = batch[0] @ w
        return batch[1] * logit - jax.nn.softplus(logit)

    return (x, y), log_prior, log_likelihood


def steps_a_second(kernel, init, chains, steps, share):
    run = partial(
        stochgrad.sample, jax.random.key(0), kernel, init=init, num_chains=chains,
        share_batches=share, progress=False, num_samples=2, chunk_size=2,
        collect=lambda state: jax.tree.map(lambda x: x.ravel()[:1], state.position),
    )  # fmt: skip
    long, short = (seconds(lambda n=n: run(thin=n).positions, repeat=3) for n in (steps, 1))
    return 2 * (steps - 1) / max(long - short, 1e-9)


def blackjax_steps_a_second(work, batch_size, dim, chains, steps, step_size=1e-6):
    (x, y), log_prior, log_likelihood = work
    x, y = jnp.asarray(x), jnp.asarray(y)
    gradient = blackjax.sgmcmc.gradients.grad_estimator(
        log_prior, lambda w, row: log_likelihood(w, row), len(x)
    )
    algorithm = blackjax.sgld(gradient)

    @jax.jit
    def run(keys, positions, x, y):
        def one(key, position):
            def step(position, key):
                rows_key, noise_key = jax.random.split(key)
                rows = jax.random.randint(rows_key, (batch_size,), 0, len(x))
                return algorithm.step(noise_key, position, (x[rows], y[rows]), step_size), None

            return jax.lax.scan(step, position, jax.random.split(key, steps))[0]

        return jax.vmap(one)(keys, positions)

    keys = jax.random.split(jax.random.key(0), chains)
    return steps / seconds(run, keys, jnp.zeros((chains, dim)), x, y, repeat=3)


def chains_table(chain_counts, dims, size, batch_size, steps, ceilings):
    """Steps a second, and the share of the resource that binds."""
    lines = [
        "| dim | chains | steps/s | of the ceiling | which | blackjax, steps/s | ours over it |"
    ]
    lines += ["| --- " * 7 + "|"]
    memory, flops = ceilings
    for dim in dims:
        work = logistic(size, dim)
        data, log_prior, log_likelihood = work
        target = stochgrad.posterior(log_prior, log_likelihood, data, batch_size=batch_size)
        kernel = stochgrad.sgld(target, 1e-6)
        for chains in chain_counts:
            ours = steps_a_second(kernel, jnp.zeros(dim), chains, steps, share=True)
            # position read and written, gradient kept; two products of batch, dim and chains
            bytes_moved = 4 * (4 * chains * dim + batch_size * (dim + 1))
            operations = 4 * batch_size * dim * chains
            limits = {"memory": memory / bytes_moved, "arithmetic": flops / operations}
            which = min(limits, key=lambda name: limits[name])
            rival = "", ""
            if chains <= 1024:
                theirs = blackjax_steps_a_second(work, batch_size, dim, chains, max(steps // 10, 2))
                rival = f"{theirs:,.0f}", f"{ours / theirs:.1f}"
            lines.append(
                f"| {dim} | {chains:,} | {ours:,.0f} | {ours / limits[which]:.2f} | {which} "
                f"| {rival[0]} | {rival[1]} |"
            )
    return lines


def noise_table(size, memory):
    lines = ["| noise | numbers/s | of a copy's bandwidth |", "| --- | --- | --- |"]
    generators = {
        "normal, ours": jax.jit(lambda key: normal(key, size)),
        "discrete, ours": jax.jit(lambda key: discrete(key, size)),
        "jax.random.normal, threefry": jax.jit(lambda key: jax.random.normal(key, (size,))),
    }
    for name, generate in generators.items():
        took = seconds(generate, jax.random.key(0))
        lines.append(f"| {name} | {size / took:.3g} | {4 * size / took / memory:.2f} |")
    took = seconds(generators["jax.random.normal, threefry"], jax.random.key(0, impl="rbg"))
    lines.append(f"| jax.random.normal, rbg | {size / took:.3g} | {4 * size / took / memory:.2f} |")
    return lines


def layout_table(size, dim, batch_size, chains, steps):
    lines = ["| layout | steps/s |", "| --- | --- |"]
    data, log_prior, log_likelihood = logistic(size, dim)
    for layout in ("blocks", "rows"):
        target = stochgrad.posterior(
            log_prior, log_likelihood, data, batch_size=batch_size, layout=layout
        )
        kernel = stochgrad.sgld(target, 1e-6)
        found = steps_a_second(kernel, jnp.zeros(dim), chains, steps, share=False)
        lines.append(f"| {layout} | {found:,.0f} |")
    return lines


def rounded(key, x):
    """Single precision to bfloat16, up or down at random so that the mean is right."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(kept, jnp.float32).astype(jnp.bfloat16)


def precision_table(chains, dim, steps):
    """A bare Langevin step on a Gaussian, its state in single precision or in bfloat16."""
    lines = ["| state | steps/s | variance (1 is right) |", "| --- | --- | --- |"]

    def run(dtype, key):
        def step(i, x):
            noise_key, round_key = jax.random.split(jax.random.fold_in(key, i))
            y = x.astype(jnp.float32)
            xi = normal(noise_key, x.size).reshape(x.shape)
            y = y - 0.05 * y + jnp.sqrt(0.1) * xi
            return y if dtype == jnp.float32 else rounded(round_key, y)

        return jax.lax.fori_loop(0, steps, step, jnp.zeros((chains, dim), dtype))

    for dtype in (jnp.float32, jnp.bfloat16):
        go = jax.jit(partial(run, dtype))
        took = seconds(go, jax.random.key(0), repeat=3)
        variance = float(jnp.var(go(jax.random.key(1)).astype(jnp.float32))) * (1 - 0.05 / 2)
        lines.append(f"| {jnp.dtype(dtype).name} | {steps / took:,.0f} | {variance:.3f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--output", type=Path, default=Path("docs/gpu.md"))
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu" and not options.smoke:
        parser.error("there is no accelerator here; --smoke runs on the CPU")
    small = options.smoke
    ceilings = bandwidth(2**22 if small else 2**28), arithmetic(512 if small else 8192)
    chains = [1, 16] if small else [4**i for i in range(9)]
    dims = [10] if small else [10, 50, 250]
    size, batch_size, steps = (10_000, 100, 50) if small else (1_000_000, 500, 2000)
    lines = [
        "# On an accelerator",
        "",
        f"Made by `python benchmarks/gpu.py` on one {device.device_kind}, jax {jax.__version__}. "
        f"Measured in the same run: a copy moves {ceilings[0] / 1e9:,.0f} GB/s, a matrix product "
        f"does {ceilings[1] / 1e12:,.2f} Tflop/s.",
        "",
        f"## Logistic regression, N = {size:,}, batch {batch_size}, SGLD, shared minibatches",
        "",
        *chains_table(chains, dims, size, batch_size, steps, ceilings),
        "",
        "## Noise",
        "",
        *noise_table(2**20 if small else 2**26, ceilings[0]),
        "",
        "## Blocks against gathered rows, minibatches of their own",
        "",
        *layout_table(size, 50, batch_size, 16 if small else 256, steps),
        "",
        "## Precision of the state",
        "",
        *precision_table(16 if small else 65_536, 50, steps),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if not small:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
