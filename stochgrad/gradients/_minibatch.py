"""The plain minibatch gradient, and how a target becomes a gradient."""

import jax

from stochgrad.core import Batches, Gradient, Posterior, Target, check_callable, describe


def minibatch(posterior: Posterior) -> Gradient:
    r"""The gradient of a posterior's log density on its next minibatch.

    $$\hat g(\theta) = \nabla\log p(\theta) + K \sum_{i \in b} \nabla\log p(x_i \mid \theta),
      \qquad K = \lceil N/B \rceil.$$

    Args:
        posterior: A posterior and its stream of minibatches.

    Raises:
        TypeError: ``posterior`` is not a posterior.

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
    check_posterior("minibatch", posterior)
    batches = posterior.batches

    def init(key, position):
        return batches.init(key)

    def next(key, position, state):
        batch, state = batches.next(state)

        def score(position):
            return jax.value_and_grad(posterior.log_density)(position, batch)

        return score, state

    return Gradient(init, next, posterior)


def as_gradient(target: Target, name: str = "target") -> Gradient:
    """The gradient that drives a kernel: a posterior's minibatch gradient, or the one given."""
    if isinstance(target, Posterior):
        return minibatch(target)
    if isinstance(target, Gradient):
        check_callable(f"{name}.init", target.init, "a function (key, position)")
        check_callable(f"{name}.next", target.next, "a function (key, position, state)")
        for part in ("initial", "model"):
            if getattr(target, part) is not None:
                check_callable(f"{name}.{part}", getattr(target, part))
        if target.posterior is not None:
            check_posterior(f"{name}.posterior", target.posterior)
        return target
    raise TypeError(
        f"{name} must be a Posterior (from stochgrad.posterior or stochgrad.from_numpyro) "
        f"or a Gradient, got {describe(target)}."
    )


def check_posterior(user: str, posterior: object) -> None:
    """Raise unless there is a posterior that can be evaluated, on minibatches."""
    if not isinstance(posterior, Posterior):
        what = describe(posterior) if isinstance(posterior, type) else type(posterior).__name__
        raise TypeError(
            f"{user} needs a Posterior, got {what}: posterior must be what stochgrad.posterior "
            "or stochgrad.from_numpyro makes."
        )
    check_callable("posterior.log_density", posterior.log_density, "a function (position, batch)")
    if not isinstance(posterior.batches, Batches):
        raise TypeError(
            "posterior.batches must be a stream of minibatches, as stochgrad.posterior makes it, "
            f"got {describe(posterior.batches)}."
        )
