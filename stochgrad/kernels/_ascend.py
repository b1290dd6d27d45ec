"""An optimiser as a dynamics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from stochgrad.core import Kernel, Position, Target, tree_dot
from stochgrad.gradients import as_gradient


class AscendState(NamedTuple):
    """State of an optimisation.

    Attributes:
        position: The position.
        optimizer_state: The optimiser's own state.
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
    r"""Climb a stochastic gradient with an optax optimiser.

    $$\theta' = \theta + \mathrm{update}(-\hat g(\theta)).$$

    It is a kernel like any other: ``stochgrad.sample`` runs it, with many chains as many restarts.

    Args:
        target: A posterior, or a gradient.
        optimizer: An ``optax.GradientTransformation``, whose updates are added to the position.

    Raises:
        TypeError: the optimiser has no ``init`` and ``update``, or the target is neither a
            posterior nor a gradient.

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
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be an optax optimiser, got {type(optimizer).__name__}.")

    def init(position: Position, rng_key) -> AscendState:
        return AscendState(position, optimizer.init(position), gradient.init(rng_key, position))

    def step(rng_key, state: AscendState) -> tuple[AscendState, AscendInfo]:
        score, gradient_state = gradient.next(rng_key, state.position, state.gradient_state)
        value, g = score(state.position)
        descent = jax.tree.map(jnp.negative, g)
        updates, optimizer_state = optimizer.update(descent, state.optimizer_state, state.position)
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
