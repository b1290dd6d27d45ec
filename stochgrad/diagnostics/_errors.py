"""Errors of pooled means and convergence, right also for chains that share their minibatches."""

from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.diagnostics._inputs import arrays_of


def mcse(draws: Any) -> PyTree:
    r"""Monte Carlo standard error of each posterior mean, pooled over chains.

    The chains' average at each draw, $\bar x_t = \frac1C\sum_c x_{ct}$, is a time series, whatever
    the chains have in common; with $\mathrm{ESS}$ its effective sample size,

    $$\mathrm{mcse} = \sqrt{\operatorname{Var}_t \bar x_t / \mathrm{ESS}(\bar x)},$$

    with ArviZ's effective sample size of the mean.

    The usual formula adds up the chains' own effective sample sizes, which takes them for
    independent. With ``share_batches=True`` they are not: their gradient noise is the same.

    Args:
        draws: Draws of one or more chains, all finite, or an ArviZ object.

    Returns:
        Standard errors in the structure of ``draws.positions``, without the chain and draw axes.
    """
    return jax.tree.map(error_of_mean, arrays_of(draws))


def rhat(draws: Any) -> PyTree:
    r"""Potential scale reduction, not fooled by noise that the chains have in common.

    The classical ratio $\sqrt{((n-1)W/n + B/n) / W}$ (Gelman & Rubin, Stat. Sci. 1992) with W, the
    variance within chains, taken of each chain's departure from the chains' average at the same
    draw. Noise in common moves that average alone; left in W, as usual, it would hide how far
    chains are apart. For independent chains the two agree.

    Args:
        draws: Draws of two or more chains, all finite, or an ArviZ object.

    Returns:
        Ratios in the structure of ``draws.positions``, without the chain and draw axes; NaN for
        what never changes, infinity for what differs between chains alone.

    Raises:
        TypeError: they are neither draws nor an ArviZ object.
        ValueError: there is one chain, or one draw, only; a draw is not finite.
    """
    arrays = arrays_of(draws)
    chains, length = jax.tree.leaves(arrays)[0].shape[:2]
    if chains < 2:
        raise ValueError("rhat compares chains: draws of num_chains of 2 or more are needed.")
    if length < 2:
        raise ValueError(
            f"rhat compares chains' spread: two draws or more are needed, got {length}."
        )

    def one(x):
        x = np.asarray(x, np.float64)
        chains, n = x.shape[:2]
        departure = x - x.mean(axis=0, keepdims=True)
        within = departure.var(axis=1, ddof=1).mean(axis=0) * chains / (chains - 1)
        between = n * x.mean(axis=1).var(axis=0, ddof=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt((n - 1) / n + between / (n * within))

    return jax.tree.map(one, arrays)


def error_of_mean(x: np.ndarray) -> np.ndarray:
    """Standard error of the mean of an array of shape (chain, draw, ...); see ``mcse``."""
    import arviz

    average = np.asarray(x, np.float64).mean(axis=0)
    ess = [
        np.asarray(arviz.ess(series[None], method="mean"))
        for series in average.reshape(len(average), -1).T
    ]
    return np.sqrt(average.var(axis=0) / np.reshape(ess, average.shape[1:]))
