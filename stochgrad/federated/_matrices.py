"""Curvatures of the clients' likelihoods, of the prior and of surrogates, as matrices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from stochgrad.core import Posterior, hoisted_jit, tree_size
from stochgrad.federated._client_sums import all_likelihoods, likelihood_sum, prior_only
from stochgrad.federated._clients import require_clients
from stochgrad.federated._curvature import curvature_diagonal, curvature_matrix, fisher, hessian
from stochgrad.federated._gaussians import Diagonal, Full, LowRank, Precision

_MOST_DIMENSIONS, _MOST_NUMBERS = 100, 2e7
_FLOOR = 1e-6
_RADII = (1.0, 3.0, 10.0)
MOST_CLIENTS = 1000
"""Clients up to which each one's curvature is looked at."""
MOST_EXACT_DIAGONALS = 500
"""Dimensions up to which diagonals of Hessians are exact, and not by random probes."""


class Curvatures(NamedTuple):
    r"""Minus the Hessians at some points, over the raveled position.

    Attributes:
        own: $H_s$ of each client's log likelihood.
        prior: $\Lambda_0$ of the prior.
    """

    own: Float[np.ndarray, "points clients d d"]
    prior: Float[np.ndarray, "points d d"]

    def at(self, point: int) -> "Curvatures":
        """Those at one of the points, without their axis."""
        return Curvatures(self.own[point], self.prior[point])


def fits_matrices(
    posterior: Posterior, origin: Any, most: int = _MOST_DIMENSIONS, clients: int = MOST_CLIENTS
) -> bool:
    """Whether a matrix for each client is small enough: by default, at most 100 dimensions.

    And, by default, at most a thousand clients.
    """
    return few_matrices(tree_size(origin), require_clients(posterior).count, most, clients)


def few_matrices(
    d: int, count: int, most: int = _MOST_DIMENSIONS, clients: int = MOST_CLIENTS
) -> bool:
    """The same by numbers of dimensions and of clients."""
    return d <= most and count <= clients and count * d**2 <= _MOST_NUMBERS


def curvature_matrices(
    posterior: Posterior, origin: Any, points: np.ndarray, numbers: np.ndarray | None = None
) -> Curvatures:
    """The curvatures at points (points, d), which are raveled positions like the origin.

    Of all clients, or of those of these numbers.
    """
    flat, unravel = ravel_pytree(origin)
    kind = hessian(posterior)
    if numbers is None:
        numbers = np.arange(require_clients(posterior).count)
    numbers = np.asarray(numbers, np.int32)
    basis = jnp.eye(flat.size, dtype=flat.dtype)
    prior_product = prior_only(posterior, kind.product)

    def prior(x):
        row = lambda v: ravel_pytree(prior_product(unravel(x), unravel(v)))[0]
        return lax.map(row, basis)

    def own(x):
        return lax.map(lambda s: curvature_matrix(posterior, kind, s, unravel(x)), numbers)

    both = hoisted_jit(lambda points: lax.map(lambda x: (own(x), prior(x)), points))
    found = both(jnp.asarray(points, flat.dtype))
    return Curvatures(*(np.asarray(x, np.float64) for x in found))


def prior_curvature(posterior: Posterior, origin: Any, form: str) -> Full | Diagonal:
    """Minus the Hessian of the log prior, ``"full"`` or ``"diagonal"``, with an axis of one.

    As a diagonal the sum of each row, which it is where the prior's numbers are independent.
    """
    flat, unravel = ravel_pytree(origin)
    product = prior_only(posterior, hessian(posterior).product)
    times = lambda v: product(origin, unravel(v))
    if form == "diagonal":
        rows = hoisted_jit(times)(jnp.ones_like(flat))
        return Diagonal(jax.tree.map(lambda x: jnp.maximum(x, 0)[None], rows))
    matrix = hoisted_jit(lambda basis: lax.map(lambda v: ravel_pytree(times(v))[0], basis))
    return Full(matrix(jnp.eye(flat.size, dtype=flat.dtype))[None])


def as_matrices(precision: Precision | None) -> Precision | None:
    """What one client's precision of low rank is as a matrix; others as they are."""
    if isinstance(precision, LowRank):
        return Full(precision.matrix_of_all()[None])
    return precision


def total_curvature(posterior: Posterior, origin: Any) -> np.ndarray:
    """Minus the Hessian of the log likelihood of all clients (d, d)."""
    flat, unravel = ravel_pytree(origin)
    product = all_likelihoods(posterior, hessian(posterior).product)
    row = lambda x, v: ravel_pytree(product(unravel(x), unravel(v)))[0]
    matrix = hoisted_jit(lambda x: lax.map(lambda v: row(x, v), jnp.eye(x.size, dtype=x.dtype)))
    found = np.asarray(matrix(flat), np.float64)
    return (found + found.T) / 2


def surrogate_matrices(precision: Precision | None, count: int, origin: Any) -> np.ndarray:
    """The precisions of surrogates, (clients, d, d)."""
    flat, unravel = ravel_pytree(origin)
    if precision is None:
        return np.zeros((count, flat.size, flat.size))
    if isinstance(precision, Full):
        return np.asarray(precision.matrices, np.float64)
    row = lambda s, v: ravel_pytree(precision.times(s, unravel(v)))[0]
    basis = jnp.eye(flat.size, dtype=flat.dtype)
    return np.asarray(
        jax.vmap(lambda s: jax.vmap(lambda v: row(s, v))(basis))(jnp.arange(count)), np.float64
    )


def precision_diagonals(precision: Precision, count: int, origin: Any) -> np.ndarray:
    """The diagonals of the surrogates' precisions, (clients, d)."""
    flat, unravel = ravel_pytree(origin)

    def unit(s, i):
        return ravel_pytree(precision.times(s, unravel(jnp.zeros_like(flat).at[i].set(1))))[0][i]

    of = lambda s: lax.map(lambda i: unit(s, i), jnp.arange(flat.size))
    return np.asarray(hoisted_jit(lambda: lax.map(of, jnp.arange(count)))(), np.float64)


def diagonals(posterior: Posterior, origin: Any, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Diagonals (clients, d) of the clients' ``"fisher"`` information or Hessian, and the prior's.

    The prior's is the sum of each row, which is its diagonal where its numbers are independent.
    """
    curvature = {"fisher": fisher, "hessian": hessian}[kind](posterior)
    numbers = np.arange(require_clients(posterior).count, dtype=np.int32)
    one = lambda s, x: ravel_pytree(curvature_diagonal(posterior, curvature, s, x))[0]
    product = prior_only(posterior, hessian(posterior).product)

    def both(x):
        ones = jax.tree.map(jnp.ones_like, x)
        return lax.map(lambda s: one(s, x), numbers), ravel_pytree(product(x, ones))[0]

    own, prior = (np.asarray(x, np.float64) for x in hoisted_jit(both)(origin))
    return own, np.maximum(prior, 0)


def second_points(posterior: Posterior, origin: Any, here: Curvatures | None) -> np.ndarray:
    r"""Raveled positions at the rim of where draws are, and beyond, by the origin's curvatures.

    All coordinates of the whitened position are moved at once, by $1 + 3/\sqrt d$ to either side,
    where a draw is three times in a thousand; and by three and ten times as much.
    """
    flat = np.asarray(ravel_pytree(origin)[0], np.float64)
    if here is not None:
        return rim(flat, here.prior + here.own.sum(axis=0))
    own, prior = diagonals(posterior, origin, "fisher")
    total = prior + own.sum(axis=0)
    return rim(flat, total)


def rim(origin: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The same by a total curvature, a matrix or a diagonal: nearest first, in opposite pairs."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(2, origin.size))
    moves = (1 + 3 / np.sqrt(origin.size)) * signs
    values, vectors = (total, None) if total.ndim == 1 else np.linalg.eigh(total)
    values = np.maximum(np.abs(values), _FLOOR * max(np.abs(values).max(), 1e-30))
    moves = moves / np.sqrt(values)
    moves = moves if vectors is None else moves @ vectors.T
    return origin + np.concatenate([r * m for r in _RADII for m in (moves, -moves)])


def own_products(posterior: Posterior) -> Any:
    """``(client, position, v) -> H_s v``, without the prior."""
    return likelihood_sum(posterior, hessian(posterior).product)
