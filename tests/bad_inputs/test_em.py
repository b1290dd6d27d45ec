"""Bad input to stochgrad.em: one sentence of our own."""

import os
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import em
from tests.bad_inputs import harness
from tests.em.networks import cache, network, parameters
from tests.em.toys import small

refuses = partial(harness.refuses, quiet=False)


TOY, THETA, KEY = small(), jnp.array([0.4, -0.3]), jax.random.key(0)
MODEL, QUESTIONS, POLICY = TOY.model(), TOY.questions(), TOY.policy()
HINTED = TOY.questions(hints=jnp.arange(3))
PARAMS = parameters(jax.random.key(0), 6)
PROMPTS = em.left_padded([[1, 2], [3]])
LOCK = threading.Lock()


def verify(text, answer):
    return True


def text_of(tokens):
    return ""


THREADS = em.host_verifier(verify, text_of, threads=1)
COUNT = (0, -1, 1.5, True, "3", None, np.array([1, 2]), jnp.nan, int)
OPTIONAL_COUNT = tuple(bad for bad in COUNT if bad is not None)
NUMBER = (-1.0, jnp.nan, jnp.inf, "1", None, True, [1.0, 2.0], 1j, float)
SHARE = (*NUMBER, 1.5)
FLAG = (1, 0, "yes", None, np.array([True, False]))
CHOICE = ("other", None, 3, ["one"], b"one")
FUNCTION = (None, 3, "verify", [verify])
INSTANCE = (None, 3, "one", {}, lambda: None)


def instance(*more):
    return (*INSTANCE, *more)


GOOD_AND_WRONG = {  # what to call, what it is called with, and what is wrong for each argument
    "trice": (
        em.trice,
        {},
        {
            "control_variate": ("loo", -1.0, None, True, jnp.nan, [0.5, 0.5]),
            "subsample": OPTIONAL_COUNT,
            "directions": OPTIONAL_COUNT,
        },
    ),
    "star": (em.star, {}, {"greedy": FLAG}),
    "raft": (em.raft, {}, {"kept": CHOICE}),
    "rest_em": (em.rest_em, {}, {"most": COUNT}),
    "reinforce": (em.reinforce, {}, {"baseline": CHOICE, "directions": OPTIONAL_COUNT}),
    "grpo": (em.grpo, {}, {"epsilon": (0.0, *NUMBER)}),
    "maxk": (em.maxk, {}, {"k": COUNT}),
    "uniform": (em.uniform, {}, {"per_question": COUNT}),
    "gvm": (
        em.gvm,
        {},
        {
            "per_question": (*COUNT, 3, 1, 2, 6),
            "alpha": NUMBER,
            "beta": (jnp.nan, "2", None, True),
            "floor": SHARE,
            "directions": COUNT,
        },
    ),
    "reinforce_ada": (
        em.reinforce_ada,
        {},
        {
            "per_round": COUNT,
            "rounds": COUNT,
            "positive": (*COUNT, 100),
            "negative": (-1, 1.5, None, True, 100),
            "corrected": FLAG,
        },
    ),
    "vade": (em.vade, {}, {"per_question": COUNT, "decay": SHARE, "floor": SHARE}),
    "Tally.none": (em.Tally.none, {}, {"questions": COUNT}),
    "History.none": (em.History.none, {}, {"questions": COUNT}),
    "left_padded": (
        em.left_padded,
        {"prompts": [[1, 2], [3]]},
        {
            "prompts": (
                None, 3, [], [[1], []], "text", ["ab", "cd"], [[1.5]], [[True]], [[-1]], [1, 2],
                [[None]], [[2**40]], {"a": [1]}, [[[1]]], [np.array(["a"])],
            ),
            "length": (*OPTIONAL_COUNT, 1),
            "pad": (-1, 1.5, None, "0", 2**40),
        },
    ),
    "decoder": (
        em.decoder,
        {"network": network, "cache": cache, "length": 3, "end": 5},
        {
            "network": FUNCTION,
            "cache": FUNCTION,
            "length": COUNT,
            "end": (-1, 1.5, None, "end", True),
            "temperature": (0.0, *NUMBER),
            "top_p": (0.0, *SHARE),
            "context": OPTIONAL_COUNT,
            "pad": (-1, 1.5, None, True),
        },
    ),
    "verified": (
        em.verified,
        {"policy": POLICY, "verify": TOY.verify},
        {
            "policy": instance(em.Policy, POLICY.sample, MODEL, em.Policy(None, None)),
            "verify": FUNCTION,
            "end": (-1, 1.5, "end", True, [5]),
        },
    ),
    "host_verifier": (
        em.host_verifier,
        {"verify": verify, "decode": text_of},
        {
            "verify": FUNCTION,
            "decode": FUNCTION,
            "timeout": (0.0, *NUMBER),
            "threads": OPTIONAL_COUNT,
            "processes": OPTIONAL_COUNT,
            "verdict": CHOICE,
            "batch": FLAG,
        },
    ),
    "HostVerifier": (
        em.HostVerifier,
        {"verify": verify, "decode": text_of, "timeout": 1.0, "workers": 1},
        {
            "verify": FUNCTION,
            "decode": FUNCTION,
            "timeout": NUMBER,
            "workers": COUNT,
            "function": ("text", 3, verify),
            "verdict": CHOICE,
            "batch": FLAG,
        },
    ),
    "HostVerifier of arrays": (
        THREADS,
        {
            "tokens": jnp.zeros((2, 3), jnp.int32),
            "mask": jnp.ones((2, 3), bool),
            "answers": jnp.zeros(2),
        },
        {
            "tokens": (None, 3, "text", jnp.zeros((2, 3)), jnp.zeros((3, 2), jnp.int32), [[1]]),
            "mask": (None, True, jnp.ones((2, 3)), np.ones((), bool)),
            "answers": (jnp.zeros(3), 4, {"a": jnp.zeros(1)}),
        },
    ),
    "mcmc_em": (
        em.mcmc_em,
        {"model": MODEL, "questions": QUESTIONS, "batch_size": 2},
        {
            "model": instance(
                em.LatentModel, POLICY, MODEL._replace(log_likelihood=None),
                MODEL._replace(policy=None), MODEL._replace(check=3),
            ),
            "questions": instance(
                em.Questions(()), em.Questions(None), em.Questions(jnp.zeros((0, 2)), jnp.zeros(0)),
                em.Questions(jnp.arange(3), jnp.arange(2)), em.Questions(np.array(["a", "b"])),
                em.Questions(jnp.array([jnp.nan, 1.0])), em.Questions(3, 4),
                em.Questions(np.array([1, None])), jnp.arange(3),
                em.Questions(np.ma.masked_array([1, 2], [True, False])),
            ),
            "batch_size": (*COUNT, 4),
            "estimator": (3, "trice", em.trice, em.uniform(2), em.Estimator(None, "none")),
            "allocator": (3, "uniform", em.uniform, em.trice(), em.Allocator(0, 1, verify)),
            "proposal": (3, POLICY, em.Guide, em.Guide(POLICY)),
            "start": (3, POLICY, em.Guide, em.Guide(POLICY)),
            "order": ("sorted", None, 3),
            "pieces": COUNT,
            "memory_path": (3, b"x", "", "/proc/none/x", __file__),
        },
    ),
    "mcmc_em with guides": (
        partial(em.mcmc_em, MODEL, HINTED, batch_size=2, estimator=em.trice("none")),
        {},
        {
            "proposal": (em.Guide(None), em.Guide(POLICY, learned=1), em.Guide(POLICY, False, 3)),
            "start": (em.Guide(None), em.Guide(POLICY, learned=True)),
        },
    ),
    "evaluate": (
        em.evaluate,
        {"model": MODEL, "params": THETA, "questions": QUESTIONS, "key": KEY},
        {
            "model": instance(em.LatentModel, POLICY, MODEL._replace(fixed=False)),
            "params": (jnp.array([jnp.nan, 0.0]), np.array([np.inf, 0.0])),
            "questions": instance(em.Questions(jnp.zeros(0)), em.Questions(None), jnp.arange(3)),
            "key": (None, 0, "key", jax.random.PRNGKey(0), jax.random.split(KEY, 2)),
            "samples": COUNT,
            "batch_size": COUNT,
            "vote": (3, "vote"),
        },
    ),
    "json_lines": (
        em.json_lines,
        {"path": os.devnull, "metrics": {"loss": 1.0}},
        {
            "path": (None, 3, "", b"x", "/proc/none/x", os.path.dirname(__file__)),
            "metrics": (
                None, 3, [1.0], {}, {"loss": "low"}, {"loss": None}, {"loss": [1, 2], "more": 3},
                {"loss": np.ones((2, 2))}, {3: 1.0}, {"step": 1}, {"loss": 1j},
                {"loss": [[1], [2, 3]]},
                {"loss": np.array([object()])},
            ),
            "step": (-1, 1.5, None, "3", True),
        },
    ),
    "unsolved": (em.unsolved, {}, {"state": (None, 3, {}, jnp.zeros(3), MODEL)}),
    "Rate.of": (
        em.Rate.of,
        {},
        {
            "values": (
                None, "a", [], [2.0], [-0.1], [np.nan], ["a"], [None], {"a": 1}, 1j, object(),
            )
        },
    ),
}  # fmt: skip
CASES = [
    pytest.param(
        partial(function, **{**good, argument: bad}), argument, id=f"{name}-{argument}-{n}"
    )
    for name, (function, good, wrong) in GOOD_AND_WRONG.items()
    for argument, values in wrong.items()
    for n, bad in enumerate(values)
]


@pytest.mark.parametrize(("thunk", "name"), CASES)
def test_bad_arguments_get_one_sentence(thunk, name):
    refuses(thunk, name)


def model_of(sample=None, log_prob=None, greedy=None, judge=None):
    return em.verified(
        em.Policy(sample or POLICY.sample, log_prob or POLICY.log_prob, greedy),
        judge or TOY.verify,
    )


def drawn(**parts):
    """A policy's draws with parts replaced, by functions of the right ones."""

    def sample(params, key, prompts):
        right = POLICY.sample(params, key, prompts)
        return right._replace(
            **{name: change(getattr(right, name)) for name, change in parts.items()}
        )

    return sample


def fails(*arguments):
    raise KeyError("weights")


SAMPLES = {
    "fails": fails,
    "none": lambda params, key, prompts: None,
    "tuple": lambda params, key, prompts: tuple(POLICY.sample(params, key, prompts)),
    "one row": drawn(tokens=lambda tokens: tokens[:1]),
    "scalar log_prob": drawn(log_prob=jnp.sum),
    "mask of numbers": drawn(mask=lambda mask: mask.astype(jnp.int32)),
    "mask of rows": drawn(mask=lambda mask: mask[:, 0]),
    "foreign error": lambda params, key, prompts: params @ jnp.zeros((7, 3)),
}
LOG_PROBS = {
    "fails": fails,
    "none": lambda *arguments: None,
    "sum": lambda *arguments: jnp.sum(POLICY.log_prob(*arguments)),
    "integers": lambda params, prompts, tokens, mask: tokens[:, 0],
    "foreign error": lambda params, prompts, tokens, mask: params @ jnp.zeros((7, 3)),
}  # fmt: skip
VERIFIERS = {
    "fails": fails,
    "none": lambda tokens, mask, answers: None,
    "integers": lambda tokens, mask, answers: answers,
    "columns": lambda tokens, mask, answers: mask,
    "text": lambda tokens, mask, answers: "yes",
    "foreign error": lambda tokens, mask, answers: tokens @ jnp.zeros((7, 3), jnp.int32),
}


@pytest.mark.parametrize("use", ["mcmc_em", "evaluate"])
@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(pytest.param(model_of(f), "policy.sample", id=f"sample {n}") for n, f in SAMPLES.items()),
        *(
            pytest.param(model_of(log_prob=f), "policy.log_prob", id=f"log_prob {n}")
            for n, f in LOG_PROBS.items()
        ),
        *(
            pytest.param(model_of(judge=f), "verify", id=f"verify {n}")
            for n, f in VERIFIERS.items()
        ),
    ],
)
def test_bad_functions_get_one_sentence(model, name, use):
    if use == "evaluate":
        refuses(lambda: em.evaluate(KEY, model, THETA, QUESTIONS), name)
    else:
        refuses(lambda: em.mcmc_em(model, QUESTIONS, batch_size=2).init(KEY, THETA), name)


def doubled(array):
    return jnp.concatenate([array, array], axis=1)


def learned(sample=None, **settings):
    guide = em.Guide(em.Policy(sample or POLICY.sample, POLICY.log_prob), learned=True)
    return em.mcmc_em(
        MODEL, HINTED, batch_size=2, estimator=em.trice("none"), proposal=guide, **settings
    )


def logits_of(shape, dtype=jnp.float32):
    return lambda params, inputs, held, keep: (jnp.zeros(shape, dtype), held)


def decoded(network, cache=cache, end=5, prompts=PROMPTS, **settings):
    policy = em.decoder(network, cache, length=3, end=end, **settings)
    return policy.greedy(PARAMS, prompts)


USES = {
    "pair": (lambda: learned().init(KEY, THETA), "position"),
    "guide's sample": (lambda: learned(fails).init(KEY, (THETA, THETA)), "proposal.policy.sample"),
    "guide's latents": (
        lambda: learned(drawn(tokens=doubled, mask=doubled)).init(KEY, (THETA, THETA)),
        "proposal.policy",
    ),
    "vote": (lambda: em.evaluate(KEY, MODEL, THETA, QUESTIONS, vote=fails), "vote"),
    "vote of floats": (
        lambda: em.evaluate(KEY, MODEL, THETA, QUESTIONS, vote=lambda t, m: 1.0 * t[:, 0]), "vote",
    ),
    "rewards": (
        lambda: em.evaluate(KEY, model_of(judge=lambda t, m, a: -1.5 * m[:, 0]), THETA, QUESTIONS),
        "verify",
    ),
    "no greedy": (
        lambda: em.mcmc_em(model_of(), QUESTIONS, batch_size=2, estimator=em.star(greedy=True)),
        "greedy",
    ),
    "few proposals": (
        lambda: em.mcmc_em(MODEL, QUESTIONS, batch_size=2, estimator=em.maxk(2)), "allocator",
    ),
    "check without rows": (
        lambda: THREADS.check(jnp.zeros((0,))), "answers",
    ),
    "check of scalars": (lambda: THREADS.check(4), "answers"),
    "check of nothing": (
        lambda: em.host_verifier(lambda t, a: None, text_of).check(jnp.zeros(2)), "verify",
    ),
    "not to be sent": (
        lambda: em.host_verifier(lambda t, a: LOCK.locked(), text_of, processes=1), "verify",
    ),
    "threads and processes": (
        lambda: em.host_verifier(verify, text_of, threads=1, processes=1), "threads",
    ),
    "full batch": (lambda: em.mcmc_em(MODEL, QUESTIONS, batch_size=2, order="full"), "batch_size"),
    "prompts": (lambda: decoded(network, prompts=jnp.zeros((2, 2), jnp.int32)), "prompts"),
    "prompts of floats": (
        lambda: decoded(network, prompts=PROMPTS._replace(tokens=jnp.zeros((2, 2)))), "prompts",
    ),
    "prompts and lists": (lambda: decoded(network, prompts=em.Prompts([[1]], [[True]])), "prompts"),
    "prompts beyond": (lambda: decoded(network, prompts=em.left_padded([[6]])), "prompts"),
    "end beyond": (lambda: decoded(network, end=6), "end"),
    "pad beyond": (lambda: decoded(network, pad=6), "pad"),
    "network fails": (lambda: decoded(fails), "network"),
    "network without cache": (lambda: decoded(lambda p, i, c, k: jnp.zeros((2, 1, 6))), "network"),
    "logits of rows": (lambda: decoded(logits_of((2, 6))), "network"),
    "logits of all": (lambda: decoded(logits_of((2, 2, 6))), "network"),
    "logits of integers": (lambda: decoded(logits_of((2, 1, 6), jnp.int32)), "network"),
    "cache fails": (lambda: decoded(network, fails), "cache"),
}  # fmt: skip


@pytest.mark.parametrize(("thunk", "name"), USES.values(), ids=USES)
def test_bad_uses_get_one_sentence(thunk, name):
    refuses(thunk, name)


def test_what_people_hold_is_taken():
    """Checks must not refuse numpy's and jax's numbers, lists, paths, or views of arrays."""
    em.rest_em(np.int64(3))
    em.grpo(jnp.float32(1e-3))
    em.trice(1)
    em.gvm(np.int32(4), alpha=0, floor=np.float32(0.5), beta=2)
    em.left_padded([np.array([1, 2]), jnp.array([3]), (4,)], length=np.int64(3))
    em.decoder(network, cache, length=np.int64(2), end=5, temperature=1, top_p=1)
    em.host_verifier(verify, text_of, timeout=1, threads=np.int64(1))
    questions = em.Questions([0, 1, 2], [0, 1, 2])
    em.mcmc_em(MODEL, questions, batch_size=np.int64(2), pieces=np.int64(1)).init(KEY, THETA)
    assert em.Rate.of([True, False]).mean == 0.5
    assert em.Rate.of(jnp.array([0, 1])).mean == 0.5
    assert em.Rate.of(jnp.array([0.5], jnp.bfloat16)).mean == 0.5
