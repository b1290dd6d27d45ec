"""Verifiers in Python: run on the host, side by side, each with a deadline."""

import functools
import queue
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from stochgrad.core import (
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_instance,
    check_number,
    data_rows,
    describe,
    first_line,
)
from stochgrad.em._function_pickle import is_pure, pickle_function
from stochgrad.em._model import VerifierWarning
from stochgrad.em._verifier_workers import (
    Form,
    InProcess,
    InThread,
    Job,
    Verdict,
    Worker,
    stop_all,
)

_START_SECONDS = 120.0  # in which a process must have started
_NOTICE_SECONDS = 0.1  # in which a deadline is noticed, if Python's lock is free
_NUM_WORKERS = 4


class HostVerifier:
    """What ``host_verifier`` makes: a verifier of tokens, masks and answers.

    Attributes:
        failures: How many rationales were counted as wrong for each reason: ``"raised"``,
            ``"timed out"``, ``"returned no bool"`` or ``"returned no number"``, ``"ended its
            process"``.
        processes: Processes that it runs in; 0 for threads.
    """

    def __init__(
        self,
        verify,
        decode,
        timeout: float,
        workers: int,
        function: bytes | None = None,
        verdict: Literal["bool", "number"] = "bool",
        batch: bool = False,
    ):
        self._verify = check_callable("verify", verify, "a function (text, answer) -> bool")
        decode = check_callable("decode", decode, "a function tokens -> text")
        self._timeout = check_number("timeout", timeout)
        self._workers = check_count("workers", workers)
        check_choice("verdict", verdict, ("bool", "number"))
        self._form = Form(verdict, check_flag("batch", batch))
        self._decode = _each(decode) if batch else decode
        if function is not None:
            check_instance("function", function, bytes, "verify as bytes, or None")
        self._function = function
        self.failures: Counter[str] = Counter()
        self.processes = 0 if function is None else self._workers
        self._abandoned: list[Worker] = []
        self._idle: list[Worker] = []
        weakref.finalize(self, stop_all, self._idle)

    def __call__(
        self, tokens: Int[Array, "n length"], mask: Bool[Array, "n length"], answers: PyTree
    ) -> Bool[Array, " n"] | Float[Array, " n"]:
        """Whether each rationale is right, or its number.

        Raises:
            ValueError: shapes do not fit each other.
            TypeError: the mask is not of bools; the verifier sets alarms, and runs in threads.
            RuntimeError: as many threads as there may be are still busy after their deadlines.
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
        shape, arguments = jax.ShapeDtypeStruct(rows, self._dtype), (tokens, mask, answers)
        return jax.pure_callback(self._on_arrays, shape, *arguments, vmap_method="broadcast_all")

    def check(self, answers: PyTree) -> None:
        """Try the verifier once, on a rationale without tokens and the first answer.

        Raises:
            TypeError: it returns something else than its verdict; it sets alarms, in threads.
            ValueError: it raises, or ends at its deadline or by itself.
        """
        if jax.tree.leaves(answers):
            data_rows(answers, name="answers")
        first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), answers)
        (verdict,) = self._run(self._jobs([(np.zeros(0, np.int32), first)]))
        wanted = f"verify must return a {self._form.verdict}"
        if verdict.kind.startswith("returned"):
            raise TypeError(f"{wanted}, got {verdict.value}.")
        if verdict.kind != "verdict":
            raise ValueError(
                f"{wanted} of any text, but {self._words(verdict)[0]} on a rationale without "
                "tokens and the first answer: let it return what is due to a wrong one."
            )

    @property
    def _dtype(self):
        return jnp.bool_ if self._form.verdict == "bool" else jnp.float32

    def _jobs(self, rows: list) -> list:
        """The rows one by one, or all as one."""
        return [tuple(map(list, zip(*rows, strict=True)))] if self._form.batch else rows

    def _on_arrays(self, tokens, mask, answers):
        shape = mask.shape[:-1]
        flat = lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[len(shape) :])
        tokens, mask, answers = jax.tree.map(flat, (tokens, mask, answers))
        row = lambda n: (tokens[n, mask[n]], jax.tree.map(lambda leaf: leaf[n], answers))
        rows = [row(n) for n in range(len(mask))]
        jobs = self._jobs(rows) if rows else []
        values = [
            self._value(job[0], verdict) for job, verdict in zip(jobs, self._run(jobs), strict=True)
        ]
        values = [value for part in values for value in part] if self._form.batch else values
        return np.array(values, self._dtype).reshape(shape)

    def _worker(self) -> Worker:
        if self._idle:
            return self._idle.pop()
        if self._function is None:
            return Worker(InThread(self._verify, self._decode, self._form))
        return Worker(InProcess(self._function, self._decode, self._timeout, self._form))

    def _run(self, jobs: list) -> list[Verdict]:
        """The verdict on each of some jobs, pairs of tokens and answers."""
        verdicts: list[Any] = [None] * len(jobs)
        results: queue.SimpleQueue = queue.SimpleQueue()
        running: dict[Worker, tuple[int, float]] = {}
        waiting = list(range(len(jobs)))[::-1]
        grace = 0.0 if self._function is None else _START_SECONDS
        while waiting or running:
            while waiting and len(running) < self._workers:
                worker, number = self._worker(), waiting.pop()
                running[worker] = number, time.monotonic() + grace + self._timeout
                tokens, truth = jobs[number]
                worker.jobs.put(Job(number, tokens, truth, results))
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
                    self._abandon(worker, list(running))
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

    def _abandon(self, worker: Worker, running: list[Worker]) -> None:
        """Count threads that no deadline ends; raise where there are too many."""
        if self._function is not None:
            return
        self._abandoned.append(worker)
        if len(self._abandoned) > self._workers:  # give them a last chance
            end = time.monotonic() + max(self._timeout, 1.0)
            for other in self._abandoned:
                other.thread.join(max(end - time.monotonic(), 0.0))
            self._abandoned = [other for other in self._abandoned if other.thread.is_alive()]
        if len(self._abandoned) > self._workers:
            stop_all(running)
            raise RuntimeError(
                f"verify still runs in {len(self._abandoned)} threads after its deadline of "
                f"{self._timeout:g} seconds, which nothing ends: give processes=4, where a "
                "deadline does."
            )

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

    def _words(self, verdict: Verdict) -> tuple[str, str]:
        """What to say of a verifier that failed, and what helps."""
        kind, value = verdict
        if kind == "timed out" and value is not None:
            words = f"held Python's lock for {value:.1f} seconds, beyond its {self._timeout:g},"
            return words, "in threads no deadline ends it, with processes=4 it does; "
        words = {
            "timed out": f"took more than {self._timeout:g} seconds",
            "raised": f"raised {value}",
            "ended its process": f"ended its process ({value})",
        }
        due = f"returned {value} where a {self._form.verdict} is due"
        return words.get(kind, due), ""

    def _value(self, tokens: Any, verdict: Verdict) -> Any:
        """What a job's rationales get."""
        if verdict.kind == "verdict":
            return verdict.value
        count = len(tokens) if self._form.batch else 1
        first = self.failures[verdict.kind] == 0
        self.failures[verdict.kind] += count
        if first:
            words, remedy = self._words(verdict)
            if self._form.batch:
                where = f"a batch of {count} rationales, which count"
            else:
                where = f"a rationale of {tokens.size} tokens, which counts"
            warnings.warn(
                f"the verifier {words} on {where} as wrong; {remedy}more of the kind are counted "
                "in the verifier's failures.",
                VerifierWarning,
                stacklevel=2,
            )
        return [0] * count if self._form.batch else 0


def _each(decode: Callable[[np.ndarray], str]) -> Callable[[list], list[str]]:
    return lambda rows: [decode(row) for row in rows]


def host_verifier(
    verify: Callable[[Any, Any], Any],
    decode: Callable[[np.ndarray], str],
    *,
    timeout: float = 10.0,
    threads: int | None = None,
    processes: int | None = None,
    verdict: Literal["bool", "number"] = "bool",
    batch: bool = False,
) -> HostVerifier:
    """A verifier from a Python function of text, for ``stochgrad.em.verified``.

    The compiled E-step hands the tokens of a minibatch over and waits for the verdicts. A rationale
    whose verifier raises, hangs or returns no verdict counts as wrong, with a ``VerifierWarning``
    for the first of each kind, and the run goes on.

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
            May be a coroutine function.
        decode: ``tokens -> text``, of one rationale, end token included. It runs in this process.
        timeout: Seconds for one rationale, or for one batch.
        threads: Number of threads of this process. Calls are watched for signals there, which costs
            Python code some of its speed.
        processes: Number of processes, started when first needed. They see the CPU alone, and get
            the code of ``verify`` with a pickled copy of what it refers to.
        verdict: ``"bool"``, or ``"number"`` for a likelihood from 0 to 1 or a reward, as
            ``stochgrad.em.verified`` takes them.
        batch: Whether ``verify`` takes all texts and answers of a minibatch, as two lists, and
            returns a list of verdicts.

    Raises:
        TypeError: ``verify`` or ``decode`` is no function, or ``verify`` cannot be sent to
            ``processes``; when tried or handed to ``mcmc_em``, ``verify`` returns something else
            than its verdict, or uses signals in ``threads``.
        ValueError: a number is not positive, or both threads and processes are given; when tried,
            ``verify`` raises or does not end in time.

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
    check_choice("verdict", verdict, ("bool", "number"))
    check_flag("batch", batch)
    if threads is not None and processes is not None:
        raise ValueError("threads and processes exclude each other: give one of them.")
    if threads is not None:
        threads = check_count("threads", threads)
        return HostVerifier(verify, decode, timeout, threads, None, verdict, batch)
    if processes is None:
        function = pickle_function(verify) if sys.executable and is_pure(verify) else None
        return HostVerifier(verify, decode, timeout, _NUM_WORKERS, function, verdict, batch)
    processes = check_count("processes", processes)
    try:
        function = pickle_function(verify)
        verifier = HostVerifier(verify, decode, timeout, processes, function, verdict, batch)
        worker = verifier._worker()
        worker.way.start()
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"verify cannot be sent to processes: {first_line(error)}. Let it refer to functions "
            "and data that can be pickled, or give threads=4."
        ) from error
    verifier._idle.append(worker)
    return verifier


@functools.cache
def _warn_of_on_host() -> None:
    warnings.warn("em.on_host is now em.host_verifier.", DeprecationWarning, stacklevel=3)


def on_host(*args: Any, **kwargs: Any) -> HostVerifier:
    """Deprecated name of ``host_verifier``."""
    _warn_of_on_host()
    return host_verifier(*args, **kwargs)
