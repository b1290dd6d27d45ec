"""Checks of what the functions of this package have in common."""

from typing import Any

import jax
import jax.numpy as jnp

from stochgrad.core import Position, Posterior, check_instance, check_position, describe, first_line
from stochgrad.federated._clients import require_clients
from stochgrad.federated._conducive import check_surrogates_fit
from stochgrad.federated._gaussians import Surrogates

WANTED = (
    "a Posterior of data that clients own, from stochgrad.federated.posterior or "
    "stochgrad.from_numpyro(model, clients=[...])"
)


def check_federated(posterior: Any) -> Posterior:
    """The posterior, or a TypeError unless its data are those of clients."""
    check_instance("posterior", posterior, Posterior, WANTED)
    require_clients(posterior)
    return posterior


def check_surrogates(posterior: Posterior, surrogates: Any) -> Surrogates:
    """The surrogates, or an error unless they are whole and of a posterior's clients."""
    return check_surrogates_fit(surrogates, require_clients(posterior).count)


def as_reference(posterior: Posterior, reference: Any, name: str = "reference") -> Position:
    """A position, or what has one, as arrays; an error unless it fits the model."""
    position = getattr(reference, "position", reference)
    if position is None or callable(position):
        raise TypeError(
            f"{name} must be a position, or what stochgrad.federated.find_reference returned, got "
            f"{describe(reference)}."
        )
    check_position(position, name)
    position = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), position)
    reason = misfit(posterior, position)
    if reason:
        raise ValueError(f"{name} does not fit the model: {reason}.")
    return position


def misfit(posterior: Posterior, position: Position) -> str:
    """Why a position does not fit a model; nothing if it does."""
    shapes = jax.tree.map(jnp.shape, position)
    if posterior.initial is not None:
        wanted = jax.tree.map(jnp.shape, jax.eval_shape(posterior.initial, jax.random.key(0)))
        if shapes != wanted:
            return f"it has shapes {shapes}, the model's position has {wanted}"
        return ""
    batch = require_clients(posterior).at(0, 0, jnp.float32(1))
    try:
        jax.eval_shape(jax.grad(posterior.log_density), position, batch)
    except Exception as error:
        return first_line(error)
    return ""
