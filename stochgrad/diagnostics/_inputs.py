"""Draws of any origin: ours, or an object of ArviZ's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import (
    Draws,
    Gradient,
    Posterior,
    check_array,
    describe,
    first_line,
    resident_block,
)
from stochgrad.gradients import as_gradient


def finite(draws: Draws) -> Draws:
    """The draws, if all of them are finite; a ValueError if not."""
    if not draws.finite.all():
        raise ValueError("some draws are not finite: take draws.finite_chains() first.")
    return draws


def arrays_of(draws: Any) -> PyTree:
    """Arrays of shape (chain, draw, ...): the positions of draws, or an ArviZ object's variables.

    Raises:
        TypeError: it is neither.
        ValueError: some draws are not finite, there are none, or they were summed up.
    """
    if isinstance(draws, Draws):
        if not jax.tree.leaves(draws.positions):
            raise ValueError("draws hold no positions: they were summed up as they came.")
        arrays = jax.tree.map(np.asarray, finite(draws).positions)  # read those of a store
        _refuse_none(arrays)
        return arrays
    group = _group(draws)
    if group is None:
        raise TypeError(
            "draws must be stochgrad.Draws or an ArviZ object with a posterior group, "
            f"got {describe(draws)}."
        )
    values = {
        str(name): check_array(f"draws[{name!r}]", group[name].values, finite=False)
        for name in group.data_vars
    }
    _refuse_none(values)
    if not all(np.isfinite(value).all() for value in values.values()):
        raise ValueError("some draws are not finite: drop their chains first.")
    return values


def _refuse_none(arrays: PyTree) -> None:
    shapes = [np.shape(x) for x in jax.tree.leaves(arrays)]
    if not shapes or any(len(shape) < 2 or 0 in shape[:2] for shape in shapes):
        raise ValueError(f"draws must hold arrays of (chain, draw, ...), not empty, got {shapes}.")


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
        try:
            return jax.tree.map(np.asarray, back(jax.tree.map(jnp.asarray, values)))
        except Exception as error:
            raise ValueError(
                f"draws of {sorted(values)} do not fit the target's model: {first_line(error)}."
            ) from error
    return values["x"] if set(values) == {"x"} else values


def gradient_of(target: Any) -> Gradient:
    """The gradient of a target, a posterior or a gradient."""
    if not isinstance(target, Posterior | Gradient):
        raise TypeError(f"target must be a posterior or a gradient, got {describe(target)}.")
    return as_gradient(target)


def check_fit(gradient: Gradient, positions: PyTree) -> None:
    """Raise unless the target's score can be taken at a draw, and has the draw's structure."""
    example = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[2:], jnp.result_type(x)), positions
    )

    def score_at(key, position):
        score, _ = gradient.next(key, position, gradient.init(key, position))
        return score(position)[1]

    try:
        with resident_block(gradient.posterior):
            found = jax.eval_shape(score_at, jax.random.key(0), example)
    except Exception as error:
        shapes = jax.tree.map(lambda x: x.shape, example)
        raise ValueError(
            f"target does not fit the draws, of shapes {shapes}: {first_line(error)}."
        ) from error
    if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, example):
        raise ValueError("target has scores of other shapes than the draws.")


def flattened(positions: PyTree) -> np.ndarray:
    """Positions as one matrix of shape (chain * draw, d)."""
    leaves = jax.tree.leaves(positions)
    count = leaves[0].shape[0] * leaves[0].shape[1]
    return np.concatenate([np.asarray(x).reshape(count, -1) for x in leaves], axis=1)


def _group(draws: Any) -> Any:
    try:
        group = draws["posterior"]
    except Exception:  # of whatever kind: it is no such object
        return None
    group = getattr(group, "dataset", group)
    return group if hasattr(group, "data_vars") else None
