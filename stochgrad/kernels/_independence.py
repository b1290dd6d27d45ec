"""Metropolized independence sampling."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from stochgrad.core import Kernel, Position, PRNGKey, check_callable, describe, first_line
from stochgrad.gradients import check_like


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
    or has no weight, is refused. Chains start at proposals unless told otherwise.

    Args:
        propose: ``key -> (x, log_weight)``, a draw of q with its log weight.
        log_weight: ``x -> scalar``, for the first position.

    Raises:
        TypeError: an argument is no function, or ``propose`` does not return a pair.
        ValueError: ``propose`` fails, or its weight is not one floating-point number; when run,
            ``log_weight`` fails on the position, or the proposals are of another structure.

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
    check_callable("propose", propose, "a function of a key")
    check_callable("log_weight", log_weight, "a function of the position")
    like = _proposal(propose)

    def init(position: Position, rng_key) -> IndependenceState:
        check_like("init", position, like, "the proposals of propose")
        try:
            weight = log_weight(position)
        except Exception as error:
            raise ValueError(f"log_weight fails on the position: {first_line(error)}.") from error
        _check_scalar("log_weight", weight)
        return IndependenceState(position, jnp.asarray(weight))

    def step(rng_key, state: IndependenceState) -> tuple[IndependenceState, IndependenceInfo]:
        propose_key, accept_key = jax.random.split(rng_key)
        proposed, weight = propose(propose_key)
        rate = acceptance(weight, state.log_weight)
        accepted = jax.random.uniform(accept_key, dtype=rate.dtype) < rate
        new = IndependenceState(proposed, weight)
        state = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, state)
        return state, IndependenceInfo(rate, accepted, state.log_weight)

    return Kernel(init, step, "independence", initial=lambda key: propose(key)[0])


def _proposal(propose) -> Position:
    """Structure and shapes of a proposal."""
    try:
        pair = jax.eval_shape(propose, jax.random.key(0))
    except Exception as error:
        raise ValueError(f"propose fails on a key: {first_line(error)}.") from error
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"propose must return a pair (x, log_weight), got {describe(pair)}.")
    position, weight = pair
    for path, leaf in jax.tree_util.tree_leaves_with_path(position):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            where = f"x{jax.tree_util.keystr(path)} of propose"
            raise ValueError(f"{where} must be a floating-point array, got dtype {leaf.dtype}.")
    if not jax.tree.leaves(position):
        raise ValueError("propose must return a position with at least one array.")
    _check_scalar("the log_weight of propose", weight)
    return position


def _check_scalar(name: str, value) -> None:
    shape = getattr(value, "shape", None if not isinstance(value, float | int) else ())
    if shape != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(f"{name} must be a floating-point scalar, got {describe(value)}.")
