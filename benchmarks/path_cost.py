"""What a path gradient costs beside the total one, flow by flow.

``python benchmarks/path_cost.py`` prints the tables and writes them to ``docs/results/path_cost.md``;
``--smoke`` is a part of the same at tiny sizes. With ``--dim``, ``--batch``, ``--layers`` or
``--dtype`` it is the affine coupling flow alone, on whatever device there is. Those two write
nothing unless ``--output`` says where.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flowjax.bijections import Affine, Chain, Invert, RationalQuadraticSpline
from flowjax.distributions import AbstractDistribution, Transformed
from flowjax.flows import coupling_flow, masked_autoregressive_flow
from flowjax.train.losses import ElboLoss
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoBNAFNormal, AutoIAFNormal, AutoMultivariateNormal

import stochgrad
from stochgrad.flows import forward_kl, parameters, reverse_kl
from stochgrad.numpyro import AutoFlow, PathGradientELBO

KEY = jax.random.key(0)
STL = "stick the landing (flowjax)"
IN_LOOP = 50
COUPLING = {"flops": 1.36, "memory": 1.1}


class Noise(AbstractDistribution):
    """Independent standard normal numbers of any precision."""

    shape: tuple[int, ...]
    cond_shape: tuple[int, ...] | None = None
    dtype: str = "float32"

    def _sample(self, key, condition=None):
        return jax.random.normal(key, self.shape, self.dtype)

    def _log_prob(self, x, condition=None):
        return -0.5 * jnp.sum(x**2) - 0.5 * x.size * np.log(2 * np.pi).astype(x.dtype)


class Contender(NamedTuple):
    """A gradient, ``(params, key) -> (value, gradient)``, and how many rounds it takes part in."""

    gradient: Callable
    params: Any
    rounds: int | None = None


class Work(NamedTuple):
    """Contenders of which the first is the measure of the others.

    ``unrolled`` has the same gradients of a flow whose layers are not in a loop, ``limits`` what
    the path gradient is to keep to and ``counted`` says whether operations can be counted, which
    they cannot where their number depends on the numbers. Short work is called several times in a
    round, ``calls``.
    """

    name: str
    about: str
    contenders: dict[str, Contender]
    limits: dict[str, float]
    unrolled: dict[str, Contender] | None = None
    counted: bool = True
    calls: int = 1
    judged: str = "path"


class Figures(NamedTuple):
    """Of one contender; all but ``milliseconds`` are shares of the first contender's."""

    milliseconds: float
    wall: float
    least: float
    flops: float
    memory: float
    flops_unrolled: float = np.nan
    memory_unrolled: float = np.nan


def log_density(x):
    """As cheap as a target can be, so that it is the flow that is measured."""
    return -0.5 * jnp.sum(x**2) - 0.1 * jnp.sum(x**4)


def climbing(objective, params, rounds=None):
    """What stochgrad's optimizers and samplers ask of an objective at a step."""

    def gradient(params, key):
        score, _ = objective.next(key, params, objective.init(key, params))
        return score(params)

    return Contender(gradient, params, rounds)


def by_flowjax(flow, batch, landing, rounds=None):
    loss = ElboLoss(log_density, batch, stick_the_landing=landing)
    params = parameters(flow)
    static = eqx.filter(flow, eqx.is_inexact_array, inverse=True)

    def gradient(params, key):
        return jax.value_and_grad(lambda params: loss(params, static, key))(params)

    return Contender(gradient, params, rounds)


def reverse(flow, batch, landing_rounds=None):
    """Gradients of the reverse divergence. flowjax's total one is the measure of all."""

    def ours(estimator):
        objective = reverse_kl(flow, log_density, estimator, num_samples=batch)
        return climbing(objective, parameters(flow))

    return {
        "total (flowjax)": by_flowjax(flow, batch, False),
        "total": ours("total"),
        "path": ours("path"),
        "auto": ours("auto"),
        STL: by_flowjax(flow, batch, True, landing_rounds),
    }


def forward(flow, batch):
    samples = 0.7 * jax.random.normal(KEY, (batch, *flow.shape))
    scores = jax.vmap(jax.grad(log_density))(samples)
    return {
        name: climbing(forward_kl(flow, samples, scores, name), parameters(flow))
        for name in ("ml", "path")
    }


def without_loop(flow):
    """The same flow with its layers one after the other instead of in a scan."""
    inverted = isinstance(flow.bijection, Invert)
    scan = flow.bijection.bijection if inverted else flow.bijection
    arrays, rest = eqx.partition(scan.bijection, eqx.is_array)
    count = len(jax.tree.leaves(arrays)[0])
    layers = Chain(
        [eqx.combine(jax.tree.map(lambda x, i=i: x[i], arrays), rest) for i in range(count)]
    )
    return Transformed(flow.base_dist, Invert(layers) if inverted else layers)


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def couplings(dim, layers, width, dtype="float32", invert=False, transformer=None):
    if dtype != "float32":  # flowjax's default has constants of single precision
        transformer = cast(Affine(), dtype)
    flow = coupling_flow(
        KEY,
        base_dist=Noise((dim,), dtype=dtype),
        transformer=transformer,
        flow_layers=layers,
        invert=invert,
        nn_width=width,
        nn_depth=2,
        nn_activation=jnp.tanh,
    )
    return cast(flow, dtype)


def affine(dim, layers, width, batch, dtype="float32"):
    flow = couplings(dim, layers, width, dtype)
    return of_coupling(
        f"Affine coupling, d = {dim}, {layers} layers, batch {batch}",
        f"Conditioners of two hidden layers of {width}, {dtype}.",
        flow,
        batch,
        1.45,
    )


def spline(dim, layers, width, batch):
    flow = couplings(dim, layers, width, transformer=RationalQuadraticSpline(knots=8, interval=4))
    return of_coupling(
        f"Spline coupling, d = {dim}, {layers} layers, batch {batch}",
        f"Rational quadratic splines of 8 knots, conditioners of two hidden layers of {width}.",
        flow,
        batch,
        1.6,
    )


def of_coupling(title, words, flow, batch, wall):
    """The reverse divergence of a coupling flow, its layers in a loop and one by one."""
    limits = {"wall": wall, **COUPLING}
    return Work(title, words, reverse(flow, batch), limits, reverse(without_loop(flow), batch))


def samples(dim, layers, width, batch):
    flow = couplings(dim, layers, width, invert=True)
    return Work(
        f"Affine coupling by samples, d = {dim}, {layers} layers, batch {batch}",
        "The forward divergence: maximum likelihood beside the path gradient, with the target's "
        "scores at the samples computed beforehand.",
        forward(flow, batch),
        {"wall": 1.45, **COUPLING},
        forward(without_loop(flow), batch),
    )


def autoregressive(dim, layers, width, batch, steps):
    flow = masked_autoregressive_flow(
        KEY,
        base_dist=Noise((dim,)),
        flow_layers=layers,
        invert=False,
        nn_width=width,
        nn_depth=2,
        nn_activation=jnp.tanh,
    )
    if steps:
        objective = reverse_kl(flow, log_density, num_samples=batch)
        flow = stochgrad.fit(KEY, objective, steps, learning_rate=1e-3, progress=False).model
    return Work(
        f"Affine autoregressive, d = {dim}, {layers} layers, batch {batch}, {state(steps)}",
        "The inverse of this flow, which stick-the-landing needs, is sequential; the path gradient "
        "solves with the Jacobian by as many sweeps as it takes.",
        reverse(flow, batch, landing_rounds=5),
        {"wall": 4.0},
        counted=False,
    )


GUIDES = {
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoFlow of couplings": lambda model: AutoFlow(
        model, lambda dim: couplings(dim, layers=4, width=64)
    ),
    "AutoIAFNormal": AutoIAFNormal,
    "AutoBNAFNormal": AutoBNAFNormal,
}
"""By name; the autoregressive ones have three and one layers, as numpyro makes them."""


def guide(name, dim, particles, steps, limit):
    """A guide of one correlated normal distribution: the model costs next to nothing."""
    covariance = 0.5 ** np.abs(np.subtract.outer(np.arange(dim), np.arange(dim)))

    def model():
        numpyro.sample("x", dist.MultivariateNormal(jnp.ones(dim), jnp.asarray(covariance)))

    return svi_work(name, f"correlated normal, d = {dim}", model, particles, steps, limit)


def regression(name, rows, particles, steps, limit):
    """A logistic regression on 20 columns, whose rows are part of the step."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, 20)), jnp.float32)
    y = jnp.asarray(rng.random(rows) < 0.5, jnp.int32)

    def model():
        w = numpyro.sample("w", dist.Normal(0, 1).expand([20]).to_event(1))
        with numpyro.plate("rows", rows):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    about = f"logistic regression, {rows} rows"
    return svi_work(name, about, model, particles, steps, limit)


def svi_work(name, about, model, particles, steps, limit):
    auto = GUIDES[name](model)
    svi = SVI(model, auto, optax.adam(1e-3), Trace_ELBO(particles))
    begun = svi.init(KEY)
    if steps:
        begun = svi.run(KEY, steps, progress_bar=False, init_state=begun).state
    params = svi.optim.get_params(begun.optim_state)

    def by(loss):
        def one(carry, key):
            gradient = jax.grad(
                lambda params: loss.loss(key, svi.constrain_fn(params), model, auto)
            )(carry)
            return jax.tree.map(lambda p, g: p - 1e-6 * g, carry, gradient), None

        def gradients(params, key):
            return jax.lax.scan(one, params, jax.random.split(key, IN_LOOP))[0]

        return Contender(gradients, params)

    latent = auto.get_transform(svi.constrain_fn(params)) if "IAF" in name else None
    words = "" if latent is None else f" {sweeps_in_words(latent, auto.latent_dim)}"
    return Work(
        f"SVI by {name}, {about}, {particles} particles, {state(steps)}",
        f"`PathGradientELBO` beside `Trace_ELBO`, {IN_LOOP} steps in a compiled loop.{words}",
        {
            "Trace_ELBO": by(Trace_ELBO(particles)),
            "path": by(PathGradientELBO(particles, score_coef=0.0)),
            "auto": by(PathGradientELBO(particles)),
        },
        {"wall": limit},
        counted="IAF" not in name and "BNAF" not in name,
        judged="auto",
    )


def sweeps_in_words(transform, dim):
    """How many of Jacobi's sweeps the layers of a guide take, and what that is in operations."""
    counts = []
    x = jax.random.normal(KEY, (dim,))
    for layer in transform.parts:
        jacobian = np.asarray(jax.jacfwd(layer)(x), np.float64)
        if np.allclose(jacobian, np.eye(dim)[::-1]):  # a permutation is turned about
            x = layer(x)
            continue
        slope = np.diag(jacobian)
        first = np.random.default_rng(0).normal(size=dim) / slope
        below = np.diag(slope) - jacobian.T
        u, count = first, 0
        while True:
            new = first + below @ u / slope
            change, u, count = np.max(np.abs(new - u)), new, count + 1
            if change <= 1.2e-6 * np.max(np.abs(new)) or count == dim:
                break
        counts.append(count)
        x = layer(x)
    k = float(np.mean(counts))
    return (
        f"In passes through a layer's network, the total gradient takes one forward and two back, "
        f"3; the path gradient one more back, and one for each of {k:.1f} sweeps: {4 + k:.1f}, "
        f"{(4 + k) / 3:.1f} times as many, of which one sweep alone would leave 1.7. Times are "
        "shorter than that as far as the step is not these passes."
    )


def state(steps):
    return f"after {steps} steps" if steps else "untrained"


def compiled(contender):
    return jax.jit(contender.gradient).lower(contender.params, KEY).compile()


def flops_and_memory(programs):
    """Operations as XLA counts them, and bytes of temporary memory: shares of the first's."""

    def of(program):
        return np.array(
            [program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes]
        )

    base = of(next(iter(programs.values())))
    return {name: of(program) / base for name, program in programs.items()}


def seconds(program, params, key, calls):
    """Median of a few calls one after the other."""
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        jax.block_until_ready(program(params, key))
        times.append(time.perf_counter() - begun)
    return np.median(times)


def timed(work, programs, rounds):
    """Seconds of every contender in every round, all in turn, after one that does not count."""
    times = {name: [] for name in programs}
    for turn, key in enumerate(jax.random.split(KEY, rounds + 1)):
        names = list(programs)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            contender = work.contenders[name]
            if turn <= (contender.rounds or rounds):
                times[name].append(seconds(programs[name], contender.params, key, work.calls))
    return {name: np.array(each[1:]) for name, each in times.items()}


def measured(work, rounds):
    programs = {name: compiled(contender) for name, contender in work.contenders.items()}
    shares = flops_and_memory(programs)
    times = timed(work, programs, rounds)
    unrolled = {}
    if work.unrolled:
        unrolled = flops_and_memory({n: compiled(c) for n, c in work.unrolled.items()})
    base = next(iter(times.values()))
    figures = {}
    for name, each in times.items():
        flops, memory = shares[name]
        beside = base[: len(each)]
        figures[name] = Figures(
            1e3 * np.median(each),
            np.median(each / beside),
            each.min() / beside.min(),
            flops if work.counted else np.nan,
            memory,
            *unrolled.get(name, ()),
        )
    return figures


def number(value):
    return "-" if np.isnan(value) else f"{value:.2f}"


def row(*cells):
    return f"| {' | '.join(cells)} |"


def rule(count):
    return row(*["---"] * count)


def details(work, figures):
    heads = ["gradient", "ms", "wall", "least wall", "flops", "memory"]
    heads += ["flops, unrolled", "memory, unrolled"] if work.unrolled else []
    lines = [f"## {work.name}", "", work.about, "", row(*heads), rule(len(heads))]
    for name, each in figures.items():
        cells = [name, f"{each.milliseconds:.1f}", *map(number, each[1:])]
        lines.append(row(*cells[: len(heads)]))
    return [*lines, "", verdict(work, figures[work.judged]), ""]


def verdict(work, judged):
    """What is within the limits and what is not, in a sentence."""
    found = {
        "wall": ("time", judged.wall),
        "flops": ("operations", judged.flops_unrolled),
        "memory": ("memory", judged.memory),
    }
    said = []
    for kind, limit in work.limits.items():
        name, value = found[kind]
        if np.isnan(value):
            continue
        where = "within" if value <= limit else "**over**"
        said.append(f"{name} {value:.2f}, {where} the limit of {limit:g}")
    name = "The path gradient" if work.judged == "path" else "The default"
    return f"{name} takes, of the total one's: {'; '.join(said)}."


def summary(results):
    heads = [
        "path of total, and in SVI the default",
        "wall",
        "limit",
        "flops",
        "limit",
        "memory",
        "limit",
    ]
    lines = [row(*heads), rule(len(heads))]
    for work, figures in results:
        path = figures[work.judged]
        limits = [
            f"≤ {work.limits[kind]:g}" if kind in work.limits else "-"
            for kind in ("wall", "flops", "memory")
        ]
        values = [number(path.wall), number(path.flops_unrolled), number(path.memory)]
        pairs = [cell for pair in zip(values, limits, strict=True) for cell in pair]
        lines.append(row(work.name, *pairs))
    return [*lines, ""]


def introduction(rounds):
    device = jax.devices()[0]
    return [
        "# What a path gradient costs",
        "",
        "Made by `python benchmarks/path_cost.py`: one value and gradient in a flow's trainable "
        f"arrays, compiled, on {device.device_kind} ({device.platform}), matrix products on one "
        "thread where it is a CPU. The measure, 1, is the total gradient as flowjax and numpyro "
        "have it (maximum likelihood as stochgrad has it). *Wall* is the median of the ratios of "
        f"{rounds} rounds in which all take turns, *least wall* the ratio of the least times. "
        "*Flops* and *memory*, the temporary one, are the compiler's. It counts what is in a loop "
        "once: where the layers are in one, operations before and after it weigh too much, so "
        "limits are for the layers unrolled, and for autoregressive flows, which solve in a loop, "
        "they say nothing. Memory is that of the layers in a loop, as flowjax builds them. The "
        "target costs next to nothing; with one that costs as much as the flow, all ratios are "
        "nearer to 1.",
        "",
    ]


def small(make):
    """Only the two gradients that matter most, of works of every kind."""
    work = make()
    base = next(iter(work.contenders))
    kept = {name: work.contenders[name] for name in (base, work.judged)}
    unrolled = make.func is affine and {name: work.unrolled[name] for name in kept}
    return work._replace(contenders=kept, unrolled=unrolled or None)


def all_works(smoke):
    if smoke:
        works = [
            partial(affine, 8, 2, 16, 24),
            partial(spline, 8, 2, 16, 24),
            partial(autoregressive, 8, 2, 16, 24, 0),
            partial(guide, "AutoIAFNormal", 8, 8, 10, 2.5),
            partial(samples, 8, 2, 16, 24),
        ]
        return [partial(small, make) for make in works]
    return [
        *(partial(regression, name, 1000, 4, 500, 1.3) for name in GUIDES),
        *(partial(guide, name, 20, 4, 500, 1.3) for name in GUIDES),
        partial(guide, "AutoIAFNormal", 64, 64, 1000, 1.3),
        *(partial(affine, dim, layers, 256, 512) for dim in (64, 256) for layers in (6, 12)),
        partial(spline, 64, 6, 256, 256),
        *(partial(autoregressive, 64, 3, 256, 256, steps) for steps in (0, 300)),
        partial(samples, 64, 6, 256, 512),
    ]


def report(works, rounds):
    results, lines = [], []
    for make in works:
        work = make()
        figures = measured(work, rounds)
        results.append((work, figures))
        table = details(work, figures)
        lines += table
        print("\n".join(table), flush=True)
    return "\n".join([*introduction(rounds), *summary(results), *lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="21 by default")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--svi", action="store_true", help="numpyro's guides alone")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    one = [options.dim, options.batch, options.layers, options.dtype]
    works, output = all_works(options.smoke), Path("docs/results/path_cost.md")
    if options.svi:
        works, output = [make for make in works if make.func in (regression, guide)], None
    if any(one):
        dim, batch, layers, dtype = one
        works = [partial(affine, dim or 64, layers or 6, 256, batch or 512, dtype or "float32")]
    text = report(works, options.rounds or (3 if options.smoke else 21))
    if any(one) or options.smoke:
        output = None
    if output := options.output or output:
        output.write_text(text)


if __name__ == "__main__":
    main()
