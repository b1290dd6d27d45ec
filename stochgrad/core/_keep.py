"""Where the draws of a run go: memory or a store, with a checkpoint beside either."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core._checkpoint import Checkpoint, Saved
from stochgrad.core._datatree import Group, by_name, groups, stats_name, unconstrained_group
from stochgrad.core._draws import Draws
from stochgrad.core._hosts import agree, is_writer, to_host, wait_for_all
from stochgrad.core._store import Store, Writer, read_back


class Keeper:
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
        store: str | Path | Store | None,
        checkpoint: str | Path | None,
        every: float,
        num_draws: int,
        resume: bool,
    ) -> None:
        """Open what is on disk, before anything is computed."""
        if checkpoint is not None:
            self._checkpoint = Checkpoint(checkpoint, every, run, resume)
        if store is not None:
            self._store = store if isinstance(store, Store) else Store(store)
            if is_writer():
                self._writer = Writer(self._store, run, num_draws, resume)

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
        if self._checkpoint is None or not (now or agree(self._checkpoint.due())):
            return
        state = to_host(carry)
        if is_writer():
            if self._writer is not None:
                self._writer.flush()
            if self._checkpoint.save(done, state, self._chunks[self._saved :]):
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
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()

    def draws(self, **fields: Any) -> Draws:
        """All draws."""
        if self._store is None:
            chunks = self._chunks or [self._none()]
            return self._as_draws(chunks, **fields)
        wait_for_all("stochgrad-store")
        positions, stats = self._shapes
        if self._online:
            positions = {}
        names = list(by_name(positions))
        stored = read_back(self._store.path, names, [stats_name(name) for name in stats])
        if stored is None:
            return self._as_draws([self._none()], **fields)
        return self._as_draws(
            None,
            positions=jax.tree.unflatten(jax.tree.structure(positions), stored.positions),
            stats=dict(zip(stats, stored.stats, strict=True)),
            finite=stored.finite,
            **fields,
        )

    def _groups(self, chunk) -> dict[str, Group]:
        draws = self._as_draws([chunk], first_bad=np.array([-1]))
        found = {name: group for name, group in groups(draws).items() if group.variables}
        if draws.posterior is not None and draws.posterior.constrain and not draws.collected:
            found["unconstrained_posterior"] = unconstrained_group(draws)
        return found

    def _none(self):
        return jax.tree.map(lambda s: np.zeros((0, *s.shape), s.dtype), self._shapes)
