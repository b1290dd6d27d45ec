"""A minibatch estimate, centered at a point where all is known."""

from collections.abc import Callable
from typing import Any

import jax

from stochgrad.core import Position, Score


def centered(
    value_and_gradient: Callable[[Position, Any], Any], batch: Any, anchor: Position, whole: Any
) -> Score:
    r"""$\theta \mapsto \hat g_b(\theta) - \hat g_b(\tilde\theta) + \nabla\log\pi(\tilde\theta)$.

    Args:
        value_and_gradient: ``(position, batch) -> (value, gradient)``.
        batch: The minibatch b.
        anchor: The point $\tilde\theta$.
        whole: Value and gradient there, on all data.
    """

    def score(position):
        return jax.tree.map(
            lambda here, there, whole: here - there + whole,
            value_and_gradient(position, batch),
            value_and_gradient(anchor, batch),
            whole,
        )

    return score
