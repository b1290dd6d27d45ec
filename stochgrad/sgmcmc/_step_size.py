"""How large a step may be: what the curvature allows, and what the bias asks for."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Position,
    PRNGKey,
    Target,
    check_key,
    check_number,
    remembered,
    tree_size,
)
from stochgrad.gradients import as_gradient
from stochgrad.integrators import Coefficients, Stage, integrator_of
from stochgrad.sgmcmc._common import as_position, check_positive
from stochgrad.sgmcmc._curvature import curvature_and_noise
from stochgrad.sgmcmc._preconditioner import whitenings

_SHARE_OF_LIMIT = 1 / 3
_MOST_NOISES = 64


class StepSizeReport(NamedTuple):
    r"""A step size, and what it rests on.

    Attributes:
        step_size: The largest h with a predicted bias within what was asked, and at most a third of
            the limit (on a Gaussian some schemes have no bias to limit them).
        limit: From here on the scheme is unstable in the stiffest direction.
        curvature: The largest eigenvalue of $M^{-1/2} H M^{-1/2}$, with minus the Hessian H.
        integrator_bias: Relative error of the position's variance in the stiffest direction at
            ``step_size``, without gradient noise.
        noise_bias: What gradient noise adds to the relative variance at ``step_size``,
            $hV/2CT$ on average over the coordinates (for SGLD, $hV/2T$). For independent
            minibatches; for reshuffled and symmetric ones it is reduced by the share of an epoch in
            the memory of the stiffest direction.
    """

    step_size: float
    limit: float
    curvature: float
    integrator_bias: float
    noise_bias: float


@key_first
def find_step_size(
    key: PRNGKey,
    target: Target,
    position: Position,
    *,
    friction: float | PyTree | None = None,
    mass: float | PyTree = 1.0,
    integrator: str = "SGHMC",
    bias: float = 0.02,
    temperature: float = 1.0,
) -> StepSizeReport:
    r"""The stability limit of a scheme, and a step size for a given bias.

    The largest curvature $\lambda$ comes from power iteration on Hessian-vector products of
    successive minibatches, at ``position`` and a few points around it. The scheme's own step on
    $U = \lambda q^2/2$, a linear map, then gives the h at which its spectral radius exceeds one,
    and the stationary variance below it. The variance V of minibatch gradients at those points
    gives the bias of gradient noise. What lies further out is not seen: where the curvature grows
    without bound (the neck of a funnel) a chain may still diverge.

    Args:
        key: A typed PRNG key, for the minibatches.
        target: A posterior, or a gradient; what the kernel will be given, so that a control variate
            is taken for what it is.
        position: Where to look: near the mode, as ``stochgrad.find_center`` finds it.
        friction: C of ``stochgrad.sghmc``; None for ``stochgrad.sgld``.
        mass: M of ``stochgrad.sghmc``.
        integrator: That of ``stochgrad.sghmc``.
        bias: The relative error of posterior variances to aim for.
        temperature: T.

    Raises:
        ValueError: a number is out of range, the integrator is unknown, or the curvature is not
            finite.
        TypeError: the target is neither a posterior nor a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(99), order="full"
        ... )
        >>> found = stochgrad.find_step_size(
        ...     jax.random.key(0), target, jnp.float32(1.0), friction=10.0, integrator="BAOAB"
        ... )
        >>> round(found.curvature), round(found.limit, 3)
        (100, 0.2)
    """
    check_key(key)
    bias = check_number("bias", bias)
    temperature = check_number("temperature", temperature)
    gradient = as_gradient(target)
    position = as_position("position", position)
    if friction is not None:
        integrator_of(integrator)
    if friction is not None:
        check_positive("friction", friction)
    check_positive("mass", mass)
    whitening = whitenings(mass, 1.0 if friction is None else friction, 0.0)(position)

    curvature, variance = curvature_and_noise(gradient, whitening, key, position)
    drag = (
        whitening.friction if friction is not None else jax.tree.map(lambda _: 1.0, whitening.mass)
    )
    excess = [
        np.sum(np.asarray(v, np.float64) / np.asarray(c) / (2 * temperature))
        for v, c in zip(jax.tree.leaves(variance), jax.tree.leaves(drag), strict=True)
    ]
    noise_slope = float(sum(excess)) / tree_size(position)
    rates = [
        np.asarray(c / np.asarray(m, np.float64))
        for c, m in zip(jax.tree.leaves(drag), jax.tree.leaves(whitening.mass), strict=True)
    ]
    extremes = {float(min(map(np.min, rates))), float(max(map(np.max, rates)))}
    models = [
        _Model(None if friction is None else integrator, rate, curvature) for rate in extremes
    ]
    limit = min(model.limit() for model in models)
    batches = gradient.posterior.batches if gradient.posterior is not None else None
    epoch = batches.epoch if batches is not None and batches.balanced else 0

    def biases(h):
        worst = max((model(h) for model in models), key=lambda found: abs(found[1]))
        share = min(1.0, epoch * h / worst[2]) if epoch else 1.0
        return worst[1], noise_slope * h * share

    def acceptable(h):
        return sum(map(abs, biases(h))) <= bias

    h = _SHARE_OF_LIMIT * limit
    if not acceptable(h):
        h = _bisect(acceptable, 1e-9 * h, h)
    return StepSizeReport(float(h), float(limit), curvature, *map(float, biases(h)))


@remembered
def _step_of_units(step: Callable[..., Stage]) -> Callable[..., Array]:
    """``(step size, friction, curvature) -> rows`` of a step that begins at unit vectors.

    It has a column for each part of z, and one for each noise that there may be.
    """

    def noise(i):
        if i >= _MOST_NOISES:
            raise ValueError(f"the integrator draws more than {_MOST_NOISES} noises a step.")
        return jnp.zeros(3 + _MOST_NOISES).at[3 + i].set(1)

    @jax.jit
    def rows(h, friction, curvature):
        def score(q):
            return jnp.zeros(()), -curvature * q

        units = jnp.eye(3, 3 + _MOST_NOISES)
        end = step(*units, score, noise, Coefficients(h, 1.0, friction, 1.0))
        return jnp.stack([end.position, end.momentum, end.gradient])

    return rows


class _Model:
    """A scheme on a Gaussian of one dimension, unit mass, by evaluating its step."""

    def __init__(self, integrator: str | None, friction: float, curvature: float):
        self.scheme = None if integrator is None else integrator_of(integrator)
        self.friction = friction
        self.curvature = curvature

    def maps(self, h: float) -> tuple[np.ndarray, np.ndarray]:
        r"""A and N of $z' = Az + N\xi$ with z = (q, p, last gradient)."""
        if self.scheme is None:
            keep = 1 - h * self.curvature
            return np.array([[keep]]), np.array([[np.sqrt(2 * h)]])
        numbers = map(float, (h, self.friction, self.curvature))  # of one type: one program
        rows = np.asarray(_step_of_units(self.scheme.step)(*numbers))
        n = 3 if self.scheme.keeps_gradient else 2
        return rows[:n, :n], rows[:n, 3:]

    def radius(self, h: float) -> float:
        return float(np.max(np.abs(np.linalg.eigvals(self.maps(h)[0]))))

    def limit(self) -> float:
        """The smallest h at which a step is unstable."""
        with jax.enable_x64(True):
            h = 1e-2 / max(np.sqrt(self.curvature), self.curvature / self.friction, self.friction)
            while self.radius(1.3 * h) < 1 and h < 1e12:
                h *= 1.3
            return _bisect(lambda h: self.radius(h) < 1, h, 1.3 * h)

    def __call__(self, h: float) -> tuple[float, float, float]:
        """Spectral radius, relative error of the variance of q, and memory in time."""
        with jax.enable_x64(True):
            a, n = self.maps(h)
        size = len(a)
        second = np.linalg.solve(np.eye(size * size) - np.kron(a, a), (n @ n.T).ravel())
        radius = float(np.max(np.abs(np.linalg.eigvals(a))))
        return radius, self.curvature * second[0] - 1, -h / np.log(max(radius, 1e-300))


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest number for which ``holds`` is true, true at ``low`` and false at ``high``."""
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
