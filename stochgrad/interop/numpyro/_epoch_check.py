"""Whether the minibatches of a model's rows have, row by row, the log density of all rows."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import Batches, Rows, hoisted_jit
from stochgrad.interop.numpyro._rows import is_supported, scaled_log_density, warn_of_support
from stochgrad.interop.numpyro._sites import Site

_MOST_MINIBATCHES = 4
_MOST_ROWS = 2**16
"""Of more rows than this, the minibatches' own and some more stand for all."""
_TRIES = 4
_SEED = 20261127
_SAME = 2.0**-10
"""Share of a row's log density by which it may differ: by rounding it differs by less."""
_NOISE = 2.0**8
"""Multiples of what a position moved by its own rounding error changes."""

Places = Mapping[str, Mapping[str, int]]
"""By site, the dimensions of the rows by their names."""


class Terms(NamedTuple):
    """The log density of one site, entry by entry.

    Attributes:
        values: Log densities, scaled as the site is.
        supported: Whether its distribution is one over what it observes.
    """

    values: Any
    supported: Any


def site_terms(trace: Mapping[str, Any]) -> dict[str, Terms]:
    """The log densities of a trace's sample sites."""
    terms = {}
    for name, site in trace.items():
        if site["type"] == "sample":
            terms[name] = Terms(scaled_log_density(site), is_supported(site))
    return terms


def check_epoch(
    on_all: Callable[[PyTree], dict[str, Terms]],
    on_batch: Callable[[PyTree, Any], dict[str, Terms]],
    initial: Callable[[Any], PyTree],
    batches: Batches,
    sites: Mapping[str, Site],
    places: Places,
    sizes: Mapping[str, int],
    advice: str,
) -> None:
    r"""Raise unless a row of a minibatch has the log density that it has among all rows.

    At one position, for some minibatches of an epoch, each row's log density must be that on all
    data times its weight, and what lies outside of the rows must be the same. The mean of the log
    density over an epoch is then that on all rows, and its gradient likewise.

    Args:
        on_all: ``position -> {site: Terms}`` of the model on all of its data.
        on_batch: ``(position, batch) -> {site: Terms}`` of the minibatch.
        initial: ``key -> position``.
        batches: The minibatches.
        sites: The model's sites.
        places: Where the rows lie in them.
        sizes: Number of rows, by the name of the rows.
        advice: What to do.

    Raises:
        ValueError: naming the site.
    """
    minibatches = _minibatches(batches)
    sample = _sample(minibatches, sizes)
    minibatch_terms = hoisted_jit(on_batch)
    all_terms: Callable[[PyTree], Any] = hoisted_jit(on_all)
    if sample is not None:
        rows: Any = {name: Rows(None, index, 1.0) for name, index in sample.items()}  # pyright: ignore
        all_terms = lambda position: minibatch_terms(position, rows)
    position: Any = None
    full_terms: Any = {}
    for key in jax.random.split(jax.random.key(_SEED), _TRIES):
        position = initial(key)
        full_terms = all_terms(position)
        if all(np.all(np.isfinite(terms.values)) for terms in full_terms.values()):
            break
    shifted = all_terms(jax.tree.map(lambda x: x * (1 + 2 * jnp.finfo(x.dtype).eps), position))
    for name, terms in full_terms.items():
        if not np.asarray(terms.supported):
            warn_of_support(name, stacklevel=4)
    for batch in minibatches:
        batch_terms = minibatch_terms(position, batch)
        for name, terms in full_terms.items():
            around = places.get(name, {})
            expected = _Expected.of(
                terms.values, shifted[name].values, around, sizes, batch, sample
            )
            values = expected.shaped(batch_terms[name].values)
            if around:
                wrong = _differ(values, expected.values, expected.tolerance)
                if np.any(wrong):
                    row = np.argwhere(wrong)[0]
                    raise ValueError(_tied(name, sites[name], around, sizes, batch, row, advice))
            elif _differ(np.sum(values), *expected.total()):
                raise ValueError(_outside(name, sites[name], sizes, advice))


def _minibatches(batches: Batches) -> list[Any]:
    """Some minibatches of an epoch, the last of its blocks, which padding fills, among them."""
    if batches.blocks is not None:
        numbers = np.linspace(0, batches.blocks.count - 1, _MOST_MINIBATCHES).astype(np.int32)
        return [batches.blocks.at(jnp.asarray(number)) for number in np.unique(numbers)]
    state, minibatches = batches.init(jax.random.key(_SEED)), []
    for _ in range(min(batches.epoch, _MOST_MINIBATCHES)):
        batch, state = batches.next(state)
        minibatches.append(batch)
    return minibatches


def _sample(minibatches: list[Any], sizes: Mapping[str, int]) -> dict[str, np.ndarray] | None:
    """Rows that stand for all where there are too many, with those of the minibatches."""
    if max(sizes.values()) <= _MOST_ROWS or len(sizes) > 1:
        return None
    ((name, size),) = sizes.items()
    extra = np.random.default_rng(0).choice(size, _MOST_ROWS // 8, replace=False)
    rows = [np.asarray(batch[name].index) for batch in minibatches]
    return {name: np.unique(np.concatenate([extra, *rows])).astype(np.int32)}


class _Expected(NamedTuple):
    """What a site's log densities must be in a minibatch, and by how much they may differ."""

    values: np.ndarray
    tolerance: np.ndarray

    @classmethod
    def of(cls, values: Any, shifted: Any, around, sizes, batch, sample) -> "_Expected":
        values = np.asarray(values)
        eps = float(jnp.finfo(values.dtype).eps)
        with np.errstate(invalid="ignore"):
            noise = np.abs(np.asarray(shifted) - values)
        finite = np.abs(values)[np.isfinite(values)]
        rounding = 2**4 * eps * (np.mean(finite) if finite.size else 0.0)
        tolerance = _SAME * np.abs(values) + _NOISE * noise + rounding
        for name, dim in around.items():
            index, weight = np.asarray(batch[name].index), np.asarray(batch[name].weight)
            if weight.ndim == 0:
                weight = np.full(index.shape, sizes[name] / len(index))
            rows = sizes[name]
            if sample is not None:  # scaled to all rows by their share
                weight, rows = weight * len(sample[name]) / rows, len(sample[name])
                index = np.searchsorted(sample[name], index)
            shape = np.broadcast_shapes(values.shape, (rows, *(1,) * (-dim - 1)))
            weight = weight.reshape(-1, *(1,) * (-dim - 1))
            with np.errstate(invalid="ignore"):  # padding of weight zero repeats rows at -inf
                values = weight * np.broadcast_to(values, shape).take(index, dim)
                tolerance = weight * np.broadcast_to(tolerance, shape).take(index, dim)
        return cls(values, tolerance + eps)

    def shaped(self, values: Any) -> np.ndarray:
        """A minibatch's log densities, one for each of these where they are the same for some."""
        values = np.asarray(values)
        return (
            values
            if values.size == self.values.size
            else np.broadcast_to(values, self.values.shape)
        )

    def total(self) -> tuple[np.ndarray, np.ndarray]:
        return np.sum(self.values), np.sum(self.tolerance)


def _tied(name: str, site: Site, around, sizes, batch, row, advice: str) -> str:
    (stream, dim), *_ = around.items()
    index = np.asarray(batch[stream].index)
    kind = "factor" if site.kind == "factor" else "site"
    return (
        f"{kind} {name!r}, shape {site.shape}, has another log density for row "
        f"{index[row[dim]]} in a minibatch of {len(index)} rows than among all {sizes[stream]}: "
        "rows that depend on each other cannot be subsampled, and what rows share (a mean, a "
        "norm, their number) is to be computed from all of the data and passed to the model; "
        f"{advice}"
    )


def _outside(name: str, site: Site, sizes: Mapping[str, int], advice: str) -> str:
    kinds = {"latent": "the prior of latent site", "observed": "site", "factor": "factor"}
    per_row = "" if site.kind == "latent" else "give it one log density per row, or "
    rows = ", ".join(repr(stream) for stream in sizes)
    return (
        f"{kinds[site.kind]} {name!r}, shape {site.shape}, has another log density with a "
        f"minibatch of the rows {rows} "
        f"than with all of them, and is not scaled with them: {per_row}compute what it depends on "
        f"from all of the data and pass it to the model; {advice}"
    )


def _differ(value: Any, other: Any, tolerance: Any) -> Any:
    with np.errstate(invalid="ignore"):
        close = np.abs(value - other) <= tolerance
    return ~(close | (value == other) | (np.isnan(value) & np.isnan(other)))
