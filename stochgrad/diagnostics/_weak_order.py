"""The order of a scheme, measured without Monte Carlo noise on the step function that ships."""

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from stochgrad.core import (
    ORDERS,
    check_array,
    check_callable,
    check_choice,
    check_count,
    check_instance,
    check_number,
    describe,
    first_line,
)
from stochgrad.diagnostics._spectral import NoiseLaw, spectral_moments
from stochgrad.kernels import Affine, KernelFactory, NoiseExposedStep, affine_steps, expose_noise

_MOST_BATCHES = 5


class Problem(NamedTuple):
    r"""A target that is the mean of a few minibatch log densities.

    $$\log\pi(q) = \frac1K \sum_{j=1}^K \log\pi_j(q).$$

    Attributes:
        log_density: ``(position, j) -> scalar`` with a position of shape (d,) and a traced integer
            j from 0 to K-1.
            Quadratic in the position; or, for K = 1 and d = 1, any density on the line that falls
            off faster than an exponential.
        dimension: d.
        num_batches: K, at most 5: orders are averaged over all permutations.
        order: Name of the batch order; for K = 1, none matters.
    """

    log_density: Callable[[Float[Array, " d"], Any], Scalar]
    dimension: int = 1
    num_batches: int = 1
    order: str = "full"


class WeakOrder(NamedTuple):
    """Errors at each step size, and the slopes of their logarithms.

    Attributes:
        step_sizes: h, shape (steps,).
        position_error: Relative error (Frobenius norm) of the position's second moments about the
            true mean.
        momentum_error: Likewise of the momentum's; NaN for a kernel that has none.
        position_order: Slope of log error against log h, over the smallest two steps.
        momentum_order: Likewise.
    """

    step_sizes: np.ndarray
    position_error: np.ndarray
    momentum_error: np.ndarray
    position_order: float
    momentum_order: float


gaussian = Problem(lambda q, j: -0.5 * jnp.sum(q**2))
"""A standard normal, full gradient."""

double_well = Problem(lambda q, j: -0.5 * jnp.sum((q**2 - 1) ** 2))
r"""$U = \tfrac12 (q^2 - 1)^2$, full gradient."""


def minibatch_gaussian(order: str) -> Problem:
    r"""A Gaussian whose three minibatches differ in curvature, place and direction.

    In two dimensions, with Hessians that do not commute, and mean and precision that are those of
    the average.

    Args:
        order: ``"reshuffled"``, ``"symmetric"`` or ``"iid"``.

    Raises:
        ValueError: there is no such order.
    """
    check_choice("order", order, ORDERS)
    shears = np.array(
        [[[1.5, 0.5], [0.5, 0.5]], [[0.9, -0.15], [-0.15, 1.0]], [[1.2, 0.25], [0.25, 0.9]]]
    )
    places = np.array([[1.0, -0.5], [-0.5, 1.0], [0.2, 0.1]])

    def log_density(q, j):
        away = q - jnp.asarray(places)[j]
        return -0.5 * away @ jnp.asarray(shears)[j] @ away

    return Problem(log_density, 2, 3, order)


def weak_order(
    kernel_factory: KernelFactory,
    problem: Problem,
    step_sizes: Sequence[float],
    *,
    time: float | None = None,
    noise: NoiseLaw = "normal",
) -> WeakOrder:
    r"""The order of a kernel's bias in the step size, to rounding error.

    On a quadratic problem a step is affine, $z' = A_j z + b_j + N_j\xi$, in position, momentum and
    whatever else the state holds. The matrices come from evaluating the kernel's own step function
    in double precision; the second moments then follow

    $$S' = \operatorname{mean}_{\text{orders}} \left(A_j S A_j^\top + N_j N_j^\top\right)$$

    (in homogeneous coordinates) exactly, over all permutations of the minibatches that the batch
    order allows. The stationary moments are the average over the steps of an epoch. On the line,
    with the full gradient, the density need not be quadratic: the step's transition operator is
    then projected on orthogonal polynomials (Galerkin, spectrally accurate).

    Args:
        kernel_factory: ``(gradient, step_size, noise=...) -> Kernel``, for instance
            ``functools.partial(stochgrad.sghmc, friction=1.0, integrator="BAOAB")``.
        problem: The target and its minibatches.
        step_sizes: Two or more, in falling order.
        time: Measure second moments at this time from a fixed start, instead of stationary ones;
            ``step_sizes`` must divide it. The error at h is then the difference to the moments with
            half the step, which falls at the same rate.
        noise: The law of the kernel's noise: its kurtosis and more matter off the Gaussian, on the
            line.

    Raises:
        ValueError: the step is not affine and the problem not one-dimensional with one batch; there
            are more than 5 batches; the chain is unstable at a step size.

    Example:
        >>> from functools import partial
        >>> import stochgrad
        >>> from stochgrad.diagnostics import gaussian, weak_order
        >>> factory = partial(stochgrad.sghmc, friction=1.0, integrator="OBABO")
        >>> round(weak_order(factory, gaussian, [0.1, 0.05]).position_order, 2)
        2.0
    """
    sizes = check_array("step_sizes", step_sizes).astype(float)
    falling = sizes.ndim == 1 and sizes.size >= 2 and np.all(np.diff(sizes) < 0)
    if not falling or np.any(sizes <= 0):
        raise ValueError(
            f"step_sizes must be two or more falling numbers, all positive, got {step_sizes!r}."
        )
    if time is not None:
        time = check_number("time", time)
    check_choice("noise", noise, ("normal", "quantized", "discrete"))
    _check_problem(problem)
    _check_factory(kernel_factory)
    with jax.enable_x64(True):
        if time is None:
            truth = _true_moments(problem)
            found = [_stationary(kernel_factory, problem, h, noise) for h in sizes]
            errors = [
                [_distance(*pair) for pair in zip(pairs, truth, strict=True)] for pairs in found
            ]
        else:
            moments = [
                [_at_time(kernel_factory, problem, step, time) for step in (h, h / 2)]
                for h in sizes
            ]
            errors = [[_distance(a, b) for a, b in zip(*pair, strict=True)] for pair in moments]
    both = np.array(errors)
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.log(both[-2] / both[-1]) / np.log(sizes[-2] / sizes[-1])
    return WeakOrder(sizes, both[:, 0], both[:, 1], float(slopes[0]), float(slopes[1]))


def _check_factory(factory: Any) -> None:
    wanted = "a function (gradient, step_size, noise=...) -> Kernel"
    check_callable("kernel_factory", factory, wanted)
    if isinstance(factory, type):
        raise TypeError(f"kernel_factory must be {wanted}, got {describe(factory)}.")


def _check_problem(problem: Any) -> None:
    """Raise unless a problem has a scalar density, and minibatches in an order there is."""
    check_instance("problem", problem, Problem, "a stochgrad.diagnostics.Problem")
    check_callable("problem.log_density", problem.log_density, "(position, j) -> scalar")
    dimension = check_count("problem.dimension", problem.dimension)
    if check_count("problem.num_batches", problem.num_batches) > _MOST_BATCHES:
        raise ValueError(
            f"problem must have at most {_MOST_BATCHES} batches, got {problem.num_batches}."
        )
    if problem.num_batches > 1:
        check_choice("problem.order", problem.order, ORDERS)
    try:
        with jax.enable_x64(True):
            out = jax.eval_shape(problem.log_density, jnp.zeros(dimension), 0)
            first = np.asarray(problem.log_density(jnp.zeros(dimension), 0))
    except Exception as error:
        raise ValueError(
            f"problem.log_density fails on a position of shape ({dimension},): {first_line(error)}."
        ) from error
    if getattr(out, "shape", None) != () or not np.isfinite(first):
        raise ValueError(f"problem.log_density must return a finite scalar, got {out}.")


def _distance(moments: Any, truth: Any) -> float:
    """Relative distance of two matrices in the Frobenius norm."""
    return float(np.linalg.norm(moments - truth) / np.linalg.norm(truth))


def _true_moments(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The covariance of the position, and the momentum's at unit mass."""
    if problem.dimension == 1 and problem.num_batches == 1:
        q = np.linspace(-12, 12, 200_001)
        log_p = np.asarray(jax.vmap(lambda x: problem.log_density(x[None], 0))(jnp.asarray(q)))
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        return np.full((1, 1), p @ (q - p @ q) ** 2), np.eye(1)
    return np.linalg.inv(_precision(problem)[0]), np.eye(problem.dimension)


def _precision(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Precision and mean of a quadratic problem."""
    zero = jnp.zeros(problem.dimension)
    batches = range(problem.num_batches)
    hessian = np.mean([jax.hessian(problem.log_density)(zero, j) for j in batches], axis=0)
    slope = np.mean([jax.grad(problem.log_density)(zero, j) for j in batches], axis=0)
    return -hessian, np.linalg.solve(-hessian, slope)


def _opened(factory, problem: Problem, h: float) -> tuple[NoiseExposedStep, list[Affine] | None]:
    example = jnp.zeros(problem.dimension)
    try:
        opened = expose_noise(factory, h, problem.log_density, example)
    except Exception as error:
        raise ValueError(
            f"kernel_factory makes no kernel of a gradient and the step size {h:g}: "
            f"{first_line(error)}."
        ) from error
    return opened, affine_steps(opened, example, problem.num_batches)


def _stationary(factory, problem: Problem, h: float, noise: NoiseLaw) -> tuple[Any, Any]:
    opened, maps = _opened(factory, problem, h)
    if maps is None:
        if problem.dimension > 1 or problem.num_batches > 1:
            raise ValueError(
                "kernel_factory: weak_order needs a step that is affine in the state, or one batch "
                "in one dimension: this kernel's step on this problem is neither."
            )
        return spectral_moments(opened, lambda q: problem.log_density(q[None], 0), noise)
    operators = [_second_moment_operator(m) for m in maps]
    size = operators[0].shape[0]
    orders = _visits(problem)
    epoch = sum(_product([operators[j] for j in visits]) for visits in orders) / len(orders)
    if np.max(np.abs(np.linalg.eigvals(epoch))) > 1 + 1e-8:
        raise ValueError(f"step_sizes: the chain is unstable at step size {h:g}.")
    fixed = epoch - np.eye(size)  # its last row, for the constant, is zero: put in the norm
    fixed[-1] = 0
    fixed[-1, -1] = 1
    start = np.linalg.solve(fixed, np.eye(size)[-1])
    total = np.zeros(size)
    for visits in orders:
        moments = start
        for j in visits:
            moments = operators[j] @ moments
            total += moments
    total /= len(orders) * len(orders[0])
    return _moments(total, opened, _precision(problem)[1])


def _at_time(factory, problem: Problem, h: float, time: float) -> tuple[Any, Any]:
    opened, maps = _opened(factory, problem, h)
    count = round(time / h)
    if maps is None or abs(count * h - time) > 1e-9 * time:
        raise ValueError("time must be a multiple of each step size, and the step affine.")
    z = np.asarray(opened.start(jnp.ones(problem.dimension), jnp.zeros(problem.dimension), 0))
    z = np.append(z, 1.0)
    operators = [_second_moment_operator(m) for m in maps]
    orders = _visits(problem)
    epoch = sum(_product([operators[j] for j in visits]) for visits in orders) / len(orders)
    epochs, rest = divmod(count, len(orders[0]))
    if rest:
        raise ValueError("time must be a whole number of epochs.")
    moments = np.linalg.matrix_power(epoch, epochs) @ np.kron(z, z)
    return _moments(moments, opened, np.zeros(problem.dimension))


def _visits(problem: Problem) -> list[list[int]]:
    """The minibatches of one period of the batch order, for each permutation of them."""
    count = problem.num_batches
    if count == 1:
        return [[0]]
    if problem.order not in ORDERS:
        raise ValueError(f"order must be one of {list(ORDERS)}, got {problem.order!r}.")
    slots, t = [], 0
    while True:
        visit = ORDERS[problem.order](jnp.uint32(t), count)
        if int(visit.permutation) > 0:
            break
        slots.append(int(visit.slot))
        t += 1
    return [[order[slot] for slot in slots] for order in permutations(range(count))]


def _second_moment_operator(m: Affine) -> np.ndarray:
    """What a step does to the raveled second moments of (z, 1)."""
    n = len(m.offset)
    homogeneous = np.zeros((n + 1, n + 1))
    homogeneous[:n, :n], homogeneous[:n, n], homogeneous[n, n] = m.matrix, m.offset, 1.0
    operator = np.kron(homogeneous, homogeneous)
    added = np.zeros((n + 1, n + 1))
    added[:n, :n] = m.noise @ m.noise.T
    operator[:, -1] += added.ravel()  # the last moment is that of the constant
    return operator


def _product(operators: list[np.ndarray]) -> np.ndarray:
    whole = operators[0]
    for operator in operators[1:]:
        whole = operator @ whole
    return whole


def _moments(second: np.ndarray, step: NoiseExposedStep, mean: np.ndarray) -> tuple[Any, Any]:
    """Second moments of the position about ``mean`` and of the momentum about zero."""
    square = second.reshape(*(round(np.sqrt(second.size)),) * 2)
    q = step.position
    cross = np.outer(square[q, -1], mean)
    position = square[np.ix_(q, q)] - cross - cross.T + np.outer(mean, mean)
    if step.momentum is None:
        return position, np.full((len(q), len(q)), np.nan)
    return position, square[np.ix_(step.momentum, step.momentum)]
