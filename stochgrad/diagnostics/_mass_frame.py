"""Coordinates of unit mass, and the curvature in them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from stochgrad.core import Kernel, Position, check_array, tree_size
from stochgrad.diagnostics._around_center import hessian_times
from stochgrad.sgmcmc import whitenings

PROBES = 64
_LEAST_CURVATURE = 1e-9


class Frame(NamedTuple):
    r"""Coordinates of unit mass, and the kernel in them.

    Attributes:
        root: W with $q = Wu$ and $W^\top M W = 1$, shape (d, d), or (d,) for a diagonal.
        friction: C in these coordinates, a diagonal of shape (d,); None for a kernel without.
        noise: The noise estimate, likewise.
        online: Whether the kernel estimates that itself.
    """

    root: np.ndarray
    friction: np.ndarray | None = None
    noise: np.ndarray | None = None
    online: bool = False


def frame_of(kernel: Kernel, settings: dict[str, Any], center: Position) -> Frame:
    """The coordinates in which a kernel's mass is one."""
    size = tree_size(center)
    if kernel.method != "SGHMC":
        return Frame(np.ones(size))
    online = isinstance(settings["noise_estimate"], str)
    estimate = 0.0 if online else settings["noise_estimate"]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float64), center)
        whitening = whitenings(settings["mass"], settings["friction"], estimate)(wide)
        white = whitening.to_white(wide)
        flat, unravel = ravel_pytree(white)

        def diagonal(tree):
            leaves = jax.tree.map(lambda v, x: np.broadcast_to(v, x.shape).ravel(), tree, white)
            return np.concatenate([np.asarray(x, np.float64) for x in jax.tree.leaves(leaves)])

        mass, friction, noise = map(diagonal, (whitening.mass, whitening.friction, whitening.noise))
        scale = 1 / np.sqrt(mass)
        if whitening.identity:
            root = scale
        else:
            outward = jax.vmap(lambda e: ravel_pytree(whitening.from_white(unravel(e)))[0])
            root = np.asarray(outward(jnp.eye(flat.size))).T * scale
    return Frame(root, friction / mass, noise / mass, online)


def curvature_and_reference(gradient, key, center, root, dense, temperature, hessian, covariance):
    """H and the covariance of draws in the coordinates of ``root``, or their diagonals."""
    size = tree_size(center)
    if hessian is not None:
        hessian = positive_matrix("hessian", hessian, size)
    if covariance is not None:
        covariance = positive_matrix("covariance", covariance, size)
    reference = None
    if covariance is not None:
        inverse = np.linalg.inv(np.diag(root) if root.ndim == 1 else root)
        reference = inverse @ covariance @ inverse.T
    if hessian is None and reference is not None:
        curvature = temperature * np.linalg.inv(reference)
        curvature = curvature if dense else np.diag(curvature)
    elif hessian is not None:
        bent = multiply(hessian, root)
        curvature = _dual(bent, root) if dense else _diagonal_of(bent, root)
    elif dense:
        bent = hessian_times(gradient, key, center, root.T).T
        curvature = _dual(bent, root)
    else:
        signs = np.random.default_rng(np.asarray(jax.random.key_data(key))).choice(
            [-1.0, 1.0], (PROBES, size)
        )
        bent = hessian_times(gradient, key, center, multiply(signs, root.T))
        curvature = np.mean(signs * multiply(bent, root), axis=0)
    eigenvalues = np.linalg.eigvalsh(curvature) if dense else curvature
    if not eigenvalues.min() > _LEAST_CURVATURE * eigenvalues.max():
        raise ValueError(
            "center: the log density is not strictly concave there, to working precision "
            f"(curvatures from {eigenvalues.min():.3g} to {eigenvalues.max():.3g} in units of the "
            "mass): give covariance=, that of draws of a pilot run, and their mean for center, and "
            "the kernel the inverse for its mass."
        )
    if not dense:
        reference = temperature / curvature
    elif reference is None:
        reference = temperature * np.linalg.inv(curvature)
    return curvature, reference


def square_matrix(name: str, value: Any, size: int) -> np.ndarray:
    """A symmetric matrix over the raveled position, or a ValueError."""
    matrix = check_array(name, value).astype(np.float64)
    if matrix.shape != (size, size):
        raise ValueError(
            f"{name} must have shape ({size}, {size}), over the raveled position, "
            f"got {matrix.shape}."
        )
    return (matrix + matrix.T) / 2


def positive_matrix(name: str, value: Any, size: int) -> np.ndarray:
    """A symmetric positive definite matrix over the raveled position, or a ValueError."""
    matrix = square_matrix(name, value, size)
    if not np.linalg.eigvalsh(matrix).min() > 0:
        raise ValueError(f"{name} must be a symmetric positive definite matrix.")
    return matrix


def root_of_draws(root: np.ndarray, reference: np.ndarray) -> np.ndarray:
    r"""L with $LL^\top$ the covariance of draws, in the position's own coordinates."""
    if reference.ndim == 2:
        return root @ np.linalg.cholesky(reference)
    return root * np.sqrt(reference)


def multiply(x: np.ndarray, root: np.ndarray) -> np.ndarray:
    """``x @ root`` with a matrix or a diagonal."""
    return x @ root if root.ndim == 2 else x * root


def _dual(bent: np.ndarray, root: np.ndarray) -> np.ndarray:
    matrix = root.T @ bent
    return (matrix + matrix.T) / 2


def _diagonal_of(bent: np.ndarray, root: np.ndarray) -> np.ndarray:
    return np.sum(root * bent, axis=0) if root.ndim == 2 else np.diag(bent) * root
