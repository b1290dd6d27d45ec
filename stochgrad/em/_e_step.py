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
from stochgrad.em._latent_store import Memory
from stochgrad.em._minibatch import Minibatch, Stats
from stochgrad.em._model import (
    LatentModel,
    ProposalKind,
    Questions,
    Rationales,
    VerifierWarning,
    take,
)
from stochgrad.gradients import directional_derivatives
from stochgrad.kernels import acceptance


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
    """What was drawn for a minibatch, and for which question; ``mask`` is False for padding."""

    latents: Rationales
    log_likelihood: Float[Array, " proposals"]
    reward: Float[Array, " proposals"]
    owner: Int[Array, " proposals"]
    mask: Bool[Array, " proposals"]
    unbiased_mask: Bool[Array, " proposals"]
    questions: Questions


def propose(
    key: PRNGKey, inputs: StepInputs, allocator: Allocator, unbounded: bool = False
) -> Proposals:
    """Draw in rounds, as many each time as earlier ones suggest; rewards may be ``unbounded``."""
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
            arguments = its.prompts, latents.tokens, latents.mask
            log_prob = lambda p: model.policy.log_prob(p, *arguments)
            along = slopes(log_prob, theta, direction_key, allocator.directions)
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
    latents, log_likelihood, reward, owner, real = out
    unbiased = real & allocator.usable(tally, owner, jnp.repeat(numbers, size))
    its = take(rows, owner)
    return Proposals(latents, log_likelihood, reward, owner, real, unbiased, its)


def accept(
    key: PRNGKey, inputs: StepInputs, proposals: Proposals, slopes: Callable[[], Any]
) -> tuple[Minibatch, Float[Array, " questions"]]:
    """Move the chains; also the current log likelihoods at their latents before the step."""
    model, kind, theta, phi, rows, mask, previous = inputs
    tokens, token_mask, log_likelihood = previous[:3]
    if not model.fixed:
        again = model.log_likelihood(theta, rows.prompts, tokens, token_mask, rows.answers)
        log_likelihood = jnp.where(jnp.isfinite(log_likelihood), again, -jnp.inf)
    log_weight = kind.log_weight(theta, phi, rows, tokens, token_mask, log_likelihood, None)
    latents, owner = proposals.latents, proposals.owner
    proposal = latents.tokens, latents.mask, proposals.log_likelihood, latents.log_prob
    proposed = kind.log_weight(theta, phi, proposals.questions, *proposal)
    real = proposals.mask & (mask > 0)[owner]
    index, final_log_weight, rates = mh_sweep(key, log_weight, proposed, owner, real)
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

    tries = minibatch.sums(proposals.mask.astype(minibatch.reward.dtype))
    successes = minibatch.sums(jnp.clip(minibatch.reward, 0.0, 1.0))
    return Memory(
        tokens=jax.tree.map(at_chains, latents.tokens, previous.tokens),
        mask=at_chains(latents.mask, previous.mask),
        log_likelihood=at_chains(proposals.log_likelihood, log_likelihood),
        tries=decay * previous.tries + tries,
        successes=decay * previous.successes + successes,
        age=jnp.where(index >= 0, 0, previous.age + 1),
    )


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
    bounded = "from 0 to 1, a likelihood, which only reinforce, grpo and maxk do without"
    wanted = "a finite number" if unbounded else bounded

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
