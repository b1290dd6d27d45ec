"""Networks in a directory: arrays by name, and a JSON that says what they are."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import by_name, check_callable, check_path, check_position, first_line
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
        arrays = {key: np.asarray(value[:]) for key, value in by_name(tree).items()}
        notes[name] = {key: [str(x.dtype), list(x.shape)] for key, x in arrays.items()}
        plain = {
            k: x.view(f"u{x.itemsize}") if x.dtype.kind == "V" else x for k, x in arrays.items()
        }
        with open(path / _ARRAYS[name], "wb") as file:
            np.savez(file, allow_pickle=False, **plain)
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
        files = {name: np.load(path / file) for name, file in _ARRAYS.items()}
        held = {name: {k: file[k] for k in file.files} for name, file in files.items()}
    except Exception as error:
        raise ValueError(f"path {path} holds no networks: {first_line(error)}.") from error
    if notes.get("format") != _FORMAT:
        raise ValueError(
            f"path {path} holds networks in format {notes.get('format')}, and this version reads "
            f"{_FORMAT}."
        )
    trees = {}
    for name, arrays in held.items():
        known = notes[name]
        noise = {k.removeprefix("noise."): None for k in known if k.startswith("noise.")}
        like = {"params": params, "noise": dict.fromkeys(noise, np.zeros(()))}
        names = list(by_name(like))
        if set(names) != set(known):
            odd = sorted(set(names) ^ set(known))[0]
            raise ValueError(
                f"params must have the leaves of the networks that were saved, {sorted(known)}, "
                f"and differ in {odd}."
            )
        leaves = []
        for key, leaf in zip(names, jax.tree.leaves(like), strict=True):
            dtype, shape = known[key]
            own = np.shape(leaf)
            if key.startswith("params.") or key == "params":
                lead = shape[: len(shape) - len(own)]
                if tuple(shape[len(lead) :]) != own:
                    raise ValueError(
                        f"params must fit: {key} has shape {own}, and {tuple(shape)} was saved."
                    )
            array = arrays[key]
            leaves.append(array if str(array.dtype) == dtype else array.view(jnp.dtype(dtype)))
        trees[name] = jax.tree.unflatten(jax.tree.structure(like), leaves)
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
