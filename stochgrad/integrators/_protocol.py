"""What an integrator of underdamped Langevin dynamics is given, and what it gives back."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Scalar

from stochgrad.core import Position, Score, number


class Coefficients(NamedTuple):
    r"""The coefficients of underdamped Langevin dynamics, each leaf with its own.

    $$dq = M^{-1}p\,dt, \qquad dp = \nabla\log\pi(q)\,dt - CM^{-1}p\,dt + \sqrt{2C\Theta}\,dW.$$

    Where the step size is a plain number, so are all of them, and what an integrator makes of them
    is computed once, on the host, in double precision.

    Attributes:
        step_size: h, as time in the SDE.
        mass: M, a number or an array (a diagonal) for each leaf of the position.
        friction: C, likewise.
        temperature: $\Theta = T - \hat B/C$, the temperature of the noise to inject, likewise.
    """

    step_size: Scalar | float
    mass: PyTree
    friction: PyTree
    temperature: PyTree

    def each(self, function: Callable[[Any, Any, Any, ModuleType], Any]) -> PyTree:
        """``function(mass, friction, temperature, numpy)`` for each leaf.

        Its last argument is ``numpy``, or ``jax.numpy`` where the step size is traced.
        """
        traced = isinstance(self.step_size, jax.Array)
        temperatures = jax.tree.leaves(self.temperature)
        module = jnp if traced or any(isinstance(t, jax.Array) for t in temperatures) else np
        return jax.tree.map(
            lambda m, c, t: function(m, c, t, module), self.mass, self.friction, self.temperature
        )

    def velocity(self, momentum: Position) -> Position:
        """$M^{-1}p$."""
        return velocity(self.mass, momentum)


class Stage(NamedTuple):
    """Where a step ends, and the last estimate of log density and gradient on its way."""

    position: Position
    momentum: Position
    value: Scalar
    gradient: Position


class Integrator(NamedTuple):
    """One step of a scheme, and what a kernel must know of it.

    Attributes:
        step: ``(position, momentum, gradient, score, noise, coefficients) -> Stage``. ``gradient``
            is the last estimate of the step before; ``noise(i)`` is the i-th independent tree of
            unit-variance noise of this step.
        keeps_gradient: Whether the step begins with the gradient that the last one ended with, so
            that a chain needs one before its first step.
        damping_limit: $hC/M$ from which on friction alone makes the scheme unstable.
        symmetric: Whether the step is its own mirror image, and so of even order.
    """

    step: Callable[
        [Position, Position, Position, Score, Callable[[int], Position], Coefficients], Stage
    ]
    keeps_gradient: bool = False
    damping_limit: float = math.inf
    symmetric: bool = False


def velocity(mass: PyTree, momentum: Position) -> Position:
    """$M^{-1}p$ with a number or an array for each leaf."""
    return jax.tree.map(over, momentum, mass)


def over(x: Any, divisor: Any) -> Any:
    """``x / divisor`` in the type of ``x``; where that is one number, times its reciprocal."""
    if np.ndim(divisor) > 0:
        return x / jnp.asarray(divisor, x.dtype)
    if isinstance(divisor, jax.Array):
        return x * (1 / divisor.astype(x.dtype))
    kind = np.dtype(x.dtype).type
    return x if divisor == 1 else x * number(kind(1) / kind(divisor), x.dtype)


def axpy(a: Any, x: Position, y: Position) -> Position:
    """``a x + y`` with a number ``a``, leaf by leaf, in the type of ``y``."""
    return jax.tree.map(lambda x, y: number(a, y.dtype) * x + y, x, y)


def scaled(a: PyTree, x: Position) -> Position:
    """``a x`` with a number or an array for each leaf of ``x``, in the type of ``x``."""
    return jax.tree.map(lambda a, x: number(a, x.dtype) * x, a, x)


def add(*terms: Position) -> Position:
    """The sum of trees."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *terms)
