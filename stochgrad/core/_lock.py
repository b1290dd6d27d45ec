"""One writer at a time: a file in a directory that says which process writes there."""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

LOCK = ".stochgrad.lock"
_BEAT = 10.0
_SILENCE = 60.0
"""Seconds without a beat after which a process on another host counts as dead."""
_held: set[Path] = set()


class Lock:
    """Holds a directory until ``release``.

    A process that dies leaves its lock behind. On the same host the next one sees that it is dead
    and takes the lock over. On another host the lock's time of change tells: a living process
    renews it every ten seconds, and one that has not for a minute counts as dead.

    Args:
        directory: What to hold; it must exist.
        name: What it is called.

    Raises:
        OSError: another run writes there; the directory cannot be written.
    """

    def __init__(self, directory: Path, name: str):
        self._path = directory / LOCK
        self._text = json.dumps(
            {"pid": os.getpid(), "host": socket.gethostname(), "birth": _birth(os.getpid())}
        )
        while not _create(self._path, self._text):
            self._take_over(name)
        _held.add(self._path)
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="stochgrad-lock", daemon=True).start()

    def release(self) -> None:
        """Let the directory go."""
        self._over.set()
        _held.discard(self._path)
        with suppress(OSError):
            if self._path.read_text() == self._text:
                self._path.unlink()

    def _beat(self) -> None:
        while not self._over.wait(_BEAT):
            with suppress(OSError):
                os.utime(self._path)

    def _take_over(self, name: str) -> None:
        """Remove a lock whose process is dead. Raises if it lives."""
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return
        owner = _owner(text)
        if _lives(self._path, owner):
            raise OSError(
                f"{name} is being written by process {owner.get('pid')} on "
                f"{owner.get('host')}: wait for it or name another path (if that process is "
                f"dead, remove {self._path})."
            )
        aside = self._path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            os.rename(self._path, aside)
            if aside.read_text() != text:  # another process was faster, and lives
                with suppress(OSError):
                    os.link(aside, self._path)
            aside.unlink()


def _create(path: Path, text: str) -> bool:
    """Make a file with a text, at once; False if it is there already."""
    temporary = path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
    temporary.write_text(text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with open(path, "x") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        temporary.unlink()
    return True


def _owner(text: str) -> dict:
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _lives(path: Path, owner: dict) -> bool:
    """Whether the process that made a lock is alive, as far as can be told."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or os.name != "posix":
        return _beats(path)
    if pid == os.getpid():
        return path in _held
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    birth = _birth(pid)
    return birth is None or (birth == owner.get("birth") and birth != "dead")


def _beats(path: Path) -> bool:
    """Whether a lock is renewed; looks at it for a minute where that is not plain."""
    clock = path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
    try:
        first = path.stat().st_mtime
        while path.stat().st_mtime == first:
            clock.touch()
            if clock.stat().st_mtime - first > _SILENCE:
                return False
            time.sleep(min(1.0, _SILENCE / 4))
        return True
    except FileNotFoundError:
        return False
    finally:
        clock.unlink(missing_ok=True)


def _birth(pid: int) -> str | None:
    """When a process began, which tells it from a later one of the same number, where known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return "dead" if fields[0] in "ZX" else fields[19]
