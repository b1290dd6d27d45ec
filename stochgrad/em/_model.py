"""What MCMC-EM learns: a model with one latent variable for each example."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from stochgrad.core import (
    Position,
    PRNGKey,
    check_callable,
    check_count,
    check_flag,
    check_instance,
    describe,
    first_line,
    is_ours,
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

    A model in flax, equinox or plain JAX has these functions; parameters are any pytree.

    Attributes:
        sample: ``(params, key, prompts) -> Rationales``, exact draws of the distribution whose
            ``log_prob`` is below.
        log_prob: ``(params, prompts, tokens, mask) -> (examples,)``, differentiable in ``params``.
        greedy: ``(params, prompts) -> Rationales``, most probable token after most probable token;
            None where there is no such thing.
        full_support: Whether every latent can be drawn under all parameters. Where not, as with a
            nucleus, latents are scored anew at each visit, and one that can no longer be drawn is
            no longer right.
    """

    sample: Callable[[Any, PRNGKey, PyTree], Rationales]
    log_prob: Callable[[Any, PyTree, PyTree, Array], Float[Array, " examples"]]
    greedy: Callable[[Any, PyTree], Rationales] | None = None
    full_support: bool = True


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
        fixed: Whether the likelihood is free of the parameters, as a verifier's is.
        initial: ``(key, questions) -> params``, where to start, if the model knows.
        constrain: ``(params, questions) -> anything``, what parameters stand for.
        check: Called with the answers before anything compiles; raises where they do not fit.
        reward: ``(params, prompts, tokens, mask, answers) -> (examples,)`` of bool, or of real
            numbers: any for ``reinforce``, ``grpo`` and ``maxk``, the likelihood for other
            estimators. None for the likelihood.
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
            ``stochgrad.em.host_verifier`` makes of a Python function of text. Numbers from 0 to 1
            are a likelihood. Other finite numbers are rewards, for ``reinforce``, ``grpo`` and
            ``maxk`` alone: elsewhere they count as wrong, with a ``VerifierWarning``; so does NaN.
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
        right = invoke("verify", verify, tokens, mask, answers)
        dtype, kinds = getattr(right, "dtype", None), (jnp.bool_, jnp.floating)
        real = dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in kinds)
        if not real or jnp.shape(right) != (examples,):
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


def invoke(name: str, function: Callable, *arguments: Any) -> Any:
    """What a user's function returns; where it fails, the sentence names it."""
    try:
        return function(*arguments)
    except Exception as error:
        if is_ours(error):
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
    check_flag(f"{name}.full_support", policy.full_support)


class ProposalKind(NamedTuple):
    r"""A distribution q of proposals, and their weight $w(z) = p_\theta(z, y\mid x)/q(z)$.

    Attributes:
        sample: ``(theta, phi, key, questions) -> Rationales``.
        log_weight: ``(theta, phi, questions, tokens, mask, log_likelihood, log_q) -> log w``, where
            a ``log_q`` of None is evaluated.
        log_prob: ``(phi, questions, tokens, mask) -> log q``, if q learns; None otherwise.
        of_policy: Whether q is the policy itself.
    """

    sample: Callable[[Any, Any, PRNGKey, Questions], Rationales]
    log_weight: Callable[..., Float[Array, " n"]]
    log_prob: Callable[[Any, Questions, Any, Array], Float[Array, " n"]] | None = None
    of_policy: bool = True

    def split(self, position: Any) -> tuple[Any, Any]:
        """The model's parameters, and those that a guide is called with."""
        if self.log_prob is None:
            return position, position
        if not (isinstance(position, tuple) and len(position) == 2):
            raise ValueError(
                "position must be a pair of the model's parameters and the learned guide's, got "
                f"{describe(position)}."
            )
        return position


def proposal_kind(model: LatentModel, guide: Guide | None, greedy: bool) -> ProposalKind:
    """Proposals of a guide; without one of the policy, or of its most probable rationales."""
    if guide is not None:
        return _of_guide(model, guide)
    policy = model.policy

    def sample(theta, phi, key, rows):
        if greedy and policy.greedy is not None:
            return policy.greedy(theta, rows.prompts)
        return policy.sample(theta, key, rows.prompts)

    def log_weight(theta, phi, rows, tokens, mask, log_likelihood, log_q):
        return log_likelihood  # the policy is the prior, which cancels

    return ProposalKind(sample, log_weight)


def _of_guide(model: LatentModel, guide: Guide) -> ProposalKind:
    def sample(theta, phi, key, rows):
        return guide.policy.sample(phi, key, rows.hints)

    def log_prob(phi, rows, tokens, mask):
        return guide.policy.log_prob(phi, rows.hints, tokens, mask)

    def log_weight(theta, phi, rows, tokens, mask, log_likelihood, log_q):
        if log_q is None:
            log_q = log_prob(phi, rows, tokens, mask)
        return model.policy.log_prob(theta, rows.prompts, tokens, mask) + log_likelihood - log_q

    return ProposalKind(sample, log_weight, log_prob if guide.learned else None, of_policy=False)


def position_functions(
    model: LatentModel, guide: Guide | None, questions: Questions
) -> tuple[Callable[[PRNGKey], Any] | None, Callable[[Any], Any]]:
    """Where a position starts, if the model knows, and what it stands for."""
    one = take(questions, jnp.zeros(1, jnp.int32))
    learned = guide is not None and guide.learned
    starts = [model.initial] if guide is None or not learned else [model.initial, guide.initial]
    for start in starts:
        if start is not None:
            invoke("model.initial", jax.eval_shape, start, jax.random.key(0), one)

    def initial(key: PRNGKey):
        keys = jax.random.split(key, len(starts))
        positions = tuple(start(key, one) for start, key in zip(starts, keys, strict=True))  # type: ignore
        return positions if learned else positions[0]

    def constrain(position: Any):
        theta = position[0] if learned else position
        value = theta if model.constrain is None else model.constrain(theta, one)
        return (value, position[1]) if learned else value

    return None if None in starts else initial, constrain


def has_verdicts(model: LatentModel, params: Any, rows: Questions, latents: Rationales) -> bool:
    """Whether likelihoods are 0 or 1, so that all right latents are alike to a chain."""
    if model.reward is None:
        return False
    one = jax.tree.map(lambda leaf: leaf[:1], (rows, latents.tokens, latents.mask))
    rows, tokens, mask = one
    reward = jax.eval_shape(model.reward, params, rows.prompts, tokens, mask, rows.answers)
    return reward.dtype == jnp.bool_


def take(tree: PyTree, index: Int[Array, " n"]) -> PyTree:
    """Rows of every leaf."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), tree)
