"""How often a policy is right: greedy, by majority, in one of k."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from stochgrad._deprecations import key_first
from stochgrad.core import (
    PRNGKey,
    check_array,
    check_callable,
    check_count,
    check_instance,
    check_key,
    check_path,
    describe,
    first_line,
)
from stochgrad.em._checks import check_draws, check_model, check_params, check_questions
from stochgrad.em._minibatch import Stats
from stochgrad.em._model import LatentModel, Questions, invoke, take


class Rate(NamedTuple):
    """A mean over questions, with a 95% interval.

    Attributes:
        mean: The mean.
        low: Lower end of Wilson's interval; conservative for means of numbers between 0 and 1.
        high: Its upper end.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Array | np.ndarray) -> "Rate":
        """Of numbers between 0 and 1, one for each question.

        Raises:
            TypeError: they are no numbers.
            ValueError: there are none, or one is below 0 or above 1.
        """
        values = _numbers("values", values).astype(np.float64)
        if values.size == 0 or values.min() < 0 or values.max() > 1:
            got = "none" if values.size == 0 else f"{values.min():g} to {values.max():g}"
            raise ValueError(f"values must be numbers from 0 to 1, at least one, got {got}.")
        n, p, z = values.size, float(values.mean()), 1.959964
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return cls(p, max(middle - half, 0.0), min(middle + half, 1.0))


class Evaluation(NamedTuple):
    """Results of ``evaluate``.

    Attributes:
        greedy: Share of questions that the most probable rationale answers, None where the policy
            has no such thing.
        majority: Share that the most frequent answer of all draws is right for; None without
            ``vote``.
        pass_at: For k = 1, 2, 4, ..., the expected share of questions that one of k draws answers.
        solved: Share of each question's draws that are right.
        tokens: The greedy rationales, or each question's first draw.
        mask: Their mask.
        right: Whether each is right.
    """

    greedy: Rate | None
    majority: Rate | None
    pass_at: dict[int, Rate]
    solved: Float[np.ndarray, " questions"]
    tokens: PyTree
    mask: Bool[np.ndarray, "questions length"]
    right: Bool[np.ndarray, " questions"]

    def metrics(self) -> dict[str, float]:
        """The rates as a flat dict, ends of intervals included."""
        rates = {"greedy": self.greedy, "majority": self.majority}
        rates |= {f"pass_at_{k}": rate for k, rate in self.pass_at.items()}
        metrics = {}
        for name, rate in rates.items():
            if rate is not None:
                metrics |= {name: rate.mean, f"{name}_low": rate.low, f"{name}_high": rate.high}
        return metrics


@key_first
def evaluate(
    key: PRNGKey,
    model: LatentModel,
    params: Any,
    questions: Questions,
    *,
    samples: int = 8,
    batch_size: int = 64,
    vote: Callable[[PyTree, Array], Int[Array, " examples"]] | None = None,
) -> Evaluation:
    r"""Judge a policy on questions, held-out ones as a rule.

    With c of n draws right, the share of k draws with at least one right one has the unbiased
    estimate

    $$\widehat{\text{pass@}k} = 1 - \binom{n-c}k \Big/ \binom nk$$

    [Chen et al. 2021]. Intervals are over questions.

    Args:
        key: A PRNG key.
        model: As ``verified`` makes it.
        params: Parameters.
        questions: Questions.
        samples: Draws for each question, n.
        batch_size: Questions decoded at once.
        vote: ``(tokens, mask) -> (examples,)``, the answer that each rationale gives as a whole
            number, negative where it gives none. Of answers equally frequent the first drawn wins.

    Raises:
        ValueError: there are no questions, or a number is not positive; a reward is not from 0 to
            1; ``vote`` does not return integers.
        TypeError: the key is no PRNG key, the model none of ``verified``; the policy or the
            verifier fails on the parameters and the questions.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from stochgrad import em
        >>> def sample(logits, key, prompts):
        ...     z = jax.random.categorical(key, logits, shape=prompts.shape)[:, None]
        ...     return em.Rationales(z, jax.nn.log_softmax(logits)[z[:, 0]], z >= 0)
        >>> def log_prob(logits, prompts, tokens, mask):
        ...     return jax.nn.log_softmax(logits)[tokens[:, 0]]
        >>> model = em.verified(
        ...     em.Policy(sample, log_prob), lambda tokens, mask, answers: tokens[:, 0] == answers)
        >>> questions = em.Questions(jnp.arange(200), jnp.full(200, 1))
        >>> found = em.evaluate(jax.random.key(0), model, jnp.log(jnp.array([0.5, 0.5])), questions)
        >>> found.pass_at[1].low < 0.5 < found.pass_at[1].high, found.pass_at[8].mean > 0.98
        (True, True)
    """
    check_model(model)
    if not model.fixed:
        raise ValueError(
            "model must say what is right, as stochgrad.em.verified does, got one whose likelihood "
            "is a density."
        )
    check_key(key)
    questions, size = check_questions(questions)
    samples, at_once = check_count("samples", samples), check_count("batch_size", batch_size)
    at_once = min(at_once, size)
    if vote is not None:
        check_callable("vote", vote, "a function of tokens and mask, or None")
    if model.check is not None:
        model.check(questions.answers)
    check_params(params)
    greedy = model.policy.greedy is not None
    check_draws("model.policy", model.policy, params, questions.prompts, at_once, greedy=greedy)

    @jax.jit
    def judge(params, key, rows: Questions):
        def verdict(latents):
            arguments = params, rows.prompts, latents.tokens, latents.mask, rows.answers
            if model.reward is None:
                rewards = jnp.exp(invoke("model.log_likelihood", model.log_likelihood, *arguments))
            else:
                rewards = model.reward(*arguments)
            votes = jnp.zeros(at_once, jnp.int32)
            if vote is not None:
                votes = invoke("vote", vote, latents.tokens, latents.mask)
                dtype, shape = getattr(votes, "dtype", None), jnp.shape(votes)
                if dtype is None or shape != (at_once,) or not jnp.issubdtype(dtype, jnp.integer):
                    raise ValueError(
                        f"vote must return {at_once} integers, one for each rationale, got "
                        f"{describe(votes) if dtype is None else f'dtype {dtype}, shape {shape}'}."
                    )
            return rewards, votes

        def one(key):
            latents = model.policy.sample(params, key, rows.prompts)
            return *verdict(latents), latents.tokens, latents.mask

        rewards, votes, tokens, mask = jax.lax.map(one, jax.random.split(key, samples))
        first = (*jax.tree.map(lambda leaf: leaf[0], (tokens, mask)), rewards[0])
        if model.policy.greedy is not None:
            best = model.policy.greedy(params, rows.prompts)
            first = best.tokens, best.mask, verdict(best)[0]
        return (rewards.T, votes.T), first

    blocks = []
    for start in range(0, size, at_once):
        rows = take(questions, (start + jnp.arange(at_once)) % size)
        blocks.append(judge(params, jax.random.fold_in(key, start), rows))
    (right, votes), (tokens, mask, first_right) = jax.tree.map(
        lambda *parts: np.concatenate(jax.device_get(parts))[:size], *blocks
    )
    right, first_right = _as_right(right), _as_right(first_right)
    counts = right.sum(axis=1)
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return Evaluation(
        None if model.policy.greedy is None else Rate.of(first_right),
        None if vote is None else Rate.of(_majority(votes, right)),
        {k: Rate.of(_pass_at(counts, samples, k)) for k in ks},
        right.mean(axis=1),
        tokens,
        mask,
        first_right,
    )


def json_lines(path: str | Path, metrics: Mapping[str, Any] | Stats, step: int = 0) -> None:
    """Append metrics to a file, one JSON object a step, which any tracker reads.

    NaN and infinity, which JSON lacks, are written as ``null``, which pandas reads as NaN.

    Args:
        path: The file.
        metrics: Numbers by name, as ``Evaluation.metrics`` has them, or arrays with one leading
            axis of steps, as a run collects ``Stats``.
        step: Number of the (first) step.

    Raises:
        TypeError: metrics are neither a mapping of names nor ``Stats``, or one is no number.
        ValueError: there are none, lengths differ, or one is called ``step``.

    Example:
        >>> import json, pathlib, tempfile, numpy as np
        >>> from stochgrad import em
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> em.json_lines(path, {"loss": np.array([1.0, np.nan])}, step=10)
        >>> [json.loads(line) for line in path.read_text().splitlines()]
        [{'step': 10, 'loss': 1.0}, {'step': 11, 'loss': None}]
    """
    place, step = check_path("path", path), check_count("step", step, least=0)
    check_instance("metrics", metrics, (Mapping, Stats), "a dict of numbers by name, or Stats")
    named = metrics if isinstance(metrics, Mapping) else metrics._asdict()
    for name in named:
        if not isinstance(name, str) or name == "step":
            raise ValueError(
                f"metrics must have names of text other than 'step', got {describe(name)}."
            )
    columns = {
        name: _numbers(f"metrics[{name!r}]", values, finite=False) for name, values in named.items()
    }
    shapes = {values.shape for values in columns.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) > 1:
        raise ValueError(
            "metrics must be numbers, or sequences of them of one length, got shapes "
            f"{ {name: values.shape for name, values in columns.items()} }."
        )
    lines = []
    for row in range(shape[0] if shape else 1):
        values = {name: np.atleast_1d(column)[row].item() for name, column in columns.items()}
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        lines.append(json.dumps({"step": step + row, **values}, allow_nan=False) + "\n")
    try:
        with place.open("a") as file:
            file.write("".join(lines))
    except OSError as error:
        raise OSError(f"path={str(path)!r} cannot be written: {first_line(error)}.") from error


def _numbers(name: str, values: Any, finite: bool = True) -> np.ndarray:
    """Real numbers or truth values as an array."""
    if isinstance(values, jax.Array) and jnp.issubdtype(values.dtype, jnp.floating):
        values = np.asarray(values.astype(jnp.float32))  # numpy's own kinds: not bfloat16
    parts = values if isinstance(values, list | tuple) and len(values) else [values]
    flags = all(getattr(part, "dtype", type(part)) in (bool, np.bool_) for part in parts)
    kind = "boolean" if flags else "number"
    return check_array(name, values, kind=kind, finite=finite)


def _as_right(rewards: np.ndarray) -> np.ndarray:
    """Whether each is right, by a reward of more than a half."""
    valid = (rewards >= 0) & (rewards <= 1)
    if not valid.all():
        raise ValueError(
            f"verify must return bools, or numbers from 0 to 1, to say what is right, got "
            f"{rewards[~valid][0]:g}: evaluate with a verify that does."
        )
    return rewards > 0.5


def _pass_at(counts, n: int, k: int) -> np.ndarray:
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in counts])


def _majority(votes, right) -> np.ndarray:
    """Whether each question's most frequent answer is right."""
    same = (votes[:, :, None] == votes[:, None, :]) & (votes >= 0)[:, None, :]
    most = np.argmax(same.sum(axis=2), axis=1)
    rows = np.arange(len(votes))
    return right[rows, most] & (votes[rows, most] >= 0)
