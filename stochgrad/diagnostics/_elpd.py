"""Results of cross-validation as ArviZ keeps them, in both of its lines."""

from importlib import import_module
from typing import Any

import arviz
import numpy as np
import xarray
from jaxtyping import Float


def good_pareto_k(draws: int) -> float:
    """The largest Pareto k at which importance sampling with so many draws can be trusted."""
    return float(min(1 - 1 / np.log10(max(draws, 2)), 0.7))


def elpd_data(
    pointwise: Float[np.ndarray, " n"],
    *,
    elpd: float,
    se: float,
    parameters: float,
    draws: int,
    labels: np.ndarray,
    dim: str,
    pareto_k: Float[np.ndarray, " n"] | None = None,
    subset: dict[str, Any] | None = None,
    folds: int | None = None,
) -> Any:
    """ArviZ's ``ELPDData``.

    Args:
        pointwise: The expected log predictive density of each data point.
        elpd: Their sum.
        se: Its standard error, over data sets.
        parameters: The effective number of parameters.
        draws: Draws that were used.
        labels: Names of the data points.
        dim: What they are.
        pareto_k: Of each data point, NaN where it was not looked at; None where there are no
            weights.
        subset: What ArviZ 1.x says of data points that were not all looked at.
        folds: The number of refits, if there were any.
    """

    def array(values, name):
        return xarray.DataArray(values, {dim: labels}, [dim], name)

    good = good_pareto_k(draws)
    bad = pareto_k is not None and bool(np.any(pareto_k > good))
    k = array(np.full(len(labels), np.nan) if pareto_k is None else pareto_k, "pareto_k")
    if hasattr(arviz, "from_datatree"):  # ArviZ 0.2x
        entries = {
            "elpd_loo": elpd,
            "se": se if subset is None else float(np.hypot(se, subset["subsampling_se"])),
            "p_loo": parameters,
            "n_samples": draws,
            "n_data_points": len(labels),
            "warning": bad,
            "loo_i": array(pointwise, "loo_i"),
            "pareto_k": k,
            "scale": "log",
            "good_k": good,
        }
        if pareto_k is None:
            del entries["pareto_k"]
        return arviz.ELPDData(list(entries.values()), list(entries))
    common = {
        "elpd": elpd,
        "se": se,
        "p": parameters,
        "n_samples": draws,
        "n_data_points": len(labels),
        "scale": "log",
        "warning": bad,
        "good_k": good,
        "elpd_i": array(pointwise, "elpd_i"),
    }
    stats = import_module("arviz_stats")
    if folds is not None:
        return stats.ELPDDataLOOKFold(**common, n_folds=folds)
    if subset is None:
        return stats.ELPDDataLOO(**common, pareto_k=k)
    around = array(subset.pop("elpd_loo_approx"), "elpd_loo_approx")
    return stats.ELPDDataLOOSubsample(**common, pareto_k=k, elpd_loo_approx=around, **subset)
