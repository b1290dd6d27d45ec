"""What a step costs: stochgrad, the bare gradient, and blackjax's SGLD in a scan of one's own.

``python benchmarks/speed.py`` writes ``benchmarks/results/speed.json``, and the page
``docs/results/speed.md`` from it. All contenders take turns in one process, several rounds; a figure is the
median over rounds of the CPU time (all threads) that a step adds, from runs of two lengths, so that
fixed costs fall out.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import stochgrad
from stochgrad.core import Batch

warnings.simplefilter("ignore", stochgrad.GradientNoiseWarning)
warnings.simplefilter("ignore", UserWarning)

RNG = np.random.default_rng(0)
THIN = 10
RESULTS = Path(__file__).parent / "results" / "speed.json"
PAGE = Path(__file__).parents[1] / "docs" / "results" / "speed.md"


def cpu_seconds(function, steps):
    begun = time.process_time()
    jax.block_until_ready(function(steps))
    return time.process_time() - begun


def per_step(function, steps):
    """Microseconds of CPU time that a step adds."""
    return 1e6 * (cpu_seconds(function, 5 * steps) - cpu_seconds(function, steps)) / (4 * steps)


def measure(contenders, steps, rounds):
    """Median and spread over rounds for each contender, taking turns."""
    for name, function in contenders.items():  # compile
        function(steps[name])
    figures = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            figures[name].append(per_step(function, steps[name]))
    return {name: float(np.median(values)) for name, values in figures.items()}


def sampler(kernel, init, chains, share=False):
    def run(steps):
        draws = stochgrad.sample(
            jax.random.key(0),
            kernel,
            init=init,
            num_samples=max(steps // THIN, 1),
            thin=THIN,
            num_chains=chains,
            share_batches=share,
            progress=False,
        )
        return draws.positions

    return run


def over_chains(gradient, init, chains):
    """A gradient of one chain and its position, for several chains on one minibatch."""
    if chains == 1:
        return gradient, init
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (chains, *jnp.shape(x))), init)
    return jax.vmap(gradient, (0, None)), many


def bare_gradient(gradient, batch, init, chains, inner=1):
    """The gradient on one fixed batch, no sampler: the floor.

    With ``inner`` above one, it is called with the number of loops of so many steps: where a loop's
    length is known, an accelerator does not ask the host after each step whether to go on.
    """
    gradient, init = over_chains(gradient, init, chains)

    @jax.jit
    def loop(position, batch, steps):
        def body(_, position):
            g = gradient(position, batch)
            return jax.tree.map(lambda p, g: p + 1e-9 * g, position, g)

        outer = body if inner == 1 else lambda _, p: jax.lax.fori_loop(0, inner, body, p)
        return jax.lax.fori_loop(0, steps, outer, position)

    return lambda steps: loop(init, batch, steps)


def blackjax_scan(log_prior, log_likelihood_of_one, data, batch_size, init, chains, step_size):
    """A user's own scan over blackjax's SGLD: random rows, gathered."""
    size = len(jax.tree.leaves(data)[0])
    gradient = blackjax.sgmcmc.gradients.grad_estimator(log_prior, log_likelihood_of_one, size)
    algorithm = blackjax.sgld(gradient)

    def one_chain(key, position, data, draws):
        def step(position, key):
            batch_key, step_key = jax.random.split(key)
            rows = jax.random.randint(batch_key, (batch_size,), 0, size)
            batch = jax.tree.map(lambda x: x[rows], data)
            return algorithm.step(step_key, position, batch, step_size), None

        def draw(position, key):
            position, _ = jax.lax.scan(step, position, jax.random.split(key, THIN))
            return position, position

        return jax.lax.scan(draw, position, jax.random.split(key, draws))[1]

    run = jax.jit(one_chain, static_argnums=3)
    if chains > 1:
        run = jax.jit(jax.vmap(one_chain, (0, None, None, None)), static_argnums=3)
    data = jax.tree.map(jnp.asarray, data)
    keys = jax.random.split(jax.random.key(0), chains) if chains > 1 else jax.random.key(0)
    return lambda steps: run(keys, init, data, max(steps // THIN, 1))


def logistic(size=100_000, dim=50):
    x = RNG.normal(size=(size, dim)).astype(np.float32)
    y = (RNG.random(size) < 0.5).astype(np.float32)

    def log_prior(t):
        return -0.5 * jnp.sum(t**2)

    def log_likelihood(t, batch):
        x, y = batch
        logit = x @ t
        return y * logit - jax.nn.softplus(logit)

    def model(x, y, minibatch):
        t = numpyro.sample("t", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))
        with numpyro.plate("rows", len(x), subsample_size=minibatch):
            xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", dist.Bernoulli(logits=xb @ t), obs=yb)

    return (x, y), log_prior, log_likelihood, model


def work_a(rounds):
    data, prior, likelihood, model = logistic()
    init, h = jnp.zeros(50), 1e-6
    make = lambda **options: stochgrad.posterior(prior, likelihood, data, batch_size=500, **options)
    blocks, rows = make(), make(layout="rows")
    batch, _ = blocks.batches.next(blocks.batches.init(jax.random.key(0)))
    from_model = stochgrad.from_numpyro(model, *data, minibatch=500)
    contenders, steps = {}, {}
    for chains in (1, 16):
        n = 4000 if chains == 1 else 600
        entries = {
            "bare gradient (floor)": bare_gradient(
                jax.grad(blocks.log_density), batch, init, chains
            ),
            "bare gradient, fresh blocks": fresh_blocks(blocks, init, chains),
            "stochgrad sgld": sampler(stochgrad.sgld(blocks, h), init, chains),
            "stochgrad sghmc": sampler(stochgrad.sghmc(blocks, 1e-3, 10.0), init, chains),
            "stochgrad sgld, numpyro model": sampler(
                stochgrad.sgld(from_model, h), {"t": init}, chains
            ),
            "stochgrad sgld, rows": sampler(stochgrad.sgld(rows, h), init, chains),
            "blackjax sgld, scan": blackjax_scan(
                prior, lambda t, b: likelihood(t, b), data, 500, init, chains, h
            ),
        }
        if chains > 1:
            for name, kernel in (
                ("stochgrad sgld, shared", stochgrad.sgld(blocks, h)),
                ("stochgrad sghmc, shared", stochgrad.sghmc(blocks, 1e-3, 10.0)),
            ):
                entries[name] = sampler(kernel, init, chains, share=True)
        for name, function in entries.items():
            contenders[chains, name], steps[chains, name] = function, n
        steps[chains, "blackjax sgld, scan"] = n // 4
        steps[chains, "stochgrad sgld, rows"] = n // 4
    return measure(contenders, steps, rounds)


def perceptron():
    x = RNG.normal(size=(20_000, 784)).astype(np.float32)
    y = RNG.integers(0, 10, 20_000).astype(np.int32)

    def log_prior(p):
        return -0.5 * sum((jnp.sum(v**2) for v in p.values()), jnp.zeros(()))

    def log_likelihood(p, batch):
        x, y = batch
        hidden = jnp.tanh(x @ p["w1"] + p["b1"])
        logit = jax.nn.log_softmax(hidden @ p["w2"] + p["b2"])
        return jnp.take_along_axis(logit, y[..., None], axis=-1)[..., 0]

    init = {
        "w1": jnp.asarray(0.03 * RNG.normal(size=(784, 100)), jnp.float32),
        "b1": jnp.zeros(100),
        "w2": jnp.asarray(0.1 * RNG.normal(size=(100, 10)), jnp.float32),
        "b2": jnp.zeros(10),
    }
    return (x, y), log_prior, log_likelihood, init


def work_b(rounds):
    (x, y), log_prior, log_likelihood, init = perceptron()
    target = stochgrad.posterior(log_prior, log_likelihood, (x, y), batch_size=256)
    batch, _ = target.batches.next(target.batches.init(jax.random.key(0)))
    contenders, steps = {}, {}
    for chains in (1, 4):
        kernels = {}
        for noise in ("auto", "normal", "discrete"):
            end = "" if noise == "auto" else f", {noise} noise"
            kernels |= {
                f"stochgrad sgld{end}": stochgrad.sgld(target, 1e-7, noise=noise),
                f"stochgrad sghmc{end}": stochgrad.sghmc(target, 1e-4, 10.0, noise=noise),
            }
        entries = {
            "bare gradient (floor)": bare_gradient(
                jax.grad(target.log_density), batch, init, chains
            ),
            "bare gradient, fresh blocks": fresh_blocks(target, init, chains),
            **{name: sampler(kernel, init, chains) for name, kernel in kernels.items()},
            "blackjax sgld, scan": blackjax_scan(
                log_prior, log_likelihood, (x, y), 256, init, chains, 1e-7
            ),
        }
        if chains > 1:
            for name in ("stochgrad sgld", "stochgrad sghmc"):
                entries[f"{name}, shared"] = sampler(kernels[name], init, chains, share=True)
        for name, function in entries.items():
            contenders[chains, name], steps[chains, name] = function, 200 // chains
    return measure(contenders, steps, rounds)


def fresh_blocks(target, init, chains=1):
    """The gradient on another block at each step, no sampler: what the memory alone costs."""
    size, batch_size = target.batches.size, target.batches.batch_size
    gradient, init = over_chains(jax.grad(target.log_density), init, chains)

    @jax.jit
    def loop(position, data, steps):
        def body(i, position):
            start = batch_size * ((i * 7919) % (size // batch_size))
            rows = [jax.lax.dynamic_slice_in_dim(x, start, batch_size) for x in data]
            g = gradient(position, Batch(tuple(rows), jnp.float32(1)))
            return jax.tree.map(lambda p, g: p + 1e-9 * g, position, g)

        return jax.lax.fori_loop(0, steps, body, position)

    return lambda steps: loop(init, target.batches.full.data, steps)


def sizes(rounds):
    """A step's cost against the number of rows."""
    contenders, steps = {}, {}
    for layout in ("blocks", "rows"):
        for size in (10_000, 1_000_000):
            data, prior, likelihood, _ = logistic(size)
            target = stochgrad.posterior(prior, likelihood, data, batch_size=500, layout=layout)
            contenders[layout, size] = sampler(stochgrad.sgld(target, 1e-6), jnp.zeros(50), 1)
            steps[layout, size] = 4000 if layout == "blocks" else 1000
            if layout == "blocks":
                contenders["memory", size] = fresh_blocks(target, jnp.zeros(50))
                steps["memory", size] = 4000
    return measure(contenders, steps, rounds)


def compile_seconds():
    """First call less second call, 16 chains, of a kernel that no other has compiled for."""

    def run_of(dim):
        data, prior, likelihood, _ = logistic(dim=dim)
        target = stochgrad.posterior(prior, likelihood, data, batch_size=500)
        return sampler(stochgrad.sgld(target, 1e-6), jnp.zeros(dim), 16)

    run_of(3)(10)  # imports
    run, times = run_of(50), []
    for _ in range(2):
        begun = time.perf_counter()
        run(10)
        times.append(time.perf_counter() - begun)
    return times[0] - times[1]


def import_seconds(module, runs=7):
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    take = lambda: float(subprocess.check_output([sys.executable, "-c", code]))
    take()
    return float(np.median([take() for _ in range(runs)]))


def table(title, figures, rival="blackjax sgld, scan"):
    lines = [
        f"## {title}",
        "",
        "| chains | | µs a step | of the floor | faster than blackjax |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (chains, name), value in figures.items():
        floor = figures[chains, "bare gradient (floor)"]
        lines.append(
            f"| {chains} | {name} | {value:.1f} | {value / floor:.2f} "
            f"| {figures[chains, rival] / value:.1f} |"
        )
    return [*lines, ""]


def run(rounds):
    """All figures, under the machine and the versions that gave them."""
    device = jax.devices()[0]

    def by_name(figures):
        return {" | ".join(map(str, key)): value for key, value in figures.items()}

    return {
        "compile_seconds": compile_seconds(),  # first: later its program would be there already
        "rounds": rounds,
        "machine": f"{platform.machine()}, {len(jax.devices())} {device.platform} device",
        "versions": {m.__name__: m.__version__ for m in (jax, blackjax, numpyro)},
        "logistic": by_name(work_a(rounds)),
        "perceptron": by_name(work_b(rounds)),
        "sizes": by_name(sizes(rounds)),
        "import_seconds": {m: import_seconds(m) for m in ("jax", "stochgrad")},
    }


def page(results):
    def figures(section, kind=int):
        split = {tuple(key.split(" | ")): value for key, value in results[section].items()}
        return {(kind(a), b): value for (a, b), value in split.items()}

    a, b, by_size = figures("logistic"), figures("perceptron"), figures("sizes", str)
    seconds, imports = results["compile_seconds"], results["import_seconds"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Speed",
        "",
        "Made by `python benchmarks/speed.py`: CPU time (all threads) that a step of all chains adds,",
        f"median of {results['rounds']} rounds in which all contenders take turns in one process; "
        "thin 10.",
        f"{results['machine']}, {versions}.",
        "Every figure is a ratio's material: compare within a table, not across machines. The floor is "
        "the gradient on one minibatch that stays in the cache; fresh blocks are what a minibatch of "
        "its own at each step costs before there is any sampler.",
        "",
        *table("Bayesian logistic regression, N = 100,000, d = 50, batch 500", a),
        f"The numpyro model costs {a[1, 'stochgrad sgld, numpyro model'] / a[1, 'stochgrad sgld']:.2f} "
        "times the plain one with 1 chain, "
        f"{a[16, 'stochgrad sgld, numpyro model'] / a[16, 'stochgrad sgld']:.2f} times with 16.",
        f"Compiling the sampler of 16 chains: {seconds:.1f} s.",
        "",
        *table("Multilayer perceptron 784-100-10 (79,510 weights), 20,000 rows, batch 256", b),
        "The default noise of so long a position is quantized (1,021 values, eleven moments of a "
        "normal).",
        "",
        "## Cost against the number of rows (logistic regression, 1 chain)",
        "",
        "| layout | N = 10,000 | N = 1,000,000 | ratio |",
        "| --- | --- | --- | --- |",
    ]
    named = {"memory": "no sampler: gradients on fresh blocks", "blocks": "blocks", "rows": "rows"}
    for layout, name in named.items():
        small, large = by_size[layout, "10000"], by_size[layout, "1000000"]
        lines.append(f"| {name} | {small:.1f} | {large:.1f} | {large / small:.2f} |")
    lines += [
        "",
        "10,000 rows (2 MB) stay in the processor's cache and 1,000,000 (200 MB) do not: the first "
        "line is that difference alone.",
        "",
        f"## Import\n\n`import jax` {imports['jax']:.2f} s, `import stochgrad` "
        f"{imports['stochgrad']:.2f} s (medians of 7).",
        "",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--page", action="store_true", help="the page alone, from saved figures")
    options = parser.parse_args()
    if not options.page:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(run(options.rounds), indent=1) + "\n")
    text = page(json.loads(RESULTS.read_text()))
    print(text)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
