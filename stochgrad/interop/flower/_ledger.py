"""What a client has answered, and what it cost: kept where a new process finds it again."""

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Context
from jaxtyping import Float

from stochgrad.core import Lock, load_notes, load_tree, save_tree

_STATE, _WAIT = "privacy", 60.0
_threads = threading.Lock()


class Item(NamedTuple):
    """Something that a reply tells.

    Attributes:
        name: Its digest, under the client's secret: what has been told once costs nothing again.
        cost: For each minibatch of the client, or one for all.
    """

    name: str
    cost: Float[np.ndarray, " blocks"] | float


class Entries(NamedTuple):
    """What a ledger holds.

    Attributes:
        cost: Spent on each minibatch of rows.
        told: The names of all items.
        rows: Rows of the client.
        batch_size: Rows of a minibatch.
        secret: The client's secret in hexadecimal digits, if it is kept here.
        mark: A digest of the secret, wherever it is kept.
    """

    cost: Float[np.ndarray, " blocks"]
    told: list[str]
    rows: int
    batch_size: int
    secret: str
    mark: str


class Ledger:
    """A file that is written before a reply is sent, one process at a time."""

    def __init__(self, path: Path, rows: int, batch_size: int, secret: bytes | None):
        self.path, self.rows, self.batch_size, self.given = path, rows, batch_size, secret
        self.blocks = -(-rows // batch_size)
        with self._held():
            entries = self._read()
            self.secret = bytes.fromhex(entries.secret) if secret is None else secret
            self._write(entries)

    def charge(self, items: Sequence[Item], most: float, most_answers: int | None) -> str:
        """Enter what is to be told; or enter nothing, and say in a word what does not allow it."""
        with self._held():
            entries = self._read()
            told = set(entries.told)
            new = [item for item in items if item.name not in told]
            cost = entries.cost + sum(np.asarray(item.cost) for item in new)
            refusal = refuse(entries.told, new, float(np.max(cost)), most, most_answers)
            if not refusal and new:
                names = [*entries.told, *(item.name for item in new)]
                self._write(entries._replace(cost=cost, told=names))
            return refusal

    def _read(self) -> Entries:
        if not self.path.exists():
            secret = secrets.token_bytes(32) if self.given is None else self.given
            kept = secret.hex() if self.given is None else ""
            cost = np.zeros(self.blocks)
            return Entries(cost, [], self.rows, self.batch_size, kept, mark_of(secret))
        found = read_ledger(self.path)
        if self.given is None and not found.secret:
            raise ValueError(
                f"ledger={str(self.path)!r} was written with a secret that was given: give it again"
                "."
            )
        if self.given is not None and mark_of(self.given) != found.mark:
            raise ValueError(
                f"ledger={str(self.path)!r} was written with another secret: give the same, as "
                "under another all answers are drawn, and paid for, anew."
            )
        if (found.rows, found.batch_size) != (self.rows, self.batch_size):
            worst = np.full(self.blocks, found.cost.max())
            return found._replace(cost=worst, rows=self.rows, batch_size=self.batch_size)
        return found

    def _write(self, entries: Entries) -> None:
        notes = entries._asdict()
        save_tree(self.path, notes.pop("cost"), notes)
        os.chmod(self.path, 0o600)

    @contextmanager
    def _held(self) -> Iterator[None]:
        with _threads:  # the lock in the directory is between processes
            lock = self._lock(time.monotonic() + _WAIT)
            try:
                yield
            finally:
                lock.release()

    def _lock(self, end: float) -> Lock:
        while True:
            try:
                return Lock(self.path.parent, f"ledger={str(self.path)!r}")
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)


def read_ledger(path: Path) -> Entries:
    """What a ledger holds.

    Raises:
        ValueError: the file is missing, damaged or none.
    """
    notes = load_notes(path)
    if not {"told", "rows", "batch_size", "secret", "mark"} <= set(notes):
        raise ValueError(f"ledger={str(path)!r} is a file of something else: name another one.")
    cost = np.asarray(load_tree(path, np.zeros(0)), np.float64)
    return Entries(cost=cost, **notes)


def charge_in_state(context: Context, items: Sequence[Item], most_answers: int | None) -> str:
    """Likewise in Flower's state of a node, which is there for a run only; costs are not kept."""
    record = context.state.get(_STATE)
    told: list[str] = []
    if isinstance(record, ConfigRecord):
        told = [str(name) for name in record["told"]]  # pyright: ignore
    new = [item for item in items if item.name not in told]
    refusal = refuse(told, new, 0.0, 0.0, most_answers)
    if not refusal and new:
        names = [*told, *(item.name for item in new)]
        context.state[_STATE] = ConfigRecord({"told": names})
    return refusal


def refuse(
    told: Sequence[str], new: Sequence[Item], cost: float, most: float, most_answers: int | None
) -> str:
    """In a word why what is new may not be told; nothing where it may."""
    answers = sum(name.startswith("answer") for name in [*told, *(item.name for item in new)])
    asks = any(item.name.startswith("answer") for item in new)
    if asks and most_answers is not None and answers > most_answers:
        return "its answers are used up"
    if new and not cost <= most:
        return "its budget is spent"
    return ""


def mark_of(secret: bytes) -> str:
    """A digest that tells one secret from another."""
    return hashlib.sha256(b"mark of a ledger" + secret).hexdigest()[:16]
