"""A numpyro model's plates, latent sites and dimensions, from running it once."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.primitives import Messenger

from stochgrad.core import Rows, describe
from stochgrad.interop.numpyro._arguments import Arguments, on_device, on_host
from stochgrad.interop.numpyro._explain import Misfit, UnknownValue, explained
from stochgrad.interop.numpyro._handler import Streamed, answer_subsample, into_scan
from stochgrad.interop.numpyro._sites import (
    Plate,
    Site,
    as_site,
    is_latent,
    site_dims,
    unconstrained_shape,
)


class Summary(NamedTuple):
    """A model's plates, latent sites and dimensions.

    Attributes:
        plates: Its plates.
        shapes: Shapes of the latent sites, unconstrained.
        dims: Names of the dimensions of what is reported.
        inside: The subsampled plate of each latent site that lies in one.
        sites: Its sample sites.
        reported: Shapes of its deterministic sites.
    """

    plates: dict[str, Plate]
    shapes: dict[str, tuple[int, ...]]
    dims: dict[str, tuple[str, ...]]
    inside: dict[str, str]
    sites: dict[str, Site]
    reported: dict[str, tuple[int, ...]]


class _Notes:
    """What is noted down while a model runs."""

    def __init__(self):
        self.plates: dict[str, Plate] = {}
        self.params: dict[str, PyTree] = {}
        self.indices: dict[str, Any] = {}
        self.subsampled: set[int] = set()  # ids of what went through numpyro.subsample
        self.branches = False


class _watch(Messenger):
    """Note a model's plates and parameters, and give each plate its first rows."""

    def __init__(self, fn: Callable, notes: _Notes, streamed: Streamed | None, scanned=False):
        self.notes = notes
        self.streamed = streamed
        self.scanned = scanned
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate":
            self._plate(msg)
        elif msg["type"] == "subsample" and msg["value"] is None:
            raise ValueError(
                "the model hands None to numpyro.subsample: pass all of its data, or let it read "
                "what may be None only where it is not."
            )
        elif msg["type"] == "param" and msg["value"] is None:
            if self.scanned:
                _refuse_param(msg["name"])
            self.notes.params[msg["name"]] = None
        elif msg["type"] == "control_flow":
            if "cond" in getattr(msg["fn"], "__name__", ""):
                self.notes.branches = True
            into_scan(msg, lambda step: _watch(step, self.notes, self.streamed, scanned=True))

    def _plate(self, msg: Any) -> None:
        name, (size, subsample_size) = msg["name"], msg["args"]
        if isinstance(size, Tracer) or isinstance(subsample_size, Tracer):
            raise UnknownValue
        size = _whole(name, "size", size)
        if subsample_size is not None:
            subsample_size = _whole(name, "subsample_size", subsample_size)
            if subsample_size > size:
                raise ValueError(
                    f"the plate {name!r} has subsample_size={subsample_size}, more than its size, "
                    f"{size}."
                )
        plate = Plate(size, subsample_size or size)
        if self.scanned and plate.subsampled and self.streamed is not None:
            raise ValueError(
                f"the subsampled plate {name!r} lies inside numpyro's scan, where rows that are "
                "streamed cannot be read: load the data into memory."
            )
        if self.notes.plates.setdefault(name, plate) != plate:
            raise ValueError(
                f"the model has two plates called {name!r}, of {self.notes.plates[name]} and of "
                f"{plate}: give them different names."
            )
        self.notes.indices[name] = msg["value"] = jnp.arange(plate.subsample_size)

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "param" and msg["name"] in self.notes.params:
            self.notes.params[msg["name"]] = msg["value"]
        if msg["type"] == "subsample":
            self.notes.subsampled.add(id(msg["value"]))
        rows = {}
        if self.streamed is not None:
            rows = {
                name: Rows(None, jnp.arange(plate.subsample_size), jnp.float32(1))
                for name, plate in self.notes.plates.items()
                if plate.subsampled
            }
        answer_subsample(msg, self.streamed, rows, self.notes.indices)


def summarize(
    model: Callable, arguments: Arguments, streamed: Streamed | None
) -> tuple[Summary, Arguments]:
    """A model's summary, and its arguments in the form that it can work with.

    That is on the device, unless the model counts with the values of its data, as in
    ``int(group.max()) + 1``: jax knows no values where it compiles, numpy does.
    """
    args, kwargs = on_device(arguments, bool(streamed))
    try:
        if not (_folds_constants() and _counts_with_values(model, args, kwargs)):
            return _run_once(model, args, kwargs, streamed), (args, kwargs)
    except UnknownValue:
        pass
    args, kwargs = on_host(arguments, bool(streamed))
    try:
        return _run_once(model, args, kwargs, streamed), (args, kwargs)
    except UnknownValue as error:
        raise ValueError(
            "the model's control flow depends on the value of a latent site or of a row (a Python "
            "if, while or range over it): stochastic control flow is not supported; use "
            "jnp.where. Counts of the data are taken with numpy: int(np.max(group)) + 1."
        ) from error.__cause__


def _run_once(
    model: Callable, args, kwargs, streamed: Streamed | None, hidden: bool = False
) -> Summary:
    """Run the model once without computing anything, and note what the samplers need of it.

    With ``hidden``, the values of the arguments that are jax's arrays are unknown.

    Raises:
        UnknownValue: the model's control flow depends on the value of an array.
        ValueError: the model fails, or is none that can be sampled.
    """
    results = []
    leaves, structure = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if hidden and isinstance(leaf, jax.Array)]

    def once(key, arrays):
        for place, array in zip(places, arrays, strict=True):
            leaves[place] = array
        args, kwargs = jax.tree.unflatten(structure, leaves)
        notes = _Notes()
        with explained((args, kwargs), notes.plates, notes.subsampled):
            filled = handlers.substitute(model, substitute_fn=mid_support)
            watch = handlers.trace(_watch(handlers.seed(filled, key), notes, streamed))
            sites = watch.get_trace(*args, **kwargs)
            check_values(sites)
        for name in _live(model, args, kwargs, notes.params):
            _refuse_param(name)
        results.append(_summary(notes, sites))

    jax.eval_shape(once, jax.random.key(0), [leaves[place] for place in places])
    return results[0]


def _counts_with_values(model: Callable, args, kwargs) -> bool:
    """Whether the model needs the values of its arguments to be known while it is compiled."""
    try:
        _run_once(model, args, kwargs, None, hidden=True)
    except UnknownValue:
        return True
    except Exception:
        return False
    return False


def _folds_constants() -> bool:
    """Whether jax computes now what it would leave to the program: then values are known."""
    seen = []

    def observe(_):
        seen.append(not isinstance(jnp.arange(2) + 1, Tracer))

    jax.eval_shape(observe, 0)
    return seen[0]


def check_values(trace: Mapping[str, Any]) -> None:
    """Raise an error unless each site's value goes with its distribution, as numpyro does not."""
    for name, site in trace.items():
        if site["type"] == "sample":
            shape, value = tuple(site["fn"].shape()), jnp.shape(site["value"])
            try:
                np.broadcast_shapes(shape, value)
            except ValueError as error:
                raise Misfit(
                    f"the distribution of site {name!r} has shape {shape}, its value {value}"
                ) from error


def mid_support(site: Any) -> Any:
    """A value for a latent site, in the middle of its support, for those that cannot be drawn."""
    if not is_latent(site) or site["value"] is not None:
        return None
    fn = site["fn"]
    try:
        transform = biject_to(fn.support)
    except NotImplementedError:
        return None
    shape = (*site["kwargs"].get("sample_shape", ()), *fn.shape())
    return transform(jnp.zeros(transform.inverse_shape(shape)))


def _whole(name: str, what: str, value: Any) -> int:
    number = np.asarray(value) if isinstance(value, jax.Array) else value
    if isinstance(number, np.ndarray) and number.ndim == 0:
        number = number[()]
    whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
    if not whole or number < 1:
        raise ValueError(
            f"the plate {name!r} must have a {what} of at least 1, an integer, got "
            f"{describe(value)}."
        )
    return int(number)


def _refuse_param(name: str) -> None:
    raise ValueError(
        f"the model has the numpyro.param site {name!r}, which would be neither sampled nor "
        "learned, and stay at its first value: give it a prior with numpyro.sample (a network's "
        "with random_flax_module), or fix it with "
        f"numpyro.handlers.substitute(model, data={{{name!r}: value}})."
    )


def _live(model: Callable, args, kwargs, params: Mapping[str, PyTree]) -> list[str]:
    """The parameters that the model's density depends on."""
    params = {name: value for name, value in params.items() if value is not None}
    if not params:
        return []

    def log_probs(key, params):
        filled = handlers.substitute(handlers.substitute(model, params), substitute_fn=mid_support)
        notes = _Notes()
        sites = handlers.trace(_watch(handlers.seed(filled, key), notes, None))
        return [
            site["fn"].log_prob(site["value"])
            for site in sites.get_trace(*args, **kwargs).values()
            if site["type"] == "sample"
        ]

    shapes = jax.eval_shape(lambda x: x, params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(log_probs)(key, shapes).jaxpr
    _, flags = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    used = jax.tree.unflatten(jax.tree.structure(shapes), flags[len(jax.tree.leaves(key)) :])
    return [name for name, leaves in used.items() if any(jax.tree.leaves(leaves))]


def _summary(notes: _Notes, trace: Mapping[str, Any]) -> Summary:
    if notes.branches:
        raise ValueError(
            "the model uses numpyro's cond: stochastic control flow is not supported; write both "
            "branches and choose with jnp.where."
        )
    subsampled = {name for name, plate in notes.plates.items() if plate.subsampled}
    shapes, dims, inside, sites, reported = {}, {}, {}, {}, {}
    for name, site in trace.items():
        latent = is_latent(site)
        within = subsampled & {frame.name for frame in site["cond_indep_stack"]}
        if latent:
            shapes[name] = unconstrained_shape(name, site)
            if within:
                inside[name] = min(within)
        if site["type"] == "sample":
            sites[name] = as_site(site)
        if latent or (site["type"] == "deterministic" and not within):
            dims[name] = site_dims(name, site)
        if site["type"] == "deterministic":
            reported[name] = tuple(jnp.shape(site["value"]))
    return Summary(notes.plates, shapes, dims, inside, sites, reported)
