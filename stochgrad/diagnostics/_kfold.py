"""Cross-validation by refitting."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from scipy.special import logsumexp

from stochgrad.core import (
    MEMORY,
    Draws,
    PRNGKey,
    check_callable,
    check_count,
    check_instance,
    check_key,
    observations_of,
)
from stochgrad.diagnostics._elpd import elpd_data
from stochgrad.diagnostics._loo import group_numbers, site_values

_SEED = 20260501


def kfold(
    key: PRNGKey,
    draws: Draws,
    fit: Callable[[PRNGKey, np.ndarray], Draws],
    *,
    folds: int = 10,
    groups: Any = None,
    var_name: str | None = None,
    seed: int = _SEED,
    memory_bytes: int = MEMORY,
) -> Any:
    r"""Expected log predictive density of rows left out, by refitting without them.

    $$\text{elpd} = \sum_{k=1}^K \sum_{i \in F_k} \log \int p(y_i \mid \theta)\,
      p(\theta \mid y_{-F_k})\, d\theta$$

    over a random partition of the rows into folds $F_k$.

    Args:
        key: A typed PRNG key.
        draws: Draws given all rows.
        fit: ``(key, rows) -> Draws`` given the rows with these numbers, of the same model.
        folds: K.
        groups: A label for each row; the rows of a group are left out together.
        var_name: The observed site, if there are several.
        seed: Chooses the partition.
        memory_bytes: Memory for the work, as in ``draws.log_likelihood``.

    Returns:
        ArviZ's ``ELPDData``, as ``loo`` gives it, without ``pareto_k``.

    Raises:
        ValueError: the draws know no rows; there are fewer rows or groups than folds; draws of a
            fit have another structure.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> x = jax.random.normal(jax.random.key(1), (60,))
        >>> def fit(key, rows):
        ...     target = stochgrad.posterior(
        ...         lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, x[rows], order="full"
        ...     )
        ...     return stochgrad.sample(
        ...         key, stochgrad.sgld(target, 0.01), init=jnp.zeros(()), num_samples=500,
        ...         num_chains=2,
        ...     )
        >>> whole = fit(jax.random.key(0), jnp.arange(60))
        >>> stochgrad.diagnostics.kfold(jax.random.key(2), whole, fit, folds=3).n_data_points
        60
    """
    check_key(key)
    check_instance("draws", draws, Draws, "draws of stochgrad.sample or stochgrad.infer")
    check_callable("fit", fit)
    of = observations_of(draws, ((), {}))
    if of.rows is None:
        raise ValueError("draws must be of a posterior whose rows can be told apart (batch_size=).")
    labels = np.arange(of.size)
    numbers = labels if groups is None else group_numbers(groups, of.size)[1]
    count = int(numbers.max()) + 1
    folds = check_count("folds", folds, least=2, most=count)
    fold_of = np.random.default_rng(seed).permutation(np.arange(count) % folds)[numbers]
    options: dict[str, Any] = {"memory_bytes": memory_bytes}
    elpd, lpd = np.empty(of.size), np.empty(of.size)
    shapes = jax.tree.map(lambda x: x.shape[2:], draws.positions)
    for k in range(folds):
        held_out = np.flatnonzero(fold_of == k)
        refit = fit(jax.random.fold_in(key, k), np.flatnonzero(fold_of != k))
        check_instance("fit(key, rows)", refit, Draws, "draws")
        if jax.tree.map(lambda x: x.shape[2:], refit.positions) != shapes:
            raise ValueError("fit must return draws of the same parameters as draws has.")
        given = replace(refit, posterior=draws.posterior)
        for place, some in ((elpd, given), (lpd, draws)):
            found = some.log_likelihood(rows=held_out, **options)
            place[held_out] = _lpd(site_values(found, var_name))
    return elpd_data(
        elpd,
        elpd=float(elpd.sum()),
        se=float(np.sqrt(len(elpd) * elpd.var())),
        parameters=float(np.sum(lpd - elpd)),
        draws=draws.num_chains * draws.num_draws,
        labels=labels,
        dim=of.rows,
        folds=folds,
    )


def _lpd(log_likelihood: np.ndarray) -> np.ndarray:
    """The log of the mean likelihood of each row."""
    values = log_likelihood.astype(np.float64)
    return logsumexp(values, axis=(0, 1)) - np.log(values.shape[0] * values.shape[1])
