"""What all SG-MCMC kernels share: gradient, schedules, noise, step count and report."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Scalar

from stochgrad.core import (
    Kernel,
    Noise,
    Position,
    Posterior,
    PRNGKey,
    Score,
    Shared,
    StepSize,
    Target,
    as_schedule,
    noise_like,
    number,
    tree_dot,
    tree_size,
)
from stochgrad.gradients import as_gradient
from stochgrad.integrators import over

_LAST_STEP = np.int32(2**31 - 1)


class StepInfo(NamedTuple):
    r"""What a step reports.

    Attributes:
        step_size: h.
        log_density: Minibatch estimate of the log density where the gradient was taken.
        gradient_norm: Euclidean norm of the gradient estimate.
        noise_ratio: Diffusion by gradient noise over the diffusion injected, $hV/2D$ (for SGLD
            $hV/2T$), from two successive gradients; NaN at the first step.
        own: Numbers of the kernel's own, by name; they can be read as attributes, too.
    """

    step_size: Float[Array, ""]
    log_density: Scalar
    gradient_norm: Float[Array, ""]
    noise_ratio: Float[Array, ""]
    own: Mapping[str, Array] = {}

    def __getattr__(self, name: str) -> Array:
        try:
            return self[4][name]
        except KeyError:
            raise AttributeError(name) from None


class Step(NamedTuple):
    """What a step is inputs.

    Attributes:
        count: Its number.
        h: The step size, a plain number unless it follows a schedule.
        T: The temperature, likewise.
        score: The estimate of the score that this step uses.
        noise: ``(tree, i=0) -> tree``, the i-th independent unit-variance noise of the step.
        key: The key of that noise.
    """

    count: Int[Array, ""]
    h: Any
    T: Any
    score: Score
    noise: Callable[..., PyTree]
    key: PRNGKey


class Move(NamedTuple):
    """What a step has done.

    Attributes:
        fields: The fields of the state that it has changed, the position among them.
        log_density: The estimate of the log density.
        gradient: The last estimate of the gradient.
        diffusion: D, the diffusion that was injected, a number or an array for each leaf.
        estimates: This gradient and that of the step before in the coordinates of ``diffusion``,
            where these are not the position's own.
        own: Numbers to report.
    """

    fields: dict[str, Any]
    log_density: Scalar
    gradient: Position
    diffusion: PyTree
    estimates: tuple[Position, Position] | None = None
    own: Mapping[str, Array] = {}


def langevin_kernel(
    method: str,
    target: Target,
    state_type: Callable[..., Any],
    move: Callable[[Step, Any], Move],
    *,
    start: Callable[[Position, PRNGKey], tuple[dict[str, Any], PRNGKey]] | None = None,
    begins_with_gradient: bool = False,
    step_size: StepSize,
    temperature: StepSize,
    noise: Noise,
    settings: tuple[tuple[str, Any], ...] = (),
) -> Kernel:
    """A kernel of its state and its move.

    Args:
        method: Its name.
        target: A posterior, or a gradient.
        state_type: A NamedTuple with the fields ``position``, ``gradient``, ``gradient_state`` and
            ``count``, and others of its own.
        move: ``(step, state) -> Move``, the mathematics.
        start: ``(position, key) -> (fields, key)``, the first values of its own fields and the key
            that is left for the gradient.
        begins_with_gradient: Whether a chain needs a gradient before its first step.
        step_size: h.
        temperature: T.
        noise: As in ``stochgrad.sgld``.
        settings: Its other hyper-parameters.
    """
    gradient = as_gradient(target)
    schedule, _ = as_schedule(step_size)
    heat, _ = as_schedule(temperature, "temperature", zero=True)
    draw = noise_like(noise)

    def init(position: Position, rng_key: PRNGKey) -> Any:
        fields, key = ({}, rng_key) if start is None else start(position, rng_key)
        estimate = jax.tree.map(jnp.zeros_like, position)
        if begins_with_gradient:
            key, next_key = jax.random.split(key)
            gradient_state = gradient.init(key, position)
            score, gradient_state = gradient.next(next_key, position, gradient_state)
            estimate = score(position)[1]
        else:
            gradient_state = gradient.init(key, position)
        return state_type(
            position=position,
            gradient=estimate,
            gradient_state=gradient_state,
            count=step_counter(),
            **fields,
        )

    def step(rng_key: PRNGKey, state: Any) -> tuple[Any, StepInfo]:
        count = state.count.value
        h, T = schedule(count), heat(count)
        h = jnp.asarray(h, float) if callable(step_size) else h
        score, gradient_state = gradient.next(
            gradient_key(rng_key), state.position, state.gradient_state
        )
        inputs = Step(
            count=count,
            h=h,
            T=T,
            score=score,
            noise=lambda tree, i=0: draw(rng_key, tree, i),
            key=rng_key,
        )
        result = move(inputs, state)
        current, previous = result.estimates or (result.gradient, state.gradient)
        step_size_now = number(h)
        info = StepInfo(
            step_size=step_size_now,
            log_density=result.log_density,
            gradient_norm=gradient_norm(current),
            noise_ratio=noise_ratio(current, previous, count, step_size_now, result.diffusion),
            own=result.own,
        )
        following = state._replace(
            gradient=result.gradient,
            gradient_state=gradient_state,
            count=successor(state.count),
            **result.fields,
        )
        return following, info

    return Kernel(
        init=init,
        step=step,
        method=method,
        settings=(
            ("step_size", _setting(step_size)),
            *settings,
            ("temperature", _setting(temperature)),
            ("noise", noise),
            *batch_settings(gradient.posterior),
        ),
        posterior=gradient.posterior,
        initial=gradient.initial,
        gradient=gradient,
    )


def step_counter() -> Shared:
    """A step count of zero, common to all chains."""
    return Shared(jnp.zeros((), jnp.int32))


def successor(count: Shared) -> Shared:
    """One step more, or the same at the largest number there is."""
    return Shared(jnp.where(count.value < _LAST_STEP, count.value + 1, count.value))


def gradient_key(rng_key: PRNGKey) -> PRNGKey:
    """A key for the gradient, apart from the counters that the noise uses of the same key."""
    return jax.random.fold_in(rng_key, np.uint32(2**32 - 1))


def gradient_norm(gradient: Position) -> Float[Array, ""]:
    """Euclidean norm."""
    return jnp.sqrt(tree_dot(gradient, gradient))


def noise_ratio(gradient, previous, count, step_size, diffusion) -> Float[Array, ""]:
    r"""Diffusion by gradient noise over the diffusion injected, $hV/2D$, averaged over coordinates.

    Two successive estimates are taken at nearly one position from different minibatches, so half
    their squared difference estimates V. NaN at the first step, which has no precursor.

    Args:
        gradient: The estimate of this step.
        previous: The estimate of the step before.
        count: Number of this step.
        step_size: h.
        diffusion: D, a number or an array for each leaf.
    """
    difference = jax.tree.map(jnp.subtract, gradient, previous)
    weighted = jax.tree.map(over, difference, diffusion)
    variance = tree_dot(difference, weighted) / (2 * tree_size(gradient))
    return jnp.where(count > 0, step_size.astype(variance.dtype) * variance / 2, jnp.nan)


def batch_settings(posterior: Posterior | None) -> tuple[tuple[str, int | str], ...]:
    """Size and order of the minibatches, for a result's attributes."""
    if posterior is None:
        return ()
    batches = posterior.batches
    return (
        ("batch_size", batches.batch_size),
        ("data_size", batches.size),
        ("order", batches.order),
    )


def _setting(value: StepSize) -> Any:
    """A number or a schedule as a result's attributes show it."""
    return value if callable(value) else float(value)
