"""Metropolised independence sampling."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from stochgrad.core import Kernel, Position, PRNGKey


class IndependenceState(NamedTuple):
    """State of an independence sampler.

    Attributes:
        position: The position.
        log_weight: Log of target over proposal there.
    """

    position: Position
    log_weight: Float[Array, ""]


class IndependenceInfo(NamedTuple):
    """What a step reports.

    Attributes:
        acceptance_rate: Probability with which the proposal was taken.
        accepted: Whether it was.
        log_weight: Log weight after the step.
    """

    acceptance_rate: Float[Array, ""]
    accepted: Bool[Array, ""]
    log_weight: Float[Array, ""]


def acceptance(proposed: Float[Array, "..."], held: Float[Array, "..."]) -> Float[Array, "..."]:
    """Probability of a move between two log weights: none to where there is no weight, 1 from it.

    Args:
        proposed: Log weight of the proposal.
        held: Log weight of the state.
    """
    finite = jnp.isfinite(proposed)
    rate = jnp.where(finite, jnp.exp(jnp.minimum(proposed - held, 0.0)), 0.0)
    return jnp.where(jnp.isfinite(held), rate, finite.astype(rate.dtype))


def independence(
    propose: Callable[[PRNGKey], tuple[Position, Scalar]],
    log_weight: Callable[[Position], Scalar],
) -> Kernel:
    r"""Metropolis-Hastings with proposals that do not look at the state.

    $$x' \sim q, \qquad a = \min\Bigl(1, \frac{w(x')}{w(x)}\Bigr), \qquad w = \pi/q.$$

    Exact for any q that covers $\pi$ [Tierney 1994, section 2.3.3]. A proposal that is not finite,
    or has no weight, is refused.

    Args:
        propose: ``key -> (x, log_weight)``, a draw of q with its log weight.
        log_weight: ``x -> scalar``, for the first position.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> def propose(key):
        ...     x = 2.0 * jax.random.normal(key)
        ...     return x, weight(x)
        >>> weight = lambda x: -0.5 * x**2 + 0.5 * (x / 2) ** 2
        >>> kernel = stochgrad.independence(propose, weight)
        >>> draws = stochgrad.sample(
        ...     jax.random.key(0), kernel, init=jnp.array(0.0), num_samples=4000)
        >>> round(float(draws.positions.std()), 1)
        1.0
    """
    for name, function in (("propose", propose), ("log_weight", log_weight)):
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {function!r}.")

    def init(position: Position, rng_key) -> IndependenceState:
        return IndependenceState(position, jnp.asarray(log_weight(position)))

    def step(rng_key, state: IndependenceState) -> tuple[IndependenceState, IndependenceInfo]:
        propose_key, accept_key = jax.random.split(rng_key)
        proposed, weight = propose(propose_key)
        rate = acceptance(weight, state.log_weight)
        accepted = jax.random.uniform(accept_key, dtype=rate.dtype) < rate
        new = IndependenceState(proposed, weight)
        state = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, state)
        return state, IndependenceInfo(rate, accepted, state.log_weight)

    return Kernel(init, step, "independence")
