"""Some leaves of a tree, by their names: what is trained, sampled or measured, and what is not."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core._checks import first_line
from stochgrad.core._datatree import by_name


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


def split_leaves(params: PyTree, chosen: list[bool]) -> tuple[list[Any], Callable]:
    """The chosen leaves, and a function that puts others in their place."""
    leaves, structure = jax.tree.flatten(params)
    own = [x for x, yes in zip(leaves, chosen, strict=True) if yes]

    def join(replaced):
        rest = iter(replaced)
        both = zip(leaves, chosen, strict=True)
        return jax.tree.unflatten(structure, [next(rest) if yes else x for x, yes in both])

    return own, join
