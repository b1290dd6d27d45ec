"""What an integrator of underdamped Langevin dynamics is given, and what it gives back."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar

from stochgrad.core import Position, Score


class Coefficients(NamedTuple):
    r"""The coefficients of underdamped Langevin dynamics.

    $$dq = M^{-1}p\,dt, \qquad dp = \nabla\log\pi(q)\,dt - CM^{-1}p\,dt + \sqrt{2CT}\,dW.$$

    Attributes:
        step_size: h, as time in the SDE.
        friction: C, a number or an array for each leaf of the position.
        noise_scale: Standard deviation of the noise injected in one step, $\sqrt{2(CT - \hat B)h}$,
            likewise.
        velocity: $p \mapsto M^{-1}p$.
    """

    step_size: Scalar | float
    friction: PyTree
    noise_scale: PyTree
    velocity: Callable[[Position], Position]


class Stage(NamedTuple):
    """Where a step ends, and the last estimate of log density and gradient on its way."""

    position: Position
    momentum: Position
    value: Scalar
    gradient: Position


Integrator: TypeAlias = Callable[
    [Position, Position, Score, Callable[[int], Position], Coefficients], Stage
]
"""``(position, momentum, score, noise, coefficients) -> Stage``.

``noise(i)`` is the i-th independent tree of unit-variance noise of the step.
"""


def axpy(a: Any, x: Position, y: Position) -> Position:
    """``a x + y`` with a number ``a``, leaf by leaf, in the type of ``y``."""
    return jax.tree.map(lambda x, y: jnp.asarray(a, y.dtype) * x + y, x, y)


def scaled(a: PyTree, x: Position) -> Position:
    """``a x`` with a number or an array for each leaf of ``x``, in the type of ``x``."""
    return jax.tree.map(lambda a, x: jnp.asarray(a, x.dtype) * x, a, x)
