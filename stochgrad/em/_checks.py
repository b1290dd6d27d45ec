"""What ``mcmc_em`` is called with: each wrong part gets a sentence."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from stochgrad.core import (
    as_data,
    check_callable,
    check_count,
    check_flag,
    check_instance,
    check_path,
    data_rows,
    describe,
    first_line,
)
from stochgrad.em._allocate import Allocator
from stochgrad.em._estimators import Estimator
from stochgrad.em._model import (
    Guide,
    LatentModel,
    Policy,
    Questions,
    Rationales,
    check_policy,
    invoke,
    take,
)


def check_parts(
    model, questions, estimator: Estimator, allocator: Allocator, proposal, start
) -> tuple[Questions, int]:
    """Raise where parts are not what they should be, or do not fit each other."""
    check_model(model)
    questions, size = check_questions(questions)
    check_instance("estimator", estimator, Estimator, "an Estimator, as stochgrad.em.trice() is")
    check_callable("estimator.weights", estimator.weights, "a function of a Minibatch")
    check_instance("allocator", allocator, Allocator, "an Allocator, as stochgrad.em.uniform() is")
    check_callable("allocator.counts", allocator.counts)
    check_count("allocator.per_round", allocator.per_round)
    check_count("allocator.rounds", allocator.rounds)
    check_count("allocator.least", allocator.least)
    check_count("allocator.folds", allocator.folds, most=2)
    for name, guide in (("proposal", proposal), ("start", start)):
        if guide is None:
            continue
        check_instance(name, guide, Guide, "a Guide")
        check_policy(f"{name}.policy", guide.policy)
        check_flag(f"{name}.learned", guide.learned)
        if guide.initial is not None:
            check_callable(f"{name}.initial", guide.initial, "a function, or None")
        if questions.hints is None:
            raise ValueError(f"{name} sees hints, but questions.hints is None.")
    if start is not None and start.learned:
        raise ValueError(
            "start must be a guide with the model's parameters, got a learned one: give it as "
            "proposal."
        )
    if proposal is not None and not estimator.chains:
        raise ValueError(
            f"{estimator.name} needs the policy's own proposals: leave proposal out, or use trice."
        )
    if proposal is not None and estimator.control:
        raise ValueError(
            "a control variate needs the policy's own proposals: with a proposal use trice('none')."
        )
    if not model.fixed and (not estimator.chains or estimator.subsample is not None):
        raise ValueError(
            f"{estimator.name} is for likelihoods that are free of the parameters, as a verifier "
            "is: use trice() without subsample."
        )
    if estimator.greedy and model.policy.greedy is None:
        raise ValueError(f"{estimator.name}(greedy=True) needs a policy with greedy, got None.")
    most = allocator.per_round * allocator.rounds
    if most < estimator.least:
        raise ValueError(
            f"{estimator.name} needs at least {estimator.least} proposals a question, got {most}: "
            "set allocator=stochgrad.em.uniform(n)."
        )
    if allocator.least < estimator.least:
        raise ValueError(
            f"{estimator.name} needs at least {estimator.least} proposals of each question, got an "
            f"allocator that is only sure of {allocator.least}: raise per_question, per_round or "
            "floor, or take uniform(n)."
        )
    if model.check is not None:
        model.check(questions.answers)
    return questions, size


def check_shapes(
    model, questions: Questions, theta, phi, proposal, start, greedy: bool, count: int
) -> None:
    """Raise where the policy, a guide or the likelihood does not do what it should: by shapes."""
    draws = check_draws(
        "model.policy", model.policy, theta, questions.prompts, count, greedy=greedy
    )
    for name, guide, params in (("proposal", proposal, phi), ("start", start, theta)):
        if guide is None:
            continue
        its = check_draws(f"{name}.policy", guide.policy, params, questions.hints, count)
        shapes = [
            jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), (of.tokens, of.mask))
            for of in (draws, its)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name}.policy must draw what the model's policy draws, {shapes[0]}, got "
                f"{shapes[1]}."
            )
    some = take(questions, jnp.zeros(count, jnp.int32))
    arguments = theta, some.prompts, draws.tokens, draws.mask, some.answers
    value = invoke("model.log_likelihood", jax.eval_shape, model.log_likelihood, *arguments)
    check_numbers("model.log_likelihood", value, count)


def writable_directory(memory_path: str | Path) -> Path:
    """The directory, made if need be; raise where it cannot be written to."""
    place = check_path("memory_path", memory_path)
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / ".written").touch()
        (place / ".written").unlink()
    except OSError as error:
        raise OSError(
            f"memory_path={str(memory_path)!r} cannot be written to: {first_line(error)}."
        ) from error
    return place


def check_model(model: Any) -> None:
    """Raise unless it is a latent model whose functions are functions."""
    check_instance("model", model, LatentModel, "a LatentModel, as stochgrad.em.verified makes it")
    check_policy("model.policy", model.policy)
    check_callable("model.log_likelihood", model.log_likelihood)
    for name in ("initial", "constrain", "check", "reward"):
        if getattr(model, name) is not None:
            check_callable(f"model.{name}", getattr(model, name), "a function, or None")


def check_questions(questions: Any) -> tuple[Questions, int]:
    """Questions as arrays, and how many they are."""
    check_instance("questions", questions, Questions, "Questions of prompts and answers")
    questions = as_data(questions, "questions")
    data_rows(questions.prompts, name="questions.prompts")
    return questions, data_rows(questions, name="questions")


def check_draws(
    name: str, policy: Policy, params: Any, prompts: PyTree, count: int, *, greedy: bool = False
) -> Rationales:
    """Shapes of some draws; raise where the policy fails on these parameters and prompts."""
    some = take(prompts, jnp.zeros(count, jnp.int32))
    kinds: dict[str, tuple] = {"sample": (params, jax.random.key(0), some)}
    if greedy:
        kinds["greedy"] = (params, some)
    draws = None
    for kind, arguments in kinds.items():
        where = f"{name}.{kind}"
        draws = invoke(where, jax.eval_shape, getattr(policy, kind), *arguments)
        if not isinstance(draws, Rationales):
            raise TypeError(f"{where} must return Rationales, got {describe(draws)}.")
        rows = {
            "tokens": [leaf.shape[:1] for leaf in jax.tree.leaves(draws.tokens)],
            "log_prob": [draws.log_prob.shape],
            "mask": [draws.mask.shape[:1]],
        }
        for part, shapes in rows.items():
            if not shapes or any(shape != (count,) for shape in shapes):
                raise ValueError(
                    f"{where} must return one row of {part} for each prompt, got shapes {shapes} "
                    f"for {count} prompts."
                )
        if draws.mask.dtype != jnp.bool_ or len(draws.mask.shape) != 2:
            raise ValueError(
                f"{where} must return a mask of bools of shape (prompts, length), got dtype "
                f"{draws.mask.dtype} and shape {draws.mask.shape}."
            )
        arguments = params, some, draws.tokens, draws.mask
        value = invoke(f"{name}.log_prob", jax.eval_shape, policy.log_prob, *arguments)
        check_numbers(f"{name}.log_prob", value, count)
    assert draws is not None
    return draws


def check_numbers(name: str, value: Any, count: int) -> None:
    """Raise unless a function's result is one floating-point number for each row."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None or shape != (count,) or not jnp.issubdtype(dtype, jnp.floating):
        got = describe(value) if dtype is None else f"dtype {dtype} and shape {shape}"
        raise ValueError(
            f"{name} must return one floating-point number for each of {count} rows, got {got}."
        )


def check_params(params: Any) -> None:
    """Raise where parameters hold NaN or infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = hasattr(leaf, "dtype") and not isinstance(leaf, Tracer)
        if array and jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.all(jnp.isfinite(leaf)):
            where = "params" + jax.tree_util.keystr(path)
            raise ValueError(f"{where} must be finite, but holds NaN or infinity.")
