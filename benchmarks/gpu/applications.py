"""Path gradients, decoding, molecular dynamics and streamed data.

What needs more than jax, numpyro and blackjax is imported by its section.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

import stochgrad

from .. import speed
from .measure import Figure, copy_bandwidth, rate, sampling, seconds, wall


def path(small: bool) -> Iterator[Figure]:
    """d = 4,096: a full-rank guide of numpyro's and a coupling flow, beside the total gradient."""
    from stochgrad.numpyro import PathGradientELBO

    dim, particles = (16, 8) if small else (4096, 8)

    def model():
        numpyro.sample("x", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))

    def guided(loss):
        svi = SVI(model, AutoMultivariateNormal(model), numpyro.optim.Adam(1e-3), loss)
        state = svi.init(jax.random.key(0))
        return {"step_ms": 1e3 * seconds(jax.jit(svi.update), state)}

    losses = {
        "total": Trace_ELBO(particles),
        "path": PathGradientELBO(particles, score_coef=0.0),
        "auto": PathGradientELBO(particles),
    }
    for name, loss in losses.items():
        case = {"guide": "AutoMultivariateNormal", "dim": dim, "gradient": name}
        yield Figure(case, partial(guided, loss))

    from .. import path_cost  # needs flowjax

    layers, width, batch = (2, 16, 8) if small else (6, 256, 512)
    flow = path_cost.couplings(dim, layers, width)

    def coupled(estimator):
        objective = path_cost.reverse_kl(flow, path_cost.log_density, estimator, num_samples=batch)
        gradient, params, _ = path_cost.climbing(objective, path_cost.parameters(flow))
        return {"step_ms": 1e3 * seconds(jax.jit(gradient), params, jax.random.key(0))}

    for name in ("total", "path", "auto"):
        case = {"guide": "affine coupling flow", "dim": dim, "gradient": name}
        yield Figure(case, partial(coupled, name))


def random_llama(small: bool):
    """A model of SmolLM2-135M's shapes with random weights."""
    from stochgrad import llm

    config = llm.Config(
        layers=2 if small else 30,
        width=64 if small else 576,
        hidden=128 if small else 1536,
        heads=1 if small else 9,
        kv_heads=1 if small else 3,
        head_width=64,
        vocabulary=49_152,
        context=8192,
        rope_base=100_000.0,
        eps=1e-5,
    )
    heads, kv_heads = config.heads * config.head_width, config.kv_heads * config.head_width
    shapes = {
        "attention_norm": (config.width,),
        "query": (config.width, heads),
        "key": (config.width, kv_heads),
        "value": (config.width, kv_heads),
        "output": (heads, config.width),
        "mlp_norm": (config.width,),
        "gate": (config.width, config.hidden),
        "up": (config.width, config.hidden),
        "down": (config.hidden, config.width),
    }
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 1))
    random = lambda *shape: 0.05 * jax.random.normal(next(keys), shape)
    params = {
        "embedding": random(config.vocabulary, config.width),
        "norm": jnp.ones(config.width),
        "layers": {name: random(config.layers, *shape) for name, shape in shapes.items()},
    }
    return llm.Llama(params, config, tokenizer=None, end=0)


def decoding(small: bool) -> Iterator[Figure]:
    """Greedy continuation of prompts of 32 tokens, beside reading weights and cache at each."""
    from .. import decoding as benchmark

    model, new_tokens = random_llama(small), 8 if small else 128
    run = benchmark.ours(model, new_tokens)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    config = model.config
    slot = 8 * config.layers * config.kv_heads * config.head_width  # bytes of keys and values

    def figures(batch):
        took = seconds(run, benchmark.prompts(batch))
        cache = batch * slot * (benchmark.PROMPT + new_tokens / 2)
        least = new_tokens * (weights + cache) / copy_bandwidth(small)
        return {"tokens_per_s": batch * new_tokens / took, "memory_share": least / took}

    for batch in [2] if small else [64, 1, 8, 256]:
        yield Figure({"batch": batch, "new_tokens": new_tokens}, partial(figures, batch))


CUTOFF, CENTERS = 2.1, np.linspace(0.8, 2.1, 16, dtype=np.float32)


def pair_energy(params, positions, box):
    """A wall and a network of the distance, between all pairs within the cut-off."""
    one, other = np.triu_indices(positions.shape[0], 1)
    delta = positions[one] - positions[other]
    delta = delta - box * jnp.round(delta / box)
    r = jnp.sqrt(jnp.sum(delta**2, -1))
    x = jnp.exp(-(((r[:, None] - CENTERS) / 0.1) ** 2))
    out = jnp.tanh(x @ params["w"]) @ params["out"]
    inside = (r**-12 + out) * (1 - (r / CUTOFF) ** 2) ** 2
    return jnp.sum(jnp.where(r < CUTOFF, inside, 0))


def dynamics(small: bool) -> Iterator[Figure]:
    """A liquid of 64 atoms, 8 networks in one program and one network alone."""
    from stochgrad import potentials

    raw = np.load(Path(__file__).parents[2] / "examples/data/lennard_jones.npz")
    box = np.full(3, raw["edge"], np.float32)
    one, other = jax.random.split(jax.random.key(0))
    params = {
        "w": 0.25 * jax.random.normal(one, (8, 16, 32)),
        "out": 0.1 * jax.random.normal(other, (8, 32)),
    }
    steps = 5 if small else 100

    def figures(networks, replicas):
        starts = np.resize(raw["positions"], (replicas, *raw["positions"].shape[1:]))
        chosen = jax.tree.map(lambda x: x[:networks], params)

        def run(frames):
            return potentials.simulate(
                jax.random.key(1),
                pair_energy,
                chosen,
                starts,
                masses=1.0,
                kT=1.0,
                time_step=0.002,
                friction=1.0,
                num_frames=frames,
                steps_per_frame=steps,
                box=box,
            )

        timed = rate(lambda n: wall(lambda: run(n).positions), steps, small)
        exploded = int((run(2).exploded >= 0).sum())
        systems = networks * replicas
        return {**timed, "system_steps_per_s": systems * timed["steps_per_s"], "exploded": exploded}

    for replicas in [1] if small else [16, 1]:
        for networks in (8, 1):
            case = {"networks": networks, "replicas": replicas, "atoms": raw["positions"].shape[1]}
            yield Figure(case, partial(figures, networks, replicas))


def streaming(small: bool) -> Iterator[Figure]:
    """A perceptron on rows that stay on the host, 1 when transfer and work overlap wholly."""
    (x, y), log_prior, log_likelihood, init = speed.perceptron()
    copies, blocks, batch_size, steps = (1 if small else 16), 8, 256, (10 if small else 50)
    data = np.tile(x, (copies, 1)), np.tile(y, copies)
    rows = len(data[1]) // blocks
    size = sum(part.nbytes for part in data)

    def steps_a_second(**options):
        target = stochgrad.posterior(
            log_prior, log_likelihood, data, batch_size=batch_size, **options
        )
        return rate(sampling(stochgrad.sgld(target, 1e-7), init, 1, steps), steps, small)

    def figures():
        in_memory = steps_a_second()["steps_per_s"]
        streamed = steps_a_second(order="streamed", resident_bytes=size // blocks)["steps_per_s"]
        block = tuple(part[:rows] for part in data)
        transfer = rows / batch_size / seconds(jax.device_put, block)  # as steps a second
        return {
            "streamed_steps_per_s": streamed,
            "memory_steps_per_s": in_memory,
            "transfer_steps_per_s": transfer,
            "overlap": min(in_memory, transfer) / streamed,
        }

    yield Figure({"bytes": size, "super_blocks": blocks}, figures)
