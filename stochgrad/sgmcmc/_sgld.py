"""Stochastic gradient Langevin dynamics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stochgrad.core import (
    Kernel,
    Noise,
    Position,
    Shared,
    StepSize,
    Target,
    number,
)
from stochgrad.integrators import axpy
from stochgrad.sgmcmc._kernel import Move, Step, langevin_kernel


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


def sgld(
    target: Target,
    step_size: StepSize,
    *,
    temperature: StepSize = 1.0,
    noise: Noise = "auto",
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
        noise: ``"normal"``; ``"quantized"``: 1,021 values with eleven moments right, a third of
            the cost; ``"discrete"``: four values with five moments right; ``"auto"``: normal, and
            quantized in positions of more than 1,000 numbers, where the noise would be much of a
            step; or a function ``(key, tree) -> tree``.

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

    def move(step: Step, state: SGLDState) -> Move:
        h, T = number(step.h), number(step.T)
        value, g = step.score(state.position)
        position = axpy(h, g, state.position)
        position = axpy(jnp.sqrt(2 * h * T), step.noise(position), position)
        return Move({"position": position}, value, g, diffusion=jax.tree.map(lambda _: T, g))

    return langevin_kernel(
        "SGLD",
        target,
        SGLDState,
        move,
        step_size=step_size,
        temperature=temperature,
        noise=noise,
    )
