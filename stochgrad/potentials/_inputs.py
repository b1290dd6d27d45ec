"""Checks of weights, energy functions and their further arrays, in one place."""

import re
import warnings
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import (
    PrecisionWarning,
    check_array,
    check_callable,
    check_finite,
    check_instance,
    describe,
    first_line,
)
from stochgrad.potentials._configurations import Configurations
from stochgrad.potentials._data_checks import holds_booleans

_LISTS = re.compile("neigh|edge|sender|receiver|pair|index|idx|shift|image|triplet", re.IGNORECASE)
"""Names that arrays of a neighbor list go by."""


def check_configurations(name: str, value: Any) -> Configurations:
    """The value, if it is configurations."""
    wanted = "configurations, as stochgrad.potentials.configurations makes them"
    return check_instance(name, value, Configurations, wanted)


def check_networks(params: PyTree, *, axes: int = 1, name: str = "params") -> PyTree:
    """Weights of many networks as arrays, with one leading axis (or ``axes``) in common.

    Raises:
        TypeError: a leaf is no array of numbers.
        ValueError: there are none, they are not finite, or their leading axes differ.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    if not leaves:
        raise ValueError(f"{name} must hold at least one array, got an empty tree.")
    arrays = []
    for path, leaf in leaves:
        where = name + jax.tree_util.keystr(path)
        numeric = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.number)
        array = leaf if numeric else check_array(where, leaf, finite=False)
        if array.ndim:
            check_finite(where, array)
        arrays.append(array)
    leads = {array.shape[:axes] for array in arrays}
    if len(leads) != 1 or len(next(iter(leads))) < axes or 0 in next(iter(leads)):
        wanted = "one leading axis of networks" if axes == 1 else "leading axes of chains and draws"
        raise ValueError(
            f"{name} must have {wanted}, got axes {leads}"
            + ("; for one network, add an axis of one." if axes == 1 else ".")
        )
    return jax.tree.unflatten(structure, arrays)


def check_energy(
    energy_fn: Callable[..., Any], params: PyTree, positions: Any, graph: dict[str, Any]
) -> Any:
    """The type of the energy of one network and one frame.

    Raises:
        TypeError: the energy function is none.
        ValueError: it fails on these, or returns no scalar.
    """
    check_callable("energy_fn", energy_fn, "a function (params, positions, **graph) -> scalar")
    if isinstance(energy_fn, type):
        raise TypeError(f"energy_fn must be a function, got {describe(energy_fn)}.")
    try:
        hash(energy_fn)
    except TypeError as error:
        raise TypeError(
            "energy_fn must be hashable, so that nothing compiles twice: wrap it in a function, "
            "and hand its arrays over as params."
        ) from error
    try:
        out = jax.eval_shape(lambda p, r, g: energy_fn(p, r, **g), params, positions, graph)
    except Exception as error:
        raise ValueError(
            f"energy_fn fails on positions of shape {jnp.shape(positions)} with {sorted(graph)}: "
            f"{first_line(error)}."
        ) from error
    dtype = getattr(out, "dtype", None)
    if dtype is None or out.shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"energy_fn must return a scalar, a floating-point number, got {out}.")
    return dtype


def with_box(energy_fn: Callable[..., Any], graph: dict[str, Any]) -> dict[str, Any]:
    """The further arrays of dynamics, without a box that is None.

    Raises:
        ValueError: a box is left out that the energy function knows of, and boundaries would be
            open without a word.
    """
    if "box" in graph:
        return {k: v for k, v in graph.items() if k != "box" or v is not None}
    try:
        known = "box" in signature(energy_fn).parameters
    except (TypeError, ValueError):
        known = False
    if known or "box" in getattr(energy_fn, "inputs", ()):
        raise ValueError(
            "box is missing, which energy_fn takes: give box=..., or box=None for open boundaries."
        )
    return graph


def check_graph(graph: dict[str, Any]) -> dict[str, Any]:
    """What an energy function takes by name, as arrays.

    Raises:
        TypeError: a value is no array of numbers or booleans.
        ValueError: a number is NaN.
    """
    arrays = {}
    for name, value in graph.items():
        array = graph_array(name, value)
        if jnp.issubdtype(array.dtype, jnp.floating) and np.isnan(array).any():
            raise ValueError(f"{name} must be finite, but holds NaN.")
        arrays[name] = array
    return arrays


def graph_array(name: str, value: Any) -> Any:
    """One array that an energy function takes, of numbers or booleans."""
    if isinstance(value, jax.Array) and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return value
    kind = "boolean" if holds_booleans(value) else "number"
    return check_array(name, value, kind=kind, finite=False)


def check_static(static: Any, graph: dict[str, Any], atoms: int | None) -> None:
    """Raise unless ``static`` names arrays, and where an array looks like a neighbor list.

    Numbers of each atom (shape ``(atoms,)``) and scalars stay what they are as atoms move. Integers
    and booleans of any other shape, and vectors that bear a neighbor list's name, belong to one
    frame, unless named in ``static``. Shapes are looked at once the number of atoms is known.
    """
    if isinstance(static, str) or not isinstance(static, Iterable):
        raise TypeError(f'static must be names in a tuple, ("bonds",), got {describe(static)}.')
    names = list(static)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f'static must be names in a tuple, ("bonds",), got {describe(static)}.')
    unknown = [name for name in names if name not in graph]
    if unknown:
        raise ValueError(
            f"static must name arrays for energy_fn, {sorted(graph)}, got {describe(unknown[0])}."
        )
    for name, array in graph.items():
        if atoms is None or name in names or name in ("species", "box"):
            continue
        discrete = array.dtype.kind in "iub"
        own = np.ndim(array) == 0 or np.shape(array) == (atoms,)
        named = bool(_LISTS.search(name)) and np.ndim(array) >= (1 if discrete else 2)
        if named or (discrete and not own):
            raise ValueError(
                f"{name} looks like a list of neighbors, {describe(array)}: it would stay that of "
                "the first frame while atoms move; let energy_fn take neighbors, which follow the "
                f'atoms with cutoff=..., or pass static=("{name}",) if it holds for every frame, '
                "as bonds do."
            )


def check_frame_inputs(graph: dict[str, Any], atoms: int, dim: int) -> None:
    """Raise unless species, box and mask are those of one frame, and every atom is there."""
    shapes = {"species": [(atoms,)], "mask": [(atoms,)], "box": [(dim,), (dim, dim)]}
    for name, wanted in shapes.items():
        if name in graph and np.shape(graph[name]) not in wanted:
            listed = " or ".join(map(str, wanted))
            raise ValueError(
                f"{name} must have shape {listed}, one for all frames, got {np.shape(graph[name])}."
            )
    if "species" in graph and graph["species"].dtype.kind not in "iu":
        raise TypeError(f"species must be integers, got {describe(graph['species'])}.")
    if "box" in graph:
        check_box(graph["box"])
    absent = np.flatnonzero(~np.asarray(graph.get("mask", True), bool).reshape(-1))
    if len(absent):
        raise ValueError(
            f"mask leaves out atom {absent[0]} of every frame: drop padding from the positions "
            "(and what else is of each atom), for it would move and be counted by observables."
        )


def check_box(box: Any) -> None:
    """Raise unless edge lengths are positive, or lattice vectors span a positive volume."""
    values = np.asarray(box, np.float64)
    if not np.all(np.isfinite(values)):
        raise ValueError(f"box must be finite, got {values}.")
    if values.ndim == 1 and np.any(values <= 0):
        raise ValueError(f"box must have positive edges, got {values.min():g}.")
    if values.ndim > 1 and np.any(np.linalg.det(values) <= 0):
        raise ValueError("box must have lattice vectors that span a positive volume.")


def warn_of_rounding(
    energies: Any, dtype: Any, scale: Any, what: str, remedy: str, stacklevel: int
) -> None:
    """Warn where the spacing of numbers at a total energy exceeds a tenth of what is to be told.

    Args:
        energies: Total energies.
        dtype: What they are computed in.
        scale: What differences of energies matter, of each.
        what: What that is called.
        remedy: What to do about it.
        stacklevel: As of ``warnings.warn``.
    """
    size = np.abs(np.asarray(energies, np.float64))
    size = np.where(np.isfinite(size) & (size > 0), size, np.finfo(np.float64).tiny)
    spacing = float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(size))
    share = spacing / np.broadcast_to(np.asarray(scale, np.float64), spacing.shape)
    if not share.size or share.max() <= 0.1:
        return
    worst = np.unravel_index(np.argmax(share), share.shape)
    warnings.warn(
        f"total energies of {size[worst]:.3g} are {spacing[worst]:.2g} apart in {dtype}, which is "
        f"{share[worst]:.2g} of {what}: {remedy}, or set jax_enable_x64.",
        PrecisionWarning,
        stacklevel=stacklevel + 1,
    )
