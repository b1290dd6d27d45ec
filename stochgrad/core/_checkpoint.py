"""Runs that can be killed: their state on disk, written whole or not at all."""

import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core._archive import load_notes, load_tree, save_tree
from stochgrad.core._identity import refuse_other_run
from stochgrad.core._warnings import CheckpointWarning

_STATE = "state.npz"


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        done: Draws of the run up to then, warm-up included.
        state: The state of the loop.
        pieces: Draws kept up to then, unless a store has them.
    """

    done: int
    state: PyTree
    pieces: list


class Checkpoint:
    """A directory with the last state of a run, and the draws up to it unless a store has them.

    Draws are written in pieces, each before the state that counts it, and every file under its
    final name at once: whenever the process dies, the state and the pieces that it counts are
    those of some moment of the run.

    Args:
        path: The directory; made if it is not there.
        every: Seconds between two saves.
        run: What tells this run from others.
        resume: Whether to go on with a run that the directory holds.

    Raises:
        OSError: the directory cannot be written.
        ValueError: it holds another run, or this one without ``resume``.
    """

    def __init__(self, path: str | Path, every: float, run: dict[str, Any], resume: bool):
        self.path = Path(path)
        self._every = every
        self._run = run
        self._last = time.monotonic()
        self._counted = 0
        self.done = 0
        """Draws that the last state counts, warm-up included."""
        state = self.path / _STATE
        self._notes = load_notes(state) if state.exists() else None
        if self._notes is not None:
            refuse_other_run(f"checkpoint={str(path)!r}", self._notes["run"], run, resume)
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".written").touch()
            (self.path / ".written").unlink()
        except OSError as error:
            raise OSError(
                f"checkpoint={str(path)!r} cannot be written: {error.strerror}."
            ) from error

    def load(self, state: PyTree, piece: PyTree) -> Saved | None:
        """What the directory holds, in the structure of a state and of a piece; None if nothing."""
        if self._notes is None:
            return None
        self._counted, self.done = self._notes["kept"], self._notes["done"]
        pieces, kept = [], 0
        while kept < self._counted:
            pieces.append(load_tree(self._piece(kept), piece))
            kept += len(jax.tree.leaves(pieces[-1])[0])
        return Saved(self._notes["done"], load_tree(self.path / _STATE, state), pieces)

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._every

    def save(self, done: int, state: PyTree, pieces: list) -> bool:
        """Replace what is there. ``pieces`` are the draws kept since it was last replaced.

        A disk that is full costs a warning, not the run: the last state stays.

        Returns:
            Whether it was replaced.
        """
        self._last = time.monotonic()
        try:
            kept = self._counted
            if pieces:
                piece = jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
                save_tree(self._piece(kept), piece, {})
                kept += len(jax.tree.leaves(piece)[0])
            notes = {"done": done, "kept": kept, "run": self._run}
            save_tree(self.path / _STATE, state, notes)
            self._counted, self.done = kept, done
            return True
        except OSError as error:
            warnings.warn(
                f"the checkpoint at {self.path} could not be written: {error.strerror or error}. "
                "The run goes on; the last checkpoint stays as it is.",
                CheckpointWarning,
                stacklevel=5,
            )
            return False

    def _piece(self, first: int) -> Path:
        return self.path / f"draws-{first:010d}.npz"
