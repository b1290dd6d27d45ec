"""Stochastic gradient Hamiltonian Monte Carlo: underdamped Langevin dynamics."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from stochgrad.core import (
    Kernel,
    Noise,
    Position,
    Shared,
    StepSize,
    Target,
    as_schedule,
    check_number,
    noise_like,
    tree_dot,
    tree_size,
)
from stochgrad.gradients import as_gradient
from stochgrad.integrators import INTEGRATORS, Coefficients, scaled
from stochgrad.sgmcmc._common import (
    describe,
    gradient_key,
    gradient_norm,
    is_number,
    noise_ratio,
    spread,
    step_counter,
    successor,
)


class SGHMCState(NamedTuple):
    """State of a chain.

    Attributes:
        position: The position, q.
        momentum: The momentum, p; it travels with the chain and is never redrawn.
        gradient: The last gradient estimate.
        gradient_state: The gradient's own state.
        count: Number of steps taken.
    """

    position: Position
    momentum: Position
    gradient: Position
    gradient_state: Any
    count: Shared


class SGHMCInfo(NamedTuple):
    r"""What a step reports.

    Attributes:
        step_size: h.
        log_density: Minibatch estimate of the log density where the gradient was taken.
        gradient_norm: Euclidean norm of the gradient estimate.
        noise_ratio: Gradient noise over injected noise, $hV/2CT$, from two successive gradients.
        kinetic_temperature: $p^\top M^{-1} p / d$, which averages to T in a faithful run.
    """

    step_size: Float[Array, ""]
    log_density: Scalar
    gradient_norm: Float[Array, ""]
    noise_ratio: Float[Array, ""]
    kinetic_temperature: Float[Array, ""]


def sghmc(
    target: Target,
    step_size: StepSize,
    friction: float | PyTree,
    *,
    mass: float | PyTree = 1.0,
    noise_estimate: float = 0.0,
    temperature: float = 1.0,
    integrator: str = "SGHMC",
    noise: Noise = "normal",
) -> Kernel:
    r"""Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox & Guestrin, ICML 2014, Algorithm 2).

    Underdamped Langevin dynamics, $dq = M^{-1}p\,dt$ and
    $dp = \nabla\log\pi\,dt - CM^{-1}p\,dt + \sqrt{2CT}\,dW$, by the semi-implicit scheme

    $$q' = q + h M^{-1} p, \qquad
      p' = p + h \hat g(q') - h C M^{-1} p + \sqrt{2(CT - \hat B)h}\, \xi,$$

    one gradient a step. In the form $\Delta\theta = v$,
    $\Delta v = \eta \hat g - \alpha v + \mathcal N(0, 2(\alpha - \hat\beta)\eta)$ of the paper,
    $\eta = h^2/M$ and $\alpha = hC/M$.

    Gradient noise of variance V adds a diffusion of $hV/2$: with independent minibatches variances
    come out a factor $1 + hV/2C$ too large, which ``noise_ratio`` in the results estimates and
    ``noise_estimate`` takes back.

    Args:
        target: A posterior, or a gradient.
        step_size: h, a positive number or an optax-style schedule ``step -> float``.
        friction: C, a number, or a tree of the position's structure with a number or an array for
            each leaf (a diagonal).
        mass: M, likewise. Inverse posterior variances make all directions equally fast; a friction
            of ``rate * mass`` then damps them all at that rate.
        noise_estimate: $\hat B$, the diffusion $hV/2$ that gradient noise is believed to add.
        temperature: T; the draws follow $\pi^{1/T}$.
        integrator: ``"SGHMC"``, the scheme above, or ``"EM"``, explicit Euler-Maruyama, of first
            order and unstable for $h \ge C/k$; it is what several libraries call SGHMC.
        noise: ``"normal"``, or ``"discrete"``: four-point variables with five moments right, a
            fraction of the cost where the noise is most of a step (10,000 parameters and more).

    Raises:
        ValueError: a number is not positive; ``friction * step_size / mass`` is 2 or more, beyond
            which no scheme is stable; ``noise_estimate`` exceeds ``friction * temperature``; the
            integrator or the noise is unknown.
        TypeError: the target is neither a posterior nor a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(10), order="full"
        ... )
        >>> kernel = stochgrad.sghmc(target, step_size=0.05, friction=2.0)
        >>> kernel.method, dict(kernel.settings)["friction"]
        ('SGHMC', 2.0)
    """
    gradient = as_gradient(target)
    schedule, first = as_schedule(step_size)
    for name, value in (("friction", friction), ("mass", mass)):
        jax.tree.map(lambda leaf, name=name: check_number(name, jnp.min(jnp.asarray(leaf))), value)
    temperature = check_number("temperature", temperature)
    noise_estimate = check_number("noise_estimate", noise_estimate, zero=True)
    draw_noise = noise_like(noise)
    if integrator not in INTEGRATORS:
        raise ValueError(f"integrator must be one of {list(INTEGRATORS)}, got {integrator!r}.")
    advance = INTEGRATORS[integrator]
    least = temperature * min(float(jnp.min(jnp.asarray(c))) for c in jax.tree.leaves(friction))
    if noise_estimate > least:
        raise ValueError(
            "noise_estimate must not exceed friction * temperature, got "
            f"{noise_estimate:g} > {least:g}: gradient noise alone heats the chain more than that; "
            "take more friction or a smaller step_size."
        )
    if is_number(friction) and is_number(mass):
        _check_damping(first, friction, mass)

    def init(position: Position, rng_key) -> SGHMCState:
        momentum_key, key = jax.random.split(rng_key)
        xi = noise_like("normal")(momentum_key, position)
        masses, frictions = spread("mass", mass, position), spread("friction", friction, position)
        jax.tree.map(partial(_check_damping, first), frictions, masses)
        momentum = scaled(jax.tree.map(lambda m: jnp.sqrt(m * temperature), masses), xi)
        zeros = jax.tree.map(jnp.zeros_like, position)
        return SGHMCState(position, momentum, zeros, gradient.init(key, position), step_counter())

    def step(rng_key, state: SGHMCState) -> tuple[SGHMCState, SGHMCInfo]:
        count = state.count.value
        h = jnp.asarray(schedule(count), float)
        masses = spread("mass", mass, state.position)
        frictions = spread("friction", friction, state.position)
        diffusion = jax.tree.map(lambda c: c * temperature, frictions)

        def velocity(p):
            return jax.tree.map(lambda m, p: p / jnp.asarray(m, p.dtype), masses, p)

        def draw(i):
            key = rng_key if i == 0 else jax.random.fold_in(rng_key, i)
            return draw_noise(key, state.position)

        score, gradient_state = gradient.next(
            gradient_key(rng_key), state.position, state.gradient_state
        )
        noise_scale = jax.tree.map(lambda d: jnp.sqrt(2 * (d - noise_estimate) * h), diffusion)
        coefficients = Coefficients(h, frictions, noise_scale, velocity)
        end = advance(state.position, state.momentum, score, draw, coefficients)
        size = tree_size(state.position)
        info = SGHMCInfo(
            step_size=h,
            log_density=end.value,
            gradient_norm=gradient_norm(end.gradient),
            noise_ratio=noise_ratio(end.gradient, state.gradient, count, h, diffusion),
            kinetic_temperature=tree_dot(end.momentum, velocity(end.momentum)) / size,
        )
        state = SGHMCState(
            end.position, end.momentum, end.gradient, gradient_state, successor(state.count)
        )
        return state, info

    settings = (
        ("step_size", first if not callable(step_size) else step_size),
        ("friction", friction),
        ("mass", mass),
        ("noise_estimate", noise_estimate),
        ("temperature", temperature),
        ("integrator", integrator),
        ("noise", noise),
    )
    return Kernel(init, step, "SGHMC", settings + describe(gradient.posterior), gradient.posterior)


def _check_damping(step_size: float, friction, mass) -> None:
    """Raise unless the friction alone is stable: h C / M below 2."""
    with jax.ensure_compile_time_eval():
        largest = float(jnp.max(jnp.asarray(friction) / jnp.asarray(mass)))
    if step_size * largest >= 2:
        raise ValueError(
            "friction * step_size / mass must be below 2 for the step to be stable, got "
            f"{step_size * largest:g} with step_size {step_size:g}."
        )
