"""Threads and processes in which verifiers run."""

import contextlib
import importlib
import queue
import subprocess
import sys
import threading
import time
from os import environ
from typing import Any, NamedTuple

from stochgrad.em import _process

_SIGNALS = importlib.import_module("_signal")
_MAIN_ONLY = [  # functions of the C module that only the main thread may call, or hears from
    getattr(_SIGNALS, name)
    for name in ("signal", "alarm", "setitimer", "set_wakeup_fd")
    if hasattr(_SIGNALS, name)
]


class Verdict(NamedTuple):
    """The result of a job: ``"verdict"`` and its value, or a reason and what to say of it."""

    kind: str
    value: Any


class Form(NamedTuple):
    """What a verifier is called with, a rationale or a ``batch``, and what it returns for each."""

    verdict: str
    batch: bool


class Job(NamedTuple):
    """A rationale to verify, or a list of them, and where the verdict goes."""

    number: int
    tokens: Any
    answer: Any
    results: queue.SimpleQueue


class InThread:
    """Verifies in the thread that calls it, where signals, which do not work there, are noticed."""

    def __init__(self, verify, decode, form: Form):
        self._verify, self._decode, self._form = verify, decode, form

    def start(self) -> None:
        """A thread is ready."""

    stop = start  # a thread ends when its verifier returns

    def judge(self, job: Job) -> Verdict:
        def verify(tokens, truth):
            return self._verify(self._decode(tokens), truth)

        calls: list[str] = []

        def watch(frame, event, function):
            if event == "c_call" and any(function is known for known in _MAIN_ONLY):
                calls.append(function.__name__)

        before = sys.getprofile()
        sys.setprofile(watch)  # of this thread alone
        try:
            verdict = Verdict(*_process.answer(verify, job.tokens, job.answer, *self._form))
        finally:
            sys.setprofile(before)
        return Verdict("signals", calls[0]) if calls else verdict


class InProcess:
    """Verifies in a process of its own; the thread that calls it waits for the verdict."""

    def __init__(self, verify: bytes, decode, timeout: float, form: Form):
        self._verify, self._decode, self._timeout, self._form = verify, decode, timeout, form
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the process, unless it runs; wait until it is ready.

        Raises:
            RuntimeError: it does not start.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self._process = process = subprocess.Popen(
            [sys.executable, _process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environ, "JAX_PLATFORMS": "cpu"},
        )
        try:
            head = (sys.path, self._verify, self._timeout, *self._form)
            _process.send(process.stdin, head)  # type: ignore
            state, words = _process.receive(process.stdout)  # type: ignore
        except (EOFError, OSError):
            state, words = "failed", f"it ended with code {process.wait()}"
        if state != "ready":
            raise RuntimeError(words)

    def judge(self, job: Job) -> Verdict:
        process = self._process
        assert process is not None
        try:
            text = self._decode(job.tokens)
        except BaseException as error:
            return Verdict("raised", repr(error))
        try:
            _process.send(process.stdin, (text, job.answer))  # type: ignore
            return Verdict(*_process.receive(process.stdout))  # type: ignore
        except (EOFError, OSError):
            return Verdict("ended its process", f"code {process.wait()}")

    def stop(self) -> None:
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


class Worker:
    """A thread that verifies one rationale after another, until a job is ``None``."""

    def __init__(self, way: InThread | InProcess):
        self.way = way
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        while (job := self.jobs.get()) is not None:
            try:
                self.way.start()
            except Exception as error:
                job.results.put((self, job.number, Verdict("not started", str(error)), 0.0))
                continue
            start = time.monotonic()
            job.results.put((self, job.number, Verdict("started", start), 0.0))
            try:
                verdict = self.way.judge(job)
            except BaseException as error:
                verdict = Verdict("raised", repr(error))
            job.results.put((self, job.number, verdict, time.monotonic() - start))

    def stop(self):
        self.jobs.put(None)
        self.way.stop()


def stop_all(workers: list[Worker]) -> None:
    """Stop them, and empty the list."""
    while workers:
        workers.pop().stop()
