"""Verifiers in Python: run on the host, side by side, each with a deadline."""

import contextlib
import importlib
import queue
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from os import environ
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, PyTree

from stochgrad.core import (
    check_callable,
    check_count,
    check_instance,
    check_number,
    data_rows,
    describe,
    first_line,
)
from stochgrad.em import _process
from stochgrad.em._model import VerifierWarning
from stochgrad.em._sending import is_pure, packed

_START = 120.0  # seconds in which a process must have started
_NOTICED = 0.1  # seconds after a deadline in which it is noticed, if Python's lock is free
_SIDE_BY_SIDE = 4
_SIGNALS = importlib.import_module("_signal")
_MAIN_ONLY = [  # functions of the C module that only the main thread may call, or hears from
    getattr(_SIGNALS, name)
    for name in ("signal", "alarm", "setitimer", "set_wakeup_fd")
    if hasattr(_SIGNALS, name)
]


class _Verdict(NamedTuple):
    """What came of a rationale: ``"bool"`` and its value, or a reason and what to say of it."""

    kind: str
    value: Any


class _Job(NamedTuple):
    number: int
    tokens: np.ndarray
    answer: Any
    watch: bool
    results: queue.SimpleQueue


class _Started(NamedTuple):
    """A worker has begun with its job, at a time."""

    time: float


class _InThread:
    """Verifies in the thread that calls it."""

    def __init__(self, verify, decode):
        self._verify, self._decode = verify, decode

    def start(self) -> None:
        pass

    def judge(self, job: _Job) -> _Verdict:
        def verify(tokens, truth):
            return self._verify(self._decode(tokens), truth)

        if not job.watch:
            return _Verdict(*_process.answer(verify, job.tokens, job.answer))
        used: list[str] = []

        def watch(frame, event, called):
            if event == "c_call" and any(called is function for function in _MAIN_ONLY):
                used.append(called.__name__)

        before = sys.getprofile()
        sys.setprofile(watch)  # of this thread alone
        try:
            verdict = _Verdict(*_process.answer(verify, job.tokens, job.answer))
        finally:
            sys.setprofile(before)
        return _Verdict("signals", used[0]) if used else verdict

    def stop(self) -> None:
        pass


class _InProcess:
    """Verifies in a process of its own; the thread that calls it waits for the verdict."""

    def __init__(self, verify: bytes, decode, timeout: float):
        self._verify, self._decode, self._timeout = verify, decode, timeout
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
            _process.send(process.stdin, (sys.path, self._verify, self._timeout))  # type: ignore
            state, words = _process.receive(process.stdout)  # type: ignore
        except (EOFError, OSError):
            state, words = "failed", f"it ended with code {process.wait()}"
        if state != "ready":
            raise RuntimeError(words)

    def judge(self, job: _Job) -> _Verdict:
        process = self._process
        assert process is not None
        try:
            text = self._decode(job.tokens)
        except BaseException as error:
            return _Verdict("raised", repr(error))
        try:
            _process.send(process.stdin, (text, job.answer))  # type: ignore
            return _Verdict(*_process.receive(process.stdout))  # type: ignore
        except (EOFError, OSError):
            return _Verdict("ended its process", f"code {process.wait()}")

    def stop(self) -> None:
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


class _Worker:
    """A thread that sees to one rationale after another until it is told ``None``."""

    def __init__(self, way: _InThread | _InProcess):
        self.way = way
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        while (job := self.jobs.get()) is not None:
            try:
                self.way.start()
            except Exception as error:
                job.results.put((self, job.number, _Verdict("not started", str(error)), 0.0))
                continue
            start = time.monotonic()
            job.results.put((self, job.number, _Started(start), 0.0))
            try:
                verdict = self.way.judge(job)
            except BaseException as error:
                verdict = _Verdict("raised", repr(error))
            job.results.put((self, job.number, verdict, time.monotonic() - start))

    def stop(self):
        self.jobs.put(None)
        self.way.stop()


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()


class HostVerifier:
    """What ``on_host`` makes: a verifier of tokens, masks and answers.

    Attributes:
        failures: How many rationales were counted as wrong for each reason: ``"raised"``,
            ``"timed out"``, ``"returned no bool"``, ``"ended its process"``.
        processes: Processes that it runs in; 0 for threads.
    """

    def __init__(self, verify, decode, timeout: float, workers: int, function: bytes | None = None):
        self._verify = check_callable("verify", verify, "a function (text, answer) -> bool")
        self._decode = check_callable("decode", decode, "a function tokens -> text")
        self._timeout = check_number("timeout", timeout)
        self._workers = check_count("workers", workers)
        if function is not None:
            check_instance("function", function, bytes, "verify as bytes, or None")
        self._function = function
        self.failures: Counter[str] = Counter()
        self.processes = 0 if function is None else self._workers
        self._watched = False
        self._idle: list[_Worker] = []
        weakref.finalize(self, _stop_all, self._idle)

    def __call__(
        self, tokens: Int[Array, "n length"], mask: Bool[Array, "n length"], answers: PyTree
    ) -> Bool[Array, " n"]:
        """Whether each rationale is right.

        Raises:
            ValueError: shapes do not fit each other.
            TypeError: the mask is not of bools; the verifier sets alarms, and runs in threads.
        """
        for name, value in (("tokens", tokens), ("mask", mask)):
            if not hasattr(value, "shape") or len(value.shape) == 0:
                raise TypeError(f"{name} must be an array, got {describe(value)}.")
        if mask.dtype != bool:
            raise TypeError(f"mask must be of bools, got dtype {mask.dtype}.")
        if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.shape != mask.shape:
            raise ValueError(
                f"tokens must be integers of the mask's shape {mask.shape}, got dtype "
                f"{tokens.dtype} and shape {tokens.shape}."
            )
        rows = mask.shape[:-1]
        for leaf in jax.tree.leaves(answers):
            if np.shape(leaf)[: len(rows)] != rows:
                raise ValueError(
                    f"answers must have one row for each of the rationales {rows}, got shape "
                    f"{np.shape(leaf)}."
                )
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((tokens, mask, answers))):
            return jnp.asarray(self._on_arrays(tokens, mask, answers))
        return jax.pure_callback(
            self._on_arrays,
            jax.ShapeDtypeStruct(rows, jnp.bool_),
            tokens,
            mask,
            answers,
            vmap_method="broadcast_all",
        )

    def check(self, answers: PyTree) -> None:
        """Try the verifier once, on a rationale without tokens and the first answer.

        Raises:
            TypeError: it returns something else than a bool; it sets alarms, and runs in threads.
        """
        if jax.tree.leaves(answers):
            data_rows(answers, name="answers")
        first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), answers)
        (verdict,) = self._run([(np.zeros(0, np.int32), first)], watch=True)
        if verdict.kind == "returned no bool":
            raise TypeError(f"verify must return a bool, got {verdict.value}.")

    def _on_arrays(self, tokens, mask, answers):
        shape = mask.shape[:-1]
        mask = np.asarray(mask).reshape(-1, mask.shape[-1])
        tokens = np.asarray(tokens).reshape(mask.shape)
        answers = jax.tree.map(
            lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[len(shape) :]), answers
        )
        rows = [
            (tokens[n, mask[n]], jax.tree.map(lambda leaf, n=n: leaf[n], answers))
            for n in range(mask.shape[0])
        ]
        verdicts = self._run(rows, watch=False)
        right = [
            self._accepted(row[0], verdict) for row, verdict in zip(rows, verdicts, strict=True)
        ]
        return np.array(right, bool).reshape(shape)

    def _worker(self) -> _Worker:
        if self._idle:
            return self._idle.pop()
        if self._function is None:
            return _Worker(_InThread(self._verify, self._decode))
        return _Worker(_InProcess(self._function, self._decode, self._timeout))

    def _run(self, rows: list, watch: bool) -> list[_Verdict]:
        """The verdict on each row."""
        verdicts: list[Any] = [None] * len(rows)
        results: queue.SimpleQueue = queue.SimpleQueue()
        running: dict[_Worker, tuple[int, float]] = {}
        waiting = list(range(len(rows)))[::-1]
        grace = 0.0 if self._function is None else _START
        while waiting or running:
            while waiting and len(running) < self._workers:
                worker, number = self._worker(), waiting.pop()
                tokens, truth = rows[number]
                first = not self._watched and tokens.size > 0
                self._watched |= first
                running[worker] = number, time.monotonic() + grace + self._timeout
                worker.jobs.put(_Job(number, tokens, truth, watch or first, results))
            soonest = min(deadline for _, deadline in running.values())
            try:
                wait = max(soonest - time.monotonic(), 0.0)
                worker, number, verdict, seconds = results.get(timeout=wait)
            except queue.Empty:
                now = time.monotonic()
                late = [worker for worker, (_, deadline) in running.items() if deadline <= now]
                for worker in late:  # a thread is left to itself: it ends when its verifier does
                    number, deadline = running.pop(worker)
                    verdicts[number] = self._late(now - deadline)
                    worker.stop()
                continue
            if worker not in running:
                continue
            if isinstance(verdict, _Started):
                running[worker] = number, verdict.time + self._timeout
                continue
            del running[worker]
            if verdict.kind in ("signals", "not started"):
                self._refuse(verdict, [worker, *running])
                waiting.append(number)
                grace = 0.0
                continue
            if verdict.kind == "ended its process":
                worker.stop()
            else:
                self._idle.append(worker)
            beyond = seconds - self._timeout
            verdicts[number] = verdict if beyond <= 0 else self._late(beyond)
        return verdicts

    def _late(self, beyond: float) -> _Verdict:
        """Noticed well beyond the deadline, as nothing here could run, or at it."""
        held = self._function is None and beyond > _NOTICED + 0.1 * self._timeout
        return _Verdict("timed out", self._timeout + beyond if held else None)

    def _refuse(self, verdict: _Verdict, workers: list[_Worker]) -> None:
        """Raise where the verifier cannot run here; where no process starts, go on in threads."""
        if verdict.kind == "signals":
            _stop_all(workers)
            raise TypeError(
                f"verify calls signal.{verdict.value}, which only works in the main thread, and "
                "runs in others here: give processes=4, or a verify without alarms (on_host has "
                "timeout)."
            )
        _stop_all(self._idle)
        workers[0].stop()
        if self._function is not None:
            warnings.warn(
                f"verify does not start in a process ({verdict.value}) and runs in threads, where "
                "a deadline does not end what holds Python's lock.",
                VerifierWarning,
                stacklevel=2,
            )
        self._function, self.processes = None, 0

    def _accepted(self, tokens: np.ndarray, verdict: _Verdict) -> bool:
        kind, value = verdict
        if kind == "bool":
            return value
        words = {
            "timed out": f"took more than {self._timeout:g} seconds",
            "raised": f"raised {value}",
            "returned no bool": f"returned {value} where a bool is due",
            "ended its process": f"ended its process ({value})",
        }[kind]
        remedy = ""
        if kind == "timed out" and value is not None:
            words = f"held Python's lock for {value:.1f} seconds, beyond its {self._timeout:g},"
            remedy = "in threads no deadline ends it, with processes=4 it does; "
        self.failures[kind] += 1
        if self.failures[kind] == 1:
            warnings.warn(
                f"the verifier {words} on a rationale of {tokens.size} tokens, which counts as "
                f"wrong; {remedy}more of the kind are counted in the verifier's failures.",
                VerifierWarning,
                stacklevel=2,
            )
        return False


def on_host(
    verify: Callable[[str, Any], bool],
    decode: Callable[[np.ndarray], str],
    *,
    timeout: float = 10.0,
    threads: int | None = None,
    processes: int | None = None,
) -> HostVerifier:
    """A verifier from a Python function of text, for ``stochgrad.em.verified``.

    The compiled E-step hands the tokens of a minibatch over and waits for the verdicts. A rationale
    whose verifier raises, hangs or returns no bool counts as wrong, with a ``VerifierWarning`` for
    the first of each kind, and the run goes on.

    Rationales are verified side by side, in processes or in threads. Only a process can be ended
    when its time is up: a thread that holds Python's lock, as a regular expression that backtracks
    does, stops the whole run until it is done, Ctrl-C included. Only a process runs ``verify`` in
    its main thread, as ``signal.alarm`` wants it. But a process has a copy of ``verify``, and what
    that changes or prints there is not seen here. By default there are four processes where that
    makes no difference: ``verify`` refers to nothing but constants, installed packages and
    functions of the kind, sets no variable outside itself, prints and logs nothing. Otherwise there
    are four threads.

    A run whose verifier gives the same verdict each time goes on from a checkpoint to the bit; one
    that runs into its timeout does not.

    Args:
        verify: ``(text, answer) -> bool``, where the answer is one row of ``Questions.answers``, of
            numpy arrays.
        decode: ``tokens -> text``, from the token numbers of one rationale, end token included. It
            runs in this process.
        timeout: Seconds for one rationale.
        threads: In how many threads of this process.
        processes: In how many processes. They are started when first needed, see the CPU alone, and
            import what ``verify`` needs. It is sent there by its code, with a copy of what it
            refers to, which must be possible to pickle.

    Raises:
        TypeError: ``verify`` or ``decode`` is no function, or ``verify`` cannot be sent to
            ``processes``; when tried or handed to ``mcmc_em``, ``verify`` returns something else
            than a bool, or uses signals in ``threads``.
        ValueError: a number is not positive, or both threads and processes are given.

    Example:
        >>> import numpy as np, jax.numpy as jnp
        >>> from stochgrad import em
        >>> verify = em.on_host(
        ...     lambda text, answer: text.endswith(f"is {answer}."),
        ...     lambda tokens: "".join(chr(token) for token in tokens))
        >>> tokens = jnp.array([list(b"it is 4."), list(b"it is 5.")])
        >>> verify(tokens, jnp.ones_like(tokens, bool), jnp.array([4, 4])).tolist()
        [True, False]
    """
    check_callable("verify", verify, "a function (text, answer) -> bool")
    check_callable("decode", decode, "a function tokens -> text")
    timeout = check_number("timeout", timeout)
    if threads is not None and processes is not None:
        raise ValueError("threads and processes exclude each other: give one of them.")
    if threads is not None:
        return HostVerifier(verify, decode, timeout, check_count("threads", threads), None)
    if processes is None:
        function = packed(verify) if sys.executable and is_pure(verify) else None
        return HostVerifier(verify, decode, timeout, _SIDE_BY_SIDE, function)
    processes = check_count("processes", processes)
    try:
        function = packed(verify)
        trial = _InProcess(function, decode, timeout)
        trial.start()
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"verify cannot be sent to processes: {first_line(error)}. Let it refer to functions "
            "and data that can be pickled, or give threads=4."
        ) from error
    verifier = HostVerifier(verify, decode, timeout, processes, function)
    verifier._idle.append(_Worker(trial))
    return verifier
