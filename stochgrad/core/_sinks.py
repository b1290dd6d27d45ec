"""Where the draws of a run go: memory or a store, with a checkpoint beside either."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core._checkpoint import Checkpoint, Saved
from stochgrad.core._checks import check_flag, check_path
from stochgrad.core._datatree import (
    Group,
    by_name,
    groups,
    stats_names,
    tree_names,
    unconstrained_group,
)
from stochgrad.core._distributed import barrier, broadcast_from_lead, is_lead_process, to_host
from stochgrad.core._draws import Draws
from stochgrad.core._store import Store, Writer
from stochgrad.core._stored_draws import read_back, whole_draws
from stochgrad.core._warnings import CheckpointWarning


def check_places(store: Any, checkpoint: Any, resume: Any) -> tuple[Store | None, Path | None]:
    """Where draws and state are to go, with absolute paths.

    Raises:
        TypeError: one of them is no path, or ``resume`` no flag.
        ValueError: one lies in the other; there is no checkpoint to resume from.
    """
    if checkpoint is not None:
        checkpoint = check_path("checkpoint", checkpoint)
    if check_flag("resume", resume) and checkpoint is None:
        raise ValueError("resume=True needs checkpoint, the directory to resume from.")
    if store is None:
        return None, checkpoint
    store = store if isinstance(store, Store) else Store(check_path("store", store))
    path = Path(store.path)
    if checkpoint is not None and (path.is_relative_to(checkpoint) or path in checkpoint.parents):
        raise ValueError(
            f"store={str(path)!r} and checkpoint={str(checkpoint)!r} must be two directories, "
            "neither within the other."
        )
    return store, checkpoint


class Sink:
    """Takes what chunks give, and makes the results of it.

    Args:
        as_draws: ``(chunks, **fields) -> Draws``.
        shapes: Shapes of the arrays of one draw, as a chunk gives them.
        online: Whether an ``Online`` sums up the draws.
    """

    def __init__(self, as_draws: Callable[..., Draws], shapes: PyTree, online: bool):
        self._online = online
        self._as_draws = as_draws
        self._shapes = shapes
        self._store: Store | None = None
        self._writer: Writer | None = None
        self._checkpoint: Checkpoint | None = None
        self._chunks: list = []
        self._saved = 0

    def open(
        self,
        run: dict[str, Any],
        store: Store | None,
        checkpoint: Path | None,
        every: float,
        num_draws: int,
        resume: bool,
    ) -> None:
        """Open what is on disk, before anything is computed."""
        self._store = store
        if store is not None:
            self._check_names()
        if checkpoint is not None:
            self._checkpoint = Checkpoint(checkpoint, every, run, resume, is_lead_process())
            self._check_draws(run["num_warmup"], num_draws)
        if store is not None and is_lead_process():
            self._writer = Writer(store, run, num_draws, resume)

    def load(self, shapes: Callable[[], PyTree], num_warmup: int) -> Saved | None:
        """What the checkpoint holds, in the given shapes; its draws are taken over."""
        if self._checkpoint is None:
            return None
        saved = self._checkpoint.load(shapes(), self._shapes)
        if saved is not None:
            self._chunks = saved.pieces
            self._saved = len(self._chunks)
            if self._writer is not None:
                self._writer.start_at(max(saved.done - num_warmup, 0))
        return saved

    def add(self, kept: PyTree, stats: dict[str, Any], count: int) -> None:
        """Take the first draws of a chunk."""
        chunk = jax.tree.map(lambda x: x[:count], to_host((kept, stats)))
        if self._store is None:
            self._chunks.append(chunk)
        elif self._writer is not None:
            self._writer.append(lambda: self._groups(chunk))

    def save(self, done: int, carry: PyTree, *, now: bool = False) -> None:
        """Save the state of the run, if it is time."""
        if self._checkpoint is None or not (now or broadcast_from_lead(self._checkpoint.due())):
            return
        state = to_host(carry)
        if is_lead_process():
            stored = None
            if self._writer is not None:
                self._writer.flush()
                stored = self._writer.draws
            if self._checkpoint.save(done, state, self._chunks[self._saved :], stored):
                self._saved = len(self._chunks)

    @property
    def saves(self) -> bool:
        """Whether there is a checkpoint."""
        return self._checkpoint is not None

    def last_saved(self) -> str:
        """A sentence on what is left of a run that failed."""
        if self._checkpoint is None:
            return "There was no checkpoint."
        return f"The last checkpoint is at draw {self._checkpoint.done}: resume=True goes on there."

    def close(self) -> None:
        """Write what is left, and let other runs write there."""
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            if self._checkpoint is not None:
                self._checkpoint.close()

    def draws(self, **fields: Any) -> Draws:
        """All draws."""
        if self._store is None:
            chunks = self._chunks or [self._none()]
            return self._as_draws(chunks, **fields)
        barrier("stochgrad-store")
        positions, stats = self._shapes
        if self._online:
            positions = {}
        names = list(tree_names(by_name(positions)))
        stored = read_back(Path(self._store.path), names, list(stats_names(stats).values()))
        if stored is None:
            return self._as_draws([self._none()], **fields)
        return self._as_draws(
            None,
            positions=jax.tree.unflatten(jax.tree.structure(positions), stored.positions),
            stats=dict(zip(stats, stored.stats, strict=True)),
            finite=stored.finite,
            **fields,
        )

    def _check_names(self) -> None:
        """Raise a ValueError if two arrays would have one name in the store."""
        draws = self._as_draws([self._none()], first_bad=np.array([-1]))
        tree_names(by_name(draws.positions))
        if draws.posterior is not None and draws.posterior.constrain and not draws.collected:
            one = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), draws.positions
            )
            tree_names(jax.eval_shape(draws.posterior.constrain, one))

    def _check_draws(self, num_warmup: int, num_draws: int) -> None:
        """Raise a ValueError unless the draws that the checkpoint counts are where they should."""
        checkpoint = self._checkpoint
        assert checkpoint is not None
        name = f"checkpoint={str(checkpoint.path)!r}"
        store = None if self._store is None else Path(self._store.path)
        there = 0 if store is None else whole_draws(store)
        if not checkpoint.holds:
            if there:
                warnings.warn(
                    f"store={str(store)!r} holds {there} draws per chain, and {name} no state to "
                    "go on from: the run begins anew and writes its draws once more.",
                    CheckpointWarning,
                    stacklevel=4,
                )
            return
        counted = max(checkpoint.done - num_warmup, 0)
        if counted > num_draws:
            raise ValueError(
                f"num_samples={num_draws} is less than the {counted} draws per chain that {name} "
                "holds already: ask for as many or more, and take a range of the result."
            )
        if counted and checkpoint.stored is None and store is not None:
            raise ValueError(
                f"{name} holds {counted} draws per chain itself, for its run was begun without a "
                "store: resume it without store, or begin anew with another checkpoint."
            )
        if counted and checkpoint.stored is not None and store is None:
            raise ValueError(
                f"{name} counts {counted} draws per chain that are in a store: pass the store that "
                "the run was begun with, or begin anew with another checkpoint."
            )
        if checkpoint.stored is not None and store is not None and there < counted:
            raise ValueError(
                f"store={str(store)!r} holds {there} draws per chain, and {name} counts {counted}: "
                "put the store back, or remove the checkpoint to begin anew."
            )

    def _groups(self, chunk) -> dict[str, Group]:
        draws = self._as_draws([chunk], first_bad=np.array([-1]))
        found = {name: group for name, group in groups(draws).items() if group.variables}
        if draws.posterior is not None and draws.posterior.constrain and not draws.collected:
            found["unconstrained_posterior"] = unconstrained_group(draws)
        return found

    def _none(self):
        return jax.tree.map(lambda s: np.zeros((0, *s.shape), s.dtype), self._shapes)
