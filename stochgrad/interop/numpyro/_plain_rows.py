"""Minibatches of models whose plates are not subsampled: where their rows are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from numpyro import handlers

from stochgrad.core import Rows, check_batch_size, first_line
from stochgrad.interop.numpyro._arguments import Arguments, on_host
from stochgrad.interop.numpyro._explain import UnknownValue, explained
from stochgrad.interop.numpyro._find_rows import (
    NUTS,
    named_leaves,
    named_size,
    row_arguments,
    row_names,
    row_plates,
    undeclared_size,
    undeclared_sizes,
)
from stochgrad.interop.numpyro._handler import give_rows
from stochgrad.interop.numpyro._inspect import Summary, check_values, mid_support
from stochgrad.interop.numpyro._row_arguments import RowArguments, give_row_arguments
from stochgrad.interop.numpyro._sites import Plate, Site, as_site, is_latent, unconstrained_shape

T = TypeVar("T")


class PlainRows(NamedTuple):
    """Rows of a model whose plates are not subsampled.

    Attributes:
        summary: The model's summary, on minibatches.
        sizes: Rows of a minibatch, by the name of the rows.
        arguments: The model's arguments, in numpy where it counts with their values.
        own: Which arguments have rows; None where the model reads them with the plate's indices.
        names: Names of these arguments.
    """

    summary: Summary
    sizes: dict[str, int]
    arguments: Arguments
    own: RowArguments | None = None
    names: str = ""

    @property
    def places(self) -> dict[str, dict[str, int]]:
        """Where the rows lie in the observed sites."""
        by_site = {}
        for name, site in self.summary.sites.items():
            if self.own is None:
                dims = {plate: dim for plate, dim in site.plates.items() if plate in self.sizes}
            else:
                own = self.own
                rows = [dim for plate, dim in site.plates.items() if plate in own.plates]
                rows += [own.sites[name]] if name in own.sites else []
                dims = dict.fromkeys([own.name], rows[0]) if rows else {}
            by_site[name] = dims
        return by_site

    def first_right(self, make: Callable[["PlainRows"], T]) -> T:
        """``make(self)``, or else with arguments of which numpy computes on all rows.

        What a model takes of numpy's arrays, as in ``(x - x.mean()) / x.std()``, is then of all of
        its data.
        """
        try:
            return make(self)
        except ValueError as error:
            if self.own is None:
                raise
            on_all = self._replace(arguments=on_host(self.arguments, streamed=False))
            try:
                return make(on_all)
            except ValueError:
                raise error from None

    @property
    def rows(self) -> dict[str, int]:
        """How many rows there are of each name."""
        return {name: self.summary.plates[name].size for name in self.sizes}

    @property
    def advice(self) -> str:
        """What to do where minibatches are wrong."""
        if self.own is None:
            return f"or {NUTS}."
        return f"or name the arguments that have rows, now {self.names}, with rows=; or {NUTS}."


class _Run(NamedTuple):
    """A model on a minibatch: its sites, and its latent sites' and reported sites' shapes."""

    sites: dict[str, Site]
    latent: dict[str, tuple[int, ...]]
    reported: dict[str, tuple[int, ...]]


def takes_plain_rows(arguments: Arguments, summary: Summary, batch_size: Any, order: str) -> bool:
    """Whether some rows of a plate that is not subsampled, or of the arguments, are taken."""
    if batch_size is None or order == "full":
        return False
    if any(plate.subsampled for plate in summary.plates.values()):
        return False
    data = {p for s in summary.sites.values() if s.kind != "latent" for p in s.plates}
    declared = max((summary.plates[plate].size for plate in data), default=0)
    undeclared_lengths = max(undeclared_sizes(arguments, summary), default=0)
    return undeclared_lengths > declared or batch_size != declared


def plain_rows(
    model: Callable,
    arguments: Arguments,
    summary: Summary,
    batch_size: Any,
    names: str | Sequence[str] | None,
) -> PlainRows:
    """Where the rows of a model without a subsampled plate are.

    A plate that is read with its indices or ``numpyro.subsample`` is handed those of a minibatch;
    for all other models the arguments with as many rows as the plate become minibatches.

    Raises:
        ValueError: the model has no rows, or its density is not known to be a sum over them.
    """
    leaf_names = None if names is None else named_leaves(model, arguments, names)
    if not any(site.kind != "latent" for site in summary.sites.values()):
        raise ValueError(
            f"the model observes nothing: it has no rows to take minibatches of; {NUTS}."
        )
    undeclared_lengths = undeclared_sizes(arguments, summary)
    plates, size = row_plates(
        summary, batch_size, undeclared_lengths, named_size(arguments, leaf_names or {})
    )
    reason = ""
    if plates and leaf_names is None:
        sizes = _by_plate(plates, size, summary, batch_size)
        try:
            run = _on_indices(model, arguments, sizes)
            return PlainRows(_minibatch_summary(run, summary, sizes, None), sizes, arguments)
        except _Refusal as error:
            reason = str(error)
    if isinstance(batch_size, Mapping):
        if len(batch_size) > 1:
            raise ValueError(
                f"minibatches of several plates, {sorted(batch_size)}, need a model that reads its "
                f"data with the plates' indices or numpyro.subsample ({reason}): subsample one."
            )
        (batch_size,) = batch_size.values()
    size = size or undeclared_size(arguments, summary, leaf_names)
    count = check_batch_size(batch_size, size, "reshuffled")
    own = row_arguments(arguments, summary, plates, size, leaf_names, reason)
    if count == size:
        return PlainRows(summary, {}, arguments)
    own_names = row_names(model, arguments, own)
    try:
        run = _on_arguments(model, arguments, summary, own, count, own_names)
    except ValueError as error:  # it may count with values, as in len(np.unique(group))
        arguments = on_host(arguments, streamed=False)
        try:
            run = _on_arguments(model, arguments, summary, own, count, own_names)
        except ValueError:
            raise error from None
    own = own._replace(sites=_dims_of_rows(run, summary, own, count))
    sizes = {own.name: count}
    return PlainRows(_minibatch_summary(run, summary, sizes, own), sizes, arguments, own, own_names)


class _Refusal(Exception):
    """Why a model does not take minibatches in one way."""


def _by_plate(plates, size: int, summary: Summary, batch_size: Any) -> dict[str, int]:
    if isinstance(batch_size, Mapping):
        return {
            plate: check_batch_size(rows, summary.plates[plate].size, "reshuffled")
            for plate, rows in batch_size.items()
        }
    return dict.fromkeys(plates, check_batch_size(batch_size, size, "reshuffled"))


def _on_indices(model: Callable, arguments: Arguments, sizes: Mapping[str, int]) -> _Run:
    """The model with all of its arguments, on the first rows of the plates."""

    def give(rows):
        return give_rows(model, rows), arguments

    try:
        run = _run(give, sizes, arguments)
    except Exception as error:
        raise _Refusal(_first(error)) from error
    for name, count in sizes.items():
        for site, (length, kind) in _lengths(run.sites, name).items():
            if kind != "latent" and length != count:
                raise _Refusal(f"site {site!r} has {length} rows where a minibatch has {count}")
    return run


def _on_arguments(
    model: Callable,
    arguments: Arguments,
    summary: Summary,
    own: RowArguments,
    count: int,
    own_names: str,
) -> _Run:
    """The model on the first rows of its arguments."""

    def give(rows):
        minibatch = own.minibatch(arguments, rows, None)
        return give_row_arguments(model, rows[own.name], own), minibatch

    try:
        run = _run(give, {own.name: count}, arguments)
    except Exception as error:
        raise ValueError(
            f"a minibatch of {count} of the {own.size} rows of {own_names} does not "
            f"fit the model ({_first(error)}): name the arguments that have rows with rows=; if "
            f"the rows do not enter one by one, {NUTS}."
        ) from error
    for name, shape in summary.shapes.items():
        if run.latent.get(name) != shape:
            raise ValueError(
                f"latent site {name!r} has shape {shape} with all {own.size} rows of "
                f"{own_names} and {run.latent.get(name)} with {count}: it belongs to "
                "the rows, and a minibatch would leave most of it without data; if its shape "
                f"follows an argument that has none, name those that have with rows=; or {NUTS}."
            )
    return run


def _dims_of_rows(run: _Run, summary: Summary, own: RowArguments, count: int) -> dict[str, int]:
    """The dimension of the rows of each observed site outside of the rows' plates."""
    dims = {}
    rows_seen = False
    for name, site in summary.sites.items():
        if site.kind == "latent":
            continue
        shape = run.sites[name].shape if name in run.sites else ()
        inside = [dim for plate, dim in site.plates.items() if plate in own.plates]
        same_rank = len(shape) == len(site.shape)
        differences = [
            (i - len(shape), pair)
            for i, pair in enumerate(zip(site.shape, shape, strict=False))
            if pair[0] != pair[1]
        ]
        where = [dim for dim, _ in differences]
        fits = same_rank and all(pair == (own.size, count) for _, pair in differences)
        if not fits or len(differences) > 1 or (inside and where != inside):
            pairs = ""
            if len(differences) > 1:
                pairs = " (a column of shape (N, 1) against rows of shape (N,) is every pair)"
            raise ValueError(
                f"site {name!r} has shape {site.shape} with all {own.size} rows and {shape} with "
                f"{count} of them, where one dimension of {own.size} should be one of {count}: its "
                f"rows do not enter one by one{pairs}; {NUTS}."
            )
        rows_seen = rows_seen or bool(differences)
        if differences and not inside:
            dims[name] = where[0]
    if not rows_seen:
        sites = "; ".join(
            f"{n!r}, shape {s.shape}" for n, s in summary.sites.items() if s.kind != "latent"
        )
        raise ValueError(
            f"no observed site has one log density for each of the {own.size} rows ({sites}): the "
            f"rows enter together, as one event (.to_event), a Gaussian process or a time series, "
            f"and not one by one; {NUTS}."
        )
    return dims


def _run(
    give: Callable[[dict[str, Rows]], tuple[Callable, Arguments]],
    sizes: Mapping[str, int],
    arguments: Arguments,
) -> _Run:
    """Run a model on rows that are not known, without computing anything."""
    results = []

    def once(key, places):
        rows = {name: Rows(None, index, jnp.float32(1)) for name, index in places.items()}
        with explained(arguments):
            minibatch, (args, kwargs) = give(rows)
            seeded = handlers.seed(handlers.substitute(minibatch, substitute_fn=mid_support), key)
            trace = handlers.trace(seeded).get_trace(*args, **kwargs)
            check_values(trace)
        sites = {name: as_site(s) for name, s in trace.items() if s["type"] == "sample"}
        latent = {n: unconstrained_shape(n, s) for n, s in trace.items() if is_latent(s)}
        reported = {
            name: tuple(jnp.shape(site["value"]))
            for name, site in trace.items()
            if site["type"] == "deterministic"
        }
        results.append(_Run(sites, latent, reported))

    places = {name: jnp.arange(count) for name, count in sizes.items()}
    jax.eval_shape(once, jax.random.key(0), places)
    return results[0]


def _minibatch_summary(
    run: _Run, summary: Summary, sizes: Mapping[str, int], own: RowArguments | None
) -> Summary:
    """The summary of a model on minibatches, as if its plates were subsampled."""
    plates = dict(summary.plates)
    if own is None:
        plates |= {name: Plate(plates[name].size, count) for name, count in sizes.items()}
        rows = set(sizes)
    else:
        (count,) = sizes.values()
        plates |= {name: Plate(own.size, count) for name in own.plates or {own.name}}
        rows = set(own.plates)
    dims = {
        name: names
        for name, names in summary.dims.items()
        if name in summary.shapes
        or (not rows & set(names) and run.reported.get(name) == summary.reported[name])
    }
    return summary._replace(plates=plates, dims=dims, sites=run.sites)


def _lengths(sites: Mapping[str, Site], plate: str) -> dict[str, tuple[int, str]]:
    return {
        name: (site.shape[dim] if len(site.shape) >= -dim else 1, site.kind)
        for name, site in sites.items()
        if (dim := site.plates.get(plate)) is not None
    }


def _first(error: Exception) -> str:
    if isinstance(error, UnknownValue):
        return "its control flow depends on values of the rows"
    return first_line(error).rstrip(".")
