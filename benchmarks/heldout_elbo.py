"""The bound on fresh draws against seconds: ``PathGradientELBO`` beside ``Trace_ELBO``.

``python benchmarks/heldout_elbo.py`` trains four numpyro models from three seeds, each with the
same guide, optimizer and number of particles under both objectives, and evaluates the bound by many
fresh draws when a quarter, a half and all of the seconds are over. It writes
``benchmarks/results/heldout_elbo.json`` and the table between the marks in ``docs/start/flows.md``.
Seconds are of the processor, one thread, and begin after compilation. ``--smoke`` is one model with
a fraction of the seconds, and writes nothing.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flowjax.distributions import StandardNormal
from flowjax.flows import coupling_flow
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal

from stochgrad.numpyro import AutoFlow, PathGradientELBO

RNG = np.random.default_rng(0)
PARTICLES, CHUNK, DRAWS, MARKS = 4, 100, 20_000, (0.25, 0.5, 1.0)
OBJECTIVES = {"Trace_ELBO": Trace_ELBO, "PathGradientELBO": PathGradientELBO}
RESULTS, PAGE = Path("benchmarks/results/heldout_elbo.json"), Path("docs/start/flows.md")
BEGIN, END = "<!-- held-out bound -->", "<!-- end of held-out bound -->"

X = RNG.normal(size=(500, 20)).astype(np.float32)
SIGNS = (RNG.random(500) < 1 / (1 + np.exp(-X @ RNG.normal(size=20)))).astype(np.int32)
GROUP = RNG.integers(0, 63, 400)
HEIGHT = (RNG.normal(size=63)[GROUP] + RNG.normal(size=400)).astype(np.float32)
EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)
ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], np.float32)
COUNTS = RNG.poisson(np.exp(0.3 * np.cumsum(RNG.normal(size=30)))).astype(np.int32)


def logistic():
    w = numpyro.sample("w", dist.Normal(0, 1).expand([20]).to_event(1))
    bias = numpyro.sample("bias", dist.Normal(0, 1))
    with numpyro.plate("rows", len(X)):
        numpyro.sample("y", dist.Bernoulli(logits=jnp.asarray(X) @ w + bias), obs=SIGNS)


def groups():
    """63 local latents under two scales and a mean."""
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("groups", 63):
        level = numpyro.sample("level", dist.Normal(mean, spread))
    with numpyro.plate("rows", len(HEIGHT)):
        numpyro.sample("y", dist.Normal(level[GROUP], noise), obs=HEIGHT)


def schools():
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    spread = numpyro.sample("spread", dist.HalfCauchy(5))
    with numpyro.plate("schools", 8):
        effect = numpyro.sample("effect", dist.Normal(mean, spread))
        numpyro.sample("y", dist.Normal(effect, ERROR), obs=EFFECT)


def walk():
    """Counts whose rate is the positive part of a random walk."""
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    steps = numpyro.sample("steps", dist.Normal(0, 1).expand([len(COUNTS)]).to_event(1))
    numpyro.sample("y", dist.Poisson(0.1 + jax.nn.softplus(spread * jnp.cumsum(steps))), obs=COUNTS)


def coupled(dim):
    return coupling_flow(
        jax.random.key(0),
        base_dist=StandardNormal((dim,)),
        invert=False,
        flow_layers=4,
        nn_width=32,
        nn_activation=jnp.tanh,
    )


class Work(NamedTuple):
    """A model, its guide in words and as a function of it, and seconds."""

    model: Callable
    words: str
    guide: Callable[[Callable], Any]
    seconds: float


WORKS = {
    "logistic regression, 21 latents": Work(
        logistic, "AutoMultivariateNormal", AutoMultivariateNormal, 4.0
    ),
    "levels of 63 groups, 66 latents": Work(
        groups, "AutoFlow, coupling", lambda m: AutoFlow(m, coupled), 8.0
    ),
    "eight schools, 10 latents": Work(
        schools, "AutoFlow, coupling", lambda m: AutoFlow(m, coupled), 8.0
    ),
    "counts of a random walk, 31 latents": Work(walk, "AutoIAFNormal", AutoIAFNormal, 8.0),
}


def trained(work, objective, seeds, learning_rate, seconds):
    """Of every seed, steps and bound at each mark."""
    guide = work.guide(work.model)
    svi = SVI(work.model, guide, optax.adam(learning_rate), OBJECTIVES[objective](PARTICLES))
    state = svi.init(jax.random.key(0))

    def chunk(state):
        return jax.lax.scan(lambda s, _: svi.update(s), state, None, length=CHUNK)[0]

    step = jax.jit(chunk).lower(state).compile()

    @jax.jit
    def bound(params, key):
        """By Trace_ELBO, draws in turn, to need no memory."""
        losses = jax.lax.map(
            lambda key: Trace_ELBO().loss(key, params, work.model, guide),
            jax.random.split(key, DRAWS),
            batch_size=500,
        )
        return -jnp.mean(losses), jnp.std(losses) / DRAWS**0.5

    rows = []
    for seed in range(seeds):
        state, spent, steps, marks = svi.init(jax.random.key(seed)), 0.0, 0, []
        for mark in MARKS:
            while spent < mark * seconds:
                begun = time.process_time()
                state = jax.block_until_ready(step(state))
                spent += time.process_time() - begun
                steps += CHUNK
            value, error = bound(svi.get_params(state), jax.random.key(1000 + seed))
            marks.append((steps, float(value), float(error)))
        rows.append(marks)
    return rows


def measured(name, seeds, learning_rate, seconds):
    work = WORKS[name]
    rows = {o: trained(work, o, seeds, learning_rate, seconds or work.seconds) for o in OBJECTIVES}
    return {
        "model": name,
        "guide": work.words,
        "seconds": seconds or work.seconds,
        "learning_rate": learning_rate,
        "marks": list(MARKS),
        "steps, bound, standard error": rows,
    }


def verdict(difference):
    """Of the differences at the end, a seed each."""
    if np.all(difference > 0):
        return "ahead"
    return "**behind**" if np.all(difference < 0) else "level"


def table(results):
    heads = [
        "model",
        "guide",
        "seconds",
        "steps",
        "path - total, nats, at ¼",
        "½",
        "all",
        "at the end",
    ]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for result in results:
        both = result["steps, bound, standard error"]
        total, path = (np.array(both[name]) for name in OBJECTIVES)
        gain = path[:, :, 1] - total[:, :, 1]
        cells = [f"{g.mean():+.4f} ({g.min():+.4f} to {g.max():+.4f})" for g in gain.T]
        steps = " / ".join(f"{each[:, -1, 0].mean():.0f}" for each in (path, total))
        end = verdict(gain[:, -1])
        lines.append(
            f"| {' | '.join([result['model'], result['guide'], str(result['seconds']), steps, *cells, end])} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", choices=list(WORKS), help="one model, the others as they were")
    options = parser.parse_args()
    if options.smoke:
        print(table([measured("eight schools, 10 latents", 1, 3e-3, 0.2)]))
        return
    saved = {r["model"]: r for r in json.loads(RESULTS.read_text())} if options.only else {}
    for name in [options.only] if options.only else WORKS:
        saved[name] = measured(name, options.seeds, options.learning_rate, None)
        print(table([saved[name]]), flush=True)
        results = [saved[name] for name in WORKS if name in saved]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write(results)


def write(results):
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
