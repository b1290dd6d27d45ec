"""Curvature and gradient noise around a position."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Gradient,
    Position,
    Posterior,
    PRNGKey,
    check_count,
    check_instance,
    check_key,
    full_data_mean_traceable,
    hoisted_jit,
    noise_like,
    resident_block,
    tree_dot,
    tree_size,
)
from stochgrad.sgmcmc._common import as_position
from stochgrad.sgmcmc._preconditioner import Whitening

_POINTS, _POWER_STEPS, _PROBES, _NOISE_BATCHES = 4, 40, 40, 64
_LEAST_CURVATURE = 1e-3
_EXACT_DIMENSION = 500
_FLOOR = 1e-6


def curvature_and_noise(
    gradient: Gradient, whitening: Whitening, key: PRNGKey, position: Position
) -> tuple[float, Position]:
    r"""The largest curvature, and the variance of gradients, where draws will be.

    The curvature is the largest eigenvalue of $M^{-1/2} H M^{-1/2}$, by power iteration on
    Hessian-vector products of successive minibatches, at the position itself and at a few points
    one standard deviation of each coordinate (given the others) away: a funnel is stiffer inside
    than at the mode, and a control variate has no noise at its center. The variance is that of
    minibatch gradients at those points, for estimates with a memory (SVRG, SAGA) of another.

    Returns:
        The curvature, and the variances in the whitening's coordinates.
    """
    masses = jax.tree.map(lambda m: np.asarray(m, np.float64), whitening.mass)
    score_in = _scores(gradient, whitening)

    def weighed(x):
        return jax.tree.map(lambda m, x: x / np.sqrt(m).astype(x.dtype), masses, x)

    def measure(key, position):
        inside = whitening.to_white(position)
        keys = jax.random.split(key, 5)
        state = gradient.init(keys[0], position)

        def bend(at, state, key, v):
            score, state = score_in(key, position, state)
            return jax.tree.map(jnp.negative, jax.jvp(score, (at,), (v,))[1]), state

        def largest_at(at, state, key):
            def power(carry, key):
                v, state = carry
                bent, state = bend(at, state, key, weighed(v))
                bent = weighed(bent)
                size = jnp.sqrt(tree_dot(bent, bent))
                return (jax.tree.map(lambda b: b / jnp.maximum(size, 1e-30), bent), state), size

            v = noise_like("discrete")(jax.random.fold_in(key, 0), at)
            (_, state), sizes = jax.lax.scan(
                power, (v, state), jax.random.split(jax.random.fold_in(key, 1), _POWER_STEPS)
            )
            return jnp.mean(sizes[_POWER_STEPS // 2 :]), state

        def probe(state, key):
            z = noise_like("discrete")(jax.random.fold_in(key, 0), inside)
            bent, state = bend(inside, state, jax.random.fold_in(key, 1), z)
            return state, jax.tree.map(jnp.multiply, z, bent)

        largest, state = largest_at(inside, state, keys[1])
        _, diagonals = jax.lax.scan(probe, state, jax.random.split(keys[2], _PROBES))

        def width(h, m):
            floor = _LEAST_CURVATURE * largest.astype(h.dtype) * np.asarray(m).astype(h.dtype)
            return 1 / jnp.sqrt(jnp.maximum(jnp.abs(jnp.mean(h, axis=0)), floor))

        widths = jax.tree.map(width, diagonals, masses)

        def displaced(key):
            xi = noise_like("normal")(key, inside)
            return jax.tree.map(lambda x, w, xi: x + w * xi, inside, widths, xi)

        def at_a_point(key):
            keys = jax.random.split(key, 5)
            at, past = displaced(keys[0]), whitening.from_white(displaced(keys[1]))
            # what an estimate remembers stems from another draw
            state = gradient.init(keys[2], past)
            there, state = largest_at(at, state, keys[3])

            def one(state, key):
                score, state = score_in(key, past, state)
                return state, score(at)

            batches = jax.random.split(keys[4], _NOISE_BATCHES // _POINTS)
            _, g = jax.lax.scan(one, state, batches)
            return there, jax.tree.map(lambda g: jnp.var(g, axis=0, ddof=1), g)

        elsewhere, variances = jax.lax.map(at_a_point, jax.random.split(keys[3], _POINTS))
        variance = jax.tree.map(lambda v: jnp.mean(v, axis=0), variances)
        return jnp.maximum(largest, jnp.max(elsewhere)), variance

    with resident_block(gradient.posterior):
        largest, variance = hoisted_jit(measure)(key, position)
    if not np.isfinite(largest) or largest <= 0:
        raise ValueError(
            f"the curvature at position came out as {float(largest):g}: a finite log density that "
            "is not flat is needed."
        )
    return float(largest), variance


def _scores(gradient: Gradient, whitening: Whitening) -> Callable[..., Any]:
    """``(key, position, state) -> (score, state)`` with a score in the whitening's coordinates."""

    def scores(key, position, state):
        score, state = gradient.next(key, position, state)
        return lambda q: whitening.cotangent_to_white(score(whitening.from_white(q))[1]), state

    return scores


@key_first
def find_mass(
    key: PRNGKey, posterior: Posterior, position: Position, *, num_probes: int = 64
) -> PyTree:
    r"""A diagonal mass from the curvature: $M_{ii} = |H_{ii}|$ at a position, on all data.

    With it all coordinates move at one pace, each in units of its own standard deviation (given the
    others). In a hierarchical model with little data for a group the mode may lie in the neck of a
    funnel, where the curvature is not that of the bulk: take the variances of a pilot run then.
    Exact for up to 500 parameters, one Hessian-vector product each; beyond, the mean of
    $z \odot Hz$ over random signs z.

    Args:
        key: A typed PRNG key, for the random signs.
        posterior: A posterior.
        position: Where to look: near the mode, as ``stochgrad.find_center`` finds it.
        num_probes: Random signs beyond 500 parameters.

    Returns:
        A tree of the position's structure, each array of its leaf's shape, for ``mass`` of
        ``stochgrad.sghmc``; ``jax.tree.map(lambda m: rate * m, mass)`` is a friction to go with it.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(99), order="full"
        ... )
        >>> float(stochgrad.find_mass(jax.random.key(0), target, jnp.float32(1.0)))
        100.0
    """
    check_instance("posterior", posterior, Posterior, "a Posterior")
    check_key(key)
    num_probes = check_count("num_probes", num_probes)
    position = as_position("position", position)
    size = tree_size(position)

    score = full_data_mean_traceable(posterior, jax.grad(posterior.log_density))

    def diagonal(key, position):
        flat, unravel = ravel_pytree(position)

        def bend(v):
            bent = jax.jvp(score, (position,), (unravel(v),))[1]
            return -v * ravel_pytree(bent)[0]

        def unit(i):
            return bend(jnp.zeros_like(flat).at[i].set(1))

        def probe(key):
            return bend(jax.random.rademacher(key, (size,), flat.dtype))

        if size <= _EXACT_DIMENSION:
            found = jnp.sum(jax.lax.map(unit, jnp.arange(size), batch_size=8), axis=0)
        else:
            found = jnp.mean(jax.lax.map(probe, jax.random.split(key, num_probes)), axis=0)
        found = jnp.abs(found)
        return unravel(jnp.maximum(found, _FLOOR * jnp.max(found)))

    mass = hoisted_jit(diagonal)(key, position)
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(mass)):
        raise ValueError("the curvature at position is not finite.")
    return jax.tree.map(np.asarray, mass)
