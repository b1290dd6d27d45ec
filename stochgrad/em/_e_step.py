"""The E-step: a chain for each example's latent, moved by independence Metropolis-Hastings."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ops import segment_sum
from jaxtyping import Array, Bool, Float, Int

from stochgrad.core import PRNGKey
from stochgrad.em._allocate import Allocator, Tally
from stochgrad.em._memory import Memory
from stochgrad.em._minibatch import Minibatch, Stats
from stochgrad.em._model import LatentModel, Questions, Rationales, VerifierWarning, take
from stochgrad.em._proposal_kinds import ProposalKind
from stochgrad.gradients import directional_derivatives
from stochgrad.kernels import acceptance


class StepInputs(NamedTuple):
    """What the stages of a step share.

    Attributes:
        model: The latent model.
        kind: Of the proposals.
        theta: The model's parameters.
        phi: The guide's.
        rows: The minibatch's questions.
        mask: 1 for questions, 0 for padding.
        previous: Their rows of the memory.
    """

    model: LatentModel
    kind: ProposalKind
    theta: Any
    phi: Any
    rows: Questions
    mask: Float[Array, " questions"]
    previous: Memory


class Proposals(NamedTuple):
    """What was drawn for a minibatch.

    Attributes:
        latents: The draws.
        log_likelihood: Of the answers given them.
        reward: The likelihood, or 0 for a reward that is invalid.
        owner: The question that each is for.
        mask: False for padding of the last round.
        unbiased_mask: Which of them may be averaged over.
        questions: The question of each.
    """

    latents: Rationales
    log_likelihood: Float[Array, " proposals"]
    reward: Float[Array, " proposals"]
    owner: Int[Array, " proposals"]
    mask: Bool[Array, " proposals"]
    unbiased_mask: Bool[Array, " proposals"]
    questions: Questions


class Chains(NamedTuple):
    """The chains of a minibatch after Metropolis-Hastings.

    Attributes:
        log_likelihood: At the latents before the step, under the parameters of today.
        log_weight: Log weights of the latents before the step.
        final_log_weight: Those of the latents after it.
        proposal_index: The proposal that each chain stands at, -1 where it did not move.
        accept: Probability with which each proposal was taken.
    """

    log_likelihood: Float[Array, " questions"]
    log_weight: Float[Array, " questions"]
    final_log_weight: Float[Array, " questions"]
    proposal_index: Int[Array, " questions"]
    accept: Float[Array, " proposals"]


def propose(
    key: PRNGKey, inputs: StepInputs, allocator: Allocator, unbounded: bool = False
) -> Proposals:
    """Draw in rounds, as many each time as the rounds before suggest.

    ``unbounded`` is whether rewards may be other than likelihoods, which are from 0 to 1.
    """
    model, kind, theta, phi, rows, mask, previous = inputs
    past = Tally.none(mask.shape[0])._replace(tries=previous.tries, successes=previous.successes)
    questions = mask.shape[0]
    size = allocator.per_round * questions

    def one_round(tally: Tally, number_and_key):
        number, key = number_and_key
        count_key, draw_key, direction_key = jax.random.split(key, 3)
        counts = allocator.counts(count_key, number, past, tally, mask)
        ends = jnp.cumsum(counts)
        slot = lax.iota(jnp.int32, size)
        owner = jnp.searchsorted(ends, slot, side="right").astype(jnp.int32)
        real, owner = slot < ends[-1], jnp.minimum(owner, questions - 1)
        its = take(rows, owner)
        latents: Rationales = lax.stop_gradient(kind.sample(theta, phi, draw_key, its))
        log_likelihood, reward = rewards_of(model, theta, its, latents, real, unbounded)
        norms = jnp.zeros(size)
        if allocator.directions:
            along = slopes(
                lambda p: model.policy.log_prob(p, its.prompts, latents.tokens, latents.mask),
                theta,
                direction_key,
                allocator.directions,
            )
            norms = jnp.sqrt(jnp.sum(along**2, axis=1))
        success = jnp.clip(reward, 0.0, 1.0)
        tally = allocator.record(tally, owner, real, success, norms, number)
        return tally, (latents, log_likelihood, reward, owner, real)

    keys = jax.random.split(key, allocator.rounds)
    numbers = jnp.arange(allocator.rounds, dtype=jnp.int32)
    tally = Tally.none(questions)
    if allocator.rounds == 1:
        tally, out = one_round(tally, (numbers[0], keys[0]))
    else:
        tally, out = lax.scan(one_round, tally, (numbers, keys))
        out = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)
    *_, owner, real = out
    unbiased = real & allocator.usable(tally, owner, jnp.repeat(numbers, size))
    return Proposals(*out, unbiased, take(rows, owner))


def accept(key: PRNGKey, inputs: StepInputs, proposals: Proposals) -> Chains:
    """Move the chains by independence Metropolis-Hastings."""
    model, kind, theta, phi, rows, mask, previous = inputs
    tokens, token_mask, log_likelihood = previous[:3]
    if not model.fixed:
        again = model.log_likelihood(theta, rows.prompts, tokens, token_mask, rows.answers)
        log_likelihood = jnp.where(jnp.isfinite(log_likelihood), again, -jnp.inf)
    chain = tokens, token_mask, log_likelihood, None
    log_weight = kind.log_weight(theta, phi, rows, *chain)
    latents = proposals.latents
    proposal = latents.tokens, latents.mask, proposals.log_likelihood, latents.log_prob
    proposed = kind.log_weight(theta, phi, proposals.questions, *proposal)
    real = proposals.mask & (mask > 0)[proposals.owner]
    index, final, rates = mh_sweep(key, log_weight, proposed, proposals.owner, real)
    return Chains(log_likelihood, log_weight, final, index, rates)


def minibatch_of(
    mask: Float[Array, " questions"],
    proposals: Proposals,
    chains: Chains,
    slopes: Callable[[], tuple[Array, Array]],
) -> Minibatch:
    """What the estimator weighs."""
    reward = jnp.where(proposals.mask, proposals.reward, 0.0)
    real = lambda flags: flags.astype(reward.dtype)
    return Minibatch(
        owner=proposals.owner,
        reward=reward,
        accept=chains.accept,
        unbiased_mask=real(proposals.unbiased_mask),
        mask=mask,
        had_valid_latent=real(jnp.isfinite(chains.log_weight)) * mask,
        has_valid_latent=real(jnp.isfinite(chains.final_log_weight)) * mask,
        proposal_index=chains.proposal_index,
        slopes=slopes,
    )


def update(
    decay: float, previous: Memory, proposals: Proposals, chains: Chains, minibatch: Minibatch
) -> tuple[Memory, Bool[Array, " questions"]]:
    """The minibatch's rows of the memory after the step, and whose latents are new."""
    new = chains.proposal_index >= 0
    at = jnp.maximum(chains.proposal_index, 0)
    latents = proposals.latents
    tokens, mask, log_likelihood = jax.tree.map(
        lambda proposal, old: jnp.where(
            new.reshape(-1, *[1] * (old.ndim - 1)), jnp.take(proposal, at, axis=0), old
        ),
        (latents.tokens, latents.mask, proposals.log_likelihood),
        (previous.tokens, previous.mask, chains.log_likelihood),
    )
    tries = minibatch.sums(proposals.mask.astype(minibatch.reward.dtype))
    successes = minibatch.sums(jnp.clip(minibatch.reward, 0.0, 1.0))
    rows = Memory(
        tokens=tokens,
        mask=mask,
        log_likelihood=log_likelihood,
        tries=decay * previous.tries + tries,
        successes=decay * previous.successes + successes,
        age=jnp.where(new, 0, previous.age + 1),
    )
    return rows, new


def summarize(
    minibatch: Minibatch, proposals: Proposals, rows: Memory, log_likelihood: Array
) -> Stats:
    """Stats of the step, from the minibatch's rows of the memory and its whole likelihood."""
    dtype, mask = minibatch.reward.dtype, minibatch.mask
    real = proposals.mask.astype(dtype) * mask[minibatch.owner]
    questions, count = jnp.sum(mask), jnp.sum(real)
    per_proposal = jnp.maximum(count, 1.0)
    return Stats(
        acceptance_rate=jnp.sum(minibatch.accept * real) / per_proposal,
        reward=jnp.sum(minibatch.reward * real) / per_proposal,
        right=jnp.sum(minibatch.has_valid_latent * mask) / questions,
        solved=jnp.mean(jnp.isfinite(log_likelihood), dtype=dtype),
        age=jnp.sum(rows.age.astype(dtype) * mask) / questions,
        proposals=count,
        tokens=jnp.sum(jnp.sum(proposals.latents.mask, axis=1, dtype=dtype) * real),
    )


def rewards_of(
    model: LatentModel,
    params: Any,
    rows: Questions,
    latents: Rationales,
    mask: Bool[Array, " n"],
    unbounded: bool,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Log likelihoods of the answers, and rewards; what is neither counts as wrong, and warns."""
    arguments = params, rows.prompts, latents.tokens, latents.mask, rows.answers
    if model.reward is None:
        log_likelihood = model.log_likelihood(*arguments)
        if not model.fixed:
            return log_likelihood, jnp.exp(log_likelihood)
        valid = log_likelihood <= 0
        reward = _replace_invalid(jnp.exp(log_likelihood), valid, mask, unbounded=False)
        return jnp.where(valid, log_likelihood, -jnp.inf), reward
    reward = model.reward(*arguments)
    if reward.dtype == jnp.bool_:
        reward = reward.astype(jnp.float32)
        return jnp.log(reward), reward
    valid = jnp.isfinite(reward)
    if not unbounded:
        valid &= (reward >= 0) & (reward <= 1)
    reward = _replace_invalid(reward, valid, mask, unbounded)
    return jnp.log(jnp.maximum(reward, 0.0)), reward


def _replace_invalid(
    reward: Float[Array, " n"], valid: Bool[Array, " n"], mask: Bool[Array, " n"], unbounded: bool
) -> Float[Array, " n"]:
    """Rewards, zero for invalid ones, with a warning from the compiled step."""
    reward = jnp.where(valid | mask, reward, 0.0)
    wanted = (
        "a finite number"
        if unbounded
        else "from 0 to 1, a likelihood, which only reinforce, grpo and maxk do without"
    )

    def warn(reward, valid):
        reward, valid = np.asarray(reward), np.asarray(valid)
        if not valid.all():
            warnings.warn(
                f"verify returned {reward[~valid][0]:g} where a reward is {wanted}: "
                f"{np.sum(~valid)} of {valid.size} proposals of this step count as wrong.",
                VerifierWarning,
                stacklevel=2,
            )
        return np.where(valid, reward, np.zeros((), reward.dtype))

    def replace(reward):
        shape = jax.ShapeDtypeStruct(reward.shape, reward.dtype)
        return jax.pure_callback(warn, shape, reward, valid | ~mask, vmap_method="broadcast_all")

    return lax.cond(jnp.all(valid | ~mask), lambda reward: reward, replace, reward)


def slopes(
    log_prob: Callable[[Any], Float[Array, " n"]], params: Any, key: PRNGKey, directions: int | None
) -> Float[Array, "n m"]:
    """Derivatives of n log probabilities, whose sums of squares are those of their gradients.

    Along random directions that is so on average; ``None`` is whole gradients.
    """
    if directions is not None:
        along = directional_derivatives(log_prob, params, key, directions)
        return lax.stop_gradient(along) / math.sqrt(directions)
    leaves = jax.tree.leaves(jax.jacrev(log_prob)(params))
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def mh_sweep(
    key: PRNGKey,
    log_weight: Float[Array, " questions"],
    proposed: Float[Array, " proposals"],
    owner: Int[Array, " proposals"],
    mask: Bool[Array, " proposals"],
) -> tuple[Int[Array, " questions"], Float[Array, " questions"], Float[Array, " proposals"]]:
    """Take each question's chain through its proposals, one after another.

    Returns:
        Where each chain ends (-1 where it did not move), its log weight there, and the probability
        with which each proposal was taken.
    """
    count, questions = proposed.shape[0], log_weight.shape[0]
    uniforms = jax.random.uniform(key, (count,), proposed.dtype)
    order = jnp.argsort(jnp.where(mask, owner, questions), stable=True)
    counts = segment_sum(mask.astype(jnp.int32), owner, questions)
    first = jnp.cumsum(counts) - counts

    def visit(carry):
        number, index, weight, rates = carry
        at = order[jnp.minimum(first + number, count - 1)]
        real = number < counts
        rate = jnp.where(real, acceptance(proposed[at], weight), 0.0)
        accepts = uniforms[at] < rate
        rates = rates.at[jnp.where(real, at, count)].set(rate, mode="drop")
        index, weight = jnp.where(accepts, at, index), jnp.where(accepts, proposed[at], weight)
        return number + 1, index, weight, rates

    start = (jnp.int32(0), jnp.full(questions, -1, order.dtype), log_weight, 0.0 * uniforms)
    most = jnp.max(counts)
    return lax.while_loop(lambda carry: carry[0] < most, visit, start)[1:]
