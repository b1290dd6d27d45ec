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
from jaxtyping import Array, Bool, Float, Int, PyTree

from stochgrad.core import PRNGKey
from stochgrad.em._allocate import Allocator, Tally
from stochgrad.em._model import LatentModel, Questions, Rationales, VerifierWarning, take
from stochgrad.em._shelf import Shelf
from stochgrad.gradients import directional_derivatives
from stochgrad.kernels import acceptance


class Memory(NamedTuple):
    """One latent for each example, and what is known of each.

    Attributes:
        tokens: The latents; with ``memory_path``, where they are found.
        mask: Their masks; empty with ``memory_path``.
        log_likelihood: Of the answer given the latent; minus infinity where none was right yet.
        tries: Proposals so far, decayed as the allocator says.
        successes: Those of them that had a likelihood, likewise.
        age: Visits since the latent last changed.
    """

    tokens: PyTree
    mask: Bool[Array, "examples length"]
    log_likelihood: Float[Array, " examples"]
    tries: Float[Array, " examples"]
    successes: Float[Array, " examples"]
    age: Int[Array, " examples"]


class Visit(NamedTuple):
    """One E-step of a minibatch of M questions with P proposals: what an estimator weighs.

    Attributes:
        owner: The question that each proposal is for.
        reward: Likelihood of the answer given each proposal: 1 or 0, with a verifier; for an
            estimator that is ``unbounded``, any finite number.
        accept: Probability with which the chain took each.
        used: 1 for proposals that an average over a question may hold without bias, 0 for others:
            they were not asked for, or ended the drawing.
        present: 1 for questions, 0 for what fills up a last minibatch.
        before: 1 where the chain stood at a latent with a likelihood, before the step.
        right: 1 where it does after the step.
        chosen: Where each chain stands: at a proposal, or -1 for where it was.
        slopes: ``() -> (proposals, chains)``: derivatives of log p(z|x) at the proposals and where
            the chains stood before, along common directions, of shapes (P, m) and (M, m).
    """

    owner: Int[Array, " proposals"]
    reward: Float[Array, " proposals"]
    accept: Float[Array, " proposals"]
    used: Float[Array, " proposals"]
    present: Float[Array, " questions"]
    before: Float[Array, " questions"]
    right: Float[Array, " questions"]
    chosen: Int[Array, " questions"]
    slopes: Callable[[], tuple[Array, Array]]

    def sums(self, values: Float[Array, "proposals ..."]) -> Float[Array, "questions ..."]:
        """Sums over each question's proposals."""
        return segment_sum(values, self.owner, self.present.shape[0])

    def shares(self) -> Float[Array, " proposals"]:
        """One over the number of its question's proposals, for each that counts."""
        return self.used / jnp.maximum(self.counts(), 1.0)[self.owner]

    def counts(self) -> Float[Array, " questions"]:
        """Proposals of each question that count."""
        return self.sums(self.used)


class Stats(NamedTuple):
    """What an E-step reports, of its minibatch.

    Attributes:
        acceptance_rate: Mean probability that a chain took a proposal.
        reward: Mean likelihood of the proposals: the accuracy, with a verifier.
        right: Share of the questions whose chain stands at a latent with a likelihood.
        solved: Share of all questions that ever had one.
        age: Mean visits since a chain last moved.
        proposals: Proposals drawn.
        tokens: Tokens drawn, those after an end-of-sequence token not counted.
    """

    acceptance_rate: Float[Array, ""]
    reward: Float[Array, ""]
    right: Float[Array, ""]
    solved: Float[Array, ""]
    age: Float[Array, ""]
    proposals: Float[Array, ""]
    tokens: Float[Array, ""]


def latent_shapes(model: LatentModel, params: Any, questions: Questions) -> Rationales:
    """Shapes and dtypes of one example's latent, with a leading axis of one."""
    one = take(questions.prompts, jnp.zeros(1, jnp.int32))
    return jax.eval_shape(model.policy.sample, params, jax.random.key(0), one)


def empty_memory(shelf: Shelf, key: PRNGKey, one: Rationales, count: int) -> Memory:
    """A memory of ``count`` latents that are all wrong."""
    zeros = jnp.zeros(count)
    return Memory(
        *shelf.init(key, (one.tokens, one.mask), count),
        jnp.full(count, -jnp.inf, one.log_prob.dtype),
        zeros,
        zeros,
        jnp.zeros(count, jnp.int32),
    )


def read(shelf: Shelf, memory: Memory, index: Int[Array, " n"]) -> Memory:
    """Rows of the memory."""
    tokens, mask = shelf.read((memory.tokens, memory.mask), index)
    return Memory(tokens, mask, *take(memory[2:], index))


def write(
    shelf: Shelf, memory: Memory, index: Int[Array, " n"], rows: Memory, moved: Bool[Array, " n"]
) -> Memory:
    """The memory with other rows, of which those that moved have new latents."""
    tokens, mask = shelf.write((memory.tokens, memory.mask), index, rows[:2], moved)
    rest = jax.tree.map(
        lambda all, rows: all.at[index].set(rows, mode="drop"), memory[2:], rows[2:]
    )
    return Memory(tokens, mask, *rest)


class Proposals(NamedTuple):
    """What was drawn for a minibatch.

    Attributes:
        drawn: The latents.
        log_likelihood: Of the answers given them.
        reward: The likelihood, or what a reward that is none comes to.
        owner: The question that each is for.
        asked: Which were asked for; the rest fills up the last round.
        used: Which of them may be averaged over.
    """

    drawn: Rationales
    log_likelihood: Float[Array, " proposals"]
    reward: Float[Array, " proposals"]
    owner: Int[Array, " proposals"]
    asked: Bool[Array, " proposals"]
    used: Bool[Array, " proposals"]


def propose(
    key: PRNGKey,
    draw: Callable[[PRNGKey, Questions], Rationales],
    model: LatentModel,
    params: Any,
    rows: Questions,
    present: Float[Array, " questions"],
    allocator: Allocator,
    past: Tally,
    unbounded: bool = False,
) -> Proposals:
    """Draw in rounds, as many each time as the rounds before suggest.

    ``unbounded`` is whether rewards may be other than likelihoods, which are from 0 to 1.
    """
    questions = present.shape[0]
    size = allocator.per_round * questions

    def one_round(tally: Tally, given):
        number, key = given
        count_key, draw_key, direction_key = jax.random.split(key, 3)
        counts = allocator.counts(count_key, number, past, tally, present)
        ends = jnp.cumsum(counts)
        slot = lax.iota(jnp.int32, size)
        owner = jnp.searchsorted(ends, slot, side="right").astype(jnp.int32)
        asked, owner = slot < ends[-1], jnp.minimum(owner, questions - 1)
        asking = take(rows, owner)
        drawn: Rationales = lax.stop_gradient(draw(draw_key, asking))
        log_likelihood, reward = judged(model, params, asking, drawn, asked, unbounded)
        norms = jnp.zeros(size)
        if allocator.directions:
            along = slopes(
                lambda p: model.policy.log_prob(p, asking.prompts, drawn.tokens, drawn.mask),
                params,
                direction_key,
                allocator.directions,
            )
            norms = jnp.sqrt(jnp.sum(along**2, axis=1))
        success = jnp.clip(reward, 0.0, 1.0)
        tally = allocator.record(tally, owner, asked, success, norms, number)
        return tally, (drawn, log_likelihood, reward, owner, asked)

    keys = jax.random.split(key, allocator.rounds)
    numbers = jnp.arange(allocator.rounds, dtype=jnp.int32)
    tally = Tally.none(questions)
    if allocator.rounds == 1:
        tally, out = one_round(tally, (numbers[0], keys[0]))
    else:
        tally, out = lax.scan(one_round, tally, (numbers, keys))
        out = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)
    drawn, log_likelihood, reward, owner, asked = out
    used = asked & allocator.usable(tally, owner, jnp.repeat(numbers, size))
    return Proposals(drawn, log_likelihood, reward, owner, asked, used)


def judged(
    model: LatentModel,
    params: Any,
    rows: Questions,
    drawn: Rationales,
    asked: Bool[Array, " n"],
    unbounded: bool,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Log likelihoods of the answers, and rewards; what is neither counts as wrong, and warns."""
    arguments = params, rows.prompts, drawn.tokens, drawn.mask, rows.answers
    if model.reward is None:
        log_likelihood = model.log_likelihood(*arguments)
        if not model.fixed:
            return log_likelihood, jnp.exp(log_likelihood)
        reward = _warned(jnp.exp(log_likelihood), log_likelihood <= 0, asked, unbounded=False)
        return jnp.where(log_likelihood <= 0, log_likelihood, -jnp.inf), reward
    reward = model.reward(*arguments)
    if reward.dtype == jnp.bool_:
        reward = reward.astype(jnp.float32)
        return jnp.log(reward), reward
    valid = jnp.isfinite(reward)
    if not unbounded:
        valid &= (reward >= 0) & (reward <= 1)
    reward = _warned(reward, valid, asked, unbounded)
    return jnp.log(jnp.maximum(reward, 0.0)), reward


def _warned(
    reward: Float[Array, " n"], valid: Bool[Array, " n"], asked: Bool[Array, " n"], unbounded: bool
) -> Float[Array, " n"]:
    """Rewards, zero for those that are none; with a warning, from the compiled step."""
    reward = jnp.where(valid | asked, reward, 0.0)
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

    def replaced(reward):
        shape = jax.ShapeDtypeStruct(reward.shape, reward.dtype)
        return jax.pure_callback(warn, shape, reward, valid | ~asked, vmap_method="broadcast_all")

    return lax.cond(jnp.all(valid | ~asked), lambda reward: reward, replaced, reward)


def slopes(
    log_prob: Callable[[Any], Float[Array, " n"]], params: Any, key: PRNGKey, directions: int | None
) -> Float[Array, "n m"]:
    """Derivatives of n log probabilities, whose sums of squares are those of their gradients.

    Along random directions that is so on average; ``None`` is whole gradients.
    """
    if directions is not None:
        found = directional_derivatives(log_prob, params, key, directions)
        return lax.stop_gradient(found) / math.sqrt(directions)
    leaves = jax.tree.leaves(jax.jacrev(log_prob)(params))
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def walk(
    key: PRNGKey,
    log_weight: Float[Array, " questions"],
    proposed: Float[Array, " proposals"],
    owner: Int[Array, " proposals"],
    asked: Bool[Array, " proposals"],
) -> tuple[Int[Array, " questions"], Float[Array, " questions"], Float[Array, " proposals"]]:
    """Take each question's chain through its proposals, one after another.

    Returns:
        Where each chain ends (-1 where it did not move), its log weight there, and the probability
        with which each proposal was taken.
    """
    count, questions = proposed.shape[0], log_weight.shape[0]
    uniforms = jax.random.uniform(key, (count,), proposed.dtype)
    order = jnp.argsort(jnp.where(asked, owner, questions), stable=True)
    counts = segment_sum(asked.astype(jnp.int32), owner, questions)
    first = jnp.cumsum(counts) - counts

    def turn(carry):
        number, chosen, weight, rates = carry
        at = order[jnp.minimum(first + number, count - 1)]
        there = number < counts
        rate = jnp.where(there, acceptance(proposed[at], weight), 0.0)
        moved = uniforms[at] < rate
        rates = rates.at[jnp.where(there, at, count)].set(rate, mode="drop")
        chosen, weight = jnp.where(moved, at, chosen), jnp.where(moved, proposed[at], weight)
        return number + 1, chosen, weight, rates

    start = (jnp.int32(0), jnp.full(questions, -1, order.dtype), log_weight, 0.0 * uniforms)
    most = jnp.max(counts)
    _, chosen, weight, rates = lax.while_loop(lambda carry: carry[0] < most, turn, start)
    return chosen, weight, rates
