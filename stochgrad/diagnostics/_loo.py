r"""Leave-one-out cross-validation of draws, at any number of rows.

The expected log predictive density of rows that were left out,

$$\text{elpd} = \sum_{i=1}^N \log p(y_i \mid y_{-i}),$$

needs a likelihood for each row and draw. Here it is a sum over all rows of something cheap,
$\log p(y_i \mid \bar\theta)$ at the mean of the draws, corrected by what some rows say of the
difference.
"""

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from arviz_stats.base import array_stats
from jaxtyping import Float

from stochgrad.core import (
    MEMORY,
    Draws,
    check_choice,
    check_count,
    check_instance,
    describe,
    observations_of,
)
from stochgrad.diagnostics._elpd import elpd_data, good_pareto_k

_SEED = 20260501


def loo(
    draws: Draws,
    rows: int | None = 500,
    *,
    groups: Any = None,
    var_name: str | None = None,
    seed: int = _SEED,
    memory_bytes: int = MEMORY,
) -> Any:
    r"""Expected log predictive density of rows left out, by PSIS on some of the rows.

    With $e_i = \log p(y_i \mid \bar\theta)$ at the mean of the draws and $\ell_i$ the PSIS estimate
    of $\log p(y_i \mid y_{-i})$ for a random subset $S$ of m rows,

    $$\widehat{\text{elpd}} = \sum_{i=1}^N e_i + \frac{N}{m} \sum_{i \in S} (\ell_i - e_i).$$

    It takes N + m S evaluations of a likelihood for S draws, where all rows would take N S. Two
    models of the same data get the same rows from the same ``seed``, so that most of what the
    subset leaves open cancels in their difference.

    A step size that is too large widens the draws, and elpd falls by about the relative excess of
    their variances times the effective number of parameters. The verdict of the draws bounds that
    excess.

    Args:
        draws: Draws of a posterior with rows.
        rows: m, or None for all rows.
        groups: A label for each row, to leave out a group at a time: all rows are read, and each
            group counts as one data point.
        var_name: The observed site, if there are several.
        seed: Chooses the rows.
        memory_bytes: Memory for the work, as in ``draws.log_likelihood``.

    Returns:
        ArviZ's ``ELPDData``, pointwise: with ArviZ 1.x ``ELPDDataLOOSubsample`` (``ELPDDataLOO``
        where all rows are used), so that ``arviz.compare`` takes it and ``plot_khat`` the sampled
        rows. Rows that were not sampled have ``e_i`` plus the mean difference, and no ``pareto_k``.
        ``se`` has the subset's error in it with ArviZ 0.2x.

    Raises:
        ValueError: the draws know no rows; ``var_name`` is needed; ``rows`` or ``groups`` do not
            fit.

    Warns:
        UserWarning: some ``pareto_k`` is too large for PSIS.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2,
        ...     lambda m, x: -0.5 * (x - m) ** 2,
        ...     jax.random.normal(jax.random.key(1), (2000,)),
        ...     batch_size=100,
        ... )
        >>> draws = stochgrad.infer(
        ...     jax.random.key(0), target, init=jnp.zeros(()), progress=False
        ... )
        >>> result = stochgrad.diagnostics.loo(draws, rows=200)
        >>> result.n_data_points
        2000

    Source: Magnusson, Andersen, Jonasson and Vehtari 2020, AISTATS (the difference estimator);
    Vehtari, Simpson, Gelman, Yao and Gabry 2024, JMLR 25 (PSIS).
    """
    check_instance("draws", draws, Draws, "draws of stochgrad.sample or stochgrad.infer")
    of = observations_of(draws, ((), {}))
    if groups is not None:
        labels, numbers = group_numbers(groups, of.size)
        found = _psis(summed_log_likelihood(draws, numbers, var_name, memory_bytes))
        return _all_of(found, labels, "group")
    size = of.size
    if rows is None or of.rows is None:
        index = np.arange(size)
    else:
        count = min(check_count("rows", rows, least=2), size)
        index = np.sort(np.random.default_rng(seed).choice(size, count, replace=False))
    some = None if of.rows is None else index
    options: dict[str, Any] = {"memory_bytes": memory_bytes}
    sampled = site_values(draws.log_likelihood(rows=some, **options), var_name)
    found = _psis(sampled)
    if len(found.elpd) == size or of.rows is None:
        return _all_of(found, np.arange(len(found.elpd)), of.rows or "row")
    around = site_values(_mean_of(draws).log_likelihood(**options), var_name)[0, 0].astype(
        np.float64
    )
    return _corrected(around, found, index, np.arange(size), of.rows)


def _mean_of(draws: Draws) -> Draws:
    """The mean of the positions, as the only draw."""
    mean = jax.tree.map(
        lambda x: np.asarray(x, np.float64).mean((0, 1), keepdims=True).astype(x.dtype),
        draws.positions,
    )
    return replace(
        draws, positions=mean, stats={}, finite=np.ones((1, 1), bool), first_bad=np.full(1, -1)
    )


def summed_log_likelihood(
    draws: Draws, groups: np.ndarray, var_name: str | None, memory_bytes: int
) -> Float[np.ndarray, "chains draws groups"]:
    """Log likelihoods summed over the rows of each group, some rows at a time.

    Args:
        draws: Draws of a posterior with rows.
        groups: The number of each row's group.
        var_name: The observed site, if there are several.
        memory_bytes: Memory for the work.
    """
    lead = draws.num_chains, draws.num_draws
    total = np.zeros((int(groups.max()) + 1, *lead))
    at_once = max(memory_bytes // (16 * lead[0] * lead[1]), 1)
    for start in range(0, len(groups), at_once):
        rows = np.arange(start, min(start + at_once, len(groups)))
        some = site_values(draws.log_likelihood(rows=rows, memory_bytes=memory_bytes), var_name)
        np.add.at(total, groups[rows], np.moveaxis(some, -1, 0))
    return np.moveaxis(total, 0, -1)


def group_numbers(groups: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The labels of the groups, and the number of each row's."""
    labels = np.asarray(groups)
    if labels.shape != (size,):
        raise ValueError(f"groups must be a label for each of {size} rows, got {describe(groups)}.")
    return np.unique(labels, return_inverse=True)


class _Psis(NamedTuple):
    """PSIS of some rows: their elpd, Pareto k and effective parameters, and the draws used."""

    elpd: Float[np.ndarray, " rows"]
    pareto_k: Float[np.ndarray, " rows"]
    parameters: Float[np.ndarray, " rows"]
    draws: int


def _psis(log_likelihood: np.ndarray) -> _Psis:
    """PSIS of log likelihoods of shape (chain, draw, row)."""
    values = np.moveaxis(log_likelihood.astype(np.float64), -1, 0)
    if not np.all(np.isfinite(values)):
        raise ValueError(
            "the log likelihood is not finite at some draw and row: draws.finite_chains() keeps "
            "what is, and a row outside of the support of its distribution has none."
        )
    likelihood = np.exp(values - values.max((1, 2), keepdims=True))
    efficiency = array_stats.ess(likelihood, method="mean", relative=True)
    efficiency = float(np.clip(np.nanmean(efficiency), 1e-3, 1.0))
    if np.any(np.ptp(values, axis=(1, 2)) == 0):
        raise ValueError(
            "the log likelihood of some row is the same at all draws: no parameter enters it, and "
            "there is nothing to reweight; leave that site out with var_name=."
        )
    elpd, pareto_k, parameters = map(np.asarray, array_stats.loo(values, r_eff=efficiency))
    return _Psis(elpd, pareto_k, parameters, values[0].size)


def _corrected(
    around: np.ndarray, found: _Psis, index: np.ndarray, labels: np.ndarray, dim: str
) -> Any:
    """The difference estimate, from PSIS of the data points ``index`` and ``around`` of all."""
    size, count = len(around), len(index)
    difference = found.elpd - around[index]
    pointwise = around + difference.mean()
    pointwise[index] = found.elpd
    # the variance over data points, of e from all of them and of the rest from the subset
    mixed = np.mean((around[index] - around[index].mean()) * difference)
    spread = around.var() + 2 * mixed + difference.var()
    pareto_k = np.full(size, np.nan)
    pareto_k[index] = found.pareto_k
    _warn(found, dim)
    subset: dict[str, Any] = {
        "subsample_size": count,
        "subsampling_se": float(
            size * np.sqrt((1 - count / size) * difference.var(ddof=1) / count)
        ),
        "loo_subsample_observations": index,
        "elpd_loo_approx": around,
    }
    return elpd_data(
        pointwise,
        elpd=float(around.sum() + size * difference.mean()),
        se=float(np.sqrt(size * max(spread, 0.0))),
        parameters=float(size * found.parameters.mean()),
        draws=found.draws,
        labels=labels,
        dim=dim,
        pareto_k=pareto_k,
        subset=subset,
    )


def _all_of(found: _Psis, labels: np.ndarray, dim: str) -> Any:
    _warn(found, dim)
    return elpd_data(
        found.elpd,
        elpd=float(found.elpd.sum()),
        se=float(np.sqrt(len(labels) * found.elpd.var())),
        parameters=float(found.parameters.sum()),
        draws=found.draws,
        labels=labels,
        dim=dim,
        pareto_k=found.pareto_k,
    )


def _warn(found: _Psis, dim: str) -> None:
    good = good_pareto_k(found.draws)
    bad = int(np.sum(found.pareto_k > good))
    if bad:
        warnings.warn(
            f"{bad} of {len(found.elpd)} data points along {dim!r} have a Pareto k above "
            f"{good:.2f}: leaving one out changes the posterior more than its draws can be "
            "reweighted for; refit without them (stochgrad.diagnostics.kfold), or take a "
            "likelihood with heavier tails.",
            stacklevel=4,
        )


def site_values(found: dict[str, Any], var_name: str | None) -> np.ndarray:
    """The log likelihood of one site, with one dimension of data points."""
    if var_name is None:
        if len(found) > 1:
            raise ValueError(
                f"var_name must say which of the observed sites is meant: {list(found)}."
            )
        (values,) = found.values()
    else:
        values = found[check_choice("var_name", var_name, found)]
    return values.reshape(*values.shape[:2], -1)
