"""How much too wide or narrow the draws come out because a visit sees one client's curvature."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from stochgrad.core import Kernel, Posterior, tree_size
from stochgrad.federated._clients import require_clients
from stochgrad.federated._gaussians import LowRank, Surrogates
from stochgrad.federated._matrices import (
    MOST_CLIENTS,
    MOST_EXACT_DIAGONALS,
    Curvatures,
    curvature_matrices,
    diagonals,
    fits_matrices,
    precision_diagonals,
    surrogate_matrices,
    total_curvature,
)
from stochgrad.federated._renewal_law import renewed_covariance

MOST_SAMPLED, _FEWEST, _SAMPLED_NUMBERS = 100, 200, 2 * 10**6
"""Of a thousand clients and more: dimensions, the fewest that are drawn, numbers in matrices."""
_DIRECT, _MOST_DIRECT = 20, 100
"""Dimensions and clients up to which the law's equations are solved by a matrix of their own."""


class StabilityWarning(UserWarning):
    """Long visits to some client are unstable, or make the draws too wide or narrow."""


class Spread(NamedTuple):
    """The direction in which the spread of the draws is most wrong, by the curvatures at a point.

    Attributes:
        ratio: Standard deviation of the draws over that of the posterior.
        coordinate: The coordinate that the direction is nearest to, in words.
        client: The client that informs the direction most.
        steps_to_forget: $h N T$: time of a visit times that client's curvature in the coordinate.
    """

    ratio: float
    coordinate: str
    client: int
    steps_to_forget: float


def step_time(kernel: Kernel) -> float | None:
    r"""Time in overdamped Langevin dynamics that a step of a kernel takes; None if unknown.

    h for SGLD, and h over the friction for SGHMC, whose slow motions are those of Langevin dynamics
    in that time.
    """
    settings = dict(kernel.settings)
    h, temperature = settings.get("step_size"), settings.get("temperature")
    if not isinstance(h, float | int) or temperature != 1.0:
        return None
    if kernel.method == "SGLD":
        return float(h)
    if kernel.method == "SGHMC":
        return float(h) / min(float(np.min(c)) for c in jax.tree.leaves(settings["friction"]))
    return None


def spread_of_draws(
    posterior: Posterior,
    surrogates: Surrogates,
    time_of_step: float,
    here: Curvatures | None = None,
    period: int | None = None,
) -> Spread | None:
    r"""The spread that draws have, of Langevin dynamics between Gaussian clients.

    During a visit of time $\tau_s = h T_s$ the covariance M about the mode follows
    $\dot M = 2 - A_s M - M A_s$ with the curvature $A_s$ of that visit
    (``stochgrad.federated.Stability``), and visits are drawn at random. The stationary covariance,
    averaged over time, is held against $(\Lambda_0 + \sum_t H_t)^{-1}$. Where a client's curvature
    N is felt during its own visits only, the variance is too large by about
    $h N T\,(1 - f_s)/f_s$ of itself, as long as that is small.

    Of more than a thousand clients the law is that of visits to some of them, drawn as visits are,
    about the curvature of all. Beyond 100 dimensions only diagonals are compared: of the empirical
    Fisher information for surrogates of first order, of the Hessian for others.

    Args:
        posterior: A posterior of data that clients own, visited as it will be.
        surrogates: The surrogates.
        time_of_step: Time of a step, as ``step_time`` gives it.
        here: The curvatures at the surrogates' origin, where they are known already.
        period: Visits after which slopes are taken anew (``renewed_covariance``), if they are; not
            known then beyond 100 dimensions.

    Returns:
        The worst direction, infinitely wide where visits drive it apart; None where the posterior
        has no positive curvature, or the law was not found.
    """
    clients, origin = require_clients(posterior), surrogates.origin
    p = np.full(clients.count, 1 / clients.count)
    p = p if clients.probabilities is None else clients.probabilities
    times = time_of_step * clients.steps.astype(np.float64)
    if not fits_matrices(posterior, origin):
        if period is not None:
            return None
        if clients.count > MOST_CLIENTS and tree_size(origin) <= MOST_SAMPLED:
            return _spread_by_sample(posterior, surrogates, p, times)
        return _spread_by_diagonals(posterior, surrogates, p, times)
    if here is None:
        flat = np.asarray(ravel_pytree(origin)[0])
        here = curvature_matrices(posterior, origin, flat[None]).at(0)
    known = surrogate_matrices(surrogates.precision, surrogates.count, origin)
    return matrix_spread(origin, here, known, clients.shares, p, times, period)


def matrix_spread(
    origin: Any,
    here: Curvatures,
    known: np.ndarray,
    shares: np.ndarray,
    p: np.ndarray,
    times: np.ndarray,
    period: int | None = None,
) -> Spread | None:
    """The worst direction by the curvatures at the origin and those of surrogates, as matrices."""
    own, prior = here
    exact = prior + own.sum(axis=0)
    if not np.all(np.isfinite(own)) or np.linalg.eigvalsh(exact)[0] <= 0:
        return None
    visits = prior + known.sum(axis=0) + (own - known) / shares[:, None, None]
    if period is None:
        covariance = stationary_covariance(visits, p, times)
    else:
        covariance = renewed_covariance(visits, exact, p, float(times[0]), period)
    return _worst_direction(origin, visits, exact, covariance, own, times)


def _worst_direction(origin, visits, exact, covariance, own, times) -> Spread | None:
    """The direction in which a covariance differs most from that of the curvature ``exact``."""
    if covariance is None:
        return None
    if not np.isfinite(covariance).all():
        least = [np.linalg.eigh(a) for a in visits]
        worst = min(least, key=lambda pair: pair[0][0])[1][:, 0]
        coordinate = int(np.argmax(worst**2))
        informed = np.diagonal(own, axis1=1, axis2=2)[:, coordinate]
        return _worst(origin, np.inf, coordinate, informed, times)
    root = np.linalg.cholesky(exact)
    values, vectors = np.linalg.eigh(root.T @ covariance @ root)
    worst = int(np.argmax(np.abs(np.log(np.maximum(values, 1e-12)))))
    v = np.linalg.solve(root.T, vectors[:, worst])
    coordinate = int(np.argmax(v**2 * np.diagonal(exact)))
    informed = np.diagonal(own, axis1=1, axis2=2)[:, coordinate]
    return _worst(origin, float(np.sqrt(values[worst])), coordinate, informed, times)


def _spread_by_sample(posterior, surrogates: Surrogates, p, times) -> Spread | None:
    """The law of visits to some clients, drawn as visits are, about the curvature of all.

    Coordinates are stretched so that the mean of the drawn curvatures is that of all.
    """
    origin, clients = surrogates.origin, require_clients(posterior)
    count = int(
        np.clip(_SAMPLED_NUMBERS // tree_size(origin) ** 2, _FEWEST, max(MOST_CLIENTS, _FEWEST))
    )
    numbers = np.random.default_rng(0).choice(clients.count, count, p=p)
    flat = np.asarray(ravel_pytree(origin)[0])
    own, prior = curvature_matrices(posterior, origin, flat[None], numbers).at(0)
    exact = prior + total_curvature(posterior, origin)
    if not np.all(np.isfinite(own)) or np.linalg.eigvalsh(exact)[0] <= 0:
        return None
    part = surrogates.precision
    if isinstance(part, LowRank) and part.factors.ndim == 2:
        own_parts = part.values[numbers], part.diagonal[numbers]
        part = LowRank(part.factors, *own_parts)
    else:
        part = jax.tree.map(lambda x: x[numbers], part)
    known = surrogate_matrices(part, count, origin)
    unravel = ravel_pytree(origin)[1]
    total = lambda v: ravel_pytree(surrogates.total_precision(unravel(v)))[0]
    both = prior + np.asarray(jax.vmap(total)(jnp.eye(flat.size, dtype=flat.dtype)), np.float64)
    visits = both + (own - known) / clients.shares[numbers][:, None, None]
    mean = np.einsum("s,sij->ij", times[numbers] / times[numbers].sum(), visits)
    if np.linalg.eigvalsh(mean)[0] <= 0:
        return None
    stretch = np.linalg.cholesky(exact) @ np.linalg.inv(np.linalg.cholesky(mean))
    visits = stretch @ visits @ stretch.T
    covariance = stationary_covariance(visits, np.full(count, 1 / count), times[numbers])
    found = _worst_direction(origin, visits, exact, covariance, own, times[numbers])
    return None if found is None else found._replace(client=int(numbers[found.client]))


def _spread_by_diagonals(posterior, surrogates: Surrogates, p, times) -> Spread | None:
    origin, shares = surrogates.origin, require_clients(posterior).shares
    if surrogates.precision is None:
        own, prior = diagonals(posterior, origin, "fisher")
        return diagonal_spread(origin, own, prior, shares, p, times)
    if tree_size(origin) > MOST_EXACT_DIAGONALS:
        return None
    own, prior = diagonals(posterior, origin, "hessian")
    known = precision_diagonals(surrogates.precision, surrogates.count, origin)
    return diagonal_spread(origin, own, prior, shares, p, times, known)


def diagonal_spread(
    origin: Any, own, prior, shares, p, times, surrogate: Any = 0.0
) -> Spread | None:
    """The worst coordinate of curvatures (clients, d) that have no others than diagonals."""
    exact = prior + own.sum(axis=0)
    known = exact > 0
    if not known.any():
        return None
    surrogate = np.broadcast_to(surrogate, own.shape)
    visits = prior + surrogate.sum(axis=0) + (own - surrogate) / shares[:, None]
    visits = np.maximum(visits, 1e-12)
    variance = _stationary_variance(visits, p, times)
    ratio = np.where(known, np.sqrt(variance * np.where(known, exact, 1)), 1.0)
    worst = int(np.argmax(np.abs(np.log(ratio))))
    return _worst(origin, float(ratio[worst]), worst, own[:, worst], times)


def stationary_covariance(visits: np.ndarray, p: np.ndarray, times: np.ndarray):
    """The covariance, averaged over time, of visits of these curvatures.

    Infinite where visits drive positions apart; None where it is not found.
    """
    from scipy.sparse.linalg import LinearOperator, gmres

    values, vectors = np.linalg.eigh(visits)
    rates = values[:, :, None] + values[:, None, :]
    reach = rates * times[:, None, None]
    size = visits.shape[1]
    if np.min(reach) < -50:
        return np.full((size, size), np.inf)
    decay, mean = np.exp(-reach), _mean_decay(reach)
    growth = np.stack([np.diag(2 * t * np.diag(m)) for t, m in zip(times, mean, strict=True)])
    turn = lambda x: np.swapaxes(vectors, 1, 2) @ x @ vectors

    def back(x, weights):
        return np.sum((weights[:, None, None] * vectors) @ x @ np.swapaxes(vectors, 1, 2), axis=0)

    def rest(flat):
        m = flat.reshape(size, size)
        return (m - back(decay * turn(m), p)).ravel()

    operator: Any = LinearOperator(  # pyright: ignore
        (size**2, size**2),
        matvec=rest,  # pyright: ignore
        dtype=np.float64,  # pyright: ignore
    )
    if size <= _DIRECT and len(visits) <= _MOST_DIRECT:
        matrix = np.stack([rest(unit) for unit in np.eye(size**2)], axis=1)
        start, failed = np.linalg.lstsq(matrix, back(growth, p).ravel())[0], 0
    else:
        start, failed = gmres(operator, back(growth, p).ravel(), rtol=1e-5, restart=60, maxiter=20)
    if failed or not np.all(np.isfinite(start)):
        return None
    start = start.reshape(size, size)
    if np.linalg.eigvalsh((start + start.T) / 2)[0] < 0:
        return np.full((size, size), np.inf)
    inside = mean * turn(start)
    for s, (rate, t) in enumerate(zip(values, times, strict=True)):
        inside[s] += np.diag(2 * t * _mean_growth(2 * rate * t))
    return back(inside, p * times / np.sum(p * times))


def _stationary_variance(visits: np.ndarray, p: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The same of numbers: (clients, d) curvatures, to d variances."""
    t = times[:, None]
    reach = 2 * visits * t
    growth, decay = 2 * t * _mean_decay(reach), np.exp(-reach)
    start = (p @ growth) / np.maximum(1 - p @ decay, 1e-12)
    inside = start * _mean_decay(reach) + 2 * t * _mean_growth(reach)
    return (p * times / np.sum(p * times)) @ inside


def _mean_decay(x: np.ndarray) -> np.ndarray:
    """The mean of $e^{-xu}$ over u from zero to one."""
    small = np.abs(x) < 1e-6
    return np.where(small, 1 - x / 2, -np.expm1(-x) / np.where(small, 1, x))


def _mean_growth(x: np.ndarray) -> np.ndarray:
    """The mean of $(1 - e^{-xu})/x$ over u from zero to one."""
    small = np.abs(x) < 1e-4
    return np.where(small, 0.5 - x / 6, (1 - _mean_decay(x)) / np.where(small, 1, x))


def _worst(origin: Any, ratio: float, coordinate: int, curvatures, times) -> Spread:
    client = int(np.argmax(curvatures))
    forget = float(max(curvatures[client], 0.0) * times[client])
    return Spread(ratio, coordinate_names(origin)[coordinate], client, forget)


def coordinate_names(position: Any) -> Sequence[str]:
    """Each coordinate of the raveled position in words."""
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(position):
        where = jax.tree_util.keystr(path)
        shape = np.shape(leaf)
        names += [where + (str(list(i)) if i else "") for i in np.ndindex(*shape)]
    return [name or "the position" for name in names]
