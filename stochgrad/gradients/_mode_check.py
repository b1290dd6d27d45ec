"""Whether a center is a mode, as what is built on one needs."""

import math
from typing import Any

from stochgrad.core import tree_size


def why_no_mode(distance: float, dimension: int) -> str | None:
    """What is wrong with a center, in words; None where it is near a mode.

    Args:
        distance: How far the mode is in standard deviations, NaN where there is none.
        dimension: d; draws lie at a distance of about its root.
    """
    if math.isnan(distance):
        return (
            "the log density is not strictly concave there, or flat in some direction, so that the "
            "center is no mode. A joint density without a mode is the rule for hierarchical models "
            "whose group scale is sampled (it is unbounded where the scale goes to zero): write "
            "them non-centered. "
            "stochgrad.svrg, stochgrad.saga and plain minibatches need no center, with a step size "
            "of your own."
        )
    if distance > math.sqrt(dimension):
        return (
            f"the mode is still {distance:.3g} standard deviations away, where draws lie at "
            f"{math.sqrt(dimension):.3g}: take more num_steps or passes, a larger learning_rate, "
            "or columns of data that are centered and scaled."
        )
    return None


def check_center(name: str, center: Any) -> Any:
    """The position of a center; a ValueError where ``stochgrad.find_center`` reports no mode."""
    distance, position = getattr(center, "distance", None), getattr(center, "position", center)
    if distance is not None and (reason := why_no_mode(float(distance), tree_size(position))):
        raise ValueError(f"{name}: {reason} To go on all the same, pass its position.")
    return position
