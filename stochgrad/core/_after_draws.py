"""Predictions and pointwise log likelihoods of draws."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from stochgrad.core._by_rows import by_rows
from stochgrad.core._checks import check_choice, check_count, check_key, describe
from stochgrad.core._jit import remember
from stochgrad.core._observations import Observations

if TYPE_CHECKING:
    from stochgrad.core._draws import Draws


def predictions(
    draws: "Draws",
    key: Any,
    data: tuple[tuple, Mapping[str, Any]],
    *,
    sites: Sequence[str] | None,
    rows: Any,
    memory_bytes: int,
    store: str | Path | None,
) -> dict[str, Any]:
    """See ``Draws.predict``."""
    check_key(key, "key")
    of = observations_of(draws, data)
    if of.predict is None:
        raise ValueError(
            "the posterior cannot predict: build it with "
            "stochgrad.posterior(..., predict=lambda key, position, batch: ...)."
        )
    wanted = tuple(of.observed) if sites is None else _names(of, draws, sites)
    function = remember(of.predict, wanted, lambda: partial(_some, of.predict, wanted))
    index = rows_of(of, rows)
    group = "predictions" if data[0] or data[1] else "posterior_predictive"
    options: dict[str, Any] = {"key": key, "store": store, "group": group}
    return _evaluate(function, draws, of, index, memory_bytes, **options)


def log_likelihoods(
    draws: "Draws",
    data: tuple[tuple, Mapping[str, Any]],
    *,
    rows: Any,
    memory_bytes: int,
    store: str | Path | None,
) -> dict[str, Any]:
    """See ``Draws.log_likelihood``."""
    of = observations_of(draws, data)
    function = remember(of.log_likelihood, "keyless", lambda: _Keyless(of.log_likelihood))
    index = rows_of(of, rows)
    options: dict[str, Any] = {"key": jax.random.key(0), "store": store, "group": "log_likelihood"}
    found = _evaluate(function, draws, of, index, memory_bytes, **options)
    if not found:
        raise ValueError("the model observes nothing with these arguments: pass what it observes.")
    return found


def log_priors(draws: "Draws", memory_bytes: int) -> dict[str, np.ndarray]:
    """The log density of the prior of each latent site at each draw, in the model's own space."""
    of = observations_of(draws, ((), {}))
    function = remember(of.log_prior, "keyless", lambda: _Keyless(of.log_prior, batch=False))
    options: dict[str, Any] = {"key": jax.random.key(0)}
    whole = of._replace(rows=None, dims={}, size=1, take=lambda index: ())
    return _evaluate(function, draws, whole, np.arange(1), memory_bytes, **options)


def observations_of(draws: "Draws", data: tuple[tuple, Mapping[str, Any]]) -> Observations:
    """What the posterior of some draws says of its data, or of others."""
    posterior = draws.posterior
    if draws.collected:
        raise ValueError(
            "these draws are not positions (they were collected or unpickled): run without "
            "collect=, or keep what is needed of them before."
        )
    if posterior is None or posterior.observations is None:
        raise ValueError(
            "these draws know no posterior whose rows could be told apart: it takes one of "
            "stochgrad.posterior or stochgrad.from_numpyro, and draws opened from a store have "
            "none (numpyro's Predictive(stochgrad.numpyro.all_rows(model), "
            "draws.constrained()) takes those)."
        )
    of = remember(posterior.observations, "observations", posterior.observations)
    return of.elsewhere(*data) if data[0] or data[1] else of


def rows_of(of: Observations, rows: Any) -> np.ndarray:
    """Numbers of rows, all of them by default."""
    if rows is None:
        return np.arange(of.size)
    if of.rows is None:
        raise ValueError(
            "rows cannot be told apart in this model, with these data: leave rows out, or build "
            "the posterior with batch_size=."
        )
    index = np.asarray(rows)
    if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
        raise TypeError(f"rows must be a list of numbers of rows, got {describe(rows)}.")
    if index.min() < 0 or index.max() >= of.size:
        raise ValueError(f"rows must be from 0 to {of.size - 1}, got {describe(rows)}.")
    return index


def _evaluate(
    function: Any, draws: "Draws", of: Observations, index: Any, memory_bytes: int, **options: Any
) -> dict[str, Any]:
    memory_bytes = check_count("memory_bytes", memory_bytes)
    if draws.num_draws == 0:
        raise ValueError("there are no draws.")
    return by_rows(function, draws.positions, of, index, memory_bytes=memory_bytes, **options)


def _names(of: Observations, draws: "Draws", sites: Any) -> tuple[str, ...]:
    if isinstance(sites, str) or not isinstance(sites, Sequence) or not sites:
        raise TypeError(f"sites must be a list of names, got {describe(sites)}.")
    one = jax.tree.map(lambda leaf: leaf[0, 0], draws.positions)
    predict: Any = of.predict
    known = jax.eval_shape(predict, jax.random.key(0), one, of.take(np.arange(min(of.size, 2))))
    for site in sites:
        check_choice("sites", site, list(known))
    return tuple(sites)


def _some(predict, wanted, key, position, batch):
    found = predict(key, position, batch)
    return {name: found[name] for name in wanted} if wanted else found


class _Keyless:
    """A function of a position, and possibly of a batch, that is handed a key as well."""

    def __init__(self, function: Any, batch: bool = True):
        self.function, self.batch = function, batch

    def __call__(self, key, position, batch):
        return self.function(position, batch) if self.batch else self.function(position)
