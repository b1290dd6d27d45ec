"""The stochastic gradient Nosé-Hoover thermostat."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

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
from stochgrad.integrators import axpy, scaled, velocity
from stochgrad.sgmcmc._common import check_positive
from stochgrad.sgmcmc._kernel import Move, Step, langevin_kernel
from stochgrad.sgmcmc._preconditioner import spread


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


def sgnht(
    target: Target,
    step_size: StepSize,
    diffusion: float,
    *,
    per_coordinate: bool = False,
    thermal_mass: float = 1.0,
    mass: float | PyTree = 1.0,
    temperature: StepSize = 1.0,
    noise: Noise = "auto",
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
        thermal_mass: $\mu$: how slowly the thermostat follows. The squared decorrelation time of
            the momentum is a good value.
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
    _, first_temperature = as_schedule(temperature, "temperature", zero=True)
    diffusion = check_number("diffusion", diffusion)
    thermal_mass = check_number("thermal_mass", thermal_mass)
    check_positive("mass", mass)
    per_coordinate = check_flag("per_coordinate", per_coordinate)

    def start(position: Position, key):
        momentum_key, key = jax.random.split(key)
        xi = noise_like("normal")(momentum_key, position)
        masses = spread("mass", mass, position)
        momentum = scaled(jax.tree.map(lambda m: np.sqrt(m * first_temperature), masses), xi)
        friction = number(diffusion, jnp.result_type(*jax.tree.leaves(position)))
        if per_coordinate:
            friction = jax.tree.map(
                lambda x: jnp.broadcast_to(number(diffusion, x.dtype), x.shape), position
            )
        return {"momentum": momentum, "friction": friction}, key

    def move(step: Step, state: SGNHTState) -> Move:
        h, T = number(step.h), number(step.T)
        masses = spread("mass", mass, state.position)
        size = tree_size(state.position)

        def kinetic(p):
            return tree_dot(p, velocity(masses, p)) / size

        def warm(zeta, p):
            """Half a step of the thermostat."""
            pace = h / number(2 * thermal_mass)
            if not per_coordinate:
                excess = (kinetic(p) - T.astype(zeta.dtype)).astype(zeta.dtype)
                return zeta + pace.astype(zeta.dtype) * excess
            return jax.tree.map(
                lambda z, p, v: z + pace.astype(z.dtype) * (p * v - T.astype(z.dtype)),
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
        value, g = step.score(q)
        p = axpy(h, g, p)
        injected = jax.tree.map(lambda m: number(2 * diffusion * m) * h * T, masses)
        p = jax.tree.map(
            lambda p, s, xi: p + jnp.sqrt(s).astype(p.dtype) * xi, p, injected, step.noise(q)
        )
        p = damp(zeta, p)
        zeta = warm(zeta, p)
        q = axpy(h / 2, velocity(masses, p), q)
        thermostats = jnp.concatenate([z.ravel() for z in jax.tree.leaves(zeta)])
        return Move(
            {"position": q, "momentum": p, "friction": zeta},
            value,
            g,
            diffusion=jax.tree.map(lambda m: number(diffusion * m) * T, masses),
            own={"kinetic_temperature": kinetic(p), "thermostat": jnp.mean(thermostats)},
        )

    return langevin_kernel(
        "SGNHT",
        target,
        SGNHTState,
        move,
        start=start,
        step_size=step_size,
        temperature=temperature,
        noise=noise,
        settings=(
            ("diffusion", diffusion),
            ("per_coordinate", str(per_coordinate)),
            ("thermal_mass", thermal_mass),
            ("mass", mass),
        ),
    )
