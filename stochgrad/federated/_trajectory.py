"""The mean of a first run, where slopes hold better than at the mode."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import (
    ConvergenceWarning,
    GradientNoiseWarning,
    Kernel,
    Position,
    PRNGKey,
    check_count,
    tree_bytes,
)
from stochgrad.core import sample as run
from stochgrad.federated._spread import StabilityWarning

_MOST_DISAGREEMENT = 0.25
"""Variance of the chains' means over that within chains: as of four independent draws in each."""
_FIRST_RUN = ("num_chains", "thin", "progress", "share_batches", "chunk_size")


class FirstRun(NamedTuple):
    """What a first run found.

    Attributes:
        mean: Of the last half of the draws of all chains.
        last: The last position of each chain.
        bytes: What its visits sent, up and down.
    """

    mean: Position
    last: Position
    bytes: np.ndarray


def check_trajectory(options: dict[str, Any], method: str) -> int:
    """Draws of a first run, or a ValueError where there is none to be had."""
    if method != "FSGLD":
        raise ValueError(
            f"reference='trajectory' is where method='FSGLD' takes slopes, not {method!r}: give a "
            "position, or leave it out."
        )
    draws = check_count("num_warmup", options.get("num_warmup", 0), least=0)
    if draws < 2:
        raise ValueError(
            "reference='trajectory' is the mean of a first run of num_warmup draws, the last half "
            f"of them, got num_warmup={draws}: give two or more, long enough for chains to forget "
            "the mode."
        )
    return draws


def first_run(
    key: PRNGKey,
    kernel: Kernel,
    init: Any,
    draws: int,
    carried: int,
    options: dict[str, Any],
) -> FirstRun:
    """Run a kernel of visits for some draws; nothing of it is stored.

    Args:
        key: A typed PRNG key.
        kernel: A kernel that reports its ``visits``.
        init: Where the chains start.
        draws: How many.
        carried: Bytes of what a chain carries from client to client.
        options: Of the main run.
    """
    like = {name: options[name] for name in _FIRST_RUN if name in options}
    with warnings.catch_warnings():  # only a mean is wanted of these draws
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", GradientNoiseWarning)
        found = run(key, kernel, init=init, num_samples=draws, **like)
    if np.any(np.asarray(found.first_bad) >= 0):
        raise ValueError(
            "chains of the first run, for reference='trajectory', leave the finite numbers: take "
            "a smaller step_size or fewer local_steps, or leave reference out."
        )

    disagreement = _disagreement(found.positions, draws)
    if disagreement > _MOST_DISAGREEMENT:
        warnings.warn(
            "the chains of the first run, for reference='trajectory', do not agree: their means "
            f"lie {disagreement**0.5:.2g} standard deviations of a chain apart, and slopes at the "
            "mean of all are near none of them: take a longer num_warmup, or "
            "surrogate_period, which takes slopes where each chain is.",
            StabilityWarning,
            stacklevel=3,
        )

    def mean(x):
        late = np.asarray(x[:, draws // 2 :], np.float64)
        return jnp.asarray(late.mean(axis=(0, 1)), x.dtype)

    last = jax.tree.map(lambda x: jnp.asarray(x[:, -1]), found.positions)
    sent = carried * int(np.asarray(found.stats["visits"])[:, -1].astype(np.int64).sum())
    return FirstRun(jax.tree.map(mean, found.positions), last, np.array([sent, sent], np.int64))


def _disagreement(positions: Position, draws: int) -> float:
    """Variance between the means of chains, over that within them, summed over coordinates."""
    between, within = 0.0, 0.0
    for x in jax.tree.leaves(positions):
        late = np.asarray(x[:, draws // 2 :], np.float64)
        if len(late) > 1:
            between += float(late.mean(axis=1).var(axis=0, ddof=1).sum())
            within += float(late.var(axis=1).mean(axis=0).sum())
    return between / within if within > 0 else 0.0


def round_bytes(position: Position, count: int) -> int:
    """Bytes of one position to all clients, or of one slope from each."""
    return count * tree_bytes(position)
