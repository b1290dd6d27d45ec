"""The curvature of clients' log likelihoods, by products with vectors."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from stochgrad.core import (
    Position,
    Posterior,
    check_callable,
    check_choice,
    check_instance,
    describe,
    first_line,
    tree_size,
)
from stochgrad.federated._client_sums import for_each_client, likelihood_sum
from stochgrad.federated._gaussians import Diagonal, Full, LowRank, Precision
from stochgrad.federated._rows import hessian_product, row_scores, weight_of_rows

Form: TypeAlias = Literal["full", "diagonal", "low_rank"]

_EXACT_DIMENSION, _PROBES, _TOGETHER = 500, 64, 16
_MORE, _ITERATIONS = 8, 3


class Curvature(NamedTuple):
    """A symmetric matrix that stands for a batch's minus Hessian, by its products.

    Attributes:
        product: ``(position, v, batch) -> matrix times v``, affine in the rows' weights.
        diagonal: ``(position, batch) -> diagonal``, where it is cheaper than by products.
    """

    product: Callable[[Position, Position, Any], Position]
    diagonal: Callable[[Position, Any], Position] | None = None


def hessian(posterior: Posterior) -> Curvature:
    """Minus the Hessian itself, which need not be positive."""
    return Curvature(hessian_product(posterior))


def fisher(posterior: Posterior) -> Curvature:
    r"""The empirical Fisher information, $\sum_i g_i g_i^\top$ of the rows' scores."""
    scores = row_scores(posterior)

    def masked(position, batch):
        g = scores(position, batch)
        return g * weight_of_rows(batch).astype(g.dtype)[:, None]

    def product(position, v, batch):
        flat, unravel = ravel_pytree(v)
        g = masked(position, batch)
        return unravel((g @ flat) @ g)

    def diagonal(position, batch):
        _, unravel = ravel_pytree(position)
        return unravel(jnp.sum(masked(position, batch) ** 2, axis=0))

    return Curvature(product, diagonal)


def gauss_newton(outputs: Callable, log_likelihood: Callable) -> Callable[[Posterior], Curvature]:
    r"""The Gauss-Newton matrix $J^\top (-\nabla_f^2 \ell) J$, for a network's outputs f.

    Args:
        outputs: ``(position, data) -> f``, an array with a leading axis of rows.
        log_likelihood: ``(f, data) -> (rows,)``.

    Raises:
        TypeError: one is not a function. On use: the posterior is of a numpyro model.
        ValueError: on use: one fails, or returns another number of rows.
    """
    check_callable("outputs", outputs, "a function (position, data) -> array of rows")
    check_callable("log_likelihood", log_likelihood, "a function (outputs, data) -> (rows,)")

    def evaluate(name, function, first, batch):
        try:
            value = jnp.asarray(function(first, batch.data))
        except Exception as error:
            raise ValueError(f"{name} fails on a minibatch: {first_line(error)}.") from error
        rows = weight_of_rows(batch).shape
        if value.shape != rows if name == "log_likelihood" else value.shape[:1] != rows:
            raise ValueError(
                f"{name} must return one value per row, {rows[0]} of them, got shape {value.shape}."
            )
        return value

    def product(position, v, batch):
        if not hasattr(batch, "data"):
            raise TypeError(
                "outputs and log_likelihood of gauss_newton need a posterior of plain arrays "
                "(stochgrad.federated.posterior), not a numpyro model."
            )
        of = lambda p: evaluate("outputs", outputs, p, batch)
        f, pushed = jax.jvp(of, (position,), (v,))

        def score(f):
            values = lambda f: evaluate("log_likelihood", log_likelihood, f, batch)
            return jax.grad(lambda f: jnp.sum(weight_of_rows(batch) * values(f)))(f)

        bent = jax.jvp(score, (f,), (pushed,))[1]
        (pulled,) = jax.vjp(of, position)[1](-bent)
        return pulled

    return lambda posterior: Curvature(product)


CURVATURES: dict[str, Callable[[Posterior], Curvature]] = {"hessian": hessian, "fisher": fisher}


def as_curvature(kind: Any, posterior: Posterior) -> Curvature:
    """A curvature by its name, or by a function of the posterior as ``gauss_newton`` makes it."""
    wanted = f"one of {list(CURVATURES)}, or what stochgrad.federated.gauss_newton(...) makes"
    if isinstance(kind, str):
        if kind not in CURVATURES:
            raise ValueError(f"curvature must be {wanted}, got {kind!r}.")
        return CURVATURES[kind](posterior)
    if isinstance(kind, type) or not callable(kind):
        raise TypeError(f"curvature must be {wanted}, got {describe(kind)}.")
    try:
        made = kind(posterior)
    except Exception as error:
        raise ValueError(f"curvature fails on the posterior: {first_line(error)}.") from error
    return check_instance("curvature", made, Curvature, wanted)


def check_form(form: str) -> None:
    """Raise a ValueError unless the form is known."""
    check_choice("form", form, get_args(Form))


def precisions(
    posterior: Posterior, curvature: Curvature, at: Any, form: str, rank: int
) -> Precision:
    """The curvature of each client's log likelihood, in some form.

    Args:
        posterior: A posterior of data that clients own.
        curvature: What kind.
        at: ``client -> position``.
        form: Of which form.
        rank: Of what rank, if that is a low one.
    """
    if form == "full":
        return Full(
            for_each_client(posterior, lambda s: curvature_matrix(posterior, curvature, s, at(s)))
        )
    if form == "diagonal":
        return Diagonal(
            for_each_client(posterior, lambda s: curvature_diagonal(posterior, curvature, s, at(s)))
        )
    return LowRank(
        *for_each_client(posterior, lambda s: _low_rank(posterior, curvature, s, at(s), rank))
    )


def _flat_product(posterior, curvature, client, position):
    flat, unravel = ravel_pytree(position)
    product = likelihood_sum(posterior, curvature.product)

    def times(v):
        return ravel_pytree(product(client, position, unravel(v)))[0]

    return times, flat, unravel


def curvature_matrix(posterior, curvature, client, position):
    """A client's curvature as a matrix."""
    times, flat, _ = _flat_product(posterior, curvature, client, position)
    basis = jnp.eye(flat.size, dtype=flat.dtype)
    matrix = lax.map(times, basis, batch_size=min(_TOGETHER, flat.size))
    return (matrix + matrix.T) / 2


def curvature_diagonal(posterior, curvature, client, position):
    """The diagonal of a client's curvature: a position; by random probes beyond 500 dimensions."""
    if curvature.diagonal is not None:
        return likelihood_sum(posterior, curvature.diagonal)(client, position)
    times, flat, unravel = _flat_product(posterior, curvature, client, position)
    if flat.size <= _EXACT_DIMENSION:
        numbers = jnp.arange(flat.size)
        unit = lambda i: times(jnp.zeros_like(flat).at[i].set(1))[i]
        return unravel(lax.map(unit, numbers, batch_size=min(_TOGETHER, flat.size)))
    signs = jax.random.rademacher(jax.random.key(0), (_PROBES, flat.size), flat.dtype)
    return unravel(jnp.mean(lax.map(lambda z: z * times(z), signs, batch_size=_TOGETHER), axis=0))


def _low_rank(posterior, curvature, client, position, rank):
    times, flat, _ = _flat_product(posterior, curvature, client, position)
    block = partial(lax.map, times)
    width = min(rank + _MORE, tree_size(position))
    start = jax.random.normal(jax.random.key(0), (width, flat.size), flat.dtype)

    def orthonormal(rows):
        return jnp.linalg.qr(rows.T)[0].T

    q = lax.fori_loop(0, _ITERATIONS, lambda _, q: orthonormal(block(q)), orthonormal(start))
    small = block(q) @ q.T
    values, vectors = jnp.linalg.eigh((small + small.T) / 2)
    largest = jnp.argsort(-jnp.abs(values))[:rank]
    values, factors = values[largest], vectors.T[largest] @ q
    diagonal = ravel_pytree(curvature_diagonal(posterior, curvature, client, position))[0]
    rest = jnp.maximum(diagonal - jnp.einsum("r,rd,rd->d", values, factors, factors), 0)
    return factors, values, rest


def extreme_eigenvalues(
    times: Callable[[np.ndarray], np.ndarray], size: int
) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of a symmetric matrix, by products with vectors."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    if size <= 32:
        matrix = np.stack([times(e) for e in np.eye(size, dtype=np.float32)])
        values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        return float(values[0]), float(values[-1])
    operator = LinearOperator((size, size), matvec=times, dtype=np.float32)  # pyright: ignore

    def extreme(which):
        start = np.random.default_rng(0).normal(size=size).astype(np.float32)
        solve: Any = partial(eigsh, operator, 1, which=which, v0=start)
        try:
            return float(solve(tol=1e-2, maxiter=30)[0][0])
        except ArpackNoConvergence:
            return float(solve(tol=0.3, maxiter=300)[0][0])

    return extreme("SA"), extreme("LA")
