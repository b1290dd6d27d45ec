"""What a chain's past visits say about the best coefficient of its control variate."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from stochgrad.core import check_count

_FADE = 0.95  # of the counts, at each visit: the model moves on


class History(NamedTuple):
    """Past visits of the chains, each counting a twentieth less with every later one.

    Attributes:
        visits: Those that met the chain at a latent with a likelihood.
        moves: Those of them at which it took a proposal.
        changes: Those of these at which the proposal was another latent.
    """

    visits: Float[Array, " questions"]
    moves: Float[Array, " questions"]
    changes: Float[Array, " questions"]

    @classmethod
    def none(cls, questions: int) -> "History":
        """No visits."""
        check_count("questions", questions)
        return cls(*(jnp.zeros(questions),) * 3)

    def add(self, valid: Array, moved: Array, changed: Array) -> "History":
        """With one more visit, of which three flags tell."""
        flags = (valid, valid & moved, valid & moved & changed)
        pairs = zip(self, flags, strict=True)
        return History(*(_FADE * count + flag.astype(count.dtype) for count, flag in pairs))

    def coefficient(self, proposals: Float[Array, " questions"]) -> Float[Array, " questions"]:
        r"""An estimate of the coefficient of least variance, with so many proposals a visit.

        $$\hat\beta = \frac{qD}{1 - p^2(1 - D)},\qquad q = 1 - (1 - p)^K,$$

        with the mean of the Beta posterior (of Jeffreys' prior) for the chance q that a visit moves
        the chain, and, for the chance D that it moves to another latent when it moves, the changes
        over the moves and two: 0 until there was one, and rather too small than too large.
        """
        q = (self.moves + 0.5) / (self.visits + 1.0)
        d = self.changes / (self.moves + 2.0)
        p = -jnp.expm1(jnp.log1p(-q) / jnp.maximum(proposals, 1.0))
        return q * d / (1.0 - p**2 * (1.0 - d))
