"""Cyclical step sizes: explore with large steps, sample with small ones, again and again."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from stochgrad.core import (
    Kernel,
    Position,
    Shared,
    StepSize,
    Target,
    check_count,
    check_number,
    number,
)
from stochgrad.sgmcmc._common import make_kernel
from stochgrad.sgmcmc._kernel import StepInfo, step_counter, successor


class CyclicalState(NamedTuple):
    """State of a chain.

    Attributes:
        position: The position.
        inner: The state of the kernel underneath.
        count: Number of steps taken.
    """

    position: Position
    inner: Any
    count: Shared


def cyclical(
    kernel_factory: Callable[..., Kernel],
    target: Target,
    step_size: StepSize,
    *,
    steps_per_cycle: int,
    exploration: float = 0.8,
    temperature: float = 1.0,
    exploration_temperature: float = 0.0,
) -> Kernel:
    r"""Cyclical SG-MCMC (Zhang, Li, Zhang, Chen & Wilson, ICLR 2020), over any kernel.

    With L steps a cycle, step k has

    $$h_k = \frac{h_0}{2}\left[\cos\left(\pi\,\frac{k \bmod L}{L}\right) + 1\right],$$

    and the temperature is zero in the first share of the cycle, where the kernel is an optimizer
    with momentum that looks for another mode, and T in the rest, where it samples around it. The
    snapshots are the draws of the sampling stage, ``draws[draws.stats["sampling"][0]]``; draws of
    one cycle belong to one mode, so the number of modes seen is at most that of the cycles. The
    early steps are far too large for the draws to be unbiased: it is a search for modes.

    Args:
        kernel_factory: ``(target, step_size, temperature=...) -> Kernel``: ``stochgrad.sgld``, or
            ``functools.partial(stochgrad.sghmc, friction=10.0)``.
        target: A posterior, or a gradient.
        step_size: $h_0$, the largest step.
        steps_per_cycle: L.
        exploration: Share of a cycle that explores, from 0 (inclusive) to 1.
        temperature: T.
        exploration_temperature: The temperature while exploring.

    Raises:
        ValueError: a number is out of range; and what the factory raises.

    Example:
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(10), order="full"
        ... )
        >>> kernel = stochgrad.cyclical(stochgrad.sgld, target, 0.05, steps_per_cycle=50)
        >>> draws = stochgrad.sample(
        ...     jax.random.key(0), kernel, init=jnp.float32(0.0), num_samples=200
        ... )
        >>> draws[draws.stats["sampling"][0]].num_draws
        40
    """
    largest = check_number("step_size", step_size)
    length = check_count("steps_per_cycle", steps_per_cycle, least=2)
    exploration = check_number("exploration", exploration, zero=True)
    if exploration >= 1:
        raise ValueError(f"exploration must be below 1, got {exploration:g}.")
    explored = math.ceil(exploration * length)
    temperature = check_number("temperature", temperature)
    hot = check_number("exploration_temperature", exploration_temperature, zero=True)

    def place(step):
        return jnp.asarray(step) % length

    def sampling(step):
        return place(step) >= explored

    def cosine(step):
        return number(largest / 2) * (jnp.cos(jnp.pi * place(step).astype(float) / length) + 1)

    def heat(step):
        return jnp.where(sampling(step), number(temperature), number(hot))

    inner = make_kernel(kernel_factory, target, cosine, heat)

    def init(position: Position, rng_key) -> CyclicalState:
        return CyclicalState(position, inner.init(position, rng_key), step_counter())

    def step(rng_key, state: CyclicalState) -> tuple[CyclicalState, StepInfo]:
        count = state.count.value
        following, info = inner.step(rng_key, state.inner)
        own = {"cycle": count // length, "sampling": sampling(count)}
        info = StepInfo(info.step_size, info.log_density, info.gradient_norm, info.noise_ratio, own)
        return CyclicalState(following.position, following, successor(state.count)), info

    settings = (
        ("steps_per_cycle", length),
        ("exploration", exploration),
        ("exploration_temperature", hot),
        *inner.settings,
    )
    settings = tuple({**dict(settings), "step_size": largest, "temperature": temperature}.items())
    return inner._replace(
        init=init, step=step, method=f"cyclical {inner.method}", settings=settings
    )
