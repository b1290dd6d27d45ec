"""What ``mcmc_em`` is called with: each wrong part gets a sentence."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from stochgrad.core import (
    check_callable,
    check_count,
    check_flag,
    check_instance,
    check_path,
    describe,
    first_line,
)
from stochgrad.em._allocate import Allocator
from stochgrad.em._estimators import Estimator
from stochgrad.em._model import (
    Guide,
    Questions,
    called,
    check_draws,
    check_model,
    check_numbers,
    check_policy,
    check_questions,
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
    return questions, size


def check_position(position: Any, learned: bool) -> None:
    """Raise unless it is a pair, where a guide learns."""
    if learned and not (isinstance(position, tuple) and len(position) == 2):
        raise ValueError(
            "position must be a pair of the model's parameters and the learned guide's, got "
            f"{describe(position)}."
        )


def check_shapes(
    model, questions: Questions, theta, phi, proposal, start, greedy: bool, count: int
) -> None:
    """Raise where the policy, a guide or the likelihood does not do what it should: by shapes."""
    drawn = check_draws(
        "model.policy", model.policy, theta, questions.prompts, count, greedy=greedy
    )
    for name, guide, params in (("proposal", proposal, phi), ("start", start, theta)):
        if guide is None:
            continue
        its = check_draws(f"{name}.policy", guide.policy, params, questions.hints, count)
        shapes = [
            jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), (of.tokens, of.mask))
            for of in (drawn, its)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name}.policy must draw what the model's policy draws, {shapes[0]}, got "
                f"{shapes[1]}."
            )
    some = take(questions, jnp.zeros(count, jnp.int32))
    found = called(
        "model.log_likelihood",
        jax.eval_shape,
        model.log_likelihood,
        theta,
        some.prompts,
        drawn.tokens,
        drawn.mask,
        some.answers,
    )
    check_numbers("model.log_likelihood", found, count)


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
