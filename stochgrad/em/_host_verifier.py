"""Verifiers in Python: run on the host, side by side, each with a deadline."""

import functools
import queue
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

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
from stochgrad.em._function_pickle import is_pure, pickle_function
from stochgrad.em._model import VerifierWarning
from stochgrad.em._verifier_workers import InProcess, InThread, Job, Verdict, Worker, stop_all

_START_SECONDS = 120.0  # in which a process must have started
_NOTICE_SECONDS = 0.1  # in which a deadline is noticed, if Python's lock is free
_NUM_WORKERS = 4


class HostVerifier:
    """What ``host_verifier`` makes: a verifier of tokens, masks and answers.

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
        self._idle: list[Worker] = []
        weakref.finalize(self, stop_all, self._idle)

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
        shape, arguments = jax.ShapeDtypeStruct(rows, jnp.bool_), (tokens, mask, answers)
        return jax.pure_callback(self._on_arrays, shape, *arguments, vmap_method="broadcast_all")

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
        flat = lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[len(shape) :])
        tokens, mask, answers = jax.tree.map(flat, (tokens, mask, answers))
        row = lambda n: (tokens[n, mask[n]], jax.tree.map(lambda leaf: leaf[n], answers))
        rows = [row(n) for n in range(len(mask))]
        verdicts = self._run(rows, watch=False)
        right = [
            self._is_right(row[0], verdict) for row, verdict in zip(rows, verdicts, strict=True)
        ]
        return np.array(right, bool).reshape(shape)

    def _worker(self) -> Worker:
        if self._idle:
            return self._idle.pop()
        if self._function is None:
            return Worker(InThread(self._verify, self._decode))
        return Worker(InProcess(self._function, self._decode, self._timeout))

    def _run(self, rows: list, watch: bool) -> list[Verdict]:
        """The verdict on each row."""
        verdicts: list[Any] = [None] * len(rows)
        results: queue.SimpleQueue = queue.SimpleQueue()
        running: dict[Worker, tuple[int, float]] = {}
        waiting = list(range(len(rows)))[::-1]
        grace = 0.0 if self._function is None else _START_SECONDS
        while waiting or running:
            while waiting and len(running) < self._workers:
                worker, number = self._worker(), waiting.pop()
                tokens, truth = rows[number]
                first = not self._watched and tokens.size > 0
                self._watched |= first
                running[worker] = number, time.monotonic() + grace + self._timeout
                worker.jobs.put(Job(number, tokens, truth, watch or first, results))
            soonest = min(deadline for _, deadline in running.values())
            try:
                wait = max(soonest - time.monotonic(), 0.0)
                worker, number, verdict, seconds = results.get(timeout=wait)
            except queue.Empty:
                now = time.monotonic()
                late = [worker for worker, (_, deadline) in running.items() if deadline <= now]
                for worker in late:  # abandoned; a thread exits when its verifier returns
                    number, deadline = running.pop(worker)
                    verdicts[number] = self._late(now - deadline)
                    worker.stop()
                continue
            if worker not in running:
                continue
            if verdict.kind == "started":
                running[worker] = number, verdict.value + self._timeout
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

    def _late(self, beyond: float) -> Verdict:
        """Noticed well beyond the deadline, as nothing here could run, or at it."""
        locked = self._function is None and beyond > _NOTICE_SECONDS + 0.1 * self._timeout
        return Verdict("timed out", self._timeout + beyond if locked else None)

    def _refuse(self, verdict: Verdict, workers: list[Worker]) -> None:
        """Raise where the verifier cannot run here; where no process starts, go on in threads."""
        if verdict.kind == "signals":
            stop_all(workers)
            raise TypeError(
                f"verify calls signal.{verdict.value}, which only works in the main thread, and "
                "runs in others here: give processes=4, or a verify without alarms, and timeout."
            )
        stop_all(self._idle)
        workers[0].stop()
        if self._function is not None:
            warnings.warn(
                f"verify does not start in a process ({verdict.value}) and runs in threads, where "
                "a deadline does not end what holds Python's lock.",
                VerifierWarning,
                stacklevel=2,
            )
        self._function, self.processes = None, 0

    def _is_right(self, tokens: np.ndarray, verdict: Verdict) -> bool:
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


def host_verifier(
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
    at its deadline: a thread that holds Python's lock, such as a regular expression that
    backtracks, stops the whole run, Ctrl-C included. Only a process runs ``verify`` in its main
    thread, which ``signal.alarm`` needs. But it has a copy of ``verify``: what that changes or
    prints is not seen here. The default is four processes where that makes no difference
    (``verify`` refers to constants, installed packages and functions of the kind, sets no variable
    outside itself, prints and logs nothing), four threads otherwise.

    A run resumes to the bit if each verdict is reproducible: no timeout.

    Args:
        verify: ``(text, answer) -> bool``; the answer is a row of ``Questions.answers``, in numpy.
        decode: ``tokens -> text``, of one rationale, end token included. It runs in this process.
        timeout: Seconds for one rationale.
        threads: Number of threads of this process.
        processes: Number of processes, started when first needed. They see the CPU alone, and get
            the code of ``verify`` with a pickled copy of what it refers to.

    Raises:
        TypeError: ``verify`` or ``decode`` is no function, or ``verify`` cannot be sent to
            ``processes``; when tried or handed to ``mcmc_em``, ``verify`` returns something else
            than a bool, or uses signals in ``threads``.
        ValueError: a number is not positive, or both threads and processes are given.

    Example:
        >>> import numpy as np, jax.numpy as jnp
        >>> from stochgrad import em
        >>> verify = em.host_verifier(
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
        function = pickle_function(verify) if sys.executable and is_pure(verify) else None
        return HostVerifier(verify, decode, timeout, _NUM_WORKERS, function)
    processes = check_count("processes", processes)
    try:
        function = pickle_function(verify)
        trial = InProcess(function, decode, timeout)
        trial.start()
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"verify cannot be sent to processes: {first_line(error)}. Let it refer to functions "
            "and data that can be pickled, or give threads=4."
        ) from error
    verifier = HostVerifier(verify, decode, timeout, processes, function)
    verifier._idle.append(Worker(trial))
    return verifier


@functools.cache
def _warn_of_on_host() -> None:
    warnings.warn("em.on_host is now em.host_verifier.", DeprecationWarning, stacklevel=3)


def on_host(*args: Any, **kwargs: Any) -> HostVerifier:
    """Deprecated name of ``host_verifier``."""
    _warn_of_on_host()
    return host_verifier(*args, **kwargs)
