"""Whether visits to a client are drawn back."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from stochgrad.core import Posterior, check_flag, hoisted_jit
from stochgrad.federated._checks import check_federated, check_surrogates
from stochgrad.federated._client_sums import prior_only
from stochgrad.federated._clients import require_clients
from stochgrad.federated._curvature import extreme_eigenvalues
from stochgrad.federated._gaussians import Precision, Surrogates
from stochgrad.federated._matrices import (
    Curvatures,
    curvature_matrices,
    fits_matrices,
    own_products,
    second_points,
    surrogate_matrices,
)
from stochgrad.federated._rows import hessian_product

_TOLERANCE, _SHRINK, _ROUNDS = 1e-3, 0.7, 40
_MOST_DIMENSIONS = 300
"""Dimensions up to which eigenvalues are those of matrices, beyond by Lanczos iterations."""
_GROWTH = 0.25
"""What a position may grow by in a visit, as a logarithm, where positions are rarely."""
_MOST_DIMENSIONS = 1000
_SPREAD = 1.1
"""Error in standard deviations, as a factor, from which on visits are too long."""


_ENOUGH = 1.05
"""The same, up to which surrogates of first order are taken by default."""
_RANKS = (4, 16)


class StabilityWarning(UserWarning):
    """Long visits to some client are unstable, or make the draws too wide or narrow."""


class Stability(NamedTuple):
    r"""What draws chains back while they visit each client.

    During a visit to client s the drift has the curvature

    $$\Lambda_0 + \sum_t \Lambda_t + \frac{H_s - \Lambda_s}{f_s},$$

    with the prior's $\Lambda_0$ and the client's own $H_s$. It is measured at the reference, and at
    positions at the rim of where draws are, at three and at ten times that distance: far away the
    likelihood of a logistic regression, say, is straight, and what its $H_s$ lacks of $\Lambda_s$
    counts for $1/f_s$ of itself. Where likelihoods are Gaussian, all are the same.

    Attributes:
        margin: The smallest eigenvalue at the reference, for each client. Below zero, positions
            grow as $\exp(|\cdot|\,t)$ over a visit of time t, $h T_s$ for Langevin dynamics.
        far_margin: The smallest eigenvalue at the other positions.
        largest: The largest eigenvalue at the reference.
    """

    margin: np.ndarray
    far_margin: np.ndarray
    largest: np.ndarray

    def unsafe(self, *, far: bool = True, times: np.ndarray | None = None) -> np.ndarray:
        """Which clients' surrogates are unsafe, at the reference or (``far``) away from it.

        With the ``times`` of visits, in which a position may grow as $e^{1/4}$.
        """
        least = np.minimum(self.margin, self.far_margin) if far else self.margin
        allowed = _TOLERANCE * np.abs(self.largest)
        if times is not None:
            allowed = np.maximum(allowed, _GROWTH / times)
        return least < -allowed

    def describe(self, *, far: bool = True, times: np.ndarray | None = None) -> str:
        """The unsafe clients and their margins in words."""
        named = [
            f"client {s} (margin {self.margin[s]:.3g}"
            + (f", far away {self.far_margin[s]:.3g}" if far else "")
            + f", of a largest curvature of {self.largest[s]:.3g})"
            for s in np.flatnonzero(self.unsafe(far=far, times=times))
        ]
        return "; ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")


def stability(posterior: Posterior, surrogates: Surrogates) -> Stability:
    """The stability of visits to each client, by products of Hessians with vectors.

    In up to 300 dimensions by matrices, beyond by Lanczos iterations. A client works on its own
    data alone.

    Args:
        posterior: A posterior of data that clients own, visited as it will be.
        surrogates: The surrogates; the curvature is taken about their origin.

    Raises:
        TypeError: the posterior's data are not federated.
    """
    check_federated(posterior)
    check_surrogates(posterior, surrogates)
    return margins_about(posterior, surrogates.origin)(surrogates.precision)


Margins: TypeAlias = Callable[[Precision | None], Stability]


def margins_about(posterior: Posterior, origin: Any) -> Margins:
    """The stability of precisions about an origin, with all else computed once."""
    if fits_matrices(posterior, origin, _MOST_DIMENSIONS, require_clients(posterior).count):
        return _margins_by_matrices(posterior, origin, curvatures_about(posterior, origin))
    return _margins_by_products(posterior, origin)


def curvatures_about(posterior: Posterior, origin: Any) -> Curvatures:
    """The curvatures at an origin, and at points at the rim of where draws are."""
    flat = np.asarray(ravel_pytree(origin)[0])[None]
    here = curvature_matrices(posterior, origin, flat)
    rim = second_points(posterior, origin, here.at(0))
    there = curvature_matrices(posterior, origin, rim)
    return Curvatures(*(np.concatenate(pair) for pair in zip(here, there, strict=True)))


def _margins_by_matrices(posterior: Posterior, origin: Any, found: Curvatures) -> Margins:
    clients = require_clients(posterior)
    over = clients.shares[:, None, None]

    def of(precision):
        known = surrogate_matrices(precision, clients.count, origin)
        return visit_margins(found, clients.shares, known.sum(axis=0) - known / over)

    return of


def visit_margins(found: Curvatures, shares: np.ndarray, added: np.ndarray) -> Stability:
    r"""The stability by curvatures at the origin, the first point, and away from it.

    Args:
        found: The curvatures.
        shares: The clients' shares of steps.
        added: What surrogates add to a visit, $\sum_t\Lambda_t - \Lambda_s/f_s$ (clients, d, d).
    """
    bare = found.prior[:, None] + found.own / shares[:, None, None]
    finite = np.asarray(np.isfinite(bare).all(axis=(2, 3), keepdims=True))
    values = np.linalg.eigvalsh(np.where(finite, bare + added, 0))
    least = np.where(finite[..., 0], values[..., :1], np.inf)[1:, :, 0].min(axis=0)
    return Stability(values[0, :, 0], np.minimum(least, values[0, :, 0]), values[0, :, -1])


def _margins_by_products(posterior: Posterior, origin: Any) -> Margins:
    clients = require_clients(posterior)
    shares = clients.shares.astype(np.float32)
    flat, unravel = ravel_pytree(origin)
    own = own_products(posterior)
    prior = prior_only(posterior, hessian_product(posterior))

    def times(client, point, v, precision):
        point, v = unravel(point), unravel(v)
        share = jnp.asarray(shares)[client]
        here = jax.tree.map(lambda x: x / share, own(client, point, v))
        if precision is not None:
            rest = jax.tree.map(
                lambda all_, x: all_ - x / share, precision.total(v), precision.times(client, v)
            )
            here = jax.tree.map(jnp.add, here, rest)
        return ravel_pytree(jax.tree.map(jnp.add, prior(point, v), here))[0]

    run = hoisted_jit(times)

    def extremes(precision, client, point):
        def product(v):
            return np.asarray(run(np.int32(client), point, jnp.asarray(v, flat.dtype), precision))

        return extreme_eigenvalues(product, flat.size)

    points = jnp.asarray(second_points(posterior, origin, None)[::2], flat.dtype)

    def of(precision):
        numbers = range(clients.count)
        near = np.array([extremes(precision, s, flat) for s in numbers])
        far = np.array([min(extremes(precision, s, x)[0] for x in points) for s in numbers])
        return Stability(near[:, 0], far, near[:, 1])

    return of


def capped(posterior: Posterior, surrogates: Surrogates, *, far: bool = True) -> Surrogates:
    """The surrogates with the curvature of unsafe clients shrunk until all are safe.

    Slopes at the origin remain, so that what is shrunk to nothing is a surrogate of first order.
    Where a likelihood is convex in some direction even that may be unsafe: then the safest that was
    seen on the way.

    Args:
        posterior: A posterior of data that clients own, visited as it will be.
        surrogates: The surrogates.
        far: Whether visits must be safe far from the origin too.
    """
    check_federated(posterior)
    check_surrogates(posterior, surrogates)
    far = check_flag("far", far)
    if surrogates.precision is None:
        return surrogates
    margins = margins_about(posterior, surrogates.origin)
    return surrogates.scaled(safe_scale(margins_of(margins, surrogates), surrogates.count, far=far))


def margins_of(margins: Margins, surrogates: Surrogates) -> Callable[[np.ndarray], Stability]:
    """The stability of surrogates by what their clients' curvatures are multiplied with."""
    return lambda scale: margins(surrogates.scaled(scale).precision)


def safe_scale(
    margins: Callable[[np.ndarray], Stability],
    count: int,
    *,
    far: bool = True,
    times: np.ndarray | None = None,
) -> np.ndarray:
    """What to multiply each of ``count`` clients' curvatures with, by the stability of that."""
    scale = best = np.ones(count)
    least = -np.inf
    for _ in range(_ROUNDS):
        found = margins(scale)
        worst = np.minimum(found.margin, found.far_margin) if far else found.margin
        worst = np.min(worst / np.abs(found.largest))
        if worst > least:
            least, best = worst, scale
        unsafe = found.unsafe(far=far, times=times)
        if not unsafe.any():
            return scale
        scale = np.where(unsafe, np.where(scale < 0.02, 0.0, scale * _SHRINK), scale)
    return best
