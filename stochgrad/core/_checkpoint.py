"""Runs that can be killed: their state on disk, written whole or not at all."""

import hashlib
import json
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core._archive import damaged, load_notes, load_tree, save_tree
from stochgrad.core._fingerprint import check_same_run
from stochgrad.core._lock import Lock
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

    Draws are written in pieces, each before the state that counts it, and files are renamed
    atomically: whenever the process dies, the state and the pieces that it counts are
    those of some moment of the run.

    Args:
        path: The directory; made if it is not there.
        every: Seconds between two saves.
        run: What tells this run from others.
        resume: Whether to go on with a run that the directory holds.
        writes: Whether this process is the one that writes, and keeps others from it.

    Raises:
        OSError: the directory cannot be written, or another run writes there.
        ValueError: a different run wrote it, or this one without ``resume``; it is damaged.
    """

    def __init__(
        self, path: Path, every: float, run: dict[str, Any], resume: bool, writes: bool = True
    ):
        self.path = path
        self._every = every
        self._run = run
        self._last = time.monotonic()
        self._counted = 0
        self._lock: Lock | None = None
        self.done = 0
        """Draws that the last state counts, warm-up included."""
        self.stored: int | None = None
        """Draws per chain that it counts and a store has; None if it has them itself."""
        name = f"checkpoint={str(path)!r}"
        if writes:
            try:
                path.mkdir(parents=True, exist_ok=True)
                (path / ".written").touch()
                (path / ".written").unlink()
            except OSError as error:
                raise OSError(f"{name} cannot be written: {error.strerror}.") from error
            self._lock = Lock(path, name)
        try:
            state = path / _STATE
            self._notes = load_notes(state) if state.exists() else None
            if self._notes is not None:
                check_same_run(name, self._notes.get("run"), run, resume)
                self._counted, self.done = self._notes["kept"], self._notes["done"]
                self.stored = self._notes["stored"]
        except BaseException:
            self.close()
            raise

    @property
    def holds(self) -> bool:
        """Whether there is a state to go on from."""
        return self._notes is not None

    def load(self, state: PyTree, piece: PyTree) -> Saved | None:
        """What the directory holds, in the structure of a state and of a piece; None if nothing.

        Raises:
            ValueError: a file is missing, damaged or of another run.
        """
        if self._notes is None:
            return None
        pieces, kept = [], 0
        while kept < self._counted:
            path = self._run_one_chunk(kept)
            if load_notes(path).get("run") != _digest(self._run):
                raise ValueError(damaged(path, "belongs to another run"))
            pieces.append(load_tree(path, piece))
            length = (_shapes(pieces[-1])[0] or (0,))[0]
            if _shapes(pieces[-1]) != [(length, *shape) for shape in _shapes(piece)]:
                raise ValueError(damaged(path, "belongs to another run"))
            kept += length
            if length == 0 or kept > self._counted:
                raise ValueError(damaged(path, f"holds {length} draws, too many or too few"))
        loaded = load_tree(self.path / _STATE, state)
        if _shapes(loaded) != _shapes(state):
            raise ValueError(damaged(self.path / _STATE, "belongs to another run"))
        return Saved(self.done, loaded, pieces)

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._every

    def save(self, done: int, state: PyTree, pieces: list, stored: int | None) -> bool:
        """Replace what is there. ``pieces`` are the draws kept since it was last replaced.

        A disk that is full costs a warning, not the run: the last state stays.

        Args:
            done: Draws so far, warm-up included.
            state: The state of the loop.
            pieces: Draws kept since the last time.
            stored: Draws per chain that a store has; None without a store.

        Returns:
            Whether it was replaced.
        """
        self._last = time.monotonic()
        try:
            kept = self._counted
            if pieces:
                piece = jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
                save_tree(self._run_one_chunk(kept), piece, {"run": _digest(self._run)})
                kept += len(jax.tree.leaves(piece)[0])
            notes = {"done": done, "kept": kept, "stored": stored, "run": self._run}
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

    def close(self) -> None:
        """Let other runs write there."""
        if self._lock is not None:
            self._lock.release()

    def _run_one_chunk(self, first: int) -> Path:
        return self.path / f"draws-{first:010d}.npz"


def _shapes(tree: PyTree) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def _digest(run: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]
