"""What a client computes of its own data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from stochgrad.core import Position, Posterior


def hessian_product(posterior: Posterior) -> Callable[[Position, Position, Any], Position]:
    r"""``(position, v, batch) -> -\nabla^2\log\pi\,v``."""

    def product(position, v, batch):
        def score(position):
            return jax.grad(posterior.log_density)(position, batch)

        bent = jax.jvp(score, (position,), (v,))[1]
        return jax.tree.map(jnp.negative, bent)

    return product


def row_scores(posterior: Posterior) -> Callable[[Position, Any], Array]:
    """``(position, batch) -> (rows, d)``: the gradient of each row's log likelihood.

    A log density is affine in the rows' weights: its derivative by a weight is the row's own log
    likelihood.
    """

    def of_rows(position, batch):
        weights, put = _weights(batch)
        return jax.grad(lambda w: posterior.log_density(position, put(w)))(jnp.ones_like(weights))

    def scores(position, batch):
        flat, unravel = ravel_pytree(position)
        by_position = jax.jacrev(lambda x: of_rows(unravel(x), batch))
        return by_position(flat)

    return scores


def _weights(batch: Any) -> tuple[Array, Callable[[Array], Any]]:
    """The weights of a batch's rows, and how to give it others."""
    if hasattr(batch, "weight"):
        return batch.weight, lambda w: batch._replace(weight=w)
    ((name, rows),) = batch.items()
    return rows.weight, lambda w: {name: rows._replace(weight=w)}


def row_weights(batch: Any) -> Array:
    """How much each row counts for."""
    return _weights(batch)[0]


def with_weights(batch: Any, weights: Array) -> Any:
    """The batch with other weights."""
    return _weights(batch)[1](weights)


def weight_of_rows(batch: Any) -> Array:
    """One for a row, zero for padding."""
    return jnp.sign(_weights(batch)[0])
