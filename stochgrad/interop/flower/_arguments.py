"""Arguments of a run over a network."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stochgrad.core import check_array, check_count, describe


def client_names(clients: Any) -> list[str]:
    if isinstance(clients, str | bytes | Mapping) or not isinstance(clients, Sequence):
        raise TypeError(f"clients must be a list of different names, got {describe(clients)}.")
    names = list(clients)
    if not names or not all(isinstance(c, str) and c for c in names):
        raise ValueError(f"clients must be a list of different names, got {describe(names)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"clients must be different names, got {describe(names)}.")
    return names


def visit_probabilities(values: Any, count: int) -> np.ndarray:
    p = check_array("probabilities", values).astype(np.float64)
    if p.shape != (count,) or not np.all(p > 0) or not np.isclose(p.sum(), 1, rtol=1e-4):
        raise ValueError(
            f"probabilities must be {count} positive numbers that sum to one, got "
            f"{describe(p.tolist())}."
        )
    return p / p.sum()


def renewal_period(period: Any, on_absent: str) -> int | None:
    """The visits between two renewals of slopes, or None."""
    if period is None:
        return None
    if on_absent == "surrogate":
        raise ValueError(
            "on_absent must be 'stop' with surrogate_period, got 'surrogate': the slope of a "
            "client that is gone cannot be taken anew where chains are."
        )
    return check_count("surrogate_period", period)


def check_private(
    names: set[str], settings: Mapping[str, Any], max_rounds: int, period: int | None = None
) -> None:
    """Raise a ValueError where clients that count privacy would decline what a run asks."""
    wanted = {"max_rounds=0": max_rounds > 0, "control_variate=False": settings["centered"]}
    wanted["surrogate_period=None"] = period is not None
    exact = settings["form"] != "none" and settings["curvature"] != "fisher"
    missing = [name for name, lacks in {**wanted, "curvature='fisher'": exact}.items() if lacks]
    if names and missing:
        raise ValueError(
            f"clients {sorted(names)} count privacy, for which a run must have "
            f"{', '.join(missing)}: a search for a reference, slopes taken anew, control "
            "variates and Hessians send sums over rows that have no bound."
        )
