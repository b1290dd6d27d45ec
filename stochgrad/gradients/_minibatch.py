"""The plain minibatch gradient, and how a target becomes a gradient."""

import jax

from stochgrad.core import Gradient, Posterior, Target


def minibatch(posterior: Posterior) -> Gradient:
    r"""The gradient of a posterior's log density on its next minibatch.

    $$\hat g(\theta) = \nabla\log p(\theta) + K \sum_{i \in b} \nabla\log p(x_i \mid \theta),
      \qquad K = \lceil N/B \rceil.$$

    Args:
        posterior: A posterior and its stream of minibatches.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(10), order="full"
        ... )
        >>> gradient = stochgrad.gradients.minibatch(target)
        >>> state = gradient.init(jax.random.key(0), jnp.float32(0.0))
        >>> score, state = gradient.next(jax.random.key(1), jnp.float32(0.0), state)
        >>> float(score(jnp.float32(0.0))[1])
        10.0
    """
    batches = posterior.batches

    def init(key, position):
        return batches.init(key)

    def next(key, position, state):
        batch, state = batches.next(state)

        def score(position):
            return jax.value_and_grad(posterior.log_density)(position, batch)

        return score, state

    return Gradient(init, next, posterior)


def as_gradient(target: Target) -> Gradient:
    """The gradient that drives a kernel: a posterior's minibatch gradient, or the one given."""
    if isinstance(target, Posterior):
        return minibatch(target)
    if isinstance(target, Gradient):
        return target
    raise TypeError(
        "target must be a Posterior (from stochgrad.posterior or stochgrad.from_numpyro) "
        f"or a Gradient, got {type(target).__name__}."
    )
