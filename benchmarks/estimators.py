"""Estimators of a mixed objective, site by site, against full enumeration.

    python benchmarks/estimators.py

A mixture with a discrete and a continuous latent variable, and a guide for both. The gradient of
the bound is known: by enumeration of the discrete variable and quadrature of the continuous one.
Writes docs/results/estimators.md.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer.util import compute_log_probs

from stochgrad.numpyro import PathGradientELBO

PARTICLES = 8
PARAMS = {"logits": jnp.array([0.5, -0.3, 0.2]), "loc": jnp.array([0.3, 1.0, 2.0])}


def model():
    k = numpyro.sample("k", dist.Multinomial(1, jnp.array([0.3, 0.5, 0.2])))
    z = numpyro.sample("z", dist.Normal(k @ jnp.array([-1.0, 1.0, 3.0]), 1.0))
    numpyro.sample("y", dist.Normal(z, 0.7), obs=1.4)


def guide():
    logits = numpyro.param("logits", PARAMS["logits"])
    loc = numpyro.param("loc", PARAMS["loc"])
    k = numpyro.sample("k", dist.Multinomial(1, logits=logits))
    numpyro.sample("z", dist.Normal(k @ loc, 0.6))


def bound(params):
    """The bound by enumeration and Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(50)
    share = jax.nn.softmax(params["logits"])

    def value(k, node):
        data = {"k": k, "z": k @ params["loc"] + 0.6 * node}
        log_p, _ = compute_log_probs(model, (), {}, data)
        log_q, _ = compute_log_probs(guide, (), {}, {**data, **params})
        return sum(log_p.values()) - sum(log_q.values())

    each = jax.vmap(jax.vmap(value, (None, 0)), (0, None))(jnp.eye(3), jnp.asarray(nodes))
    return share @ each @ jnp.asarray(weights / weights.sum())


def fitted(steps=4000):
    """Parameters at which the bound is highest."""

    def step(_, params):
        return jax.tree.map(lambda p, g: p + 0.05 * g, params, jax.grad(bound)(params))

    return jax.lax.fori_loop(0, steps, step, PARAMS)


def moments(elbo, params, exact, count):
    """Bias in standard errors, squared bias over the gradient's square, and variance."""

    def one(key):
        gradient = jax.grad(lambda p: -elbo.loss(key, p, model, guide))(params)
        return jax.flatten_util.ravel_pytree(gradient)[0]

    keys = jax.random.split(jax.random.key(1), count)
    found = np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=2000))(keys))
    bias = found.mean(0) - exact
    error = found.std(0) / np.sqrt(count)
    z = np.abs(bias[error > 1e-12] / error[error > 1e-12]).max(initial=0.0)
    return z, np.linalg.norm(bias), found.var(0).sum()


def rows(params, count):
    exact = jax.flatten_util.ravel_pytree(jax.grad(bound)(params))[0]
    for discrete in ("score", "optimal", "straight_through"):
        for coefficient, name in ((0.0, "path"), (1.0, "total"), ("auto", "auto")):
            elbo = PathGradientELBO(PARTICLES, score_coef=coefficient, estimators={"k": discrete})
            z, bias, variance = moments(elbo, params, exact, count)
            yield f"| {discrete} | {name} | {bias:.4f} | {z:.1f} | {variance:.3g} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="docs/results/estimators.md")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    count = 2000 if args.smoke else 40_000
    head = [
        "| discrete site | continuous site | size of the bias | largest, in standard errors "
        "| variance |",
        "| --- | --- | --- | --- | --- |",
    ]
    text = [
        "# Estimators site by site, against enumeration",
        "",
        "Made by `python benchmarks/estimators.py`.",
        "",
        f"A mixture of three with one observation; {PARTICLES} particles a gradient, {count:,} "
        "gradients. Bias against enumeration of the discrete variable and quadrature of the "
        "continuous one; variance summed over the six parameters. With unbiased estimators the "
        "largest of six biases is below 2.6 standard errors in 95 of 100 rows; rows share their random numbers.",
    ]
    for title, params in (("At the start", PARAMS), ("At the optimum", jax.jit(fitted)())):
        text += ["", f"## {title}", "", *head, *rows(params, count)]
        print("\n".join(text[-9 - len(head) :]), flush=True)
    text += ["", "Score functions are unbiased, straight-through is not, and its bias stays."]
    Path(args.output).write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
