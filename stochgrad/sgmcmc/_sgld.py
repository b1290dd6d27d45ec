"""Stochastic gradient Langevin dynamics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from stochgrad.core import (
    Kernel,
    Noise,
    Position,
    Shared,
    StepSize,
    Target,
    as_schedule,
    noise_like,
    number,
)
from stochgrad.gradients import as_gradient
from stochgrad.integrators import axpy
from stochgrad.sgmcmc._common import (
    batch_settings,
    gradient_key,
    gradient_norm,
    noise_ratio,
    setting,
    step_counter,
    successor,
)


class SGLDState(NamedTuple):
    """State of a chain.

    Attributes:
        position: The position.
        gradient: The last gradient estimate.
        gradient_state: The gradient's own state.
        count: Number of steps taken.
    """

    position: Position
    gradient: Position
    gradient_state: Any
    count: Shared


class SGLDInfo(NamedTuple):
    """What a step reports.

    Attributes:
        step_size: h.
        log_density: Minibatch estimate of the log density where the gradient was taken.
        gradient_norm: Euclidean norm of the gradient estimate.
        noise_ratio: Gradient noise over injected noise, $hV/2T$, from two successive gradients.
    """

    step_size: Float[Array, ""]
    log_density: Scalar
    gradient_norm: Float[Array, ""]
    noise_ratio: Float[Array, ""]


def sgld(
    target: Target,
    step_size: StepSize,
    *,
    temperature: StepSize = 1.0,
    noise: Noise = "normal",
) -> Kernel:
    r"""Stochastic gradient Langevin dynamics (Welling & Teh, ICML 2011).

    $$\theta' = \theta + h\, \hat g(\theta) + \sqrt{2hT}\, \xi, \qquad
      \operatorname{Cov}\xi = I.$$

    The step size is time in $d\theta = \nabla\log\pi\,dt + \sqrt2\,dW$: a paper that writes the
    drift as $\tfrac{\epsilon}{2}\nabla\log\pi$ with noise of variance $\epsilon$ means
    $h = \epsilon/2$. There is no Metropolis step, so the draws are biased: on a Gaussian of
    precision k, with independent gradient noise of variance V,

    $$\operatorname{Var}\theta = \frac{1}{k}\,\frac{T + hV/2}{1 - hk/2}.$$

    ``noise_ratio`` in the results estimates $hV/2T$, averaged over coordinates. Stable for
    $hk < 2$.

    Args:
        target: A posterior, or a gradient.
        step_size: h, a positive number or an optax-style schedule ``step -> float``.
        temperature: T, a number or a schedule; the draws follow $\pi^{1/T}$. At zero, a step is
            one of gradient descent.
        noise: ``"normal"``, or ``"discrete"``: four-point variables with five moments right, a
            fraction of the cost where the noise is most of a step (10,000 parameters and more); or
            a function ``(key, tree) -> tree``.

    Raises:
        ValueError: the step size or the temperature is not positive, the noise unknown.
        TypeError: the target is neither a posterior nor a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(10), order="full"
        ... )
        >>> kernel = stochgrad.sgld(target, step_size=0.01)
        >>> state = kernel.init(jnp.float32(0.0), jax.random.key(0))
        >>> state, info = kernel.step(jax.random.key(1), state)
        >>> float(info.gradient_norm)
        10.0
    """
    gradient = as_gradient(target)
    schedule, _ = as_schedule(step_size)
    heat, _ = as_schedule(temperature, "temperature", zero=True)
    draw_noise = noise_like(noise)

    def init(position: Position, rng_key) -> SGLDState:
        zeros = jax.tree.map(jnp.zeros_like, position)
        return SGLDState(position, zeros, gradient.init(rng_key, position), step_counter())

    def step(rng_key, state: SGLDState) -> tuple[SGLDState, SGLDInfo]:
        count = state.count.value
        h = number(schedule(count))
        score, gradient_state = gradient.next(
            gradient_key(rng_key), state.position, state.gradient_state
        )
        value, g = score(state.position)
        position = axpy(h, g, state.position)
        xi = draw_noise(rng_key, position)
        hot = number(heat(count))
        position = axpy(jnp.sqrt(2 * h * hot), xi, position)
        info = SGLDInfo(
            step_size=h,
            log_density=value,
            gradient_norm=gradient_norm(g),
            noise_ratio=noise_ratio(g, state.gradient, count, h, jax.tree.map(lambda _: hot, g)),
        )
        return SGLDState(position, g, gradient_state, successor(state.count)), info

    settings = (
        ("step_size", setting(step_size)),
        ("temperature", setting(temperature)),
        ("noise", noise),
    )
    return Kernel(
        init,
        step,
        "SGLD",
        settings + batch_settings(gradient.posterior),
        gradient.posterior,
        gradient.initial,
    )
