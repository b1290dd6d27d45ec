"""Gaussian approximations of the clients' likelihoods, as natural parameters."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from stochgrad.core import (
    Position,
    check_array,
    check_count,
    check_finite,
    check_instance,
    describe,
    tree_bytes,
    tree_dot,
)
from stochgrad.gradients import check_like


class Diagonal(NamedTuple):
    """Diagonal precisions, one for each client.

    Attributes:
        values: A tree of the position's structure, its arrays with a leading axis of clients.
    """

    values: PyTree[Float[Array, "clients ..."]]

    def times(self, client: Int[Array, ""], v: Position) -> Position:
        """The product of a client's precision with a vector."""
        return jax.tree.map(lambda p, x: p[client] * x, self.values, v)

    def conducive_parameters(self, shares: Float[np.ndarray, " clients"]) -> "Diagonal":
        r"""$\sum_t \Lambda_t - \Lambda_s / f_s$ for each client."""
        return Diagonal(jax.tree.map(lambda p: _conducive_parameters(p, shares), self.values))

    def total(self, v: Position) -> Position:
        r"""$\sum_t \Lambda_t v$."""
        return jax.tree.map(lambda p, x: jnp.sum(p, axis=0) * x, self.values, v)

    def scaled(self, by: Float[np.ndarray, " clients"]) -> "Diagonal":
        """Each client's precision times a number."""
        return Diagonal(jax.tree.map(lambda p: p * _each(by, p), self.values))


class Full(NamedTuple):
    """Full precision matrices over the raveled position, one for each client."""

    matrices: Float[Array, "clients d d"]

    def times(self, client: Int[Array, ""], v: Position) -> Position:
        return _flat(lambda x: self.matrices[client] @ x, v)

    def conducive_parameters(self, shares: Float[np.ndarray, " clients"]) -> "Full":
        return Full(_conducive_parameters(self.matrices, shares))

    def total(self, v: Position) -> Position:
        return _flat(lambda x: jnp.sum(self.matrices, axis=0) @ x, v)

    def scaled(self, by: Float[np.ndarray, " clients"]) -> "Full":
        return Full(self.matrices * _each(by, self.matrices))


class LowRank(NamedTuple):
    r"""Precisions $U_s^\top \operatorname{diag}(w_s) U_s + \operatorname{diag}(d_s)$.

    Attributes:
        factors: $U_s$, rows over the raveled position; or one matrix for all clients.
        values: $w_s$.
        diagonal: $d_s$.
    """

    factors: Float[Array, "clients rank d"] | Float[Array, "rank d"]
    values: Float[Array, "clients rank"]
    diagonal: Float[Array, "clients d"]

    def times(self, client: Int[Array, ""], v: Position) -> Position:
        factors = self.factors[client] if self.factors.ndim == 3 else self.factors

        def product(x):
            return (self.values[client] * (factors @ x)) @ factors + self.diagonal[client] * x

        return _flat(product, v)

    def conducive_parameters(
        self, shares: Float[np.ndarray, " clients"]
    ) -> "LowRank | TotalLessOwn":
        count, rank, d = self.factors.shape
        if count * rank >= d:
            return TotalLessOwn(self.matrix_of_all(), self.scaled(1 / shares))
        own = np.eye(count)[:, :, None] / shares[:, None, None]
        values = jnp.asarray(1 - own, self.values.dtype) * self.values[None]
        return LowRank(
            self.factors.reshape(count * rank, d),
            values.reshape(count, count * rank),
            _conducive_parameters(self.diagonal, shares),
        )

    def matrix_of_all(self) -> Float[Array, "d d"]:
        """The sum over clients as one matrix."""
        low = jnp.einsum("srd,sr,sre->de", self.factors, self.values, self.factors)
        return low + jnp.diag(jnp.sum(self.diagonal, axis=0))

    def total(self, v: Position) -> Position:
        def product(x):
            inside = jnp.einsum("srd,d->sr", self.factors, x) * self.values
            return jnp.einsum("srd,sr->d", self.factors, inside) + jnp.sum(self.diagonal, 0) * x

        return _flat(product, v)

    def scaled(self, by: Float[np.ndarray, " clients"]) -> "LowRank":
        return LowRank(
            self.factors,
            self.values * _each(by, self.values),
            self.diagonal * _each(by, self.values),
        )


class TotalLessOwn(NamedTuple):
    r"""$\sum_t \Lambda_t - \Lambda_s / f_s$ as one matrix for all, and each client's own part."""

    total: Float[Array, "d d"]
    own: LowRank

    def times(self, client: Int[Array, ""], v: Position) -> Position:
        """The product of a client's matrix with a vector."""
        all_ = _flat(lambda x: self.total @ x, v)
        return jax.tree.map(jnp.subtract, all_, self.own.times(client, v))


Precision: TypeAlias = Diagonal | Full | LowRank


class Surrogates(NamedTuple):
    r"""A Gaussian function for each client's likelihood, never for its posterior,

    $$\log q_s(\theta) = a_s^\top(\theta - \theta_0) -
      \tfrac12 (\theta - \theta_0)^\top \Lambda_s (\theta - \theta_0) + \text{const},$$

    with one origin $\theta_0$ for all clients. Natural parameters: products are sums, nothing is
    inverted, and a likelihood that is flat in some direction is as good as any other.

    Attributes:
        origin: $\theta_0$.
        slope: $a_s$, a tree of the position's structure with a leading axis of clients.
        precision: $\Lambda_s$, or None where all are zero.
    """

    origin: Position
    slope: PyTree[Float[Array, "clients ..."]]
    precision: Precision | None = None

    @property
    def count(self) -> int:
        """Number of clients."""
        check_surrogates(self)
        return len(jax.tree.leaves(self.slope)[0])

    @property
    def bytes_each(self) -> int:
        """Bytes of one client's parameters."""
        return tree_bytes((self.slope, self.precision)) // self.count

    def log_density(self, client: int | Int[Array, ""], position: Position) -> Array:
        r"""$\log q_s$, up to its constant."""
        self._check(client, position)
        return quadratic(self.slope, self.precision, client, self._from_origin(position))[0]

    def score(self, client: int | Int[Array, ""], position: Position) -> Position:
        r"""$\nabla\log q_s$."""
        self._check(client, position)
        return quadratic(self.slope, self.precision, client, self._from_origin(position))[1]

    def total_precision(self, v: Position) -> Position:
        r"""$\sum_s \Lambda_s v$."""
        check_surrogates(self)
        check_like("v", v, self.origin, "the surrogates' origin")
        return (
            jax.tree.map(jnp.zeros_like, v) if self.precision is None else self.precision.total(v)
        )

    def scaled(self, by: Any) -> "Surrogates":
        """With each client's precision times a number; the slopes at the origin stay."""
        by = check_array("by", by, shape=(self.count,))
        if self.precision is None:
            return self
        return self._replace(precision=self.precision.scaled(by))

    def _check(self, client, position):
        count = self.count
        if not isinstance(client, jax.Array | Tracer):
            check_count("client", client, least=0, most=count - 1)
        elif client.shape != () or not jnp.issubdtype(client.dtype, jnp.integer):
            raise TypeError(f"client must be one integer, got {describe(client)}.")
        elif not isinstance(client, Tracer):
            check_count("client", int(client), least=0, most=count - 1)
        check_like("position", position, self.origin, "the surrogates' origin")

    def _from_origin(self, position):
        return jax.tree.map(jnp.subtract, position, self.origin)


def check_surrogates(surrogates: Surrogates) -> None:
    """Raise unless origin, slopes and precisions have the structure and the shapes of each other.

    What is traced is looked at as well: shapes are known.
    """
    check_instance("surrogates", surrogates, Surrogates, "Surrogates of the clients' likelihoods")
    origin, slope, precision = surrogates
    leaves = jax.tree.leaves(slope)
    if not leaves or any(jnp.ndim(x) == 0 for x in leaves):
        raise ValueError("surrogates.slope must hold arrays with a leading axis of clients.")
    count, d = len(leaves[0]), sum(jnp.size(x) for x in jax.tree.leaves(origin))

    def of_clients(name, tree):
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *jnp.shape(x)), x.dtype), origin)
        check_like(name, tree, like, f"the origin, one for each of {count} clients")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            check_finite(name + jax.tree_util.keystr(path), leaf)

    def of_shape(name, array, *shapes):
        if not hasattr(array, "dtype") or jnp.shape(array) not in shapes:
            raise ValueError(f"{name} must have shape {shapes[0]}, got {describe(array)}.")
        check_finite(name, array)

    for path, leaf in jax.tree_util.tree_leaves_with_path(origin):
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            where = "surrogates.origin" + jax.tree_util.keystr(path)
            raise TypeError(f"{where} must be a floating-point array, got {describe(leaf)}.")
        if jnp.ndim(leaf):
            check_finite("surrogates.origin" + jax.tree_util.keystr(path), leaf)
    of_clients("surrogates.slope", slope)
    if isinstance(precision, Diagonal):
        of_clients("surrogates.precision", precision.values)
    elif isinstance(precision, Full):
        of_shape("surrogates.precision", precision.matrices, (count, d, d))
    elif isinstance(precision, LowRank):
        rank = jnp.shape(precision.values)[-1] if jnp.ndim(precision.values) else 0
        shapes = ((count, rank, d), (rank, d))
        of_shape("surrogates.precision.factors", precision.factors, *shapes)
        of_shape("surrogates.precision.values", precision.values, (count, rank))
        of_shape("surrogates.precision.diagonal", precision.diagonal, (count, d))
    elif precision is not None:
        raise TypeError(
            "surrogates.precision must be Diagonal, Full, LowRank or None, got "
            f"{describe(precision)}."
        )


def quadratic(slope: PyTree, precision: Precision | None, client: Any, delta: Position) -> tuple:
    r"""$a_s^\top\delta - \frac12\delta^\top\Lambda_s\delta$ and its gradient."""
    a = jax.tree.map(lambda x: x[client], slope)
    if precision is None:
        return tree_dot(a, delta), a
    g = jax.tree.map(jnp.subtract, a, precision.times(client, delta))
    return tree_dot(jax.tree.map(lambda a, g: (a + g) / 2, a, g), delta), g


def conducive_parameters(
    surrogates: Surrogates, shares: Float[np.ndarray, " clients"]
) -> tuple[PyTree, Any]:
    r"""Slopes and precisions of $\log q - \log q_s / f_s$ for each client, with $q = \prod q_t$."""
    slope = jax.tree.map(lambda a: _conducive_parameters(a, shares), surrogates.slope)
    precision = surrogates.precision
    return slope, None if precision is None else precision.conducive_parameters(shares)


def _conducive_parameters(of_each: Array, shares: np.ndarray) -> Array:
    # in double precision where it is there to be had: the sum over clients has to vanish
    x = np.asarray(of_each, np.float64)
    return jnp.asarray(x.sum(axis=0) - x / _each(shares, x), of_each.dtype)


def _each(by: np.ndarray, like: Any) -> Any:
    by = np.asarray(by).reshape(-1, *(1,) * (like.ndim - 1))
    return by if isinstance(like, np.ndarray) else jnp.asarray(by, like.dtype)


def _flat(product, v: Position) -> Position:
    flat, unravel = ravel_pytree(v)
    return unravel(product(flat))
