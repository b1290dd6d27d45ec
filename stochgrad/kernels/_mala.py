"""The Metropolis-adjusted Langevin algorithm, for densities that are known in full."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from stochgrad.core import (
    Kernel,
    Position,
    Posterior,
    PRNGKey,
    Target,
    check_number,
    describe,
    noise_like,
    number,
    tree_dot,
)
from stochgrad.gradients import as_gradient
from stochgrad.kernels._independence import acceptance


class MALAState(NamedTuple):
    """State of a chain.

    Attributes:
        position: The position.
        gradient: The log density there and its gradient.
        gradient_state: The gradient's own state.
    """

    position: Position
    gradient: tuple[Scalar, Position]
    gradient_state: Any


class MALAInfo(NamedTuple):
    """What a step reports.

    Attributes:
        step_size: h.
        log_density: Log density after the step.
        gradient_norm: Euclidean norm of its gradient there.
        noise_ratio: Zero: the gradient has no noise.
        acceptance_rate: Probability with which the proposal was taken.
        accepted: Whether it was.
    """

    step_size: Float[Array, ""]
    log_density: Scalar
    gradient_norm: Float[Array, ""]
    noise_ratio: Float[Array, ""]
    acceptance_rate: Float[Array, ""]
    accepted: Bool[Array, ""]


def mala(target: Target, step_size: float, *, temperature: float = 1.0) -> Kernel:
    r"""The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie, Bernoulli 1996).

    $$\theta' = \theta + h\,g(\theta) + \sqrt{2hT}\,\xi, \qquad
      a = \min\Bigl(1, \frac{\pi^{1/T}(\theta')\,q(\theta \mid \theta')}
      {\pi^{1/T}(\theta)\,q(\theta' \mid \theta)}\Bigr), \quad g = \nabla\log\pi,$$

    with q the density of the proposal. The draws follow $\pi^{1/T}$ at any step size. A step takes
    one log density with its gradient. A proposal that is not finite is refused. The best acceptance
    rate is near 0.57 (Roberts & Rosenthal, JRSS B 1998).

    Args:
        target: A posterior on all rows, ``order="full"``: minibatches would bias the acceptance.
        step_size: h, as ``stochgrad.sgld`` takes it.
        temperature: T.

    Raises:
        ValueError: the target takes minibatches, or a number is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(9), order="full"
        ... )
        >>> draws = stochgrad.sample(
        ...     jax.random.key(0), stochgrad.mala(target, 0.1), init=jnp.float32(0.9),
        ...     num_samples=4000, thin=2,
        ... )
        >>> round(float(draws.positions.std()), 1)  # of the posterior, 10^-1/2
        0.3
    """
    gradient = as_gradient(target)
    check_full("target", target)
    h = check_number("step_size", step_size)
    heat = check_number("temperature", temperature)
    draw = noise_like("normal")

    def evaluate(key, position, gradient_state):
        score, gradient_state = gradient.next(key, position, gradient_state)
        return score(position), gradient_state

    def init(position: Position, rng_key: PRNGKey) -> MALAState:
        return MALAState(position, *evaluate(rng_key, position, gradient.init(rng_key, position)))

    def log_proposal(start, g, end):
        """Log density of a proposal, but for a constant."""
        away = jax.tree.map(lambda a, g, b: b - a - number(h, g.dtype) * g, start, g, end)
        square = tree_dot(away, away)
        return -square / number(4 * h * heat, square.dtype)

    def step(rng_key: PRNGKey, state: MALAState) -> tuple[MALAState, MALAInfo]:
        noise_key, accept_key = jax.random.split(rng_key)
        value, g = state.gradient
        spread = (2 * h * heat) ** 0.5

        def moved(x, g, noise):
            return x + number(h, x.dtype) * g + number(spread, x.dtype) * noise

        proposed = jax.tree.map(moved, state.position, g, draw(noise_key, state.position))
        found, gradient_state = evaluate(rng_key, proposed, state.gradient_state)
        new_value, new_g = found
        there = new_value / number(heat, new_value.dtype)
        here = value / number(heat, value.dtype)
        there = there + log_proposal(proposed, new_g, state.position).astype(there.dtype)
        here = here + log_proposal(state.position, g, proposed).astype(here.dtype)
        rate = acceptance(there, here)
        accepted = jax.random.uniform(accept_key, dtype=rate.dtype) < rate

        def choose(new, old):
            return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)

        state = MALAState(
            choose(proposed, state.position), choose(found, state.gradient), gradient_state
        )
        value, g = state.gradient
        norm = jnp.sqrt(tree_dot(g, g))
        none = jnp.zeros_like(norm)
        return state, MALAInfo(number(h), value, norm, none, rate, accepted)

    return Kernel(
        init,
        step,
        "MALA",
        settings=(("step_size", h), ("temperature", heat), ("order", "full")),
        posterior=gradient.posterior,
        initial=gradient.initial,
        gradient=gradient,
    )


def check_full(name: str, target: Target) -> None:
    """Raise unless a target is a posterior whose every step sees all rows."""
    if not isinstance(target, Posterior):
        raise ValueError(
            f"{name} must be a posterior on all its rows, got {describe(target)}: the noise of "
            "another estimate would bias the acceptance."
        )
    if not on_all_rows(target):
        batches = target.batches
        raise ValueError(
            f"{name} must take all {batches.size} rows at every step, got batch_size="
            f"{batches.batch_size}: give stochgrad.posterior order='full'."
        )


def on_all_rows(target: Target) -> bool:
    """Whether a target is a posterior of which every minibatch is the whole data."""
    return isinstance(target, Posterior) and target.batches.batch_size >= target.batches.size
