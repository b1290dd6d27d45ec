"""What MCMC-EM learns: a model with one latent variable for each example."""

import dis
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from stochgrad.core import (
    Position,
    PRNGKey,
    as_data,
    check_callable,
    check_count,
    check_instance,
    data_rows,
    describe,
    first_line,
)


class VerifierWarning(UserWarning):
    """A verifier raised, ran out of time or returned no verdict; the rationale counts as wrong."""


class Rationales(NamedTuple):
    """Latent draws for a batch of examples: rationales, for a language model.

    Attributes:
        tokens: Token numbers, of fixed length; for another model any pytree of arrays with a
            leading axis of examples.
        log_prob: Log probability of each under what drew it, the end-of-sequence token included.
        mask: Which tokens count: all up to the end-of-sequence token, that one included.
    """

    tokens: PyTree
    log_prob: Float[Array, " examples"]
    mask: Bool[Array, "examples length"]


class Policy(NamedTuple):
    r"""A conditional distribution $p_\theta(z\mid x)$ over latents, with the means to draw from it.

    A model in flax, equinox or plain JAX takes part by these functions; parameters are any pytree,
    so that sharding and low-rank adapters are the business of whoever made them.

    Attributes:
        sample: ``(params, key, prompts) -> Rationales``, exact draws of the distribution whose
            ``log_prob`` is below.
        log_prob: ``(params, prompts, tokens, mask) -> (examples,)``, differentiable in ``params``.
        greedy: ``(params, prompts) -> Rationales``, most probable token after most probable token;
            None where there is no such thing.
    """

    sample: Callable[[Any, PRNGKey, PyTree], Rationales]
    log_prob: Callable[[Any, PyTree, PyTree, Array], Float[Array, " examples"]]
    greedy: Callable[[Any, PyTree], Rationales] | None = None


class Questions(NamedTuple):
    """Examples to learn from: pytrees of arrays with one leading axis.

    Attributes:
        prompts: What the policy sees: x.
        answers: What the likelihood sees: y.
        hints: What a guide sees instead of the prompts: the prompts with the answers in them.
    """

    prompts: PyTree
    answers: PyTree = ()
    hints: PyTree = None


class LatentModel(NamedTuple):
    r"""A joint model $p_\theta(z\mid x)\,p_\theta(y\mid z, x)$ of latents and answers.

    Attributes:
        policy: The first factor.
        log_likelihood: ``(params, prompts, tokens, mask, answers) -> (examples,)``, the log of the
            second; for a verifier 0 or minus infinity.
        fixed: Whether the likelihood is free of the parameters, as a verifier's is. It is then
            asked once a rationale.
        initial: ``(key, questions) -> params``, where to start, if the model knows.
        constrain: ``(params, questions) -> anything``, what parameters stand for.
        check: Called with the answers before anything compiles; raises where they do not fit.
        reward: ``(params, prompts, tokens, mask, answers) -> (examples,)`` of bool, or of real
            numbers: what ``reinforce``, ``grpo`` and ``maxk`` climb, of any size and sign; for
            other estimators it is the likelihood. None where the likelihood serves for it.
    """

    policy: Policy
    log_likelihood: Callable[..., Float[Array, " examples"]]
    fixed: bool = False
    initial: Callable[[PRNGKey, Questions], Position] | None = None
    constrain: Callable[[Position, Questions], Any] | None = None
    check: Callable[[PyTree], None] | None = None
    reward: Callable[..., Array] | None = None


class Guide(NamedTuple):
    r"""A proposal $q(z\mid x, y)$ that sees the answer, in the hint.

    Attributes:
        policy: The distribution, whose prompts are the questions' hints.
        learned: Whether it learns too. The position is then a pair of the model's parameters and
            the guide's, and the guide follows $\nabla_\phi\log q_\phi(z\mid x, y)$ at the
            memory [joint stochastic approximation, Xu and Ou 2016]; otherwise its policy is called
            with the model's parameters.
        initial: ``(key, questions) -> params``, where a learned guide starts, if it knows.
    """

    policy: Policy
    learned: bool = False
    initial: Callable[[PRNGKey, Questions], Position] | None = None


def verified(
    policy: Policy,
    verify: Callable[[PyTree, Array, PyTree], Bool[Array, " examples"]],
    end: int | None = None,
) -> LatentModel:
    r"""A policy whose rationales are right or wrong.

    $$p_\theta(y\mid x) = \sum_z p_\theta(z\mid x)\,c(z, y), \qquad c \in \{0, 1\}.$$

    Args:
        policy: Where rationales are from.
        verify: ``(tokens, mask, answers) -> (examples,)`` of bool, jittable; what
            ``stochgrad.em.on_host`` makes of a Python function of text. Numbers from 0 to 1 are a
            soft verifier, a likelihood. Other finite numbers are rewards, for ``reinforce``,
            ``grpo`` and ``maxk`` alone: elsewhere they count as wrong, with a ``VerifierWarning``,
            and so does NaN everywhere.
        end: The end token, if a rationale without it is wrong, of reward 0: it was cut off.

    Raises:
        TypeError: the policy is no ``Policy``, ``verify`` no function, or ``end`` no integer.
        ValueError: in use, ``verify`` fails or returns something of another shape or dtype.
    """
    check_policy("policy", policy)
    check_callable("verify", verify, "a function of tokens, mask and answers")
    if end is not None:
        end = check_count("end", end, least=0)

    def reward(params, prompts, tokens, mask, answers):
        examples = mask.shape[0]
        right = called("verify", verify, tokens, mask, answers)
        kinds = (jnp.bool_, jnp.floating)
        dtype = getattr(right, "dtype", None)
        if (
            dtype is None
            or jnp.shape(right) != (examples,)
            or not any(jnp.issubdtype(dtype, kind) for kind in kinds)
        ):
            got = describe(right) if dtype is None else f"dtype {dtype}, shape {jnp.shape(right)}"
            raise ValueError(
                f"verify must return {examples} bools (or numbers from 0 to 1), one for each "
                f"rationale, got {got}."
            )
        right = jnp.asarray(right)
        if end is not None:
            ended = jnp.any((tokens == end) & mask, axis=1)
            right = jnp.where(ended, right, jnp.zeros((), right.dtype))
        return right

    def log_likelihood(params, prompts, tokens, mask, answers):
        right = reward(params, prompts, tokens, mask, answers)
        if right.dtype == jnp.bool_:
            return jnp.log(right.astype(jnp.float32))
        return jnp.log(jnp.where((right >= 0) & (right <= 1), right, 0.0))

    check = getattr(verify, "check", None)
    return LatentModel(policy, log_likelihood, fixed=True, check=check, reward=reward)


def called(name: str, function: Callable, *arguments: Any) -> Any:
    """What a user's function returns; where it fails, the sentence names it."""
    try:
        return function(*arguments)
    except Exception as error:
        if _is_ours(error):
            raise
        raise ValueError(f"{name} fails: {type(error).__name__}: {first_line(error)}.") from error


def check_policy(name: str, policy: Any, *, greedy: bool = False) -> None:
    """Raise unless it is a policy whose functions are functions."""
    check_instance(name, policy, Policy, "a Policy, as stochgrad.em.decoder makes it")
    check_callable(f"{name}.sample", policy.sample, "a function (params, key, prompts)")
    check_callable(
        f"{name}.log_prob", policy.log_prob, "a function (params, prompts, tokens, mask)"
    )
    if policy.greedy is not None:
        check_callable(f"{name}.greedy", policy.greedy, "a function (params, prompts), or None")
    elif greedy:
        raise ValueError(f"{name}.greedy is None where the most probable rationale is wanted.")


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
    drawn = None
    for kind, arguments in kinds.items():
        where = f"{name}.{kind}"
        drawn = called(where, jax.eval_shape, getattr(policy, kind), *arguments)
        if not isinstance(drawn, Rationales):
            raise TypeError(f"{where} must return Rationales, got {describe(drawn)}.")
        rows = {
            "tokens": [leaf.shape[:1] for leaf in jax.tree.leaves(drawn.tokens)],
            "log_prob": [drawn.log_prob.shape],
            "mask": [drawn.mask.shape[:1]],
        }
        for part, shapes in rows.items():
            if not shapes or any(shape != (count,) for shape in shapes):
                raise ValueError(
                    f"{where} must return one row of {part} for each prompt, got shapes {shapes} "
                    f"for {count} prompts."
                )
        if drawn.mask.dtype != jnp.bool_ or len(drawn.mask.shape) != 2:
            raise ValueError(
                f"{where} must return a mask of bools of shape (prompts, length), got dtype "
                f"{drawn.mask.dtype} and shape {drawn.mask.shape}."
            )
        found = called(
            f"{name}.log_prob",
            jax.eval_shape,
            policy.log_prob,
            params,
            some,
            drawn.tokens,
            drawn.mask,
        )
        check_numbers(f"{name}.log_prob", found, count)
    assert drawn is not None
    return drawn


def check_numbers(name: str, found: Any, count: int) -> None:
    """Raise unless a function's result is one floating-point number for each row."""
    dtype, shape = getattr(found, "dtype", None), getattr(found, "shape", None)
    if dtype is None or shape != (count,) or not jnp.issubdtype(dtype, jnp.floating):
        got = describe(found) if dtype is None else f"dtype {dtype} and shape {shape}"
        raise ValueError(
            f"{name} must return one floating-point number for each of {count} rows, got {got}."
        )


def check_params(params: Any) -> None:
    """Raise where parameters hold NaN or infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        known = hasattr(leaf, "dtype") and not isinstance(leaf, Tracer)
        if known and jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.all(jnp.isfinite(leaf)):
            where = "params" + jax.tree_util.keystr(path)
            raise ValueError(f"{where} must be finite, but holds NaN or infinity.")


def _is_ours(error: BaseException) -> bool:
    """Whether a raise statement of the library made it: it then says enough."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    module = trace.tb_frame.f_globals.get("__name__", "")
    operation = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]]
    return module.split(".")[0] == "stochgrad" and operation == "RAISE_VARARGS"


def take(tree: PyTree, index: Int[Array, " n"]) -> PyTree:
    """Rows of every leaf."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), tree)
