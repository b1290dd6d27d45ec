"""Verifiers in Python: what raises, hangs or returns nonsense costs one rationale."""

import asyncio
import os
import re
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import em
from stochgrad.em import _host_verifier
from tests.em.toys import small


def text_of(tokens):
    return " ".join(str(token) for token in tokens)


def test_what_fails_costs_one_rationale():
    released = threading.Event()

    def verify(text, answer):
        if text == "1":
            raise RuntimeError("a bad parse")
        if text == "2":
            released.wait(30)
        if text == "3":
            return 1.0
        return text == str(answer)

    verify = em.host_verifier(verify, text_of, timeout=0.3, threads=2)
    tokens = jnp.arange(6, dtype=jnp.int32)[:, None]
    answers = jnp.array([0, 1, 2, 3, 4, 9])
    start = time.monotonic()
    with pytest.warns(em.VerifierWarning) as seen:
        right = jax.block_until_ready(jax.jit(verify)(tokens, jnp.ones((6, 1), bool), answers))
    assert time.monotonic() - start < 10
    assert right.tolist() == [True, False, False, False, True, False]
    assert verify.failures == {"raised": 1, "timed out": 1, "returned no bool": 1}
    said = " ".join(str(warning.message) for warning in seen)
    for words in ("RuntimeError('a bad parse')", "more than 0.3 seconds", "where a bool is due"):
        assert words in said
    released.set()
    again = verify(tokens[:1], jnp.ones((1, 1), bool), answers[:1])
    assert again.tolist() == [True]


TWO = jnp.array([[1, 2], [3, 4]], jnp.int32), jnp.ones((2, 2), bool), jnp.array([1, 3])


def backtracks(text, answer):
    return bool(re.match(r"(a+)+$", "a" * 60 + "b")) if text == "1 2" else True


def test_a_deadline_comes_also_where_pythons_lock_is_held():
    """A regular expression that would take centuries, with no setting; then the run goes on."""
    verify = em.host_verifier(backtracks, text_of, timeout=0.3)
    assert verify.processes
    start = time.monotonic()
    with pytest.warns(em.VerifierWarning, match=r"more than 0\.3 seconds"):
        assert verify(*TWO).tolist() == [False, True]
    assert time.monotonic() - start < 60
    assert verify.failures == {"timed out": 1}
    assert verify(*(part[1:] for part in TWO)).tolist() == [True]


def test_a_thread_that_came_too_late_is_wrong_and_says_why():
    """In threads nothing ends it: its verdict must not count, and the remedy is named."""

    def verify(text, answer):
        return not re.match(r"(a+)+$", "a" * 23 + "b")

    verify = em.host_verifier(verify, text_of, timeout=0.01, threads=1)
    with pytest.warns(em.VerifierWarning, match="Python's lock.*processes=4"):
        assert verify(*TWO).tolist() == [False, False]
    assert verify.failures == {"timed out": 2}


def alarmed(text, answer):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(30)
    try:
        return text.endswith(str(answer + 1))
    finally:
        signal.alarm(0)


def test_a_verifier_with_alarms_runs_where_they_work():
    assert em.host_verifier(alarmed, text_of)(*TWO).tolist() == [True, True]


def test_a_verifier_with_alarms_is_refused_in_threads():
    """Also where it hides the error, and where it looks at rationales with text alone."""

    def swallows(text, answer):
        try:
            return alarmed(text, answer)
        except ValueError:
            return False

    def later(text, answer):
        return swallows(text, answer) if text.startswith("3") else False

    for verify in (alarmed, swallows, later):
        threads = em.host_verifier(verify, text_of, threads=2)
        if verify is later:
            threads.check(TWO[2])
            assert threads(*(part[:1] for part in TWO)).tolist() == [False]
        with pytest.raises(TypeError, match=r"verify calls signal.*main thread.*processes=4"):
            threads(*TWO) if verify is later else threads.check(TWO[2])


def test_what_is_seen_outside_a_verifier_keeps_it_in_threads():
    """A copy in another process would lose it without a word."""
    seen = []

    def collects(text, answer):
        seen.append(text)
        return True

    def counts(text, answer):
        nonlocal number
        number += 1
        return True

    def prints(text, answer):
        print(text)
        return True

    number = 0
    for verify in (collects, counts, prints):
        assert em.host_verifier(verify, text_of).processes == 0
    verifier = em.host_verifier(counts, text_of)
    assert verifier(*TWO).tolist() == [True, True]
    assert number == 2
    table = {"1 2": True}
    copied = em.host_verifier(lambda text, answer: table.get(text, False), text_of, processes=1)
    assert copied(*TWO).tolist() == [True, False]


def test_threads_that_nothing_ends_do_not_pile_up():
    released = threading.Event()

    def verify(text, answer):
        released.wait(60)
        return True

    verify = em.host_verifier(verify, text_of, timeout=0.1, threads=1)
    with pytest.warns(em.VerifierWarning, match=r"more than 0\.1 seconds"):
        assert verify(*(part[:1] for part in TWO)).tolist() == [False]
    with pytest.raises(RuntimeError, match=r"still runs in 2 threads.*processes=4"):
        verify(*TWO)
    released.set()


def lengths(text, answer):
    return len(text) / 2.0 if answer != 3 else float("nan")


async def patient(text, answer):
    await asyncio.sleep(0.01)
    return text.startswith(str(answer))


def in_batch(texts, answers):
    return [text.startswith(str(answer)) for text, answer in zip(texts, answers, strict=True)]


@pytest.mark.parametrize("where", [{"processes": 1}, {"threads": 2}], ids=["processes", "threads"])
def test_numbers_batches_and_coroutines(where):
    numbers = em.host_verifier(lengths, text_of, verdict="number", **where)
    found = jax.jit(numbers)(*TWO)
    assert found.dtype == jnp.float32
    assert found[0] == 1.5
    assert jnp.isnan(found[1])
    for verify, settings in ((patient, {}), (in_batch, {"batch": True})):
        verifier = em.host_verifier(verify, text_of, **settings, **where)
        verifier.check(TWO[2])
        assert verifier(*TWO).tolist() == [True, True]
        assert not verifier.failures


def test_a_batch_that_fails_is_wrong_as_a_whole():
    def short(texts, answers):
        return [True]

    def slow(texts, answers):
        time.sleep(60 if len(texts) > 1 else 0)
        return [True] * len(texts)

    for verify, words in ((short, "1 verdicts for 2"), (slow, "more than 0.3 seconds")):
        verifier = em.host_verifier(verify, text_of, batch=True, timeout=0.3, processes=1)
        verifier.check(TWO[2])
        with pytest.warns(em.VerifierWarning, match=f"{words}.*a batch of 2 rationales"):
            assert verifier(*TWO).tolist() == [False, False]
        assert sum(verifier.failures.values()) == 2


def test_a_soft_verifier_in_python_is_a_likelihood():
    toy = small()
    table = [[0.5 * bool(x) for x in row] for row in toy.right]
    verify = em.host_verifier(
        lambda text, answer: table[int(answer)][int(text)] if text else 0.0,
        text_of,
        verdict="number",
    )
    model = em.verified(toy.policy(), verify)
    theta = jnp.array([0.4, -0.3])
    target = em.mcmc_em(model, toy.questions(), batch_size=3)
    state = target.init(jax.random.key(0), theta)
    for key in jax.random.split(jax.random.key(1), 5):
        state = target.next(key, theta, state)[1]
    found = np.asarray(state.memory.log_likelihood)
    assert set(np.exp(found).round(6).tolist()) <= {0.0, 0.5}
    assert np.isfinite(found).any()


def ends(text, answer):
    os._exit(3)


def raises(text, answer):
    return {}[text]


def hangs(text, answer):
    time.sleep(60)


@pytest.mark.parametrize(
    ("verify", "words"),
    [
        (ends, r"ended its process \(code 3\)"),
        (raises, "raised KeyError"),
        (hangs, "took more than 0.3 seconds"),
    ],
    ids=["ends", "raises", "hangs"],
)
def test_a_trial_that_fails_is_refused_where_the_model_is_made_use_of(verify, words):
    toy = small()
    model = em.verified(toy.policy(), em.host_verifier(verify, text_of, timeout=0.3, processes=1))
    with pytest.raises(ValueError, match=f"verify must return a bool of any text, but {words}"):
        em.mcmc_em(model, toy.questions(), batch_size=1)


def test_what_cannot_be_sent_to_processes_is_refused():
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"verify cannot be sent to processes: .*lock"):
        em.host_verifier(lambda text, answer: lock.locked(), text_of, processes=1)
    with pytest.raises(ValueError, match="threads and processes"):
        em.host_verifier(backtracks, text_of, processes=1, threads=1)


def test_a_process_that_ends_costs_one_rationale():
    def verify(text, answer):
        if answer == 1:
            os._exit(3)
        return True

    verify = em.host_verifier(verify, text_of, processes=1)
    with pytest.warns(em.VerifierWarning, match=r"ended its process \(code 3\)"):
        assert verify(*TWO).tolist() == [False, True]
    assert verify.failures == {"ended its process": 1}


def test_rationales_are_verified_side_by_side():
    together = threading.Barrier(4, timeout=20)

    def verify(text, answer):
        together.wait()
        return True

    verify = em.host_verifier(verify, text_of, threads=4)
    tokens = jnp.zeros((8, 2), jnp.int32)
    assert verify(tokens, jnp.ones((8, 2), bool), jnp.zeros(8)).all()


def test_masked_tokens_and_restarts_side_by_side():
    """A verifier under ``vmap`` sees one rationale at a time."""
    verify = em.host_verifier(lambda text, answer: text == f"{answer[0]} {answer[1]}", text_of)
    tokens = jnp.array([[[1, 2, 7], [3, 4, 7]], [[5, 6, 7], [8, 9, 7]]], jnp.int32)
    mask = tokens != 7
    answers = jnp.array([[[1, 2], [0, 4]], [[5, 6], [8, 9]]])
    found = jax.vmap(verify)(tokens, mask, answers)
    assert found.tolist() == [[True, False], [True, True]]


def test_learning_with_a_verifier_on_the_host_is_learning_with_one_on_the_device():
    toy = small()
    host = em.host_verifier(
        lambda text, answer: bool(toy.right[int(answer), int(text)]) if text else False, text_of
    )
    theta, found = jnp.array([0.4, -0.3]), []
    for model in (toy.model(), em.verified(toy.policy(), host)):
        target = em.mcmc_em(model, toy.questions(), batch_size=2)

        @jax.jit
        def step(state, key, target=target):
            score, state = target.next(key, theta, state)
            return state, score(theta)[1]

        state = target.init(jax.random.key(0), theta)
        for key in jax.random.split(jax.random.key(1), 10):
            state, slope = step(state, key)
            found.append(slope.tolist())
    assert found[:10] == found[10:]
    assert any(map(any, found))
    assert not host.failures


def test_a_verifier_that_returns_no_bool_is_refused():
    toy = small()
    for verdict in (1.0, None, "yes"):
        model = em.verified(toy.policy(), em.host_verifier(lambda text, answer: verdict, text_of))
        with pytest.raises(TypeError, match="verify must return a bool, got"):
            em.mcmc_em(model, toy.questions(), batch_size=1)
        with pytest.raises(TypeError, match="verify must return a bool, got"):
            em.evaluate(jax.random.key(0), model, jnp.zeros(2), toy.questions())
    with pytest.raises(TypeError, match="decode must be a function"):
        em.host_verifier(lambda text, answer: True, None)
    with pytest.raises(ValueError, match="timeout"):
        em.host_verifier(lambda text, answer: True, text_of, timeout=0.0)


def test_a_rationale_that_was_cut_off_is_wrong():
    toy = small()
    model = em.verified(toy.policy(), lambda tokens, mask, answers: mask[:, 0], end=9)
    tokens, mask = jnp.array([[1, 9], [1, 2], [1, 9]]), jnp.array([[1, 1], [1, 1], [1, 0]], bool)
    found = model.log_likelihood(jnp.zeros(2), None, tokens, mask, jnp.zeros(3))
    assert jnp.exp(found).tolist() == [1.0, 0.0, 0.0]


def test_the_old_name_warns_once():
    _host_verifier._warn_of_on_host.cache_clear()
    with pytest.warns(DeprecationWarning, match="em.host_verifier") as seen:
        verifiers = [em.on_host(lambda t, answer: t == "1 2", text_of, threads=n) for n in (1, 2)]
    assert [warning.filename for warning in seen] == [__file__]
    assert verifiers[0](*TWO).tolist() == [True, False]
