"""What a numpyro model says of its data row by row: densities, predictions, observed values."""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer.util import log_density as numpyro_log_density
from numpyro.primitives import Messenger

from stochgrad.core import Observations, Rows
from stochgrad.interop.numpyro._arguments import (
    Arguments,
    as_arguments,
    check_call,
    on_device,
    on_host,
)
from stochgrad.interop.numpyro._explain import UnknownValue, explained
from stochgrad.interop.numpyro._handler import all_rows, give_rows, into_scan
from stochgrad.interop.numpyro._inspect import check_values, mid_support
from stochgrad.interop.numpyro._row_arguments import RowArguments, give_row_arguments
from stochgrad.interop.numpyro._rows import own_log_density
from stochgrad.interop.numpyro._sites import batch_dims, batch_shape, is_factor


class _Model(NamedTuple):
    """A model, and a way to run it on some of its rows.

    Attributes:
        model: The model.
        change: ``position -> substitute_fn`` for its latent sites.
        arguments: All of its arguments.
        size: Number of rows; one where they cannot be told apart.
        take: ``numbers -> batch``.
        give: ``(model, batch) -> (model, arguments)`` on the rows of a batch.
        latent: Names of its latent sites.
        rows: Name of the rows, if they can be told apart.
        by_plate: Whether the rows are those of a plate, so that those of other data are, too.
    """

    model: Callable
    change: Callable[[Any], Callable]
    arguments: Arguments
    size: int
    take: Callable[[np.ndarray], Any]
    give: Callable[[Callable, Any], tuple[Callable, Arguments]]
    latent: frozenset[str]
    rows: str | None = None
    by_plate: bool = False

    def sites(self, fill: Callable, batch: Any, key: Any = None, anew: bool = False) -> dict:
        """The sites on some rows, observations drawn anew or as they are."""
        run, (args, kwargs) = self.give(handlers.substitute(self.model, substitute_fn=fill), batch)
        if key is not None:
            run = handlers.seed(run, key)
        if anew:
            run = _observe_anew(run)
        with explained(self.arguments):
            trace = handlers.trace(run).get_trace(*args, **kwargs)
            check_values(trace)
        return trace

    def drawn(self, trace: Mapping[str, Any]) -> list[str]:
        """The observed sites, also where nothing was observed."""
        return [
            name
            for name, site in trace.items()
            if site["type"] == "sample" and name not in self.latent and not is_factor(site)
        ]

    def dims(self) -> tuple[dict[str, tuple[str, ...]], list[str]]:
        """Names of the dimensions of each site but for those of an event, and what is observed.

        The rows are where a site is longer on three of them than on two.
        """
        found: dict[str, tuple[str, ...]] = {}
        observed: list[str] = []

        def once(key):
            few, more = (
                self.sites(mid_support, self.take(np.arange(count)), key) for count in (2, 3)
            )
            for name, site in more.items():
                if site["type"] not in ("sample", "deterministic"):
                    continue
                names, shape = batch_dims(name, site), batch_shape(site)
                longer = [i for i, n in enumerate(batch_shape(few[name])) if n != shape[i]]
                for i in longer:
                    names[i] = str(self.rows)
                found[name] = tuple(names)
            observed.extend(self.drawn(more))

        jax.eval_shape(once, jax.random.key(0))
        return found, observed


def observations(
    model: Callable,
    change: Callable[[Any], Callable],
    arguments: Arguments,
    latent: frozenset[str],
    sizes: Mapping[str, int],
    take: Callable[[np.ndarray], Any] | None,
    arrays: Any,
    own: RowArguments | None,
) -> Observations:
    """The observations of a posterior that ``from_numpyro`` makes.

    Args:
        model: The model.
        change: ``position -> substitute_fn`` for its latent sites.
        arguments: Its arguments, with all rows.
        latent: Names of its latent sites.
        sizes: Number of rows by the name of the plates that have minibatches.
        take: ``numbers -> batch`` of these rows.
        arrays: What answers the model's ``numpyro.subsample``.
        own: The arguments that have rows, where no plate is subsampled.
    """
    if len(sizes) != 1 or take is None or min(sizes.values()) < 3:
        return _observations(_on_all(model, change, arguments, latent))
    ((rows, size),) = sizes.items()
    if own is None:

        def give(model, batch):
            return give_rows(model, batch, arrays), arguments

        return _observations(
            _Model(model, change, arguments, size, take, give, latent, rows, by_plate=True)
        )

    def give_own(model, batch):
        given = give_row_arguments(model, batch[rows], own)
        return given, own.minibatch(arguments, batch, None)

    return _observations(_Model(model, change, arguments, size, take, give_own, latent, rows))


def _on_all(
    model: Callable, change: Callable, arguments: Arguments, latent: frozenset[str]
) -> _Model:
    """The model on all rows at once."""

    def give(model, batch):
        return all_rows(model), arguments

    return _Model(model, change, arguments, 1, lambda index: (), give, latent)


def _of_other_data(of: _Model, args: tuple, kwargs: Mapping[str, Any]) -> Observations:
    check_call(of.model, args, kwargs)
    arguments = as_arguments(args, dict(kwargs), False)
    try:
        return _observations(_elsewhere(of, on_device(arguments, False)))
    except UnknownValue:  # it counts with their values
        return _observations(_elsewhere(of, on_host(arguments, False)))


def _elsewhere(of: _Model, arguments: Arguments) -> _Model:
    """The model on other data: in blocks of rows where it has a plate for them."""
    on_all = _on_all(of.model, of.change, arguments, of.latent)
    sizes: dict[str, int] = {}

    def once(key):
        counted = _count_plates(all_rows(of.model), sizes)
        filled = handlers.substitute(counted, substitute_fn=mid_support)
        handlers.seed(filled, key)(*arguments[0], **arguments[1])

    if of.rows is None or not of.by_plate:
        return on_all
    with explained(arguments):
        jax.eval_shape(once, jax.random.key(0))
    rows = of.rows
    if sizes.get(rows, 0) < 3:
        return on_all

    def take(index):
        return {rows: Rows(None, jnp.asarray(index, jnp.int32), jnp.float32(1))}

    def give(model, batch):
        return give_rows(model, batch), arguments

    return of._replace(arguments=arguments, size=sizes[rows], take=take, give=give)


def _observations(of: _Model) -> Observations:
    dims, observed = of.dims()
    axes = {name: names.index(of.rows) for name, names in dims.items() if of.rows in names}

    def log_likelihood(position, batch):
        trace = of.sites(of.change(position), batch, jax.random.key(0))  # for what is not given
        return {
            name: own_log_density(site)
            for name, site in trace.items()
            if site["type"] == "sample" and site["is_observed"]
        }

    def log_prior(position):
        trace = of.sites(of.change(position), of.take(np.arange(1)))
        return {name: own_log_density(site) for name, site in trace.items() if name in of.latent}

    def predict(key, position, batch):
        trace = of.sites(of.change(position), batch, key, anew=True)
        computed = [name for name, site in trace.items() if site["type"] == "deterministic"]
        return {name: jnp.asarray(trace[name]["value"]) for name in of.drawn(trace) + computed}

    def values(batch):
        trace = of.sites(mid_support, batch, jax.random.key(0))
        seen = [name for name in of.drawn(trace) if trace[name]["is_observed"]]
        return {name: jnp.asarray(trace[name]["value"]) for name in seen}

    def given(observed):
        def log_density(position, batch):
            change: Any = of.change(position)
            index = None if of.rows is None else batch[of.rows].index
            model = _observe(of.model, observed, index, axes)
            run, (args, kwargs) = of.give(handlers.substitute(model, substitute_fn=change), batch)
            return numpyro_log_density(run, args, kwargs, {})[0] + change.log_jacobian

        return log_density

    def simulate(key):
        trace = _on_all(*of[:3], of.latent).sites(lambda site: None, (), key, anew=True)
        drawn = [*of.latent, *of.drawn(trace)]
        return {name: jnp.asarray(site["value"]) for name, site in trace.items() if name in drawn}

    return Observations(
        of.size,
        of.take,
        log_likelihood,
        log_prior,
        predict,
        values,
        dims,
        of.rows,
        tuple(observed),
        partial(_of_other_data, of),
        lambda: _constants(of, values),
        simulate,
        given,
    )


def _constants(of: _Model, values: Callable) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """The arguments that are arrays of numbers and are not observed, with their dimensions."""
    seen = [np.asarray(value) for value in values(of.take(np.arange(of.size))).values()]
    args, kwargs = of.arguments
    try:
        named = signature(of.model).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        named = {f"argument_{i}": value for i, value in enumerate(args)} | kwargs
    found = {}
    for argument, value in named.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            if not isinstance(leaf, jax.Array | np.ndarray) or np.ndim(leaf) == 0:
                continue
            array = np.asarray(leaf)
            if array.dtype.kind not in "biuf" or any(np.array_equal(array, x) for x in seen):
                continue
            name = argument + jax.tree_util.keystr(path, simple=True, separator=".")
            rows = of.rows if of.rows is not None and len(array) == of.size else f"{name}_dim_0"
            found[name] = (rows, *(f"{name}_dim_{i}" for i in range(1, array.ndim))), array
    return found


class _observe_anew(handlers.uncondition):
    """``numpyro.handlers.uncondition``, inside of numpyro's scan as well."""

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow":
            into_scan(msg, _observe_anew)
        super().process_message(msg)


class _observe(Messenger):
    """Let a model observe other values than it does, of the rows of a minibatch.

    Args:
        fn: The model.
        values: All rows of each site.
        index: Numbers of the rows of the minibatch; None for all.
        axes: Where the rows lie.
    """

    def __init__(self, fn: Callable, values: Mapping[str, Any], index: Any, axes: Mapping):
        self.values, self.index, self.axes = values, index, axes
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow":
            raise ValueError("a model with numpyro's scan cannot be given other observations.")
        if msg["type"] == "sample" and msg["is_observed"] and msg["name"] in self.values:
            value, axis = self.values[msg["name"]], self.axes.get(msg["name"])
            if self.index is not None and axis is not None:
                value = jnp.take(value, self.index, axis)
            msg["value"] = value


class _count_plates(Messenger):
    """Note the sizes of a model's plates."""

    def __init__(self, fn: Callable, sizes: dict[str, int]):
        self.sizes = sizes
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate":
            self.sizes[msg["name"]] = msg["args"][0]
