"""What MCMC-EM learns: a model with one latent variable for each example."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from stochgrad.core import Position, PRNGKey


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
    """

    policy: Policy
    log_likelihood: Callable[..., Float[Array, " examples"]]
    fixed: bool = False
    initial: Callable[[PRNGKey, Questions], Position] | None = None
    constrain: Callable[[Position, Questions], Any] | None = None
    check: Callable[[PyTree], None] | None = None


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
            ``stochgrad.em.on_host`` makes of a Python function of text. A number between 0 and 1
            is a soft verifier.
        end: The end token, if a rationale without it is wrong: it was cut off.

    Raises:
        TypeError: the policy lacks a function, or ``verify`` is none.
    """
    if not (callable(getattr(policy, "sample", None)) and callable(policy.log_prob)):
        raise TypeError(f"policy must have sample and log_prob, got {policy!r}.")
    if not callable(verify):
        raise TypeError(f"verify must be a function of tokens, mask and answers, got {verify!r}.")

    def log_likelihood(params, prompts, tokens, mask, answers):
        right = jnp.asarray(verify(tokens, mask, answers))
        examples = mask.shape[0]
        kinds = jnp.issubdtype(right.dtype, jnp.bool_) or jnp.issubdtype(right.dtype, jnp.floating)
        if right.shape != (examples,) or not kinds:
            raise ValueError(
                f"verify must return {examples} bools, one for each rationale, got dtype "
                f"{right.dtype} and shape {right.shape}."
            )
        real = right.dtype if jnp.issubdtype(right.dtype, jnp.floating) else jnp.float32
        right = right.astype(real)
        if end is not None:
            right = jnp.where(jnp.any((tokens == end) & mask, axis=1), right, 0.0)
        return jnp.log(right)

    check = getattr(verify, "check", None)
    return LatentModel(policy, log_likelihood, fixed=True, check=check)


def take(tree: PyTree, index: Int[Array, " n"]) -> PyTree:
    """Rows of every leaf."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), tree)
