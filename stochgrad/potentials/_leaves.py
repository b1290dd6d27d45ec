"""Some of a network's weights: the last layer, the readouts, what is added to a frozen trunk."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from stochgrad.core import by_name, check_callable, check_position, first_line


def chosen_leaves(name: str, where: Callable[[str], bool], params: PyTree) -> list[bool]:
    """Which leaves a predicate on names chooses, in their order.

    Raises:
        TypeError: it returns no boolean.
        ValueError: it fails, or chooses none of the leaves or all of them.
    """
    names = list(by_name(params))
    chosen = []
    for leaf in names:
        try:
            answer = where(leaf)
        except Exception as error:
            raise ValueError(f"{name} fails on {leaf!r}: {first_line(error)}.") from error
        if not isinstance(answer, bool | np.bool_):
            raise TypeError(f"{name} must return True or False, got {answer!r} for {leaf!r}.")
        chosen.append(bool(answer))
    if not any(chosen) or all(chosen):
        raise ValueError(f"{name} must choose some of the weights, and not all, of {names}.")
    return chosen


def split_leaves(params: PyTree, chosen: list[bool]) -> tuple[list[Array], Callable]:
    """The chosen leaves, and a function that puts others in their place."""
    leaves, structure = jax.tree.flatten(params)
    own = [x for x, yes in zip(leaves, chosen, strict=True) if yes]

    def join(replaced):
        rest = iter(replaced)
        both = zip(leaves, chosen, strict=True)
        return jax.tree.unflatten(structure, [next(rest) if yes else x for x, yes in both])

    return own, join


def freeze(
    energy_fn: Callable[..., Any], params: PyTree, where: Callable[[str], bool]
) -> tuple[Callable[..., Any], dict[str, Array]]:
    """An energy function of some of its weights, the others fixed as they are.

    What is left is trained, sampled, predicted with and saved as any network is; gradients are
    taken by it alone, and frozen weights are stored once for all networks.

    Args:
        energy_fn: ``(params, positions, **graph) -> scalar``.
        params: Weights of one network: a pretrained one.
        where: ``name -> bool``, whether a leaf is left free; names are paths, ``readout.w``.

    Returns:
        The energy function, ``(free, positions, **graph) -> scalar``, and the free weights by name,
        at their values in ``params``: ``init`` of ``force_matching``.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: ``where`` fails, or leaves no weights free, or all.

    Example:
        >>> import jax.numpy as jnp, stochgrad
        >>> energy = lambda p, r: jnp.sum(jnp.tanh(r @ p["trunk"]) @ p["readout"])
        >>> params = {"trunk": jnp.ones((3, 4)), "readout": jnp.ones(4)}
        >>> own, free = stochgrad.potentials.freeze(energy, params, lambda name: name == "readout")
        >>> {name: x.shape for name, x in free.items()}
        {'readout': (4,)}
        >>> float(own({"readout": jnp.zeros(4)}, jnp.ones((5, 3))))
        0.0
    """
    check_callable("energy_fn", energy_fn, "a function (params, positions, **graph) -> scalar")
    check_callable("where", where, "a function name -> bool")
    check_position(params, "params")
    params = jax.tree.map(jnp.asarray, params)
    chosen = chosen_leaves("where", where, params)
    own, join = split_leaves(params, chosen)
    names = [name for name, yes in zip(by_name(params), chosen, strict=True) if yes]

    def energy(free, positions, **graph):
        return energy_fn(join([free[name] for name in names]), positions, **graph)

    return energy, dict(zip(names, own, strict=True))
