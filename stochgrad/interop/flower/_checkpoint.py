"""The file that a federated run over a network goes on from."""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import CheckpointWarning, load_notes, load_tree, save_tree
from stochgrad.interop.flower._choice import Choice
from stochgrad.interop.flower._likelihoods import Likelihoods
from stochgrad.interop.flower._network import Network
from stochgrad.interop.flower._protocol import sum_shapes
from stochgrad.interop.flower._renewal import Anchors, anchor_shapes
from stochgrad.interop.flower._visits import Chain


def save_run(
    path: Path,
    identity: dict,
    network: Network,
    likelihoods: Likelihoods,
    choice: Choice,
    chains: list[Chain],
    anchors: Anchors | None = None,
) -> None:
    """Write all that the run needs to go on; a full disk costs a warning, not the run."""
    notes = {
        "run": identity,
        "clients": [c.clients for c in chains],
        "minibatches": [c.minibatches for c in chains],
        "rows": network.rows,
        "gone": network.gone,
        "setup": likelihoods.setup_bytes.tolist(),
        "scales": likelihoods.scales.tolist(),
        "choice": choice._asdict(),
    }
    join = lambda *parts: np.concatenate(parts)
    tree = {
        "reference": likelihoods.reference,
        "total": likelihoods.total,
        "own": (likelihoods.values, likelihoods.slopes),
        "chains": [(c.state, jax.tree.map(join, *c.draws)) for c in chains if c.clients],
    }
    if anchors is not None:
        notes["anchors"] = {"visits": anchors.visits, "kept": anchors.kept}
        tree["anchors"] = (anchors.positions, anchors.slopes)
    try:
        save_tree(path, tree, notes)
    except OSError as error:
        warnings.warn(
            f"the checkpoint at {path} could not be written: {error.strerror or error}. The "
            "run goes on; the last checkpoint stays as it is.",
            CheckpointWarning,
            stacklevel=4,
        )


def load_run_notes(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run.

    Raises:
        ValueError: the file is not a checkpoint of such a run.
    """
    try:
        notes = load_notes(path)
    except Exception as error:
        raise ValueError(
            f"checkpoint={str(path)!r} is no file that a run of stochgrad.flower.federate wrote: "
            "name another one, or remove it."
        ) from error
    needed = {"run", "clients", "minibatches", "rows", "choice"}
    if not isinstance(notes, dict) or not needed <= set(notes):
        raise ValueError(
            f"checkpoint={str(path)!r} holds something other than a run of this version of "
            "stochgrad.flower.federate: name another file, or remove it."
        )
    return notes


def load_run(
    path: Path,
    notes: dict[str, Any],
    position: PyTree,
    state: PyTree,
    form: str,
    draws_per_visit: int,
    period: int | None = None,
) -> tuple[Likelihoods, list[Chain], Anchors | None]:
    """The likelihoods, chains and anchors of a checkpoint, for shapes of a position and a state."""
    num_clients = len(notes["rows"])

    def zeros(length):
        return jax.tree.map(lambda s: np.zeros((length, *s.shape), s.dtype), position)

    like = {
        "reference": position,
        "total": sum_shapes(position, form),
        "own": (np.zeros(num_clients), zeros(num_clients)),
        "chains": [(state, zeros(len(c) * draws_per_visit)) for c in notes["clients"] if c],
    }
    anchors = None
    if period is not None:
        like["anchors"] = anchor_shapes(position, len(notes["clients"]), num_clients)
    tree = load_tree(path, like)
    if period is not None:
        at, there = tree["anchors"]
        told = notes["anchors"]
        anchors = Anchors(period, told["visits"], at, there, dict(told["kept"]))
    values, slopes = tree["own"]
    likelihoods = Likelihoods(
        reference=tree["reference"],
        total=tree["total"],
        values=values,
        slopes=slopes,
        scales=np.array(notes["scales"]),
        setup_bytes=np.array(notes["setup"]),
    )
    states = iter(tree["chains"])
    chains = []
    for clients, minibatches in zip(notes["clients"], notes["minibatches"], strict=True):
        last, draws = next(states) if clients else (None, None)
        chains.append(Chain(last, [draws] if clients else [], clients, minibatches))
    return likelihoods, chains, anchors
