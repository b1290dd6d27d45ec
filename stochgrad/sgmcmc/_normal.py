"""Normal distributions that stand for a posterior before there are draws."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from stochgrad.core import Position, PRNGKey, key_words
from stochgrad.sgmcmc._precision import Precision

EQUALS = 5.0
"""Normals whose evidence bounds differ by less than this are as good as each other."""


class Normal(NamedTuple):
    r"""A normal distribution over the raveled position.

    Attributes:
        mean: Its mean.
        precision: The inverse of its covariance.
        elbo: $E_q[\log\pi(\theta) - \log q(\theta)]$, estimated; -inf where the density is not
            finite at one of its draws.
    """

    mean: Float[np.ndarray, " d"]
    precision: Precision
    elbo: float = -np.inf

    def draws(self, white: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """Draws from standard normal numbers."""
        return self.mean + self.precision.color(white)

    def log_density(self, white: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Log densities of those draws."""
        constant = white.shape[1] * np.log(2 * np.pi) + self.precision.log_determinant
        return -0.5 * (constant + np.sum(white**2, axis=1))


class NormalApproximation(NamedTuple):
    """A normal approximation of a posterior, the best of several.

    Attributes:
        position: The mean of the best.
        precision: The inverse of its covariance, for ``mass`` of ``stochgrad.sghmc``.
        elbo: Its evidence lower bound.
        paths: The best of each path of the search, by falling bound.
        passes: Passes over all rows that were spent.
        unravel: ``vector -> position``.
    """

    position: Position
    precision: Precision
    elbo: float
    paths: tuple[Normal, ...]
    passes: int
    unravel: Callable[[Any], Position]

    def starts(self, key: PRNGKey, count: int) -> Float[np.ndarray, "count d"]:
        """Draws of the best normals, in turn; of those alone whose bound is within 5 of it.

        Each is the one furthest from those before it, so that few chains see what modes there are.
        """
        best = [path for path in self.paths if path.elbo > self.elbo - EQUALS] or self.paths[:1]
        order = [best[0]]
        while len(order) < len(best):
            rest = [path for path in best if not any(path is other for other in order)]
            order.append(max(rest, key=lambda path: min(_distance(path, o) for o in order)))
        white = generator(key).standard_normal((count, order[0].mean.size))
        return np.concatenate([order[i % len(order)].draws(white[i : i + 1]) for i in range(count)])


def _distance(one: Normal, other: Normal) -> float:
    """How far the mean of one is from the other, in standard deviations of either."""
    gap = one.mean - other.mean
    return float(min(np.linalg.norm(x.precision.whiten(gap)) for x in (one, other)))


def generator(key: PRNGKey) -> np.random.Generator:
    """Numbers of the host's, of a key."""
    return np.random.default_rng(np.asarray(key_words(key)).tolist())
