"""The stochastic gradient Nosé-Hoover thermostat."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from stochgrad.core import (
    Kernel,
    Noise,
    Position,
    Shared,
    StepSize,
    Target,
    as_schedule,
    check_flag,
    check_number,
    noise_like,
    number,
    tree_dot,
    tree_size,
)
from stochgrad.gradients import as_gradient
from stochgrad.integrators import axpy, scaled, velocity
from stochgrad.sgmcmc._common import (
    batch_settings,
    check_positive,
    gradient_key,
    gradient_norm,
    noise_ratio,
    setting,
    step_counter,
    successor,
)
from stochgrad.sgmcmc._frame import spread


class SGNHTState(NamedTuple):
    """State of a chain.

    Attributes:
        position: The position, q.
        momentum: The momentum, p.
        friction: The thermostats, one number or one for each coordinate.
        gradient: The last gradient estimate.
        gradient_state: The gradient's own state.
        count: Number of steps taken.
    """

    position: Position
    momentum: Position
    friction: PyTree
    gradient: Position
    gradient_state: Any
    count: Shared


class SGNHTInfo(NamedTuple):
    r"""What a step reports.

    Attributes:
        step_size: h.
        log_density: Minibatch estimate of the log density where the gradient was taken.
        gradient_norm: Euclidean norm of the gradient estimate.
        noise_ratio: Gradient noise over injected noise, $hV/2AMT$, which the thermostat takes.
        kinetic_temperature: $p^\top M^{-1} p / d$.
        thermostat: Mean of the friction; it averages to $A + hV/2$ at unit mass.
    """

    step_size: Float[Array, ""]
    log_density: Scalar
    gradient_norm: Float[Array, ""]
    noise_ratio: Float[Array, ""]
    kinetic_temperature: Float[Array, ""]
    thermostat: Float[Array, ""]


def sgnht(
    target: Target,
    step_size: StepSize,
    diffusion: float,
    *,
    per_coordinate: bool = False,
    thermal_mass: float = 1.0,
    mass: float | PyTree = 1.0,
    temperature: StepSize = 1.0,
    noise: Noise = "normal",
) -> Kernel:
    r"""A thermostat that finds the friction which unknown gradient noise calls for.

    Stochastic gradient Nosé-Hoover dynamics (Ding et al., NeurIPS 2014),

    $$dq = M^{-1}p\,dt, \quad dp = \nabla\log\pi\,dt - \zeta p\,dt + \sqrt{2AMT}\,dW, \quad
      d\zeta = \frac1\mu\left(\frac{p^\top M^{-1}p}{d} - T\right)dt,$$

    by the symmetric splitting of Leimkuhler & Shang (SIAM J. Sci. Comput. 2016): half of the drift,
    of the thermostat, and of the friction $e^{-\zeta h/2}$, then kick and noise, and back. One
    gradient a step, second order with exact gradients. Gradient noise whose variance V is the same
    in all directions (in units of the mass) raises $\zeta$ by $hV/2MT$ and leaves the law of q as
    it is; the form with one thermostat for each coordinate,
    $d\zeta_i = (p_i^2/M_i - T)/\mu\,dt$, takes a different V for each.

    Args:
        target: A posterior, or a gradient.
        step_size: h, a positive number or an optax-style schedule ``step -> float``.
        diffusion: A, also where the friction starts.
        per_coordinate: One thermostat for each coordinate.
        thermal_mass: $\mu$: how slowly the thermostat follows. The squared time that the momentum
            takes to turn round is a good value.
        mass: M, a number, or a tree of the position's structure with a number or an array for each
            leaf.
        temperature: T, a number or a schedule.
        noise: As in ``stochgrad.sghmc``.

    Raises:
        ValueError: a number is not positive, the mass does not fit, the noise is unknown.
        TypeError: the target is neither a posterior nor a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(10), order="full"
        ... )
        >>> kernel = stochgrad.sgnht(target, step_size=0.05, diffusion=1.0)
        >>> kernel.method
        'SGNHT'
    """
    gradient = as_gradient(target)
    schedule, _ = as_schedule(step_size)
    heat, first_heat = as_schedule(temperature, "temperature", zero=True)
    diffusion = check_number("diffusion", diffusion)
    thermal_mass = check_number("thermal_mass", thermal_mass)
    check_positive("mass", mass)
    per_coordinate = check_flag("per_coordinate", per_coordinate)
    draw_noise = noise_like(noise)

    def init(position: Position, rng_key) -> SGNHTState:
        momentum_key, key = jax.random.split(rng_key)
        xi = noise_like("normal")(momentum_key, position)
        masses = spread("mass", mass, position)
        momentum = scaled(jax.tree.map(lambda m: np.sqrt(m * first_heat), masses), xi)
        zeros = jax.tree.map(jnp.zeros_like, position)
        friction = number(diffusion, jnp.result_type(*jax.tree.leaves(position)))
        if per_coordinate:
            friction = jax.tree.map(
                lambda x: jnp.broadcast_to(number(diffusion, x.dtype), x.shape), position
            )
        gradient_state = gradient.init(key, position)
        return SGNHTState(position, momentum, friction, zeros, gradient_state, step_counter())

    def step(rng_key, state: SGNHTState) -> tuple[SGNHTState, SGNHTInfo]:
        count = state.count.value
        h, hot = number(schedule(count)), number(heat(count))
        masses = spread("mass", mass, state.position)
        size = tree_size(state.position)

        def kinetic(p):
            return tree_dot(p, velocity(masses, p)) / size

        def warm(zeta, p):
            """Half a step of the thermostat."""
            pace = h / number(2 * thermal_mass)
            if not per_coordinate:
                excess = (kinetic(p) - hot.astype(zeta.dtype)).astype(zeta.dtype)
                return zeta + pace.astype(zeta.dtype) * excess
            return jax.tree.map(
                lambda z, p, v: z + pace.astype(z.dtype) * (p * v - hot.astype(z.dtype)),
                zeta,
                p,
                velocity(masses, p),
            )

        def damp(zeta, p):
            """Half a step of the friction."""
            factors = zeta if per_coordinate else jax.tree.map(lambda x: zeta.astype(x.dtype), p)
            return jax.tree.map(lambda z, x: jnp.exp(-z * h.astype(x.dtype) / 2) * x, factors, p)

        q = axpy(h / 2, velocity(masses, state.momentum), state.position)
        zeta = warm(state.friction, state.momentum)
        p = damp(zeta, state.momentum)
        score, gradient_state = gradient.next(
            gradient_key(rng_key), state.position, state.gradient_state
        )
        value, g = score(q)
        p = axpy(h, g, p)
        injected = jax.tree.map(lambda m: number(2 * diffusion * m) * h * hot, masses)
        p = jax.tree.map(
            lambda p, s, xi: p + jnp.sqrt(s).astype(p.dtype) * xi,
            p,
            injected,
            draw_noise(rng_key, q),
        )
        p = damp(zeta, p)
        zeta = warm(zeta, p)
        q = axpy(h / 2, velocity(masses, p), q)
        spreads = jax.tree.map(lambda m: number(diffusion * m) * hot, masses)
        thermostats = jnp.concatenate([z.ravel() for z in jax.tree.leaves(zeta)])
        info = SGNHTInfo(
            step_size=h,
            log_density=value,
            gradient_norm=gradient_norm(g),
            noise_ratio=noise_ratio(g, state.gradient, count, h, spreads),
            kinetic_temperature=kinetic(p),
            thermostat=jnp.mean(thermostats),
        )
        return SGNHTState(q, p, zeta, g, gradient_state, successor(state.count)), info

    settings = (
        ("step_size", setting(step_size)),
        ("diffusion", diffusion),
        ("per_coordinate", str(per_coordinate)),
        ("thermal_mass", thermal_mass),
        ("mass", mass),
        ("temperature", setting(temperature)),
        ("noise", noise),
    )
    return Kernel(
        init,
        step,
        "SGNHT",
        settings + batch_settings(gradient.posterior),
        gradient.posterior,
        gradient.initial,
    )
