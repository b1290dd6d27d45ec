"""The way from near a mode to the mode, on all data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from stochgrad.core import (
    Position,
    Posterior,
    full_data_mean,
    full_data_mean_traceable,
    hoisted_jit,
)

EXACT_DIMENSION = 128
_LANCZOS_STEPS = 64
_ROUNDING = 1e-5
"""Eigenvalues below this share of the largest, of a matrix of unit diagonal, are rounding."""
_FLAT = 2e-7
"""Eigenvalues below this share of the largest are those of a flat direction."""
_NEWTON_ROUNDS = 6
_ENOUGH = 0.1


class Curvature(NamedTuple):
    r"""Minus the Hessian at a position, as far as it is known.

    Attributes:
        scale: $1/\sqrt{|H_{ii}|}$, or ones where the diagonal is not known.
        basis: Orthonormal columns V in coordinates divided by the scale.
        values: Eigenvalues of $V^\top SHSV$, increasing.
    """

    scale: Float[np.ndarray, " d"]
    basis: Float[np.ndarray, "d k"]
    values: Float[np.ndarray, " k"]

    @property
    def positive(self) -> bool:
        """Whether the log density is strictly concave there, beyond rounding."""
        top = self.values[-1]
        return bool(np.isfinite(top) and top > 0 and self.values[0] > _FLAT * top)

    def newton(self, g: Float[np.ndarray, " d"]) -> tuple[Float[np.ndarray, " d"], float]:
        r"""The step $|H|^{-1}g$ and its length $\sqrt{g^\top |H|^{-1} g}$."""
        weights = self.basis.T @ (g * self.scale)
        floor = _ROUNDING * max(abs(self.values[-1]), abs(self.values[0]), 1e-300)
        size = np.maximum(np.abs(self.values), floor)
        return self.scale * (self.basis @ (weights / size)), float(
            np.sqrt(np.sum(weights**2 / size))
        )


def _tridiagonal(diagonal: list, beside: list) -> np.ndarray:
    off = beside[: len(diagonal) - 1]
    return np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)


def _corner_of_inverse(diagonal: list, beside: list) -> float:
    """What the squared distance is in units of the squared gradient."""
    values, vectors = np.linalg.eigh(_tridiagonal(diagonal, beside))
    return float(np.sum(vectors[0] ** 2 / np.where(values == 0, np.inf, values)))


class Mode(NamedTuple):
    """Where a climb has come to, and how far the mode is from there in standard deviations."""

    position: Position
    value: float
    gradient_norm: float
    distance: float


class Climb:
    """All that a climb needs of a posterior: its value, gradient and curvature on all data.

    Args:
        posterior: A posterior.
        position: A position, for the shapes.
        passes: Passes over all rows, at most; a product with the Hessian counts as two.
    """

    def __init__(self, posterior: Posterior, position: Position, passes: int):
        flat, self.unravel = ravel_pytree(jax.tree.map(jnp.asarray, position))
        self.dtype, self.size, self.left = flat.dtype, flat.size, passes
        self._value_and_grad = full_data_mean(posterior, jax.value_and_grad(posterior.log_density))
        score = full_data_mean_traceable(posterior, jax.grad(posterior.log_density))

        def bend(position, v):
            bent = jax.jvp(score, (position,), (self.unravel(v),))[1]
            return -ravel_pytree(bent)[0]

        def matrix(position):
            unit = jnp.eye(self.size, dtype=self.dtype)
            return jax.lax.map(lambda v: bend(position, v), unit, batch_size=8)

        self._bend, self._matrix = hoisted_jit(bend), hoisted_jit(matrix)

    def at(self, x: np.ndarray) -> Position:
        return self.unravel(jnp.asarray(x, self.dtype))

    def value_and_grad(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        self.left -= 1
        value, g = self._value_and_grad(self.at(x))
        return float(value), np.asarray(ravel_pytree(g)[0], np.float64)

    def curvature(self, x: np.ndarray, g: np.ndarray) -> Curvature:
        """Minus the Hessian: exact up to 128 numbers, else in the Krylov space of the gradient."""
        position = self.at(x)
        if self.size <= EXACT_DIMENSION:
            self.left -= 2 * self.size
            h = np.asarray(self._matrix(position), np.float64)
            diagonal = np.abs(np.diag(h))
            scale = 1 / np.sqrt(np.maximum(diagonal, 1e-12 * max(diagonal.max(), 1e-300)))
            h = scale[:, None] * (h + h.T) / 2 * scale
            if not np.all(np.isfinite(h)):
                return Curvature(scale, np.eye(self.size), np.full(self.size, np.nan))
            values, basis = np.linalg.eigh(h)
            return Curvature(scale, basis, values)
        return self._lanczos(lambda v: self._bend(position, jnp.asarray(v, self.dtype)), g)

    def _lanczos(self, bend: Callable[[np.ndarray], Any], g: np.ndarray) -> Curvature:
        start = g if np.any(g) else np.ones_like(g)
        basis, diagonal, beside = [start / np.linalg.norm(start)], [], []
        estimates: list[float] = []
        for _ in range(_LANCZOS_STEPS):
            self.left -= 2
            w = np.asarray(bend(basis[-1]), np.float64)
            diagonal.append(w @ basis[-1])
            for _ in range(2):
                w = w - np.array(basis).T @ (np.array(basis) @ w)
            norm = np.linalg.norm(w)
            if not np.isfinite(norm) or norm <= 1e-6 * max(np.abs(diagonal).max(), 1e-300):
                break
            beside.append(norm)
            basis.append(w / norm)
            estimates.append(_corner_of_inverse(diagonal, beside))
            if len(estimates) > 4 and np.ptp(estimates[-4:]) < 0.01 * abs(estimates[-1]):
                break
        k = len(diagonal)
        t = _tridiagonal(diagonal, beside)
        if not np.all(np.isfinite(t)):
            return Curvature(np.ones(self.size), np.array(basis[:k]).T, np.full(k, np.nan))
        values, vectors = np.linalg.eigh(t)
        return Curvature(np.ones(self.size), np.array(basis[:k]).T @ vectors, values)


def climb(posterior: Posterior, position: Position, passes: int) -> Mode:
    r"""Climb to the mode on all data, by L-BFGS and Newton's method, unless it is near already.

    Near is a distance $\sqrt{g^\top H^{-1}g}$ below $0.1\sqrt d$. Newton's steps are taken with the
    absolute values of the curvature's eigenvalues (Dauphin et al., NeurIPS 2014), so that they
    climb where the density is not concave, and shortened until the density does not fall.
    """
    problem = Climb(posterior, position, passes)
    x = np.asarray(ravel_pytree(jax.tree.map(jnp.asarray, position))[0], np.float64)
    value, g = problem.value_and_grad(x)
    curvature = problem.curvature(x, g)
    enough = _ENOUGH * np.sqrt(problem.size)
    for turn in range(_NEWTON_ROUNDS):
        step, distance = curvature.newton(g)
        if (curvature.positive and distance < enough) or problem.left <= 0:
            break
        before = value
        if turn % 2 == 0:
            x, value, g = _lbfgs(problem, x, value, g, curvature.scale)
        else:
            x, value, g = _backtracked(problem, x, value, g, step)
        curvature = problem.curvature(x, g)
        if not np.isfinite(value) or (turn % 2 and value <= before):
            break
    _, distance = curvature.newton(g)
    if not curvature.positive or not np.isfinite(value):
        distance = float("nan")
    return Mode(jax.tree.map(np.asarray, problem.at(x)), value, float(np.linalg.norm(g)), distance)


def _lbfgs(problem: Climb, x, value, g, scale):
    """L-BFGS in coordinates divided by a scale; the best point that it meets."""
    from scipy.optimize import minimize

    best = [value, x, g]

    def objective(z):
        value, g = problem.value_and_grad(z * scale)
        if not np.isfinite(value) or not np.all(np.isfinite(g)):
            return 1e300, np.zeros_like(g)
        if value > best[0]:
            best[:] = value, z * scale, g
        return -value, -g * scale

    options = {"maxfun": max(problem.left // 2, 1), "maxiter": 10_000, "ftol": 0.0, "gtol": 1e-6}
    minimize(objective, x / scale, jac=True, method="L-BFGS-B", options=options)
    return best[1], best[0], best[2]


def _backtracked(problem: Climb, x, value, g, step):
    """The longest of a few steps that does not lower the density by more than its rounding."""
    slack = 4 * float(jnp.finfo(problem.dtype).eps) * abs(value)
    for shrink in (1.0, 0.5, 0.1, 0.01):
        there, slope = problem.value_and_grad(x + shrink * step)
        if np.isfinite(there) and np.all(np.isfinite(slope)) and there >= value - slack:
            return x + shrink * step, there, slope
    return x, value, g
