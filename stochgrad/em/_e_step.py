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

from stochgrad.core import PRNGKey, at_least_float32
from stochgrad.em._allocate import Allocator, Tally
from stochgrad.em._latent_store import Memory
from stochgrad.em._minibatch import Minibatch, Stats
from stochgrad.em._model import (
    LatentModel,
    ProposalKind,
    Questions,
    Rationales,
    VerifierWarning,
    has_verdicts,
    take,
)
from stochgrad.gradients import directional_derivatives
from stochgrad.kernels import acceptance

_FINITE = "verify returned {:g} where a reward is a finite number"
_BOUNDED = (
    "verify returned {:g} where a reward is from 0 to 1, a likelihood, which only reinforce, grpo "
    "and maxk do without"
)
_OUTSIDE = (
    "policy.log_prob is -inf where policy.sample has drawn a latent, as a nucleus in low precision "
    "has it: take float32 or top_p=1"
)


class StepInputs(NamedTuple):
    """What the stages of a step share; ``previous`` is the minibatch's rows of the memory."""

    model: LatentModel
    kind: ProposalKind
    theta: Any
    phi: Any
    rows: Questions
    mask: Float[Array, " questions"]
    previous: Memory


class Proposals(NamedTuple):
    """What was drawn for a minibatch, and for which question; ``mask`` is False for padding.

    ``number`` is the round of each, ``fold`` the average that it enters, and ``moves`` whether the
    chain is offered it.
    """

    latents: Rationales
    log_likelihood: Float[Array, " proposals"]
    reward: Float[Array, " proposals"]
    owner: Int[Array, " proposals"]
    mask: Bool[Array, " proposals"]
    unbiased_mask: Bool[Array, " proposals"]
    moves: Bool[Array, " proposals"]
    number: Int[Array, " proposals"]
    fold: Int[Array, " proposals"]
    questions: Questions


def propose(
    key: PRNGKey, inputs: StepInputs, allocator: Allocator, unbounded: bool = False
) -> Proposals:
    """Draw in rounds, as many each time as earlier ones suggest; rewards may be ``unbounded``."""
    model, kind, theta, phi, rows, mask, previous = inputs
    past = Tally.none(mask.shape[0])._replace(tries=previous.tries, successes=previous.successes)
    questions = mask.shape[0]
    size, cells = allocator.per_round * questions, allocator.folds * questions

    def one_round(tally: Tally, number_and_key):
        number, key = number_and_key
        count_key, draw_key, direction_key = jax.random.split(key, 3)
        counts = allocator.counts(count_key, number, past, tally, mask)
        ends = jnp.cumsum(counts)
        slot = lax.iota(jnp.int32, size)
        cell = jnp.searchsorted(ends, slot, side="right").astype(jnp.int32)
        real, cell = slot < ends[-1], jnp.minimum(cell, cells - 1)
        rank, owner = slot - (ends - counts)[cell], cell % questions
        its = take(rows, owner)
        latents: Rationales = lax.stop_gradient(kind.sample(theta, phi, draw_key, its))
        log_likelihood, reward = rewards_of(model, theta, its, latents, real, unbounded)
        if not model.policy.full_support:
            prior = model.policy.log_prob(theta, its.prompts, latents.tokens, latents.mask)
            valid = prior > -jnp.inf
            reward = _replace_invalid(reward, valid, real, _OUTSIDE)
            log_likelihood = jnp.where(valid, log_likelihood, -jnp.inf)
        norms = jnp.zeros(size)
        if allocator.directions:
            arguments = its.prompts, latents.tokens, latents.mask
            log_prob = lambda p: model.policy.log_prob(p, *arguments)
            along = slopes(log_prob, theta, direction_key, allocator.directions)
            norms = jnp.sqrt(jnp.sum(along**2, axis=1))
        success = jnp.clip(reward, 0.0, 1.0)
        tally = allocator.record(tally, cell, real, success, norms, number)
        return tally, (latents, log_likelihood, reward, cell, real, rank)

    keys = jax.random.split(key, allocator.rounds)
    numbers = jnp.arange(allocator.rounds, dtype=jnp.int32)
    tally = Tally.none(cells)
    if allocator.rounds == 1:
        tally, out = one_round(tally, (numbers[0], keys[0]))
    else:
        tally, out = lax.scan(one_round, tally, (numbers, keys))
        out = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)
    latents, log_likelihood, reward, cell, real, rank = out
    number, owner = jnp.repeat(numbers, size), cell % questions
    unbiased = real & allocator.usable(tally, cell, number)
    moves = real
    if allocator.rounds == 1 and not (kind.of_policy and has_verdicts(model, theta, rows, latents)):
        # how many come after the certain ones depends on past likelihoods, and so on the chain
        moves = real & (rank < allocator.least)
    # the first round of each fold is averaged with what another fold has decided on
    fold = jnp.where(number == 0, cell // questions + 1, cell // questions) % allocator.folds
    return Proposals(
        latents,
        log_likelihood,
        reward,
        owner,
        real,
        unbiased,
        moves,
        number,
        fold,
        take(rows, owner),
    )


def accept(
    key: PRNGKey, inputs: StepInputs, proposals: Proposals, slopes: Callable[[], Any]
) -> tuple[Minibatch, Float[Array, " questions"]]:
    """Move the chains; also the current log likelihoods at their latents before the step."""
    model, kind, theta, phi, rows, mask, previous = inputs
    tokens, token_mask, log_likelihood = previous[:3]
    if not model.fixed:
        again = model.log_likelihood(theta, rows.prompts, tokens, token_mask, rows.answers)
        log_likelihood = jnp.where(jnp.isfinite(log_likelihood), again, -jnp.inf)
    if not model.policy.full_support:  # what cannot be drawn today is no latent of today
        prior = model.policy.log_prob(theta, rows.prompts, tokens, token_mask)
        log_likelihood = jnp.where(prior > -jnp.inf, log_likelihood, -jnp.inf)
    log_weight = kind.log_weight(theta, phi, rows, tokens, token_mask, log_likelihood, None)
    latents, owner = proposals.latents, proposals.owner
    proposal = latents.tokens, latents.mask, proposals.log_likelihood, latents.log_prob
    proposed = kind.log_weight(theta, phi, proposals.questions, *proposal)
    offered = proposals.moves & (mask > 0)[owner]
    index, final_log_weight, rates = mh_sweep(
        key, log_weight, proposed, owner, offered, proposals.number
    )
    reward = jnp.where(proposals.mask, proposals.reward, 0.0)
    as_float = lambda flags: flags.astype(reward.dtype)
    minibatch = Minibatch(
        owner=owner,
        reward=reward,
        accept=rates,
        unbiased_mask=as_float(proposals.unbiased_mask),
        mask=mask,
        had_valid_latent=as_float(jnp.isfinite(log_weight)) * mask,
        has_valid_latent=as_float(jnp.isfinite(final_log_weight)) * mask,
        proposal_index=index,
        slopes=slopes,
        history=previous.history,
    )
    return minibatch, log_likelihood


def update(
    decay: float,
    previous: Memory,
    proposals: Proposals,
    minibatch: Minibatch,
    log_likelihood: Array,
) -> Memory:
    """The minibatch's rows of the memory after the step, by ``log_likelihood`` before it."""
    index, latents = minibatch.proposal_index, proposals.latents

    def at_chains(proposal, old):
        new = (index >= 0).reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(new, jnp.take(proposal, jnp.maximum(index, 0), axis=0), old)

    tokens = jax.tree.map(at_chains, latents.tokens, previous.tokens)
    token_mask = at_chains(latents.mask, previous.mask)
    changed = differ((tokens, token_mask), (previous.tokens, previous.mask))
    valid = minibatch.had_valid_latent > 0
    tries = minibatch.sums(proposals.mask.astype(minibatch.reward.dtype))
    successes = minibatch.sums(jnp.clip(minibatch.reward, 0.0, 1.0))
    return Memory(
        tokens=tokens,
        mask=token_mask,
        log_likelihood=at_chains(proposals.log_likelihood, log_likelihood),
        tries=decay * previous.tries + tries,
        successes=decay * previous.successes + successes,
        age=jnp.where(index >= 0, 0, previous.age + 1),
        history=previous.history.add(valid, index >= 0, changed),
    )


def differ(a: tuple[Any, Array], b: tuple[Any, Array]) -> Bool[Array, " n"]:
    """Which of some latents are not the same as others, tokens beyond their masks aside."""
    (a, mask), (b, other) = a, b
    found = jnp.any(mask != other, axis=1)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        apart = x != y
        if x.shape[: mask.ndim] == mask.shape:
            apart &= mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        found |= jnp.any(apart.reshape(apart.shape[0], -1), axis=1)
    return found


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
        reward = _replace_invalid(jnp.exp(log_likelihood), valid, mask, _BOUNDED)
        return jnp.where(valid, log_likelihood, -jnp.inf), reward
    reward = model.reward(*arguments)
    if reward.dtype == jnp.bool_:
        reward = reward.astype(jnp.float32)
        return jnp.log(reward), reward
    reward = reward.astype(at_least_float32(reward.dtype))
    valid = jnp.isfinite(reward)
    if not unbounded:
        valid &= (reward >= 0) & (reward <= 1)
    reward = _replace_invalid(reward, valid, mask, _FINITE if unbounded else _BOUNDED)
    return jnp.log(jnp.maximum(reward, 0.0)), reward


def _replace_invalid(
    reward: Float[Array, " n"], valid: Bool[Array, " n"], mask: Bool[Array, " n"], words: str
) -> Float[Array, " n"]:
    """Rewards, zero for invalid ones, with a warning from the compiled step."""
    reward = jnp.where(valid | mask, reward, 0.0)

    def warn(reward, valid):
        reward, valid = np.asarray(reward), np.asarray(valid)
        if not valid.all():
            warnings.warn(
                f"{words.format(reward[~valid][0])}: {np.sum(~valid)} of {valid.size} proposals of "
                "this step count as wrong.",
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
        along = directional_derivatives(key, log_prob, params, directions)
        return lax.stop_gradient(along) / math.sqrt(directions)
    leaves = jax.tree.leaves(jax.jacrev(log_prob)(params))
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def mh_sweep(
    key: PRNGKey,
    log_weight: Float[Array, " questions"],
    proposed: Float[Array, " proposals"],
    owner: Int[Array, " proposals"],
    mask: Bool[Array, " proposals"],
    number: Int[Array, " proposals"],
) -> tuple[Int[Array, " questions"], Float[Array, " questions"], Float[Array, " proposals"]]:
    """Take each question's chain through its proposals, one after another.

    Later rounds come first: a round has decided how many proposals there are in later ones, not in
    earlier ones, so that the kernel is invariant after those that had no part in the decision.

    Returns:
        Where each chain ends (-1 where it did not move), its log weight there, and the probability
        with which each proposal was taken.
    """
    count, questions = proposed.shape[0], log_weight.shape[0]
    uniforms = jax.random.uniform(key, (count,), proposed.dtype)
    order = jnp.lexsort((-number, jnp.where(mask, owner, questions)))
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
