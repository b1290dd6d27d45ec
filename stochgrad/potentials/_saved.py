"""Networks in a directory: arrays by name, and a JSON that says what they are."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import (
    by_name,
    check_callable,
    check_path,
    check_position,
    first_line,
    load_tree,
    save_tree,
)
from stochgrad.potentials._potential import Potential

_FORMAT = 1
_NOTES, _ARRAYS = "networks.json", {"positions": "positions.npz", "trained": "trained.npz"}


def save_networks(path: Any, positions: PyTree, trained: PyTree, method: str, potential: Any):
    """Write what ``load_saved`` reads."""
    path = check_path("path", path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"path must be a directory, got the file {path}.")
    if path.exists() and any(path.iterdir()) and not (path / _NOTES).exists():
        raise ValueError(f"path must be a new directory, or one of networks, got {path}.")
    path.mkdir(parents=True, exist_ok=True)
    notes: dict[str, Any] = {"format": _FORMAT, "method": method}
    if isinstance(potential, Potential):
        references = potential.reference_energies
        notes |= {
            "inputs": list(potential.inputs),
            "elements": None if potential.elements is None else list(potential.elements),
            "reference_energies": None if references is None else list(references),
            "cutoff": potential.cutoff,
            "lengths": bool(potential.lengths),
        }
    for name, tree in (("positions", positions), ("trained", trained)):
        arrays = jax.tree.map(lambda x: np.asarray(x[:]), tree)
        notes[name] = {k: [str(x.dtype), list(x.shape)] for k, x in by_name(arrays).items()}
        save_tree(path / _ARRAYS[name], arrays, {})
    (path / _NOTES).write_text(json.dumps(notes, indent=1) + "\n")


def load_saved(path: Any, energy_fn: Callable[..., Any], params: PyTree):
    """Positions, trained networks, method and potential of a directory.

    Raises:
        ValueError: there are no networks, they are damaged, or of other weights than ``params``.
    """
    path = check_path("path", path)
    check_callable("energy_fn", energy_fn, "a function (params, positions, **graph) -> scalar")
    check_position(params, "params")
    try:
        notes = json.loads((path / _NOTES).read_text())
    except Exception as error:
        raise ValueError(f"path {path} holds no networks: {first_line(error)}.") from error
    if notes.get("format") != _FORMAT:
        raise ValueError(
            f"path {path} holds networks in format {notes.get('format')}, and this version reads "
            f"{_FORMAT}."
        )
    trees = {}
    for name, file in _ARRAYS.items():
        known = notes[name]
        noise = [key.removeprefix("noise.") for key in known if key.startswith("noise.")]
        like = {"params": params, "noise": dict.fromkeys(noise, np.zeros(()))}
        names = list(by_name(like))
        if set(names) != set(known):
            odd = sorted(set(names) ^ set(known))[0]
            raise ValueError(
                f"params must have the leaves of the networks that were saved, {sorted(known)}, "
                f"and differ in {odd}."
            )
        saved = []
        for key, leaf in zip(names, jax.tree.leaves(like), strict=True):
            dtype, shape = known[key]
            own = np.shape(leaf)
            if not key.startswith("noise.") and tuple(shape[len(shape) - len(own) :]) != own:
                raise ValueError(
                    f"params must fit: {key} has shape {own}, and {tuple(shape)} was saved."
                )
            saved.append(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
        as_saved = jax.tree.unflatten(jax.tree.structure(like), saved)
        try:
            trees[name] = load_tree(path / file, as_saved)
        except ValueError as error:
            raise ValueError(f"path {path} holds no networks: {first_line(error)}.") from error
    references = notes.get("reference_energies")
    elements = notes.get("elements")
    potential = Potential(
        energy_fn,
        tuple(notes.get("inputs", ())),
        None if elements is None else tuple(elements),
        None if references is None else tuple(references),
        notes.get("cutoff"),
        bool(notes.get("lengths", False)),
    )
    return trees["positions"], trees["trained"], notes["method"], potential
