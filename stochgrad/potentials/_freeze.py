"""A network whose trunk is fixed: the energy as a function of some of its weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from stochgrad.core import by_name, check_callable, check_position, chosen_leaves, split_leaves


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
