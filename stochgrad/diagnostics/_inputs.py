"""Draws of any origin: ours, or an object of ArviZ's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import Draws, Posterior


def finite(draws: Draws) -> Draws:
    """The draws, if all of them are finite; a ValueError if not."""
    if not draws.finite.all():
        raise ValueError("some draws are not finite: take draws.finite_chains() first.")
    return draws


def arrays_of(draws: Any) -> PyTree:
    """Arrays of shape (chain, draw, ...): the positions of draws, or an ArviZ object's variables.

    Raises:
        TypeError: it is neither.
        ValueError: some draws are not finite.
    """
    if isinstance(draws, Draws):
        return jax.tree.map(np.asarray, finite(draws).positions)  # read those of a store
    group = _group(draws)
    if group is None:
        raise TypeError(
            "draws must be stochgrad.Draws or an ArviZ object with a posterior group, "
            f"got {type(draws).__name__}."
        )
    values = {str(name): np.asarray(group[name].values) for name in group.data_vars}
    if not all(np.isfinite(value).all() for value in values.values()):
        raise ValueError("some draws are not finite: drop their chains first.")
    return values


def positions_of(draws: Any, posterior: Posterior | None) -> PyTree:
    """Positions, shape (chain, draw, ...), where the posterior's score can be taken.

    Args:
        draws: Draws of positions, or an ArviZ object. Its variables are taken for the entries of a
            dict, or for the position itself where ``x`` is the only one; those of a numpyro model
            are brought back to unconstrained space.
        posterior: The posterior, if there is one.

    Raises:
        TypeError, ValueError: as ``arrays_of`` does; or the draws were made by a ``collect`` of the
            caller's.
    """
    values = arrays_of(draws)
    if isinstance(draws, Draws):
        if draws.collected:
            raise ValueError("draws of positions are needed, not those of a collect function.")
        return values
    if posterior is not None and posterior.unconstrain is not None:
        back = jax.jit(jax.vmap(jax.vmap(posterior.unconstrain)))
        return jax.tree.map(np.asarray, back(jax.tree.map(jnp.asarray, values)))
    return values["x"] if set(values) == {"x"} else values


def flattened(positions: PyTree) -> np.ndarray:
    """Positions as one matrix of shape (chain * draw, d)."""
    leaves = jax.tree.leaves(positions)
    count = leaves[0].shape[0] * leaves[0].shape[1]
    return np.concatenate([np.asarray(x).reshape(count, -1) for x in leaves], axis=1)


def _group(draws: Any) -> Any:
    try:
        group = draws["posterior"]
    except (KeyError, TypeError, IndexError):
        return None
    group = getattr(group, "dataset", group)
    return group if hasattr(group, "data_vars") else None
