"""Densities of many modes: fit_modes, parallel tempering and SMC at equal energy evaluations.

    python benchmarks/modes.py [--target mixture] [--seeds 3] [--smoke]
    python benchmarks/modes.py --page    # the table and docs/images/modes.png

An energy evaluation is a log density, alone or with its gradient. SMC is annealed from a normal with
temperatures by the effective sample size, systematic resampling and Langevin moves with Metropolis'
correction whose step size follows their acceptance.
"""

import argparse
import json
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.bijections import RationalQuadraticSpline, Vmap
from flowjax.distributions import StandardNormal, Transformed
from flows import affine, alternating, hamiltonian, phi4
from jax.scipy.special import logsumexp

import stochgrad
from stochgrad import flows
from stochgrad.kernels import systematic

OUTPUT = Path(__file__).parent / "results" / "modes.json"
MOVES, KEPT = 5, 0.9


class Problem(NamedTuple):
    """A density with known weights of modes.

    ``modes`` gives numbers whose means are ``weights``; ``samples`` draws of the density itself.
    ``log_z`` is None where a long SMC has to find it. SMC starts at a normal of the scale
    ``prior``, as the chains do.
    """

    name: str
    log_density: Any
    shape: tuple[int, ...]
    prior: float
    modes: Any
    weights: np.ndarray
    log_z: float | None
    samples: Any
    flow: Any
    steps: tuple[float, ...]
    temperatures: tuple[float, ...]
    options: dict


def mixture():
    """40 normals with means uniform on a square of half width 40, as Midgley et al. [2023]."""
    means = 40 * jax.random.uniform(jax.random.key(40), (40, 2), minval=-1.0)
    scale = float(np.log1p(np.e))

    def each(x):
        return -0.5 * jnp.sum((x - means) ** 2, -1) / scale**2 - np.log(40 * 2 * np.pi * scale**2)

    def samples(key, count):
        one, other = jax.random.split(key)
        chosen = jax.random.randint(one, count, 0, 40)
        return means[chosen] + scale * jax.random.normal(other, (count, 2))

    return Problem(
        "40 normals, d = 2",
        lambda x: logsumexp(each(x)),
        (2,),
        25.0,
        lambda x: jax.nn.softmax(each(x)),
        np.full(40, 1 / 40),
        0.0,
        samples,
        lambda x: flows.mixture_of_normals(x, 60),
        (1.0, 4.0, 20.0, 100.0),
        (1.0, 4.0, 16.0, 100.0),
        {"num_steps": 1000, "learning_rate": 1e-2, "num_samples": 60, "num_chains": 128},
    )


def many_well(wells=16):
    """Sixteen double wells, 65,536 modes: the density of Midgley et al. [2023]."""
    grid = np.linspace(-5, 5, 200_001)
    height = np.exp(-(grid**4) + 6 * grid**2 + 0.5 * grid - 9)
    z = np.trapezoid(height, grid)
    right = np.trapezoid(np.where(grid > 0, height, 0), grid) / z
    below = jnp.asarray(np.cumsum(height) / np.sum(height), jnp.float32)

    def log_density(x):
        a, b = x[:wells], x[wells:]
        return jnp.sum(-(a**4) + 6 * a**2 + 0.5 * a) - 0.5 * jnp.sum(b**2)

    def samples(key, count):
        one, other = jax.random.split(key)
        uniform = jax.random.uniform(one, (count, wells))
        a = jnp.interp(uniform, below, jnp.asarray(grid, jnp.float32))
        return jnp.concatenate([a, jax.random.normal(other, (count, wells))], 1)

    each = eqx.filter_vmap(lambda _: RationalQuadraticSpline(knots=16, interval=4))
    splines = Vmap(each(jnp.arange(2 * wells)), in_axes=eqx.if_array(0))
    return Problem(
        "many-well, d = 32",
        log_density,
        (2 * wells,),
        2.0,
        lambda x: (x[:wells] > 0).astype(x.dtype),
        np.full(wells, right),
        float(wells * (np.log(z) + 9 + 0.5 * np.log(2 * np.pi))),
        samples,
        lambda x: Transformed(StandardNormal((2 * wells,)), splines),
        (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2),
        (1.0, 1.5, 2.2, 3.3, 5.0, 7.0, 10.0),
        {"num_steps": 2000, "learning_rate": 1e-2, "num_samples": 64, "num_chains": 64},
    )


def lattice(kappa, size=6):
    """phi^4 theory: both signs of the mean field have the weight of a half, by symmetry."""
    problem = phi4(size, kappa, "")
    d = size**2
    return Problem(
        f"phi^4, {size}x{size}, kappa = {kappa:g}",
        problem.log_density,
        (d,),
        2.0,
        lambda x: (jnp.mean(x)[None] > 0).astype(x.dtype),
        np.array([0.5]),
        None,
        lambda key, count: jnp.asarray(hamiltonian(problem.log_density, d, key, count)[0])[:count],
        lambda x: alternating(flows.mixture_of_normals(x, 2), affine(), 6, jax.random.key(1), True),
        (0.15, 0.2, 0.3, 0.4),
        (1.0, 1.4, 2.0, 3.0),
        {"num_steps": 1500, "learning_rate": 2e-3, "num_chains": 64, "forward": "ml"},
    )


PROBLEMS = {
    "mixture": mixture,
    "many-well": many_well,
    "phi4 0.24": partial(lattice, 0.24),
    "phi4 0.27": partial(lattice, 0.27),
    "phi4 0.3": partial(lattice, 0.3),
}


def tempering(problem, target):
    return stochgrad.replica_exchange(
        stochgrad.mala,
        target,
        problem.steps,
        temperatures=problem.temperatures,
        swap_every=5,
        energy_batches=1,
    )


def start(problem, key):
    return problem.prior * jax.random.normal(key, problem.shape)


def by_flow(problem, seed, options):
    """One call of fit_modes; its record, and what its flow says on samples of the density."""
    found = flows.fit_modes(
        jax.random.key(seed),
        problem.flow,
        problem.log_density,
        chains=partial(tempering, problem),
        init=partial(start, problem),
        modes=problem.modes,
        progress=False,
        **options,
    )
    exact = problem.samples(jax.random.key(1000 + seed), 4000)
    last = found.rounds[-1]
    rounds = [
        {
            "evaluations": r.evaluations,
            "khat": r.khat,
            "ess": r.ess,
            "ess_held_out": r.ess_target,
            "acceptance": r.acceptance,
            "reasons": len(r.reasons),
        }
        for r in found.rounds
    ]
    return found, {
        "evaluations": found.evaluations,
        "ess": found.weighted.ess,
        "ess_forward": flows.ess_under_target(found.model, exact, problem.log_density),
        "khat": last.khat,
        "weights_rmse": rmse(last.weights_reverse, problem),
        "weights_rmse_metropolis": rmse(last.weights, problem),
        "log_z": found.weighted.log_z,
        "ok": found.ok,
        "reasons": list(found.reasons),
        "rounds": rounds,
    }


def by_tempering(problem, seed, evaluations, per_step, num_chains):
    """Replica exchange alone; a third of its steps are warm-up."""
    thin = 20
    draws = int(evaluations / (num_chains * per_step * thin))
    run = stochgrad.sample(
        jax.random.key(seed + 100),
        tempering(problem, full(problem)),
        init=partial(start, problem),
        num_samples=draws - draws // 3,
        num_warmup=draws // 3,
        thin=thin,
        num_chains=num_chains,
        progress=False,
    )
    values = jax.vmap(jax.vmap(problem.modes))(jnp.asarray(run.positions))
    means = np.asarray(values, np.float64).mean(1)
    return {
        "evaluations": round(num_chains * draws * thin * per_step),
        "weights_rmse": rmse(means.mean(0), problem),
        "swap_probability": float(np.nanmean(run.stats["swap_probability"])),
    }


def full(problem):
    return flows._evaluations.full_target(problem.log_density, jnp.zeros((1, *problem.shape)))


def by_smc(problem, seed, evaluations):
    """SMC with as many particles as the evaluations allow, by a small run's number of levels."""
    levels = smc(problem, jax.random.key(seed + 300), 500)["levels"]
    particles = max(int(evaluations / (1 + MOVES * levels)), 100)
    found = smc(problem, jax.random.key(seed + 200), particles)
    values = np.asarray(jax.vmap(problem.modes)(found["x"]), np.float64)
    return {
        "evaluations": particles * (1 + MOVES * found["levels"]),
        "particles": particles,
        "levels": found["levels"],
        "weights_rmse": rmse(values.mean(0), problem),
        "log_z": found["log_z"],
    }


def smc(problem, key, particles):
    x = jax.vmap(partial(start, problem))(jax.random.split(key, particles))
    d = int(np.prod(problem.shape))

    def both(x):
        log_p, up = jax.value_and_grad(problem.log_density)(x)
        base = -0.5 * jnp.sum((x / problem.prior) ** 2)
        base = base - d * np.log(problem.prior * np.sqrt(2 * np.pi))
        return base, log_p, -x / problem.prior**2, up

    @jax.jit
    def move(key, x, beta, h):
        def one(carry, key):
            x, (base, log_p, down, up), h = carry
            noise_key, accept_key = jax.random.split(key)
            g = (1 - beta) * down + beta * up
            there = x + h * g + jnp.sqrt(2 * h) * jax.random.normal(noise_key, x.shape)
            after = jax.vmap(both)(there)
            g_after = (1 - beta) * after[2] + beta * after[3]
            forth = jnp.sum((there - x - h * g) ** 2, 1)
            back = jnp.sum((x - there - h * g_after) ** 2, 1)
            gain = (1 - beta) * (after[0] - base) + beta * (after[1] - log_p)
            rate = jnp.exp(jnp.minimum(gain + (forth - back) / (4 * h), 0.0))
            rate = jnp.where(jnp.isfinite(rate), rate, 0.0)
            taken = jax.random.uniform(accept_key, rate.shape) < rate

            def choose(a, b):
                return jnp.where(taken.reshape(-1, *[1] * (a.ndim - 1)), a, b)

            values = jax.tree.map(choose, after, (base, log_p, down, up))
            h = h * jnp.exp(jnp.mean(rate) - 0.574)
            return (choose(there, x), values, h), None

        start = (x, jax.vmap(both)(x), h)
        return jax.lax.scan(one, start, jax.random.split(key, MOVES))[0]

    first = jax.jit(jax.vmap(both))(x)
    beta, log_z, h, level = 0.0, 0.0, 0.01 * problem.prior**2, 0
    values = first
    while beta < 1:
        ratio = np.asarray(values[1] - values[0], np.float64)
        step = increment(ratio, 1 - beta)
        log_w = step * ratio
        log_z += float(logsumexp(log_w) - np.log(particles))
        beta = min(beta + step, 1.0)
        keys = jax.random.split(jax.random.fold_in(key, level), 2)
        weights = jnp.asarray(np.exp(log_w - log_w.max()), jnp.float32)
        x = x[systematic(keys[0], weights, particles)]
        x, values, h = move(keys[1], x, jnp.float32(beta), jnp.float32(h))
        level += 1
    return {"x": x, "log_z": log_z, "levels": level}


def increment(ratio, most):
    """The largest step in temperature that keeps the effective sample size above a share."""

    def kept(step):
        w = np.exp(step * ratio - np.max(step * ratio))
        return np.sum(w) ** 2 / (len(w) * np.sum(w**2))

    if kept(most) >= KEPT:
        return most
    low, high = 0.0, most
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) >= KEPT else (low, middle)
    return max(low, 1e-6)


def rmse(weights, problem):
    return float(np.sqrt(np.mean((np.asarray(weights) - problem.weights) ** 2)))


def work(name, seeds, smoke):
    problem = PROBLEMS[name]()
    options = dict(problem.options)
    if smoke:
        options |= {"num_steps": 100, "num_chains": 16, "most_rounds": 1}
    log_z, log_z_error = problem.log_z, 0.0
    if log_z is None:
        longest = [
            smc(problem, jax.random.key(9000 + i), 1000 if smoke else 20_000) for i in range(4)
        ]
        each = [one["log_z"] for one in longest]
        log_z, log_z_error = float(np.mean(each)), float(np.std(each, ddof=1) / 2)
    places = jnp.zeros((1, *problem.shape))
    per_step = flows._evaluations.evaluations_per_step(
        partial(tempering, problem), problem.log_density, places, 240
    )
    record = {"name": problem.name, "log_z": log_z, "log_z_error": log_z_error, "seeds": []}
    for seed in range(seeds):
        clock = time.perf_counter()
        _, ours = by_flow(problem, seed, options)
        ours["seconds"] = time.perf_counter() - clock
        n = ours["evaluations"]
        clock = time.perf_counter()
        alone = by_tempering(problem, seed, n, per_step, options["num_chains"])
        alone["seconds"] = time.perf_counter() - clock
        clock = time.perf_counter()
        long = by_tempering(problem, seed, 10 * n, per_step, options["num_chains"])
        long["seconds"] = time.perf_counter() - clock
        clock = time.perf_counter()
        annealed = by_smc(problem, seed, n)
        annealed["seconds"] = time.perf_counter() - clock
        for one in (ours, annealed):
            one["log_z_off"] = one["log_z"] - log_z
        row = {"flow": ours, "tempering": alone, "tempering x 10": long, "smc": annealed}
        record["seeds"].append(row)
        print(problem.name, seed, json.dumps(row), flush=True)
    return record


METHODS = {
    "flow": ("fit_modes", "#b5341d", "o"),
    "tempering": ("tempering alone", "#1f6f8b", "s"),
    "tempering x 10": ("tempering alone, 10 times the evaluations", "#8fb8c6", "s"),
    "smc": ("SMC", "#c08a1e", "^"),
}


def errors(record, method, name):
    """Root of the mean square over seeds; None where the method gives none."""
    values = [seed[method].get(name) for seed in record["seeds"]]
    return None if None in values else float(np.sqrt(np.mean(np.square(values))))


def table(saved):
    """The page's table."""
    lines = [
        "| density | evaluations | forward ESS of the flow | error of mode weights: flow, its "
        "Metropolis, tempering, tempering x 10, SMC | error of log Z: flow, SMC | seconds: flow, "
        "tempering, tempering x 10, SMC |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in saved.values():
        seeds = record["seeds"]
        n = np.mean([seed["flow"]["evaluations"] for seed in seeds]) / 1e6
        ess = ", ".join(f"{seed['flow']['ess_forward']:.2f}" for seed in seeds)
        weights = [errors(record, "flow", "weights_rmse")]
        weights += [errors(record, "flow", "weights_rmse_metropolis")]
        weights += [errors(record, m, "weights_rmse") for m in list(METHODS)[1:]]
        log_z = [errors(record, m, "log_z_off") for m in ("flow", "smc")]
        seconds = [np.median([seed[m]["seconds"] for seed in seeds]) for m in METHODS]
        lines.append(
            f"| {record['name']} | {n:.2f} million | {ess} | "
            f"{', '.join(f'{x:.4f}' for x in weights)} | {', '.join(f'{x:.3f}' for x in log_z)} | "
            f"{', '.join(f'{x:.0f}' for x in seconds)} |"
        )
    return "\n".join(lines)


def picture(saved, path):
    """Errors of mode weights and of log Z, by density and method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    titles = {"weights_rmse": "error of the modes' weights", "log_z_off": "error of log Z"}
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        for method, (label, color, marker) in METHODS.items():
            for row, record in enumerate(saved.values()):
                value = errors(record, method, name)
                if value is None:
                    continue
                each = [abs(seed[method][name]) for seed in record["seeds"]]
                ax.plot(each, [row] * len(each), marker, color=color, alpha=0.3, ms=4, mec="none")
                shown = label if row == 0 else None
                ax.plot(value, row, marker, color=color, ms=9, label=shown, mec="white")
        ax.set_xscale("log")
        ax.set_xlim(2e-4, 0.6)
        ax.set_xlabel(title)
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(saved)), [record["name"] for record in saved.values()])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncol=4, frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(PROBLEMS), help="one only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a short run, nothing written")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--page", action="store_true", help="table and picture of what was run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    saved = json.loads(options.output.read_text()) if options.output.exists() else {}
    if options.page:
        print(table(saved))
        picture(saved, Path(__file__).parents[1] / "docs" / "images" / "modes.png")
        return
    for name in [options.target] if options.target else PROBLEMS:
        record = work(name, 1 if options.smoke else options.seeds, options.smoke)
        if not options.smoke:
            saved[name] = record
            options.output.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
