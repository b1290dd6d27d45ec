"""Preconditioned stochastic gradient Langevin dynamics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochgrad.core import (
    Kernel,
    Noise,
    Position,
    Shared,
    StepSize,
    Target,
    check_count,
    check_flag,
    check_number,
    noise_like,
    number,
)
from stochgrad.gradients import as_gradient
from stochgrad.sgmcmc._kernel import Move, Step, langevin_kernel


class PSGLDState(NamedTuple):
    """State of a chain.

    Attributes:
        position: The position.
        gradient: The last gradient estimate.
        gradient_state: The gradient's own state.
        count: Number of steps taken.
        square: Running mean of the squared gradient of one row, V.
    """

    position: Position
    gradient: Position
    gradient_state: Any
    count: Shared
    square: Position


def psgld(
    target: Target,
    step_size: StepSize,
    *,
    decay: float = 0.99,
    regularizer: float = 1e-5,
    correction: bool = True,
    adapt_steps: int | None = None,
    temperature: StepSize = 1.0,
    noise: Noise = "auto",
) -> Kernel:
    r"""Preconditioned SGLD with an RMSprop preconditioner (Li, Chen, Carlson & Carin, AAAI 2016).

    With $\bar g = \hat g / N$, the gradient of one of the N rows on average,

    $$V' = aV + (1-a)\,\bar g^2, \qquad G = \operatorname{diag}\frac{1}{\lambda + \sqrt{V'}}, \qquad
      \theta' = \theta + h\,[G \hat g(\theta) + T\,\Gamma(\theta)] + \sqrt{2hTG}\, \xi,$$

    $$\Gamma_i = \frac{\partial G_{ii}}{\partial\theta_i}
      = -(1-a)\,G_{ii}^2\,\frac{\bar g_i}{\sqrt{V'_i}}\,
        \frac{\partial \bar g_i}{\partial\theta_i}.$$

    The paper's $\epsilon$ is $2h$. Most implementations leave $\Gamma$ out. Here its diagonal of
    the Hessian is estimated without bias by $z \odot Hz$ with random signs z, at the cost of one
    more gradient or two. It accounts for the preconditioner's dependence on this step's gradient
    and not on the path before, so that some bias is left. ``adapt_steps`` leaves none: from that
    step on the preconditioner stands still, and a constant one needs no correction.

    Args:
        target: A posterior, or a gradient (for which N is 1).
        step_size: h, a positive number or an optax-style schedule ``step -> float``.
        decay: a, from 0 (inclusive) to 1.
        regularizer: $\lambda$, which bounds the preconditioner.
        correction: Whether to include $\Gamma$.
        adapt_steps: Steps after which V is kept as it is; None adapts for ever.
        temperature: T, a number or a schedule; the draws follow $\pi^{1/T}$.
        noise: As in ``stochgrad.sgld``.

    Raises:
        ValueError: a number is out of range, or the noise unknown.
        TypeError: the target is neither a posterior nor a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(10), order="full"
        ... )
        >>> kernel = stochgrad.psgld(target, step_size=0.01, adapt_steps=1000)
        >>> kernel.method
        'pSGLD'
    """
    gradient = as_gradient(target)
    decay = check_number("decay", decay, zero=True)
    if decay >= 1:
        raise ValueError(f"decay must be below 1, got {decay:g}.")
    regularizer = check_number("regularizer", regularizer)
    correction = check_flag("correction", correction)
    if adapt_steps is not None:
        adapt_steps = check_count("adapt_steps", adapt_steps)
    rows = max(gradient.posterior.batches.size, 1) if gradient.posterior is not None else 1

    def start(position: Position, key):
        return {"square": jax.tree.map(jnp.zeros_like, position)}, key

    def move(step: Step, state: PSGLDState) -> Move:
        h, T = number(step.h), number(step.T)
        adapting = True if adapt_steps is None else step.count < adapt_steps

        def with_curvature(position):
            signs = _signs(step.key, position)
            (value, g), (_, bent) = jax.jvp(step.score, (position,), (signs,))
            return value, g, jax.tree.map(jnp.multiply, signs, bent)

        def without(position):
            value, g = step.score(position)
            return value, g, jax.tree.map(jnp.zeros_like, g)

        if correction and adapt_steps is not None:
            estimates = lax.cond(adapting, with_curvature, without, state.position)
        else:
            estimates = (with_curvature if correction else without)(state.position)
        value, g, curvature = estimates

        def follow(v, g):
            # the first gradient stands for all before it, else early steps would be huge
            a = jnp.where(step.count > 0, number(decay, v.dtype), 0)
            return jnp.where(adapting, a * v + (1 - a) * (g / rows) ** 2, v)

        square = jax.tree.map(follow, state.square, g)
        metric = jax.tree.map(lambda v: 1 / (number(regularizer, v.dtype) + jnp.sqrt(v)), square)

        def drift(g, metric, v, c):
            if not correction:
                return metric * g
            root = jnp.maximum(jnp.sqrt(v), jnp.finfo(v.dtype).tiny)
            gamma = number(-(1 - decay), g.dtype) * metric**2 * (g / rows) * (c / rows) / root
            return metric * g + T.astype(g.dtype) * gamma

        def advance(x, drift, metric, xi):
            scale = jnp.sqrt(2 * (h * T).astype(x.dtype) * metric)
            return x + h.astype(x.dtype) * drift + scale * xi

        drifts = jax.tree.map(drift, g, metric, square, curvature)
        xi = step.noise(state.position)
        position = jax.tree.map(advance, state.position, drifts, metric, xi)
        # in the metric's own coordinates: gradient noise G V h / 2 over injected noise T
        diffusion = jax.tree.map(lambda m: T.astype(m.dtype) / m, metric)
        return Move({"position": position, "square": square}, value, g, diffusion)

    return langevin_kernel(
        "pSGLD",
        gradient,
        PSGLDState,
        move,
        start=start,
        step_size=step_size,
        temperature=temperature,
        noise=noise,
        settings=(
            ("decay", decay),
            ("regularizer", regularizer),
            ("correction", str(correction)),
            ("adapt_steps", str(adapt_steps)),
        ),
    )


def _signs(key, position: Position) -> Position:
    """Random signs, independent of the noise of the same key."""
    xi = noise_like("discrete")(key, position, 1)
    return jax.tree.map(lambda x: jnp.where(x > 0, 1, -1).astype(x.dtype), xi)
