"""How much the posterior hangs on the prior and on the likelihood."""

from typing import Any

import numpy as np
import xarray
from arviz_stats.base import array_stats
from scipy.special import softmax

from stochgrad.core import MEMORY, Draws, check_instance, log_priors, observations_of
from stochgrad.diagnostics._loo import summed_log_likelihood

_DELTA = 0.01


def sensitivity(draws: Draws, *, var_name: str | None = None, memory_bytes: int = MEMORY) -> Any:
    r"""Power-scaling sensitivity: what happens as the prior or the likelihood is raised to a power.

    Draws are reweighted by $p(\theta)^{\alpha - 1}$ or $p(y \mid \theta)^{\alpha - 1}$ for $\alpha$
    close to one; the sensitivity is the rate at which a parameter's distribution moves, as a
    distance of cumulative distributions. Above 0.05 it matters: a prior that matters is in conflict
    with a likelihood that does, too, and all there is beside one that does not.

    Args:
        draws: Draws of a posterior with rows.
        var_name: The observed site, if there are several.
        memory_bytes: Memory for the work, as in ``draws.log_likelihood``.

    Returns:
        An ``xarray.Dataset`` with every parameter along a dimension ``component``, of ``prior`` and
        ``likelihood``; what ``arviz.psense`` of ArviZ 1.x gives.

    Raises:
        ValueError: the draws know no rows, or ``var_name`` is needed.

    Source: Kallioinen, Paananen, Bürkner and Vehtari 2024, Statistics and Computing 34.
    """
    check_instance("draws", draws, Draws, "draws of stochgrad.sample or stochgrad.infer")
    of = observations_of(draws, ((), {}))
    groups = np.zeros(of.size, int)
    total = {
        "prior": sum(
            np.asarray(x, np.float64).reshape(*x.shape[:2], -1).sum(-1)
            for x in log_priors(draws, memory_bytes).values()
        ),
        "likelihood": summed_log_likelihood(draws, groups, var_name, memory_bytes)[..., 0],
    }
    alphas = 1 / (1 + _DELTA), 1 + _DELTA
    scaled: Any = array_stats.power_scale_lw
    parameters = draws.to_datatree(["posterior"])["posterior"].to_dataset()

    def of_component(values, log_density):
        lower, upper = (
            np.broadcast_to(softmax(scaled(log_density, a, axis=(-2, -1))), values.shape)
            for a in alphas
        )
        return array_stats.power_scale_sense(values, lower, upper, *alphas)

    core = ["chain", "draw"]
    found = [
        xarray.apply_ufunc(
            of_component, parameters, xarray.DataArray(x, dims=core), input_core_dims=[core, core]
        )
        for x in total.values()
    ]
    return xarray.concat(found, xarray.DataArray(list(total), dims="component", name="component"))
