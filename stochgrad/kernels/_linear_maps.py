"""A kernel's step on a Gaussian: the matrices of its modes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.kernels._noise_exposed import KernelFactory, expose_noise


class LinearMaps(NamedTuple):
    r"""$z_i' = A_i z_i + F_i u_i + N_i \xi_i$ for each mode i, with gradient noise u.

    The m modes have n numbers each, r of them positions; k unit-variance noises drive each.

    Attributes:
        matrix: A, shape (m, n, n).
        force: F, shape (m, n, r).
        noise: N, shape (m, n, k).
        position: Places of the positions among the n numbers, shape (r,).
        score_matrix: The last gradient's dependence on z, shape (m, r, n).
        score_noise: Its dependence on the noises, shape (m, r, k).
        evaluations: Gradients a step.
    """

    matrix: np.ndarray
    force: np.ndarray
    noise: np.ndarray
    position: np.ndarray
    score_matrix: np.ndarray
    score_noise: np.ndarray
    evaluations: int

    @property
    def radius(self) -> float:
        """The largest spectral radius of the modes; the chain is stable below one."""
        return float(np.max(np.abs(np.linalg.eigvals(self.matrix))))


def mode_maps(factory: KernelFactory, step_size: float, curvatures: np.ndarray) -> LinearMaps:
    r"""The maps of a kernel that acts on each coordinate alike, by evaluating its step.

    The target is $-\tfrac12 \sum_i \lambda_i q_i^2$. All modes are evaluated at once, in double
    precision.

    Args:
        factory: ``(gradient, step_size, noise=...) -> Kernel`` for a position of shape (m,), with
            neither mass nor friction that mixes coordinates.
        step_size: h.
        curvatures: $\lambda$, shape (m,).

    Example:
        >>> from functools import partial
        >>> import numpy as np, stochgrad
        >>> maps = mode_maps(stochgrad.sgld, 0.1, np.array([1.0, 5.0]))
        >>> maps.matrix.ravel().round(3).tolist()
        [0.9, 0.5]
    """
    curvatures = np.asarray(curvatures, np.float64)
    size = len(curvatures)
    with jax.enable_x64(True):
        step, parts, noises, count = _step(factory, step_size, lambda q: curvatures * q, size)

        def per_mode(z, xi, u):
            spread = [jnp.repeat(x, size) for x in (z, xi, u)]
            return step(*spread).reshape(parts, size)

        zeros = jnp.zeros(parts), jnp.zeros(noises), jnp.zeros(1)
        found = jax.jit(jax.jacfwd(per_mode, (0, 1, 2)))(*zeros)
        matrix, noise, force = (np.moveaxis(np.asarray(x), 1, 0) for x in found)
    return _reduced(matrix, noise, force, 1, count)


def joint_maps(factory: KernelFactory, step_size: float, hessian: np.ndarray) -> LinearMaps:
    r"""The map of any kernel on $-\tfrac12 q^\top H q$, all d coordinates as one mode (m = 1).

    Args:
        factory: ``(gradient, step_size, noise=...) -> Kernel`` for a position of shape (d,).
        step_size: h.
        hessian: H, shape (d, d).
    """
    size = len(hessian)
    with jax.enable_x64(True):
        h = jnp.asarray(hessian, float)
        step, parts, noises, count = _step(factory, step_size, lambda q: h @ q, size)
        zeros = jnp.zeros(parts * size), jnp.zeros(noises * size), jnp.zeros(size)
        found = jax.jit(jax.jacfwd(step, (0, 1, 2)))(*zeros)
        matrix, noise, force = (np.asarray(x)[None] for x in found)
    return _reduced(matrix, noise, force, size, count)


def _step(
    factory: KernelFactory, step_size: float, bend: Callable[[Any], Any], size: int
) -> tuple[Callable, int, int, int]:
    """``(z, xi, u) -> z``, how many times ``size`` numbers z and xi are, and gradients a step."""
    count = [0]

    def log_density(q, u):
        count[0] += 1
        return jnp.sum(u * q) - 0.5 * jnp.sum(q * bend(q))

    opened = expose_noise(factory, step_size, log_density, jnp.zeros(size))
    z = opened.start(jnp.zeros(size), jnp.zeros(size), jnp.zeros(size))
    count[0] = 0
    jax.eval_shape(opened.step, z, jnp.zeros(opened.noise_size), jnp.zeros(size))
    return opened.step, z.size // size, opened.noise_size // size, count[0]


def _reduced(matrix, noise, force, block: int, evaluations: int) -> LinearMaps:
    """Without what the next step does not read: z is (position, ..., last gradient)."""
    parts = matrix.shape[1] // block
    read = [i == 0 or bool(np.any(matrix[:, :, i * block : (i + 1) * block])) for i in range(parts)]
    live = np.flatnonzero(np.repeat(read, block))
    last = np.arange((parts - 1) * block, parts * block)
    return LinearMaps(
        matrix[:, live][:, :, live],
        force[:, live],
        noise[:, live],
        np.arange(block),
        matrix[:, last][:, :, live],
        noise[:, last],
        evaluations,
    )
