"""Stochastic gradient Hamiltonian Monte Carlo: underdamped Langevin dynamics."""

from typing import Any, Literal, NamedTuple

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
    noise_like,
    number,
    tree_dot,
    tree_size,
)
from stochgrad.integrators import Coefficients, Integrator, integrator_of, scaled
from stochgrad.sgmcmc._common import check_positive
from stochgrad.sgmcmc._kernel import Move, Step, langevin_kernel
from stochgrad.sgmcmc._noise_variance import effective_temperature, following_variance
from stochgrad.sgmcmc._preconditioner import Whitening, is_number, whitenings


class SGHMCState(NamedTuple):
    """State of a chain.

    Attributes:
        position: The position, q.
        momentum: The momentum, p; it travels with the chain and is never redrawn.
        gradient: The last gradient estimate.
        gradient_state: The gradient's own state.
        count: Number of steps taken.
        noise_variance: Running estimate of the gradient noise's variance, or None where the kernel
            keeps none.
    """

    position: Position
    momentum: Position
    gradient: Position
    gradient_state: Any
    count: Shared
    noise_variance: Position | None = None


def sghmc(
    target: Target,
    step_size: StepSize,
    friction: float | PyTree,
    *,
    mass: float | PyTree = 1.0,
    noise_estimate: float | PyTree | Literal["online"] = 0.0,
    temperature: StepSize = 1.0,
    integrator: str = "SGHMC",
    noise: Noise = "auto",
) -> Kernel:
    r"""Stochastic gradient Hamiltonian Monte Carlo, by any of a family of integrators.

    Underdamped Langevin dynamics,

    $$dq = M^{-1}p\,dt, \qquad
      dp = \nabla\log\pi\,dt - CM^{-1}p\,dt + \sqrt{2(CT - \hat B)}\,dW,$$

    in steps of h. The default integrator is Algorithm 2 of Chen, Fox & Guestrin (ICML 2014),

    $$q' = q + h M^{-1} p, \qquad
      p' = p + h \hat g(q') - h C M^{-1} p + \sqrt{2(CT - \hat B)h}\, \xi,$$

    one gradient a step. In the form $\Delta\theta = v$,
    $\Delta v = \eta \hat g - \alpha v + \mathcal N(0, 2(\alpha - \hat\beta)\eta)$ of the paper,
    $\eta = h^2/M$ and $\alpha = hC/M$.

    Gradient noise of variance V adds a diffusion of $hV/2$: with independent minibatches variances
    come out a factor $1 + hV/2C$ too large whatever the integrator, which ``noise_ratio`` in the
    results estimates and ``noise_estimate`` takes back. With reshuffled or symmetric minibatches
    the error is of second order in h, and so is that of a second-order integrator.

    Args:
        target: A posterior, or a gradient.
        step_size: h, a positive number or an optax-style schedule ``step -> float``.
        friction: C, a number, a tree of the position's structure with a number or an array for each
            leaf (a diagonal), or a (d, d) matrix over the raveled position of d numbers; a multiple
            of the mass where that is a ``stochgrad.sgmcmc.Precision``.
        mass: M, likewise. Inverse posterior variances (or the inverse covariance) make all
            directions equally fast; a friction of ``rate * mass`` then damps them all at that rate.
        noise_estimate: $\hat B$, the diffusion $hV/2$ that the gradient noise of independent
            minibatches adds, likewise; or ``"online"``: a diagonal estimated as the chain runs,
            from differences of successive gradients.
        temperature: T, a number or a schedule; the draws follow $\pi^{1/T}$. At zero, the dynamics
            is gradient descent with momentum.
        integrator: A name or a splitting.

            - ``"SGHMC"``: as above. Second order for positions, first for momenta.
            - ``"EM"``: explicit Euler-Maruyama, of first order and unstable for $h \ge C/k$; it is
              what several libraries call SGHMC.
            - ``"LEAPFROG"``: the same kick between two half drifts.
            - ``"SSI"``: the symmetric splitting of Chen, Ding & Carin (NeurIPS 2015).
            - ``"LT"``: Verlet, then exact friction and noise; the same as ``"BABO"``.
            - a word over A (drift), B (kick), O (exact friction and noise) and U (A and O at once):
              ``"OBABO"``, ``"BAOAB"``, ``"ABOBA"``, ``"OABAO"``, ``"UBU"``, ``"BUB"`` and others;
              a letter that occurs n times advances by h/n. Palindromes are of second order.
            - ``"MT3"``: third order, three gradients a step.
        noise: ``"normal"``; ``"quantized"``: 1,021 values with eleven moments right, a third of
            the cost; ``"discrete"``: four values with five moments right; ``"auto"``: normal, and
            quantized in positions of more than 1,000 numbers, where the noise would be much of a
            step; or a function ``(key, tree) -> tree``.

    Raises:
        ValueError: a number is not positive; the friction alone makes the scheme unstable
            (``friction * step_size / mass`` of 2 or more where the friction is Euler's);
            ``noise_estimate`` exceeds ``friction * temperature``; the integrator or the noise is
            unknown; matrices are not symmetric, or cannot be made diagonal together.
        TypeError: the target is neither a posterior nor a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(10), order="full"
        ... )
        >>> kernel = stochgrad.sghmc(target, step_size=0.05, friction=2.0, integrator="BAOAB")
        >>> kernel.method, dict(kernel.settings)["friction"]
        ('SGHMC', 2.0)
    """
    _, first = as_schedule(step_size)
    _, first_temperature = as_schedule(temperature, "temperature", zero=True)
    for name, value in (("friction", friction), ("mass", mass)):
        check_positive(name, value)
    online = isinstance(noise_estimate, str)
    if online and noise_estimate != "online":
        raise ValueError(
            f"noise_estimate must be a number, a tree or 'online', got {noise_estimate!r}."
        )
    known_noise = 0.0 if online else noise_estimate
    check_positive("noise_estimate", known_noise, zero=True)
    scheme = integrator_of(integrator)
    whitening_of = whitenings(mass, friction, known_noise)
    fixed_temperature = None if callable(temperature) else first_temperature

    def check(mass, friction, noise):
        _check_stable(scheme, first, fixed_temperature, mass, friction, noise)

    if all(is_number(x) and np.ndim(x) < 2 for x in (mass, friction, known_noise)):
        check(mass, friction, known_noise)

    def coefficients(step: Step, whitening: Whitening, variance: Position | None) -> Coefficients:
        noise = whitening.noise
        if variance is not None:
            noise = jax.tree.map(lambda v: number(step.h, v.dtype) * v / 2, variance)
        temperatures = jax.tree.map(
            lambda c, b: effective_temperature(step.T, c, b), whitening.friction, noise
        )
        return Coefficients(step.h, whitening.mass, whitening.friction, temperatures)

    def start(position: Position, key):
        momentum_key, key = jax.random.split(key)
        whitening = whitening_of(position)
        check(whitening.mass, whitening.friction, whitening.noise)
        inside = whitening.to_white(position)
        xi = noise_like("normal")(momentum_key, inside)
        roots = jax.tree.map(lambda m: np.sqrt(m * first_temperature), whitening.mass)
        momentum = whitening.cotangent_from_white(scaled(roots, xi))
        variance = jax.tree.map(jnp.zeros_like, inside) if online else None
        return {"momentum": momentum, "noise_variance": variance}, key

    def move(step: Step, state: SGHMCState) -> Move:
        whitening = whitening_of(state.position)
        inside, previous = (
            whitening.to_white(state.position),
            whitening.cotangent_to_white(state.gradient),
        )
        c = coefficients(step, whitening, state.noise_variance)

        def score(position):
            value, g = step.score(whitening.from_white(position))
            return value, whitening.cotangent_to_white(g)

        draw = lambda i: step.noise(inside, i)
        end = scheme.step(
            inside, whitening.cotangent_to_white(state.momentum), previous, score, draw, c
        )
        variance = state.noise_variance
        if variance is not None:
            variance = following_variance(variance, end.gradient, previous, step.count)
        kinetic = tree_dot(end.momentum, c.velocity(end.momentum)) / tree_size(inside)
        return Move(
            {
                "position": whitening.from_white(end.position),
                "momentum": whitening.cotangent_from_white(end.momentum),
                "noise_variance": variance,
            },
            end.value,
            whitening.cotangent_from_white(end.gradient),
            diffusion=jax.tree.map(lambda c: c * step.T, whitening.friction),
            estimates=(end.gradient, previous),
            own={"kinetic_temperature": kinetic},
        )

    return langevin_kernel(
        "SGHMC",
        target,
        SGHMCState,
        move,
        start=start,
        begins_with_gradient=scheme.keeps_gradient,
        step_size=step_size,
        temperature=temperature,
        noise=noise,
        settings=(
            ("friction", friction),
            ("mass", mass),
            ("noise_estimate", noise_estimate),
            ("integrator", integrator),
        ),
    )


def _check_stable(scheme: Integrator, step_size, temperature, mass, friction, noise) -> None:
    """Raise unless friction and noise estimate leave the scheme stable, whatever the target."""
    leaves = [jax.tree.leaves(tree) for tree in (mass, friction, noise)]
    for m, c, b in zip(*leaves, strict=True):
        m, c, b = (np.asarray(x, np.float64) for x in (m, c, b))
        damping = step_size * np.max(c / m)
        if damping >= scheme.damping_limit:
            raise ValueError(
                f"friction * step_size / mass must be below {scheme.damping_limit:g} for the step "
                f"to be stable, got {damping:g} with step_size {step_size:g}; an integrator with "
                "exact friction, such as 'BAOAB', has no such limit."
            )
        if temperature is not None and np.any(b > c * temperature):
            raise ValueError(
                "noise_estimate must not exceed friction * temperature, got "
                f"{np.max(b):g} > {np.min(c * temperature):g}: gradient noise alone heats the "
                "chain more than that; take more friction or a smaller step_size."
            )
