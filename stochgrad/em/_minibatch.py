"""What an estimator sees of an E-step, and what the E-step reports."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.ops import segment_sum
from jaxtyping import Array, Float, Int

from stochgrad.em._history import History


class Minibatch(NamedTuple):
    """M questions with P proposals after an E-step: what an estimator weighs.

    Attributes:
        owner: The question that each proposal is for.
        reward: Likelihood of the answer given each proposal: 1 or 0, with a verifier; for an
            estimator that is ``unbounded``, any finite number.
        accept: Probability with which the chain took each.
        unbiased_mask: 1 for proposals that may enter the per-question mean without bias, 0 for
            others: padding, or those that ended the drawing.
        mask: 1 for questions, 0 for padding.
        had_valid_latent: 1 where the chain stood at a latent with a likelihood, before the step.
        has_valid_latent: 1 where it does after the step.
        proposal_index: Where each chain stands: at a proposal, or -1 for where it was.
        slopes: ``() -> (proposals, chains)``: derivatives of log p(z|x) at the proposals and where
            the chains stood before, along common directions, of shapes (P, m) and (M, m).
        history: The chains' past visits.
    """

    owner: Int[Array, " proposals"]
    reward: Float[Array, " proposals"]
    accept: Float[Array, " proposals"]
    unbiased_mask: Float[Array, " proposals"]
    mask: Float[Array, " questions"]
    had_valid_latent: Float[Array, " questions"]
    has_valid_latent: Float[Array, " questions"]
    proposal_index: Int[Array, " questions"]
    slopes: Callable[[], tuple[Array, Array]]
    history: History | None = None

    used = property(lambda self: self.unbiased_mask)  # names of version 0.1, from here on
    present = property(lambda self: self.mask)
    before = property(lambda self: self.had_valid_latent)
    right = property(lambda self: self.has_valid_latent)
    chosen = property(lambda self: self.proposal_index)

    def sums(self, values: Float[Array, "proposals ..."]) -> Float[Array, "questions ..."]:
        """Sums over each question's proposals."""
        return segment_sum(values, self.owner, self.mask.shape[0])

    def shares(self) -> Float[Array, " proposals"]:
        """One over the number of its question's proposals, for each that counts."""
        return self.unbiased_mask / jnp.maximum(self.counts(), 1.0)[self.owner]

    def counts(self) -> Float[Array, " questions"]:
        """Proposals of each question that count."""
        return self.sums(self.unbiased_mask)


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


Visit = Minibatch  # its name in version 0.1
