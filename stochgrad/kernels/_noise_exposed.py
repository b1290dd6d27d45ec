"""A kernel's step as a function of its state and its noise, and its matrices where it is affine."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from stochgrad.core import Gradient, Kernel, Position

KernelFactory = Callable[..., Kernel]
"""``(gradient, step_size, noise=...) -> Kernel``: ``functools.partial(sghmc, friction=1.0)``."""


class NoiseExposedStep(NamedTuple):
    """One step with all that moves it in view.

    Attributes:
        start: ``(position, momentum, batch) -> z``, the floating-point part of a state as one
            vector; ``momentum`` is not used by a kernel that has none.
        step: ``(z, noise, batch) -> z``, with ``noise`` of shape (size of the noise,).
        noise_size: How many unit-variance numbers a step draws.
        position: Places of the position in z.
        momentum: Places of the momentum in z, or None.
    """

    start: Callable[[Any, Any, Any], Any]
    step: Callable[[Any, Any, Any], Any]
    noise_size: int
    position: np.ndarray
    momentum: np.ndarray | None


class Affine(NamedTuple):
    r"""$z' = Az + b + N\xi$ with unit-variance $\xi$."""

    matrix: np.ndarray
    offset: np.ndarray
    noise: np.ndarray


def expose_noise(
    factory: KernelFactory,
    step_size: float,
    log_density: Callable[[Position, Any], Any],
    position: Position,
) -> NoiseExposedStep:
    """Take the shipped step function apart by handing it its noise and its minibatch."""
    key = jax.random.key(0)

    def kernel_with(noise, batch):
        def next(key, position, state):
            return jax.value_and_grad(lambda q: log_density(q, batch)), state

        return factory(Gradient(lambda key, position: (), next), step_size, noise=noise)

    sizes: list[int] = []

    def count(key, tree):
        sizes.append(ravel_pytree(tree)[0].size)
        return jax.tree.map(jnp.zeros_like, tree)

    counting = kernel_with(count, 0)
    example = counting.init(position, key)
    jax.eval_shape(counting.step, key, example)
    total, ends = sum(sizes), np.cumsum(sizes)
    paths = jax.tree_util.tree_leaves_with_path(example)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in paths]

    def pack(state):
        leaves = jax.tree.leaves(state)
        kept = [x.ravel() for x, flag in zip(leaves, floating, strict=True) if flag]
        return jnp.concatenate(kept)

    def unpack(z):
        leaves, structure = jax.tree.flatten(example)
        filled, at = [], 0
        for leaf, flag in zip(leaves, floating, strict=True):
            filled.append(z[at : at + leaf.size].reshape(leaf.shape) if flag else leaf)
            at += leaf.size if flag else 0
        return jax.tree.unflatten(structure, filled)

    def start(position, momentum, batch):
        state = kernel_with(count, batch).init(position, key)
        if hasattr(state, "momentum"):
            state = state._replace(momentum=momentum)
        return pack(state)

    def step(z, noise, batch):
        given = iter(np.split(np.arange(total), ends[:-1]))

        def hand_out(key, tree):
            flat, unravel = ravel_pytree(tree)
            return unravel(noise[next(given)].astype(flat.dtype))

        state, _ = kernel_with(hand_out, batch).step(key, unpack(z))
        return pack(state)

    def places(name):
        found, at = [], 0
        for (path, leaf), flag in zip(paths, floating, strict=True):
            if flag and path[0] == jax.tree_util.GetAttrKey(name):
                found.append(np.arange(at, at + leaf.size))
            at += leaf.size if flag else 0
        return np.concatenate(found) if found else None

    where = places("position")
    assert where is not None  # expose_noise is for kernels whose state has a position
    return NoiseExposedStep(start, step, total, where, places("momentum"))


def affine_steps(opened: NoiseExposedStep, position: Position, batches: int) -> list[Affine] | None:
    """The matrices of a step for each minibatch, by evaluation; None where it is not affine."""
    z = opened.start(position, position, 0)
    xi = jnp.zeros(opened.noise_size, z.dtype)
    numbers = jnp.arange(batches)
    step = jax.vmap(lambda z, xi, j: opened.step(z, xi, j), (None, None, 0))
    jacobians = jax.jit(
        lambda z, xi: (*jax.jacfwd(step, (0, 1))(z, xi, numbers), step(z, xi, numbers))
    )
    matrix, noise, offset = map(np.asarray, jacobians(jnp.zeros_like(z), xi))
    elsewhere = jacobians(z + 0.5 + 0.1 * jnp.arange(z.size, dtype=z.dtype), xi + 0.7)
    for here, there in zip((matrix, noise), elsewhere[:2], strict=True):
        if not np.allclose(here, there, rtol=1e-6, atol=1e-8):
            return None
    return [Affine(*parts) for parts in zip(matrix, offset, noise, strict=True)]
