"""How many proposals each question gets."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ops import segment_sum
from jaxtyping import Array, Bool, Float, Int

from stochgrad.core import check_count, check_flag, check_number, check_real


class Tally(NamedTuple):
    """What is known of M questions, once for each fold of an allocator.

    Attributes:
        tries: Proposals.
        successes: Sum of their rewards.
        norms: Sum of the gradient's norms at those with a reward.
        ended: The round in which enough was found, or a large number.
    """

    tries: Float[Array, " questions"]
    successes: Float[Array, " questions"]
    norms: Float[Array, " questions"]
    ended: Int[Array, " questions"]

    @classmethod
    def none(cls, questions: int) -> "Tally":
        """Nothing yet."""
        check_count("questions", questions)
        zeros = jnp.zeros(questions)
        return cls(zeros, zeros, zeros, jnp.full(questions, _NEVER))


_NEVER = jnp.iinfo(jnp.int32).max
_PRIOR = 8.0  # proposals of a pilot for which the mean of all questions counts


class Allocator(NamedTuple):
    """A rule for the numbers of proposals.

    No average may hold proposals that decided how many it holds. Numbers may depend on earlier
    visits; on earlier rounds of the same visit only by ``enough`` or between ``folds``.

    Attributes:
        per_round: Proposals drawn in a round, on average over the questions.
        rounds: Rounds; the proposals of one are drawn together.
        counts: ``(key, round, past, tally, mask) -> (folds * questions,)``: how many of the
            ``per_round * questions`` proposals of a round each gets, fold by fold. ``past`` is the
            tally of earlier steps, ``tally`` that of earlier rounds, by the fold for which each
            proposal was drawn; ``mask`` is 0 for padding.
        enough: ``tally -> (questions,)`` of bool: which questions need no more rounds. The round
            that ends a question is left out of averages: its end depends on the rewards. None where
            no round depends on rewards.
        directions: Directions along which gradients' norms are measured; zero for none.
        decay: Of the tally of earlier steps, each time that a question is visited.
        least: The fewest proposals that a question's average has for certain.
        folds: Parts with tallies of their own. Of two, the later rounds of each are averaged with
            the first round of the other one, which did not decide on them; the estimate is the mean
            of both.
    """

    per_round: int
    rounds: int
    counts: Callable[..., Int[Array, " questions"]]
    enough: Callable[[Tally], Bool[Array, " questions"]] | None = None
    directions: int = 0
    decay: float = 1.0
    least: int = 1
    folds: int = 1

    def usable(self, tally: Tally, owner: Array, number: Array) -> Bool[Array, " proposals"]:
        """Which proposals may be averaged over."""
        ended = tally.ended[owner]
        return (number < ended) | (ended == 0)

    def record(
        self,
        tally: Tally,
        owner: Int[Array, " p"],
        mask: Bool[Array, " p"],
        reward: Float[Array, " p"],
        norms: Float[Array, " p"],
        number: Int[Array, ""],
    ) -> Tally:
        """The tally with one more round."""

        def sums(values):
            return segment_sum(jnp.where(mask, values, 0.0), owner, tally.tries.shape[0])

        tally = tally._replace(
            tries=tally.tries + sums(jnp.ones_like(reward)),
            successes=tally.successes + sums(reward),
            norms=tally.norms + sums(jnp.where(reward > 0, norms, 0.0)),
        )
        if self.enough is None:
            return tally
        now = self.enough(tally) & (tally.ended == _NEVER)
        return tally._replace(ended=jnp.where(now, number, tally.ended))


def uniform(per_question: int = 1) -> Allocator:
    """The same number for every question.

    Args:
        per_question: The number.
    """
    number = check_count("per_question", per_question)

    def counts(key, round, past, tally, mask):
        return whole(mask, number * jnp.sum(mask))

    return Allocator(number, 1, counts, least=number)


def gvm(
    per_question: int = 8,
    *,
    alpha: float = 1e-3,
    beta: float = 2.0,
    floor: float = 0.0,
    directions: int = 4,
) -> Allocator:
    r"""Numbers that minimize the variance of a gradient from accepted proposals.

    $$n_i \propto \frac{G_i}{\sqrt{p_i + \alpha / p_i^{\beta - 1}}},$$

    with the share $p_i$ of accepted proposals and the mean gradient norm $G_i$ at them, both from a
    pilot round of half of all proposals, the same number for each question; the second half goes
    where the pilot says that it is missing [GVM-RAFT, Yao et al. 2025]. A few pilot proposals say
    little: the mean over all questions of the minibatch counts for another 8 of each. With the
    published $p_i = s / n$ a question that the pilot did not solve would get nothing, and is often
    the one that needs proposals most.

    A pilot that decides how many proposals it is averaged with biases every average: those that ask
    for more, by large norms or few successes, weigh less. So it is in the paper. Here the pilot has
    two halves, each of which decides on a half of the second round, and what one has asked for is
    averaged with the other one: with no proposal that decided on it. Estimates have the mean that
    they have with numbers fixed beforehand. ``star`` and ``rest_em``, which count proposals and not
    questions, follow the numbers.

    Args:
        per_question: Proposals for each question on average, pilot included; a multiple of 4.
        alpha: Keeps questions that are hardly ever solved from taking all.
        beta: Likewise.
        floor: Share of the second round that is spread evenly.
        directions: Random directions along which gradients' norms are measured.
    """
    number = check_count("per_question", per_question, least=4)
    if number % 4:
        raise ValueError(
            f"per_question must be a multiple of 4: a half is a pilot in two parts, got {number}."
        )
    alpha, beta = check_number("alpha", alpha, zero=True), check_real("beta", beta)
    floor = check_number("floor", floor, zero=True, most=1.0)
    directions = check_count("directions", directions)
    part = number // 4

    def second(tally: Tally, mask):
        """Of one fold, whose proposals come on top of as many of the other one's pilot."""
        target = gvm_share(tally, alpha, beta) * 2 * part * jnp.sum(mask)
        missing = jnp.maximum(target - part, 0.0) * mask
        total = jnp.sum(missing)
        evenly = mask / jnp.sum(mask)
        share = missing / jnp.where(total > 0, total, 1.0)
        share = jnp.where(total > 0, (1 - floor) * share + floor * evenly, evenly)
        return whole(share, part * jnp.sum(mask))

    def counts(key, round, past, tally, mask):
        halves = jax.tree.map(lambda leaf: leaf.reshape(2, -1), tally)
        later = jax.vmap(second, (0, None))(halves, mask).reshape(-1)
        first = jnp.tile(whole(mask, part * jnp.sum(mask)), 2)
        return jnp.where(round == 0, first, later)

    return Allocator(2 * part, 2, counts, directions=directions, least=part, folds=2)


def gvm_share(tally: Tally, alpha: float, beta: float) -> Float[Array, " questions"]:
    """The shares of all proposals that minimize the variance, by a tally."""
    s, n, all = tally.successes, tally.tries, jnp.sum(tally.successes)
    p = (s + _PRIOR * (all + 0.5) / (jnp.sum(n) + 1.0)) / (n + _PRIOR)
    mean = jnp.where(all > 0, jnp.sum(tally.norms) / jnp.maximum(all, 1e-12), 1.0)
    norm = (tally.norms + _PRIOR * mean) / (s + _PRIOR)
    share = jnp.where(n > 0, norm / jnp.sqrt(p + alpha / p ** (beta - 1.0)), 0.0)
    total = jnp.sum(share)
    return share / jnp.where(total > 0, total, 1.0)


def reinforce_ada(
    per_round: int = 2,
    rounds: int = 4,
    *,
    positive: int = 1,
    negative: int = 0,
    corrected: bool = True,
) -> Allocator:
    r"""Rounds of proposals until enough right and enough wrong ones are found.

    Which questions go on depends on their rewards, so that an average over all of a question's
    proposals is biased. Those *before* the round in which it ended are exchangeable: an average
    over them, or over the first round where that was enough, has the mean of a single round.
    ``corrected`` leaves the last round of such a question out of averages, not of the chains.

    Args:
        per_round: Proposals for each question that goes on.
        rounds: The most rounds.
        positive: Right proposals that are enough.
        negative: Wrong ones that must be there too; half and half is ``"balance"`` in
            [Reinforce-Ada, Xiong et al. 2025].
        corrected: Whether to leave the deciding round out of averages.
    """
    each, rounds = check_count("per_round", per_round), check_count("rounds", rounds)
    positive = check_count("positive", positive)
    negative = check_count("negative", negative, least=0)
    if positive + negative > each * rounds:
        raise ValueError(
            f"positive and negative must be reached by per_round * rounds = {each * rounds} "
            f"proposals, got {positive} and {negative}."
        )
    check_flag("corrected", corrected)

    def enough(tally):
        return (tally.successes >= positive) & (tally.tries - tally.successes >= negative)

    def counts(key, round, past, tally, mask):
        return jnp.where((mask > 0) & ~enough(tally), each, 0)

    return Allocator(each, rounds, counts, enough if corrected else None, least=each)


def vade(per_question: int = 4, *, decay: float = 0.9, floor: float = 0.5) -> Allocator:
    r"""Thompson sampling: more proposals where a draw of the success rate promises information.

    $$\tilde p_i \sim \mathrm{Beta}(1 + s_i, 1 + f_i),\qquad n_i \propto \tilde p_i(1-\tilde p_i),$$

    with the successes and failures of earlier visits, which fade by ``decay`` each visit as the
    model moves on [VADE, 2025].

    Args:
        per_question: Proposals for each question on average.
        decay: What is left of earlier visits' counts.
        floor: Share of the proposals that each question gets for certain, in whole numbers, and at
            least one. An estimator that needs two of each question, as ``reinforce`` does, wants
            ``floor * per_question`` to be two.
    """
    number = check_count("per_question", per_question)
    decay = check_number("decay", decay, zero=True, most=1.0)
    floor = check_number("floor", floor, zero=True, most=1.0)
    least = max(int(floor * number + 1e-6), 1)

    def counts(key, round, past, tally, mask):
        failures = jnp.maximum(past.tries - past.successes, 0.0)
        p = jax.random.beta(key, 1.0 + past.successes, 1.0 + failures)
        worth = mask * jnp.maximum(p * (1.0 - p), 1e-12)
        evenly = jnp.where(mask > 0, least, 0)
        return evenly + whole(worth, (number - least) * jnp.sum(mask))

    return Allocator(number, 1, counts, decay=decay, least=least)


def whole(share: Float[Array, " n"], total: Int[Array, ""]) -> Int[Array, " n"]:
    """Whole numbers in proportion to shares, with the given sum."""
    ends = jnp.round(jnp.cumsum(share) / jnp.sum(share) * total).astype(jnp.int32)
    return jnp.diff(ends, prepend=0)
