"""How the clients' likelihoods are approximated."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from stochgrad._deprecations import key_first
from stochgrad.core import (
    ConvergenceWarning,
    Position,
    Posterior,
    PRNGKey,
    check_array,
    check_choice,
    check_count,
    check_key,
    check_number,
    check_position,
    hoisted_jit,
    ravel_draws,
    sample,
)
from stochgrad.federated._checks import as_reference, check_federated, check_surrogates
from stochgrad.federated._client_sums import for_each_client, likelihood_sum, prior_only
from stochgrad.federated._clients import require_clients
from stochgrad.federated._curvature import as_curvature, check_form, precisions
from stochgrad.federated._gaussians import Diagonal, Full, Surrogates
from stochgrad.federated._parallel_clients import side_by_side
from stochgrad.federated._reference import local_modes
from stochgrad.federated._rows import hessian_product
from stochgrad.sgmcmc import sghmc

_FLOOR = 1e-4


def global_first_order(posterior: Posterior, reference: Any) -> Surrogates:
    r"""The slope of each client's log likelihood at one point for all, $q_s \propto
    \exp(g_s^\top(\theta - \theta_*))$.

    A client sends d numbers once, and a step costs one addition more. With them a visit of any
    length has the drift of all data at $\theta_*$, and the client's own curvature divided by its
    share: right to first order in the distance, and never unstable where the likelihood is
    log-concave.

    Args:
        posterior: A posterior of data that clients own.
        reference: $\theta_*$: a position, or what ``stochgrad.federated.find_reference`` found.
    """
    check_federated(posterior)
    position = as_reference(posterior, reference)
    slope = for_each_client(posterior, _local_score(posterior), position)[1]
    return _checked(Surrogates(position, slope))


def global_quadratic(
    posterior: Posterior,
    reference: Any,
    *,
    form: str = "full",
    curvature: Any = "hessian",
    rank: int = 10,
) -> Surrogates:
    r"""Slope and curvature of each client's log likelihood at one point for all.

    $$\log q_s(\theta) = g_s^\top(\theta - \theta_*) - \tfrac12 (\theta - \theta_*)^\top \Lambda_s
      (\theta - \theta_*)$$

    Args:
        posterior: A posterior of data that clients own.
        reference: $\theta_*$.
        form: ``"full"``, a (d, d) matrix for each client; ``"diagonal"``; or ``"low_rank"``, its
            leading ``rank`` eigenvectors and the rest of the diagonal.
        curvature: ``"hessian"``; ``"fisher"``, the sum of the rows' squared scores, which is never
            negative; or ``stochgrad.federated.gauss_newton(outputs, log_likelihood)``.
        rank: Eigenvectors to keep.

    Raises:
        ValueError: the form or the curvature is unknown, or a client's is not finite.
    """
    check_form(form)
    check_federated(posterior)
    rank = check_count("rank", rank)
    kind = as_curvature(curvature, posterior)
    first = global_first_order(posterior, reference)
    position = first.origin
    precision = precisions(posterior, kind, lambda _: position, form, rank)
    return _checked(first._replace(precision=precision))


def exact(posterior: Posterior, reference: Any) -> Surrogates:
    """The likelihoods themselves, where they are Gaussian functions of the position.

    Raises:
        ValueError: a client's is not: its curvature at another point is another one.
    """
    found = global_quadratic(posterior, reference)
    elsewhere = jax.tree.map(lambda x: x + jnp.ones_like(x), found.origin)
    again = global_quadratic(posterior, elsewhere)
    assert isinstance(found.precision, Full)
    assert isinstance(again.precision, Full)
    here, there = found.precision.matrices, again.precision.matrices
    gap = jnp.max(jnp.abs(here - there), axis=(1, 2)) / jnp.max(jnp.abs(here), axis=(1, 2))
    if not bool(jnp.all(gap < 1e-3)):
        worst = int(jnp.argmax(gap))
        raise ValueError(
            f"the likelihood of client {worst} is not a Gaussian function of the position: its "
            f"curvature changes by {float(gap[worst]):.0%} over a distance of one. Take "
            "surrogate='global_quadratic' or 'global_first_order'."
        )
    return found


def laplace_local(
    posterior: Posterior, reference: Any, *, form: str = "full", max_steps: int = 200
) -> Surrogates:
    r"""A Gaussian at the maximum of each client's own likelihood, with the curvature there.

    One of the ways of the paper (its supplement). The maximum may lie far from where the posterior
    of all data is, or at infinity, as with labels that one client can separate: then the surrogate
    is wrong where chains are, and long visits are biased. Prefer ``global_first_order``.

    Args:
        posterior: A posterior of data that clients own.
        reference: Where the searches start.
        form: ``"full"`` or ``"diagonal"``.
        max_steps: The most steps of each search.

    Raises:
        ValueError: the curvature at a maximum is not positive definite.
    """
    check_choice("form", form, ("full", "diagonal"))
    check_federated(posterior)
    max_steps = check_count("max_steps", max_steps)
    origin = as_reference(posterior, reference)
    modes = local_modes(posterior, _local_score(posterior), origin, max_steps)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *modes)
    at = lambda s: jax.tree.map(lambda x: x[s], stacked)
    precision = precisions(posterior, as_curvature("hessian", posterior), at, "full", 1)
    assert isinstance(precision, Full)
    for s, matrix in enumerate(np.asarray(precision.matrices, np.float64)):
        check_positive_definite(f"the curvature of client {s} at its own maximum", matrix)
    return _gaussian(origin, stacked, np.asarray(precision.matrices), form)


@key_first
def sampled(
    key: PRNGKey,
    posterior: Posterior,
    reference: Any,
    *,
    form: str = "full",
    num_samples: int = 3000,
    step_size: float = 0.1,
) -> Surrogates:
    r"""A Gaussian with the moments of draws from each client's likelihood alone.

    The other way of the paper, its draws by SGHMC with a diagonal mass for each client; all clients
    are sampled at once. Where a likelihood hardly binds the position in some direction, its draws
    wander off in it: as with ``laplace_local``, prefer ``global_first_order``.

    Args:
        key: A typed PRNG key.
        posterior: A posterior of data that clients own.
        reference: Where the chains start.
        form: ``"full"`` or ``"diagonal"``.
        num_samples: Draws, of ten steps each.
        step_size: In units of the roots of the clients' curvatures.

    Raises:
        ValueError: a client's draws leave the finite numbers, or have no covariance.
    """
    check_choice("form", form, ("full", "diagonal"))
    check_federated(posterior)
    check_key(key)
    num_samples = check_count("num_samples", num_samples, least=10)
    step_size = check_number("step_size", step_size)
    origin = as_reference(posterior, reference)
    count = require_clients(posterior).count
    curvature = precisions(
        posterior, as_curvature("hessian", posterior), lambda _: origin, "diagonal", 1
    )
    assert isinstance(curvature, Diagonal)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(curvature.values))
    mass = jax.tree.map(
        lambda x: np.maximum(np.abs(np.asarray(x)), _FLOOR * largest), curvature.values
    )
    starts = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), origin)
    kernel = sghmc(side_by_side(posterior, prior=False), step_size, friction=mass, mass=mass)
    with warnings.catch_warnings():  # only moments are wanted of these draws, and roughly
        warnings.simplefilter("ignore", ConvergenceWarning)
        draws = sample(
            key,
            kernel,
            init=starts,
            num_samples=num_samples,
            num_warmup=num_samples // 4,
            thin=10,
            progress=False,
        )
    if not draws.finite.all():
        raise ValueError(
            "draws from the clients' likelihoods alone leave the finite numbers: take a smaller "
            "step_size, or surrogate='global_first_order', which needs none."
        )
    flat = ravel_draws(jax.tree.map(lambda x: x[0], draws.positions))
    mean = jax.tree.map(lambda x: jnp.asarray(x[0].mean(axis=0)), draws.positions)
    covariances = [np.atleast_2d(np.cov(flat[:, s].T)) for s in range(count)]
    for s, covariance in enumerate(covariances):
        check_positive_definite(f"the covariance of client {s}'s draws", covariance)
    if form == "diagonal":
        covariances = [np.diag(np.diag(c)) for c in covariances]
    return _gaussian(origin, mean, np.stack([np.linalg.inv(c) for c in covariances]), form)


def gaussian(mean: Position, precision: Any, *, origin: Position | None = None) -> Surrogates:
    r"""Surrogates $q_s = \mathcal N(\mu_s, \Lambda_s^{-1})$ from means and precisions.

    Args:
        mean: $\mu_s$, a tree of the position's structure with a leading axis of clients.
        precision: $\Lambda_s$, an array (clients, d, d) over the raveled position, or a tree like
            ``mean`` of diagonals.
        origin: About where to hold them; the mean of the means by default.

    Raises:
        ValueError: a matrix is not symmetric positive definite.
    """
    check_position(mean, "mean")
    counts = {jnp.shape(x)[:1] for x in jax.tree.leaves(mean)}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            "mean must have one leading axis of clients, got shapes "
            f"{jax.tree.map(jnp.shape, mean)}."
        )
    mean = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), mean)
    if origin is None:
        origin = jax.tree.map(lambda x: jnp.mean(x, axis=0), mean)
    origin = getattr(origin, "position", origin)
    check_position(origin, "origin")
    origin = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), origin)
    shapes = jax.tree.map(lambda x: x.shape[1:], mean)
    if jax.tree.map(jnp.shape, origin) != shapes:
        raise ValueError(
            f"origin must be a position like one client's mean, of shape {shapes}, got "
            f"{jax.tree.map(jnp.shape, origin)}."
        )
    count, size = jax.vmap(lambda m: ravel_pytree(m)[0])(mean).shape
    if jax.tree.structure(precision) == jax.tree.structure(mean) and [
        jnp.shape(x) for x in jax.tree.leaves(precision)
    ] == [x.shape for x in jax.tree.leaves(mean)]:
        check_position(precision, "precision")
        if not all(bool(jnp.all(jnp.asarray(x) > 0)) for x in jax.tree.leaves(precision)):
            raise ValueError("precision must be positive, as diagonals.")
        values = jax.tree.map(lambda x, m: jnp.asarray(x, m.dtype), precision, mean)
        slope = jax.tree.map(lambda p, m, o: p * (m - o[None]), values, mean, origin)
        return _checked(Surrogates(origin, slope, Diagonal(values)))
    matrices = check_array("precision", precision)
    if matrices.shape != (count, size, size):
        raise ValueError(
            f"precision must be an array of shape ({count}, {size}, {size}), or a tree like mean "
            f"of diagonals, got shape {matrices.shape}."
        )
    for s, matrix in enumerate(matrices):
        check_positive_definite(f"the precision of client {s}", matrix)
    return _gaussian(origin, mean, matrices, "full")


def fisher_merge(
    posterior: Posterior, surrogates: Surrogates
) -> tuple[Position, Float[np.ndarray, "d d"]]:
    r"""Mean and covariance of the Gaussian $p(\theta)\prod_s q_s(\theta)$.

    The prior is taken as the Gaussian that it is at the surrogates' origin. One round of
    communication: a baseline, and a place to start from.

    Returns:
        The mean, a position, and the covariance of the raveled position.

    Raises:
        ValueError: the sum of the precisions is not positive definite.
    """
    check_federated(posterior)
    check_surrogates(posterior, surrogates)
    origin = as_reference(posterior, surrogates.origin, "surrogates.origin")
    flat, unravel = ravel_pytree(origin)

    def natural(position):
        product = prior_only(posterior, hessian_product(posterior))
        score = prior_only(posterior, jax.grad(posterior.log_density))(position)

        def times(v):
            prior, likelihood = (
                product(position, unravel(v)),
                surrogates.total_precision(unravel(v)),
            )
            return ravel_pytree(jax.tree.map(jnp.add, prior, likelihood))[0]

        slope = jax.tree.map(lambda g, a: g + jnp.sum(a, axis=0), score, surrogates.slope)
        return ravel_pytree(slope)[0], jax.lax.map(times, jnp.eye(flat.size, dtype=flat.dtype))

    slope, matrix = (np.asarray(x, np.float64) for x in hoisted_jit(natural)(origin))
    check_positive_definite("the sum of the clients' precisions and the prior's", matrix)
    covariance = np.linalg.inv((matrix + matrix.T) / 2)
    mean = np.asarray(flat, np.float64) + covariance @ slope
    return unravel(jnp.asarray(mean, flat.dtype)), covariance


def check_positive_definite(name: str, matrix: np.ndarray) -> None:
    """Raise a ValueError unless a matrix is symmetric positive definite."""
    if not np.allclose(matrix, matrix.T, rtol=1e-3, atol=1e-4 * np.abs(matrix).max()):
        raise ValueError(f"{name} must be a symmetric matrix.")
    least = np.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
    if not least > 0:
        raise ValueError(f"{name} must be positive definite: its smallest eigenvalue is {least:g}.")


def _gaussian(origin: Position, mean: Position, matrices: np.ndarray, form: str) -> Surrogates:
    """Surrogates of given means (a tree with a leading axis) and precision matrices."""
    flat, unravel = ravel_pytree(origin)
    means = np.asarray(jax.vmap(lambda m: ravel_pytree(m)[0])(mean), np.float64)
    away = means - np.asarray(flat, np.float64)
    matrices = np.asarray(matrices, np.float64)
    if form == "diagonal":
        diagonals = np.diagonal(matrices, axis1=1, axis2=2)
        spread: Any = jax.vmap(unravel)(jnp.asarray(diagonals, flat.dtype))
        slope, precision = diagonals * away, Diagonal(spread)
    else:
        slope = np.einsum("sij,sj->si", matrices, away)
        precision = Full(jnp.asarray(matrices, flat.dtype))
    return _checked(
        Surrogates(origin, jax.vmap(unravel)(jnp.asarray(slope, flat.dtype)), precision)
    )


def _local_score(posterior: Posterior):
    return likelihood_sum(posterior, jax.value_and_grad(posterior.log_density))


def _checked(surrogates: Surrogates) -> Surrogates:
    """The surrogates, or a ValueError that names the client whose are not finite."""
    for leaf in jax.tree.leaves((surrogates.slope, surrogates.precision)):
        finite = np.isfinite(np.asarray(leaf)).all(axis=tuple(range(1, leaf.ndim)))
        if not finite.all():
            client = int(np.argmin(finite))
            raise ValueError(
                f"the surrogate of client {client} is not finite: is the log likelihood of its "
                "data finite, with derivatives, at the reference?"
            )
    return surrogates
