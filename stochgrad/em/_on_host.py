"""Verifiers in Python: run on the host, side by side, each with a deadline."""

import queue
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from stochgrad.core import check_count, check_number


class VerifierWarning(UserWarning):
    """A verifier raised, ran out of time or returned no bool; the rationale counts as wrong."""


class _LateError(Exception):
    """Stands for a verdict that did not come in time."""


class _Job(NamedTuple):
    number: int
    tokens: np.ndarray
    answer: Any
    results: queue.SimpleQueue


class _Worker:
    """A thread that verifies one rationale after another until it is told ``None``."""

    def __init__(self, judge: Callable[[np.ndarray, Any], Any]):
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(judge,), daemon=True).start()

    def _work(self, judge):
        while (job := self.jobs.get()) is not None:
            try:
                verdict = judge(job.tokens, job.answer)
            except BaseException as error:
                verdict = error
            job.results.put((self, job.number, verdict))


class HostVerifier:
    """What ``on_host`` makes: a verifier of tokens, masks and answers.

    Attributes:
        failures: How many rationales were counted as wrong for each reason: ``"raised"``,
            ``"timed out"``, ``"returned no bool"``.
    """

    def __init__(self, verify, decode, timeout: float, threads: int):
        self.failures: Counter[str] = Counter()
        self._verify, self._decode = verify, decode
        self._timeout, self._threads = timeout, threads
        self._idle: list[_Worker] = []

    def __call__(
        self, tokens: Int[Array, "n length"], mask: Bool[Array, "n length"], answers: PyTree
    ) -> Bool[Array, " n"]:
        """Whether each rationale is right."""
        shape = jax.ShapeDtypeStruct(mask.shape[:-1], jnp.bool_)
        return jax.pure_callback(
            self._on_arrays, shape, tokens, mask, answers, vmap_method="broadcast_all"
        )

    def check(self, answers: PyTree) -> None:
        """Try the verifier once, on a rationale without tokens and the first answer.

        Raises:
            TypeError: it returns something else than a bool.
        """
        first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), answers)
        (verdict,) = self._run([(np.zeros(0, np.int32), first)])
        if not isinstance(verdict, _BOOLS | BaseException):
            raise TypeError(
                f"verify must return a bool, got {verdict!r} of type {type(verdict).__name__}."
            )

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
        verdicts = self._run(rows)
        right = [
            self._accepted(row[0], verdict) for row, verdict in zip(rows, verdicts, strict=True)
        ]
        return np.array(right, bool).reshape(shape)

    def _run(self, rows: list) -> list[Any]:
        """The verdict on each row, or the exception instead of it."""
        verdicts: list[Any] = [None] * len(rows)
        results: queue.SimpleQueue = queue.SimpleQueue()
        running: dict[_Worker, tuple[int, float]] = {}
        waiting = list(range(len(rows)))[::-1]
        while waiting or running:
            while waiting and len(running) < self._threads:
                worker = self._idle.pop() if self._idle else _Worker(self._judge)
                number = waiting.pop()
                running[worker] = number, time.monotonic() + self._timeout
                worker.jobs.put(_Job(number, rows[number][0], rows[number][1], results))
            soonest = min(deadline for _, deadline in running.values())
            try:
                wait = max(soonest - time.monotonic(), 0.0)
                worker, number, verdict = results.get(timeout=wait)
            except queue.Empty:
                now = time.monotonic()
                late = [worker for worker, (_, deadline) in running.items() if deadline <= now]
                for worker in late:  # left to itself: it ends when its verifier does
                    verdicts[running.pop(worker)[0]] = _LateError()
                    worker.jobs.put(None)
                continue
            if worker in running:
                del running[worker]
                verdicts[number] = verdict
                self._idle.append(worker)
        return verdicts

    def _judge(self, tokens: np.ndarray, answer: Any) -> Any:
        return self._verify(self._decode(tokens), answer)

    def _accepted(self, tokens: np.ndarray, verdict: Any) -> bool:
        if isinstance(verdict, _BOOLS):
            return bool(verdict)
        if isinstance(verdict, _LateError):
            reason, words = "timed out", f"took more than {self._timeout:g} seconds"
        elif isinstance(verdict, BaseException):
            reason, words = "raised", f"raised {verdict!r}"
        else:
            reason, words = "returned no bool", f"returned {verdict!r} where a bool is due"
        self.failures[reason] += 1
        if self.failures[reason] == 1:
            warnings.warn(
                f"the verifier {words} on a rationale of {tokens.size} tokens, which counts as "
                "wrong; more of the kind are counted in the verifier's failures.",
                VerifierWarning,
                stacklevel=2,
            )
        return False


_BOOLS = bool | np.bool_


def on_host(
    verify: Callable[[str, Any], bool],
    decode: Callable[[np.ndarray], str],
    *,
    timeout: float = 10.0,
    threads: int = 4,
) -> HostVerifier:
    """A verifier from a Python function of text, for ``stochgrad.em.verified``.

    The compiled E-step hands the tokens of a minibatch over and waits for the verdicts. Threads
    verify them side by side; what holds Python's lock runs one at a time, so that heavy verifiers
    should start processes of their own. A rationale whose verifier raises, hangs or returns no bool
    counts as wrong, and the run goes on.

    A run whose verifier gives the same verdict each time goes on from a checkpoint to the bit; one
    that runs into its timeout does not.

    Args:
        verify: ``(text, answer) -> bool``, where the answer is one row of ``Questions.answers``, of
            numpy arrays.
        decode: ``tokens -> text``, from the token numbers of one rationale, end token included.
        timeout: Seconds for one rationale.
        threads: Rationales verified side by side.

    Raises:
        TypeError: ``verify`` or ``decode`` is no function; when handed to ``mcmc_em``, ``verify``
            returns something else than a bool.
        ValueError: ``timeout`` or ``threads`` is not positive.

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
    for name, value in (("verify", verify), ("decode", decode)):
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {value!r}.")
    check_number("timeout", timeout)
    return HostVerifier(verify, decode, timeout, check_count("threads", threads))
