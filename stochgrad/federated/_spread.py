"""How much too wide or narrow the draws come out because a visit sees one client's curvature."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from stochgrad.core import Kernel, Posterior, hoisted_jit, tree_size
from stochgrad.federated._client_sums import likelihood_sum, prior_only
from stochgrad.federated._clients import require_clients
from stochgrad.federated._curvature import fisher, hessian, precisions
from stochgrad.federated._gaussians import Diagonal, Full, Precision, Surrogates
from stochgrad.federated._rows import hessian_product

_DENSE = 100
"""Dimensions up to which curvatures are matrices, and not diagonals of the Fisher information."""

_RADII = (0.3, 3.0, 30.0)
"""Distances from the reference at which a constant curvature is looked at."""


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
    posterior: Posterior, surrogates: Surrogates, time_of_step: float
) -> Spread | None:
    r"""The spread that draws have, of Langevin dynamics between Gaussian clients.

    During a visit of time $\tau_s = h T_s$ the covariance M about the mode follows
    $\dot M = 2 - A_s M - M A_s$ with the curvature $A_s$ of that visit
    (``stochgrad.federated.Stability``), and visits are drawn at random. The stationary covariance,
    averaged over time, is held against $(\Lambda_0 + \sum_t H_t)^{-1}$. Where a client's curvature
    N is felt during its own visits only, the variance is too large by about
    $h N T\,(1 - f_s)/f_s$ of itself, as long as that is small.

    Beyond 100 dimensions only diagonals are compared, of the empirical Fisher information, and of
    surrogates of first order alone.

    Returns:
        The worst direction; None where it is not known.
    """
    clients = require_clients(posterior)
    p = np.full(clients.count, 1 / clients.count)
    p = p if clients.probabilities is None else clients.probabilities
    times = time_of_step * clients.steps.astype(np.float64)
    if tree_size(surrogates.origin) > _DENSE:
        if surrogates.precision is not None:
            return None
        own, prior = _diagonals(posterior, surrogates)
        return diagonal_spread(surrogates.origin, own, prior, clients.shares, p, times)
    own, prior, known = _matrices(posterior, surrogates)
    exact = prior + own.sum(axis=0)
    if not np.all(np.isfinite(own)) or np.linalg.eigvalsh(exact)[0] <= 0:
        return None
    visits = prior + known.sum(axis=0) + (own - known) / clients.shares[:, None, None]
    covariance = stationary_covariance(visits, p, times)
    if covariance is None:
        return None
    root = np.linalg.cholesky(exact)
    values, vectors = np.linalg.eigh(root.T @ covariance @ root)
    worst = int(np.argmax(np.abs(np.log(np.maximum(values, 1e-12)))))
    v = np.linalg.solve(root.T, vectors[:, worst])
    weights = v**2 * np.diagonal(exact)
    return _worst(
        surrogates.origin,
        float(np.sqrt(values[worst])),
        int(np.argmax(weights)),
        np.diagonal(own, axis1=1, axis2=2)[:, np.argmax(weights)],
        times,
    )


def diagonal_spread(origin: Any, own, prior, shares, p, times) -> Spread | None:
    """The worst coordinate of curvatures (clients, d) that have no others than diagonals."""
    exact = prior + own.sum(axis=0)
    known = exact > 0
    if not known.any():
        return None
    visits = np.maximum(prior + own / shares[:, None], 1e-12)
    variance = _stationary_variance(visits, p, times)
    ratio = np.where(known, np.sqrt(variance * np.where(known, exact, 1)), 1.0)
    worst = int(np.argmax(np.abs(np.log(ratio))))
    return _worst(origin, float(ratio[worst]), worst, own[:, worst], times)


def stationary_covariance(visits: np.ndarray, p: np.ndarray, times: np.ndarray):
    """The covariance, averaged over time, of visits of these curvatures; None if there is none."""
    from scipy.sparse.linalg import LinearOperator, gmres

    values, vectors = np.linalg.eigh(visits)
    rates = values[:, :, None] + values[:, None, :]
    reach = rates * times[:, None, None]
    if np.min(reach) < -50:
        return None
    decay, mean = np.exp(-reach), _mean_decay(reach)
    growth = np.stack([np.diag(2 * t * np.diag(m)) for t, m in zip(times, mean, strict=True)])
    turn = lambda x: np.einsum("sji,jk,skl->sil", vectors, x, vectors)
    back = lambda x, weights: np.einsum("s,sij,sjk,slk->il", weights, vectors, x, vectors)
    size = visits.shape[1]

    def rest(flat):
        m = flat.reshape(size, size)
        return (m - back(decay * turn(m), p)).ravel()

    operator: Any = LinearOperator(  # pyright: ignore
        (size**2, size**2),
        matvec=rest,  # pyright: ignore
        dtype=np.float64,  # pyright: ignore
    )
    start, failed = gmres(operator, back(growth, p).ravel(), rtol=1e-5, restart=60, maxiter=20)
    if failed or not np.all(np.isfinite(start)):
        return None
    start = start.reshape(size, size)
    if np.linalg.eigvalsh((start + start.T) / 2)[0] < 0:
        return None
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


def curvature_is_constant(posterior: Posterior, origin: Any) -> bool:
    """Whether each client's likelihood is a Gaussian function of the position, as far as is seen.

    Products of its curvature with one vector are compared at points near the origin and far away.
    """
    flat, unravel = ravel_pytree(origin)
    bend = likelihood_sum(posterior, hessian_product(posterior))
    random = np.random.default_rng(0)
    v = jnp.asarray(random.normal(size=flat.size), flat.dtype)
    directions = random.choice([-1.0, 1.0], size=(len(_RADII), flat.size))
    moves = np.concatenate([np.zeros((1, flat.size)), np.array(_RADII)[:, None] * directions])
    numbers = np.arange(require_clients(posterior).count, dtype=np.int32)

    def products(points):
        of = lambda s, x: ravel_pytree(bend(s, unravel(x), unravel(v)))[0]
        return lax.map(lambda s: lax.map(lambda x: of(s, x), points), numbers)

    points = flat[None] + jnp.asarray(moves, flat.dtype)
    found = np.asarray(hoisted_jit(products)(points), np.float64)
    gap = np.max(np.abs(found[:, 1:] - found[:, :1]), axis=(1, 2))
    return bool(np.all(gap <= 1e-3 * np.max(np.abs(found[:, 0]), axis=1)))


def _matrices(posterior: Posterior, surrogates: Surrogates):
    """Curvatures of the clients' likelihoods, of the prior, and of the surrogates."""
    origin = surrogates.origin
    own = precisions(posterior, hessian(posterior), lambda _: origin, "full", 1)
    assert isinstance(own, Full)
    flat, unravel = ravel_pytree(origin)
    basis = jnp.eye(flat.size, dtype=flat.dtype)
    product = prior_only(posterior, hessian_product(posterior))
    prior = hoisted_jit(
        lambda basis: lax.map(lambda v: ravel_pytree(product(origin, unravel(v)))[0], basis)
    )(basis)
    known = _as_matrices(surrogates.precision, surrogates.count, basis, unravel)
    return tuple(np.asarray(x, np.float64) for x in (own.matrices, prior, known))


def _as_matrices(precision: Precision | None, count: int, basis: Any, unravel: Any):
    if precision is None:
        return np.zeros((count, *basis.shape))
    if isinstance(precision, Full):
        return precision.matrices
    row = lambda s, v: ravel_pytree(precision.times(s, unravel(v)))[0]
    return jax.vmap(lambda s: jax.vmap(lambda v: row(s, v))(basis))(jnp.arange(count))


def _diagonals(posterior: Posterior, surrogates: Surrogates):
    """Diagonals of the clients' empirical Fisher information, and of the prior's curvature."""
    origin = surrogates.origin
    own = precisions(posterior, fisher(posterior), lambda _: origin, "diagonal", 1)
    assert isinstance(own, Diagonal)
    flat = jax.vmap(lambda x: ravel_pytree(x)[0])(own.values)
    product = prior_only(posterior, hessian_product(posterior))
    ones = jax.tree.map(jnp.ones_like, origin)
    prior = ravel_pytree(hoisted_jit(product)(origin, ones))[0]
    return np.asarray(flat, np.float64), np.maximum(np.asarray(prior, np.float64), 0)


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
