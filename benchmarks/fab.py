"""A rival of fit_modes: a flow trained by its own annealed draws, at equal energy evaluations.

    python benchmarks/fab.py [--target mixture] [--seeds 2] [--smoke]

The alpha divergence at 2 has the gradient of -log q under p^2/q. Annealed importance sampling, from
the flow to p^2/q through (p/q)^{2 beta} q, one Langevin move with Metropolis' correction a level,
gives weighted points of it; a store of the latest ones is drawn from by weight, and the flow climbs
its log density there, each point corrected for how the flow has moved since [Midgley et al. 2023].
The flow is that of ``modes.py``, made of draws of the start; evaluations are those that fit_modes
took, from ``results/modes.json``, where what comes out is written to.
"""

import argparse
import json
import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from modes import OUTPUT, PROBLEMS, rmse, start

from stochgrad import flows

LEVELS, BATCH, STEPS, STORED, WEIGHTED = 8, 128, 4, 64, 4096
MOST_CORRECTION = 10.0


def annealed(flow, problem, key, h):
    """Points of p^2/q with log weights, their log q, and acceptance rates by level."""
    keys = jax.random.split(key, LEVELS + 1)
    x = flow.sample(keys[0], (BATCH,))
    both = jax.vmap(lambda x: (*of(flow.log_prob, x), *of(problem.log_density, x)))

    def level(carry, given):
        x, values, log_w = carry
        key, beta, h = given
        log_w = log_w + 2 / LEVELS * (values[2] - values[0])
        noise_key, accept_key = jax.random.split(key)

        def tilted(values):
            log_q, down, log_p, up = values
            density = (1 - 2 * beta) * log_q + 2 * beta * log_p
            return density, (1 - 2 * beta) * down + 2 * beta * up

        density, g = tilted(values)
        there = x + h * g + jnp.sqrt(2 * h) * jax.random.normal(noise_key, x.shape)
        after = both(there)
        density_after, g_after = tilted(after)
        forth = jnp.sum((there - x - h * g) ** 2, 1)
        back = jnp.sum((x - there - h * g_after) ** 2, 1)
        rate = jnp.exp(jnp.minimum(density_after - density + (forth - back) / (4 * h), 0.0))
        rate = jnp.where(jnp.isfinite(rate), rate, 0.0)
        taken = jax.random.uniform(accept_key, rate.shape) < rate
        choose = lambda a, b: jnp.where(taken.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        return (choose(there, x), jax.tree.map(choose, after, values), log_w), jnp.mean(rate)

    betas = jnp.arange(1, LEVELS + 1) / LEVELS
    first = (x, both(x), jnp.zeros(BATCH))
    (x, values, log_w), rates = jax.lax.scan(level, first, (keys[1:], betas, h))
    return x, log_w, values[0], rates


def of(function, x):
    return jax.value_and_grad(function)(x)


def by_fab(problem, seed, evaluations, learning_rate):
    """Train with as many evaluations, the last draws among them; what modes.py records."""
    key = jax.random.key(seed + 400)
    x = jax.vmap(partial(start, problem))(jax.random.split(jax.random.fold_in(key, 0), 2000))
    params, static = flows.split_flow(problem.flow(x))
    rounds = (evaluations - WEIGHTED) // (BATCH * (LEVELS + 1))
    schedule = optax.cosine_decay_schedule(learning_rate, rounds * STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(100.0), optax.adam(schedule))
    whole = lambda params: flows.unwrap_flow(eqx.combine(params, static))

    def train(carry, key):
        params, state, (x, log_w, log_q) = carry
        chosen = jax.random.categorical(key, log_w, shape=(BATCH,))

        def loss(params):
            now = whole(params).log_prob(x[chosen])
            correction = jnp.exp(jnp.minimum(log_q[chosen] - now, np.log(MOST_CORRECTION)))
            return -jnp.mean(jax.lax.stop_gradient(correction) * now), now

        (_, now), slopes = jax.value_and_grad(loss, has_aux=True)(params)
        slopes = jax.tree.map(jnp.nan_to_num, slopes)
        update, state = optimizer.update(slopes, state, params)
        log_w = log_w.at[chosen].set(log_w[chosen] + log_q[chosen] - now)
        return (
            optax.apply_updates(params, update),
            state,
            (x, log_w, log_q.at[chosen].set(now)),
        ), None

    def one(carry, given):
        params, state, store, h = carry
        key, turn = given
        draw_key, train_key = jax.random.split(key)
        x, log_w, log_q, rates = annealed(
            whole(jax.lax.stop_gradient(params)), problem, draw_key, h
        )
        log_w = jnp.where(jnp.isfinite(log_w), log_w, -jnp.inf)
        at = (turn % STORED) * BATCH
        store = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, at, 0),
            store,
            (x, log_w, log_q),
        )
        keys = jax.random.split(train_key, STEPS)
        (params, state, store), _ = jax.lax.scan(train, (params, state, store), keys)
        return (params, state, store, h * jnp.exp(0.1 * (rates - 0.574))), jnp.mean(rates)

    count = STORED * BATCH
    empty = (jnp.zeros((count, *problem.shape)), jnp.full(count, -jnp.inf), jnp.zeros(count))
    h = jnp.full(LEVELS, 0.01)
    carry = (params, optimizer.init(params), empty, h)
    keys = jax.random.split(jax.random.fold_in(key, 1), rounds)
    (params, *_), rates = jax.jit(partial(jax.lax.scan, one))(carry, (keys, jnp.arange(rounds)))
    model = eqx.combine(params, static)
    weighted = flows.sample(jax.random.fold_in(key, 2), model, WEIGHTED, problem.log_density)
    shares = jax.nn.softmax(weighted.log_weight)
    exact = problem.samples(jax.random.key(1000 + seed), 4000)
    return {
        "evaluations": rounds * BATCH * (LEVELS + 1) + WEIGHTED,
        "ess": float(weighted.ess),
        "ess_forward": float(flows.ess_under_target(model, exact, problem.log_density)),
        "khat": float(weighted.khat),
        "weights_rmse": rmse(shares @ jax.vmap(problem.modes)(weighted.value), problem),
        "log_z": float(weighted.log_z),
        "acceptance": float(rates[-1]),
        "learning_rate": learning_rate,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=["mixture", "many-well"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    saved = json.loads(OUTPUT.read_text())
    for name in [options.target] if options.target else ["mixture", "many-well"]:
        problem, record = PROBLEMS[name](), saved[name]
        for seed, row in enumerate(record["seeds"][: options.seeds]):
            begun = time.perf_counter()
            evaluations = 20_000 if options.smoke else row["flow"]["evaluations"]
            found = by_fab(problem, seed, evaluations, options.learning_rate)
            found["seconds"] = time.perf_counter() - begun
            found["log_z_off"] = found["log_z"] - record["log_z"]
            row["fab"] = found
            print(name, seed, json.dumps(found), flush=True)
            if not options.smoke:
                OUTPUT.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
