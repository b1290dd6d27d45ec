"""The choice of surrogates by the spread that draws would have."""

from collections.abc import Callable
from typing import Any

import numpy as np

from stochgrad.core import tree_size
from stochgrad.federated._gaussians import Precision, Surrogates
from stochgrad.federated._matrices import MOST_EXACT_DIAGONALS
from stochgrad.federated._spread import Spread

_SPREAD = 1.1
"""Error in standard deviations, as a factor, from which on visits are too long."""
_ENOUGH = 1.05
"""The same, up to which surrogates of first order are taken by default."""
RANKS = (4, 16)


def choose_surrogates(
    first: Surrogates,
    time: float | None,
    steps: np.ndarray,
    matrices: bool,
    precision_of: Callable[[str, int], Precision],
    spread_of: Callable[[Surrogates], Spread | None],
    scale_of: Callable[[Surrogates], Any],
) -> tuple[str, Surrogates, Spread | None]:
    """Surrogates of first order if draws spread as they should, or else with curvature.

    Full, or beyond the dimensions of matrices of the least rank by which the spread is right;
    beyond 500, where diagonals are not known well enough to tell, they stay as they are. As much of
    the curvature is taken as is safe.

    Args:
        first: Surrogates of first order.
        time: Of a step in Langevin dynamics; None if it is not known.
        steps: Steps of a visit to each client.
        matrices: Whether a matrix for each client is small enough.
        precision_of: ``(form, rank) -> precision``, the clients' Hessians in that form.
        spread_of: ``surrogates -> spread``.
        scale_of: ``surrogates -> numbers`` to multiply each client's curvature with.

    Returns:
        Of what kind they are, the surrogates, and the spread of their draws.
    """
    spread = spread_of(first)
    if not _needs_curvature(spread, time, steps):
        return "global_first_order", first, spread
    if matrices:
        kind, chosen = "global_quadratic", first._replace(precision=precision_of("full", 1))
    elif tree_size(first.origin) > MOST_EXACT_DIAGONALS:
        return "global_first_order", first, spread
    else:
        kind, chosen = _least_rank(first, precision_of, spread_of)
    chosen = chosen.scaled(scale_of(chosen))
    return kind, chosen, spread_of(chosen)


def _least_rank(first, precision_of, spread_of) -> tuple[str, Surrogates]:
    kind, made = "", first
    for rank in RANKS:
        kind, made = f"low rank {rank}", first._replace(precision=precision_of("low_rank", rank))
        spread = spread_of(made)
        if spread is None or not too_wide(spread, _ENOUGH):
            break
    return kind, made


def _needs_curvature(spread: Spread | None, time: float | None, steps: np.ndarray) -> bool:
    if time is None:
        return steps.max() > 1
    return spread is not None and too_wide(spread, _ENOUGH)


def too_wide(spread: Spread, most: float = _SPREAD) -> bool:
    """Whether the spread of draws is wrong, by default by more than a tenth."""
    return not 1 / most <= spread.ratio <= most
