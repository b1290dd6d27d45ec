"""What a verifier's own process runs: this file by itself, without the library and without jax."""

import asyncio
import importlib
import io
import marshal
import numbers
import os
import pickle
import signal
import struct
import sys
import types
from typing import Any, BinaryIO

NAME = "stochgrad.em._process"
"""The name by which pickles refer to functions of this file."""


def make_function(code: bytes, name: str, module: str | None, free: int) -> types.FunctionType:
    """A function without what it refers to, which ``fill_function`` adds."""
    closure = tuple(types.CellType() for _ in range(free))
    names = {"__builtins__": __builtins__, "__name__": module}
    return types.FunctionType(marshal.loads(code), names, name, None, closure)


def fill_function(function: types.FunctionType, state: dict[str, Any]) -> None:
    """Add globals, closure and defaults."""
    for module in state["imports"]:
        importlib.import_module(module)
    function.__globals__.update(state["globals"])
    for cell, values in zip(function.__closure__ or (), state["closure"], strict=True):
        if values:
            cell.cell_contents = values[0]
    function.__defaults__ = state["defaults"]
    function.__kwdefaults__ = state["kwdefaults"]
    function.__dict__.update(state["attributes"])


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return globals()[name] if module == NAME else super().find_class(module, name)


def send(stream: BinaryIO, message: Any) -> None:
    """Write a message with its length before it."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Read a message.

    Raises:
        EOFError: the other side has ended.
    """
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return _Unpickler(io.BytesIO(data)).load()


def _as_verdict(value: Any, verdict: str) -> Any:
    """The value as a bool or a float, if it is one; None otherwise."""
    kind = type(value)
    if kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")):
        return bool(value) if verdict == "bool" else float(value)
    if verdict == "number" and isinstance(value, numbers.Real):
        return float(value)
    return None


async def _wait(awaitable: Any) -> Any:
    return await awaitable


def answer(verify: Any, text: Any, truth: Any, verdict: str, batch: bool) -> tuple[str, Any]:
    """What a verifier says, and the kind of it, in what any process can read.

    ``verdict`` is ``"bool"`` or ``"number"``; of a ``batch``, a list of them is due.
    """
    try:
        result = verify(text, truth)
        if hasattr(result, "__await__"):
            result = asyncio.run(_wait(result))
        results = list(result) if batch else [result]
    except BaseException as error:
        return "raised", repr(error)
    values = [_as_verdict(value, verdict) for value in results]
    if batch and len(values) != len(text):
        return f"returned no {verdict}", f"{len(values)} verdicts for {len(text)} rationales"
    for value, found in zip(values, results, strict=True):
        if value is None:
            return f"returned no {verdict}", f"{found!r} of type {type(found).__name__}"
    return "verdict", values if batch else values[0]


def _limit_time(seconds: float) -> None:
    """Let the system end this process, should nobody be left to do it."""
    try:
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        soft = int(used + 8 * seconds + 60)
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))
    except (ImportError, ValueError, OSError):
        pass


def main() -> None:
    """Verify one text after another, until there are no more."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the verifier prints goes to the error stream
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to handle
    path, function, seconds, verdict, batch = receive(source)
    sys.path[:] = path
    try:
        importlib.import_module("numpy")
        verify = _Unpickler(io.BytesIO(function)).load()
    except BaseException as error:
        send(sink, ("failed", f"{type(error).__name__}: {error}"))
        return
    send(sink, ("ready", None))
    while True:
        try:
            text, truth = receive(source)
        except EOFError:
            return
        _limit_time(seconds)
        send(sink, answer(verify, text, truth, verdict, batch))


if __name__ == "__main__":
    main()
