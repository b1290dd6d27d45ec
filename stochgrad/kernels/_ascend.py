"""An optimizer as a dynamics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from stochgrad.core import Kernel, Position, Target, describe, first_line, tree_dot
from stochgrad.gradients import as_gradient, evaluated


class AscendState(NamedTuple):
    """State of an optimization.

    Attributes:
        position: The position.
        optimizer_state: The optimizer's own state.
        gradient_state: The gradient's own state.
    """

    position: Position
    optimizer_state: Any
    gradient_state: Any


class AscendInfo(NamedTuple):
    """What a step reports.

    Attributes:
        log_density: Estimate of the objective before the step.
        gradient_norm: Euclidean norm of the gradient estimate.
    """

    log_density: Scalar
    gradient_norm: Float[Array, ""]


def ascend(target: Target, optimizer: Any) -> Kernel:
    r"""Climb a stochastic gradient with an optax optimizer.

    $$\theta' = \theta + \mathrm{update}(-\hat g(\theta)).$$

    It is a kernel like any other: ``stochgrad.sample`` runs it, with many chains as many restarts.

    Args:
        target: A posterior, or a gradient.
        optimizer: An ``optax.GradientTransformation``, whose updates are added to the position.

    Raises:
        TypeError: the optimizer is none of optax's, or the target is neither a posterior nor a
            gradient.
        ValueError: when run: the optimizer fails on the position (one that needs the objective's
            value, such as ``optax.lbfgs``, does), or the target does.

    Example:
        >>> import jax, jax.numpy as jnp, optax, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(9), order="full"
        ... )
        >>> kernel = stochgrad.ascend(target, optax.adam(0.05))
        >>> path = stochgrad.sample(
        ...     jax.random.key(0), kernel, init=jnp.float32(0.0), num_samples=300
        ... )
        >>> round(float(path.positions[0, -1]), 2)
        0.9
    """
    gradient = as_gradient(target)
    check_optimizer(optimizer)

    def init(position: Position, rng_key) -> AscendState:
        state = _by_optimizer("init", optimizer.init, position)
        return AscendState(position, state, gradient.init(rng_key, position))

    def step(rng_key, state: AscendState) -> tuple[AscendState, AscendInfo]:
        score, gradient_state = gradient.next(rng_key, state.position, state.gradient_state)
        value, g = evaluated("target", score, state.position)
        descent = jax.tree.map(jnp.negative, g)
        updates, optimizer_state = _by_optimizer(
            "update", optimizer.update, descent, state.optimizer_state, state.position
        )
        position = jax.tree.map(jnp.add, state.position, updates)
        info = AscendInfo(value, jnp.sqrt(tree_dot(g, g)))
        return AscendState(position, optimizer_state, gradient_state), info

    return Kernel(
        init,
        step,
        "ascend",
        posterior=gradient.posterior,
        initial=gradient.initial,
        samples=False,
    )


def check_optimizer(optimizer: Any) -> None:
    """Raise unless there is what optax's factories return."""
    parts = (getattr(optimizer, name, None) for name in ("init", "update"))
    if isinstance(optimizer, type) or not all(callable(part) for part in parts):
        raise TypeError(
            "optimizer must be an optax optimizer, a GradientTransformation such as "
            f"optax.adam(1e-3) returns, got {describe(optimizer)}."
        )


def _by_optimizer(name: str, function: Any, *arguments: Any) -> Any:
    try:
        result = function(*arguments)
        if name == "update":
            updates, _ = result
            jax.tree.map(jnp.add, updates, arguments[-1])
        return result
    except Exception as error:
        raise ValueError(
            f"optimizer.{name} fails on this position: {first_line(error)}."
        ) from error
