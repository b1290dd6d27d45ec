"""Errors of pooled means and convergence, right also for chains that share their minibatches."""

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import Draws


def mcse(draws: Draws) -> PyTree:
    r"""Monte Carlo standard error of each posterior mean, pooled over chains.

    The chains' average at each draw, $\bar x_t = \frac1C\sum_c x_{ct}$, is a time series, whatever
    the chains have in common; with $\mathrm{ESS}$ its effective sample size,

    $$\mathrm{mcse} = \sqrt{\operatorname{Var}_t \bar x_t / \mathrm{ESS}(\bar x)}.$$

    The usual formula adds up the chains' own effective sample sizes, which takes them for
    independent. With ``share_batches=True`` they are not: their gradient noise is the same.

    Args:
        draws: Draws of one or more chains, all finite.

    Returns:
        Standard errors in the structure of ``draws.positions``, without the chain and draw axes.
    """
    return jax.tree.map(error_of_mean, finite(draws).positions)


def rhat(draws: Draws) -> PyTree:
    r"""Potential scale reduction, not fooled by noise that the chains have in common.

    The classical ratio $\sqrt{((n-1)W/n + B/n) / W}$ (Gelman & Rubin, Stat. Sci. 1992) with W, the
    variance within chains, taken of each chain's departure from the chains' average at the same
    draw. Noise in common moves that average alone; left in W, as usual, it would hide how far
    chains are apart. For independent chains the two agree.

    Args:
        draws: Draws of two or more chains, all finite.

    Returns:
        Ratios in the structure of ``draws.positions``, without the chain and draw axes.

    Raises:
        ValueError: there is one chain only.
    """
    if draws.num_chains < 2:
        raise ValueError("rhat compares chains: run with num_chains of 2 or more.")

    def one(x):
        x = np.asarray(x, np.float64)
        chains, n = x.shape[:2]
        departure = x - x.mean(axis=0, keepdims=True)
        within = departure.var(axis=1, ddof=1).mean(axis=0) * chains / (chains - 1)
        between = n * x.mean(axis=1).var(axis=0, ddof=1)
        return np.sqrt((n - 1) / n + between / (n * within))

    return jax.tree.map(one, finite(draws).positions)


def error_of_mean(x: np.ndarray) -> np.ndarray:
    """Standard error of the mean of an array of shape (chain, draw, ...); see ``mcse``."""
    from numpyro.diagnostics import effective_sample_size

    average = np.asarray(x, np.float64).mean(axis=0, keepdims=True)
    return np.sqrt(average.var(axis=(0, 1)) / effective_sample_size(average))


def finite(draws: Draws) -> Draws:
    """The draws, if all of them are finite; a ValueError if not."""
    if not draws.finite.all():
        raise ValueError("some draws are not finite: take draws.finite_chains() first.")
    return draws
