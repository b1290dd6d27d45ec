"""The numbers of a report: scalars by name, predictions against observations, their ranks."""

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray
from jaxtyping import Bool, Float

from stochgrad.core import Draws, Observations, effective_draws, evenly, observations_of, rhat

_MOST_BYTES = 2**28
_MOST_SCALARS = 256
_MOST_VALUES = 20_000
_GRID = np.arange(1, 100) / 100


class Scalars(NamedTuple):
    """Scalars of a posterior in the model's own space.

    Attributes:
        names: Of each, with the labels of its coordinates.
        series: Finite draws of shape (chain, draw, scalar).
        rhat: Of each, over split chains.
        ess: Effective draws of the bulk of each.
        total: How many there are.
        draws: How many draws of a chain were looked at, from the end.
    """

    names: list[str]
    series: Float[np.ndarray, "chains draws scalars"]
    rhat: Float[np.ndarray, " scalars"]
    ess: Float[np.ndarray, " scalars"]
    total: int
    draws: int

    def worst(self, most: int) -> np.ndarray:
        """Numbers of the scalars that mix worst: by R-hat - 1 against 0.05, or 100 draws."""
        badness = np.maximum((self.rhat - 1) / 0.05, 100 / self.ess)
        return np.argsort(-np.nan_to_num(badness, nan=-1.0), kind="stable")[:most]


def scalars(draws: Draws) -> Scalars:
    """At most 256 scalars, evenly spread over all, of the chains that are finite to the end."""
    bytes_each = sum(
        x.size // max(x.shape[1], 1) * x.dtype.itemsize for x in jax.tree.leaves(draws.positions)
    )
    last = min(max(_MOST_BYTES // max(bytes_each, 1), 1), draws.num_draws)
    recent = draws[draws.num_draws - last :].finite_chains()
    data = recent.to_datatree(["posterior"]).children["posterior"].to_dataset()
    variables = [x for x in data.data_vars.values() if x.dtype.kind in "fiub" and x.size]
    total = sum(_size(x) for x in variables)
    chosen, first = evenly(total, _MOST_SCALARS), 0
    names: list[str] = []
    parts = [np.zeros((recent.num_chains, last, 0))]
    for x in variables:
        own = chosen[(chosen >= first) & (chosen < first + _size(x))] - first
        flat = x.to_numpy().reshape(*x.shape[:2], -1)[:, :, own]
        parts.append(flat.astype(np.float64))
        names += [_label(x, number) for number in own]
        first += _size(x)
    series = np.concatenate(parts, axis=2)
    finite = np.flatnonzero(np.isfinite(series).all((0, 1)))
    names, series = [names[i] for i in finite], series[:, :, finite]
    return Scalars(names, series, rhat(series), effective_draws(series), total, last)


def _size(variable: xarray.DataArray) -> int:
    return int(np.prod(variable.shape[2:], dtype=int))


def _label(variable: xarray.DataArray, number: int) -> str:
    if variable.ndim == 2:
        return str(variable.name)
    places = np.unravel_index(number, variable.shape[2:])
    labels = [variable[dim].to_numpy()[i] for dim, i in zip(variable.dims[2:], places, strict=True)]
    return f"{variable.name}[{', '.join(map(str, labels))}]"


def summary(found: Scalars) -> Any:
    """ArviZ's summary of some scalars, in either of its lines."""
    import arviz

    values = xarray.Dataset({"x": (("chain", "draw", "scalar"), found.series)})
    tree: Any = xarray.DataTree.from_dict({"posterior": values})
    if hasattr(arviz, "from_datatree"):  # ArviZ 0.2x
        tree = values
    table = arviz.summary(tree, round_to="none")
    return table.set_axis(found.names, axis=0)


class Predictions(NamedTuple):
    """Replications of what was observed at one site.

    Attributes:
        observed: Finite observed values.
        replicated: As many of each draw.
        rows: Rows that were looked at; 0 where rows cannot be told apart.
        missing: How many observed values were not finite.
    """

    observed: Float[np.ndarray, " n"]
    replicated: Float[np.ndarray, "draws n"]
    rows: int
    missing: int

    @property
    def discrete(self) -> bool:
        return all(bool(np.all(x == np.round(x))) for x in (self.observed, self.replicated))

    @property
    def binary(self) -> bool:
        return self.discrete and set(np.unique(self.observed)) | set(
            np.unique(self.replicated)
        ) <= {0.0, 1.0}


def predictions(draws: Draws, key: Any, rows: int, most: int) -> dict[str, Predictions | str]:
    """Replications by site, at ``most`` draws and at some rows; or why there are none."""
    of = observations_of(draws, ((), {}))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    index = np.arange(of.size)
    if of.rows is not None:
        count = min(rows, max(_MOST_VALUES // _width(draws, of), 1), of.size)
        index = np.sort(rng.choice(of.size, count, replace=False))
    drawn = few(draws, most).predict(key, rows=None if of.rows is None else index)
    values = {name: np.asarray(x) for name, x in of.values(of.take(index)).items()}
    result: dict[str, Predictions | str] = {}
    for name, replicated in drawn.items():
        if name not in values:
            result[name] = f"predict gives {name!r}, and the data are {sorted(values)}."
        elif values[name].shape != replicated.shape[2:]:
            result[name] = (
                f"predictions of {name!r} have shape {replicated.shape[2:]} for data of shape "
                f"{values[name].shape}."
            )
        else:
            result[name] = compared(
                values[name], np.asarray(replicated), len(index) if of.rows else 0
            )
    return result


def _width(draws: Draws, of: Observations) -> int:
    """The most values that one row of a predicted site has."""
    if of.predict is None:
        return 1
    one = jax.tree.map(lambda leaf: np.asarray(leaf[:1, :1])[0, 0], draws.positions)
    shapes = jax.eval_shape(of.predict, jax.random.key(0), one, of.take(np.arange(1)))
    sizes = [int(np.prod(shapes[name].shape)) for name in of.observed or shapes]
    return max([1, *sizes])


def compared(observed: np.ndarray, replicated: np.ndarray, rows: int) -> Predictions | str:
    """Replications of shape (chain, draw, ...) against observations; or why they cannot be."""
    if observed.dtype.kind not in "fiub" and observed.dtype.name != "bfloat16":
        return f"observations of type {observed.dtype} have no order to compare by."
    flat = observed.astype(np.float64).ravel()
    draws = replicated.reshape(-1, flat.size)
    finite = np.flatnonzero(np.isfinite(flat))
    if not finite.size:
        return "no observed value is finite."
    chosen = finite[evenly(finite.size, _MOST_VALUES)]
    several = draws[:, chosen].astype(np.float64)
    if not np.isfinite(several).all():
        share = np.mean(~np.isfinite(several))
        return f"{share:.2g} of the predictions are not finite."
    return Predictions(flat[chosen], several, rows, flat.size - finite.size)


def few(draws: Draws, most: int) -> Draws:
    """About so many draws, evenly spread over the chains that are finite to the end."""
    healthy = np.flatnonzero(draws.first_bad < 0)
    chains = healthy[evenly(len(healthy), most)]
    numbers = evenly(draws.num_draws, max(most // max(len(chains), 1), 1))
    some = draws[numbers]
    return replace(
        some,
        positions=jax.tree.map(lambda x: np.asarray(x)[chains], some.positions),
        stats={},
        finite=some.finite[chains],
        first_bad=some.first_bad[chains],
    )


def pit(found: Predictions, rng: np.random.Generator) -> Float[np.ndarray, " n"]:
    r"""Ranks of observations among D replications, $u = (r + v (t + 1)) / (D + 1)$.

    Here r replications lie below and t are equal, and v is uniform on (0, 1): u is uniform if
    observation and replications have one law, discrete or not.
    """
    below = np.sum(found.replicated < found.observed, axis=0)
    equal = np.sum(found.replicated == found.observed, axis=0)
    uniform = rng.random(found.observed.size)
    return (below + uniform * (equal + 1)) / (len(found.replicated) + 1)


class Difference(NamedTuple):
    """How far the distribution of some numbers lies from the uniform one on (0, 1)."""

    grid: Float[np.ndarray, " k"]
    difference: Float[np.ndarray, " k"]
    band: Float[np.ndarray, " k"]

    @property
    def outside(self) -> Bool[np.ndarray, " k"]:
        return np.abs(self.difference) > self.band


def ecdf_difference(values: Float[np.ndarray, " n"], size: int | None = None) -> Difference:
    """The empirical distribution less the uniform one, with a simultaneous band of 95%.

    Args:
        values: Numbers in (0, 1).
        size: How many independent ones they are worth; all by default.
    """
    ecdf = np.searchsorted(np.sort(values), _GRID, side="right") / max(len(values), 1)
    return Difference(_GRID, ecdf - _GRID, band(max(len(values) if size is None else size, 1)))


@lru_cache(64)
def band(size: int, level: float = 0.95) -> Float[np.ndarray, " k"]:
    """Half widths between which so many uniform numbers' distribution lies everywhere at once."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(size, np.full(100, 0.01), 2000)[:, :-1].cumsum(1)
    scale = np.sqrt(_GRID * (1 - _GRID) / size)
    widest = np.max(np.abs(counts / size - _GRID) / scale, axis=1)
    return np.quantile(widest, level) * scale


class Reliability(NamedTuple):
    """Observed against predicted frequencies of ones in bins of equal size."""

    predicted: Float[np.ndarray, " bins"]
    observed: Float[np.ndarray, " bins"]
    low: Float[np.ndarray, " bins"]
    high: Float[np.ndarray, " bins"]


def reliability(found: Predictions, bins: int = 10) -> Reliability:
    """Of binary data: bins by one half of the draws, predictions by the other.

    The frequency observed in a bin is then held against those of the other half's replications,
    whose central 90% are ``low`` and ``high``.
    """
    first, second = found.replicated[::2], found.replicated[1::2]
    if not len(second):
        raise ValueError("it takes two draws.")
    # ties, of which there are many, are broken by row
    order = np.argsort(first.mean(0), kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    frequencies = np.stack([second[:, group].mean(1) for group in groups], 1)
    observed = np.array([found.observed[group].mean() for group in groups])
    low, high = np.quantile(frequencies, [0.05, 0.95], axis=0)
    return Reliability(frequencies.mean(0), observed, low, high)


def statistics(found: Predictions) -> list[dict[str, Any]]:
    """Statistics of the observations beside those of the replications."""
    choices: dict[str, Any] = {"mean": np.mean}
    if not found.binary:
        choices |= {"standard deviation": np.std, "smallest": np.min, "largest": np.max}
        if found.discrete:
            choices["share of zeros"] = lambda x, axis=None: np.mean(x == 0, axis=axis)
    rows = []
    for name, statistic in choices.items():
        own, others = statistic(found.observed), statistic(found.replicated, axis=1)
        low, high = np.quantile(others, [0.05, 0.95])
        above = (np.sum(others > own) + 0.5 * np.sum(others == own)) / len(others)
        rows.append({"name": name, "observed": own, "low": low, "high": high, "above": above})
    return rows


def coverage(ranks: Float[np.ndarray, " n"]) -> list[tuple[float, float]]:
    """Shares of the observations inside of central predictive intervals, by nominal level."""
    return [(p, float(np.mean(np.abs(ranks - 0.5) <= p / 2))) for p in (0.5, 0.8, 0.95)]
