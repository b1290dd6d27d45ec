"""What a numpyro model tells of itself: its plates, latent sites and dimensions."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree
from numpyro import handlers
from numpyro.distributions import ExpandedDistribution, MaskedDistribution, Unit, biject_to
from numpyro.primitives import Messenger

from stochgrad.core import Rows, describe, first_line
from stochgrad.interop.numpyro._arguments import names_of
from stochgrad.interop.numpyro._handler import Streamed, answer_subsample, into_scan


class Plate(NamedTuple):
    """A plate of a model, and how many of its rows the model asks for."""

    size: int
    subsample_size: int

    @property
    def subsampled(self) -> bool:
        return self.subsample_size < self.size


class Site(NamedTuple):
    """A sample site of a model.

    Attributes:
        kind: ``"latent"``, ``"observed"`` or ``"factor"``.
        shape: Shape of its log density, on the first rows of each plate.
        own_shape: Shape of its own distribution, before plates expand it.
        fn_shape: The same, after.
        value_shape: Shape of its value, without the dimensions of an event.
        plates: The plates that it lies in, and their dimensions.
    """

    kind: str
    shape: tuple[int, ...]
    own_shape: tuple[int, ...]
    fn_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    plates: dict[str, int]


class Model(NamedTuple):
    """What one run of a model tells of it."""

    plates: dict[str, Plate]
    shapes: dict[str, tuple[int, ...]]  # of the latent sites, unconstrained
    dims: dict[str, tuple[str, ...]]  # of what is reported
    inside: dict[str, str]  # latent sites inside a subsampled plate
    sites: dict[str, Site]


class Unknown(Exception):
    """The model's course depends on the value of an array."""


class _Notes:
    """What is noted down while a model runs."""

    def __init__(self):
        self.plates: dict[str, Plate] = {}
        self.params: dict[str, PyTree] = {}
        self.indices: dict[str, Any] = {}
        self.read: set[int] = set()  # ids of what went through numpyro.subsample
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
            raise Unknown
        size = _whole(name, "size", size)
        if subsample_size is not None:
            subsample_size = _whole(name, "subsample_size", subsample_size)
            if subsample_size > size:
                raise ValueError(
                    f"the plate {name!r} has subsample_size={subsample_size}, more than its size, "
                    f"{size}."
                )
        plate = Plate(size, subsample_size or size)
        if self.scanned and plate.subsampled:
            raise ValueError(
                f"the subsampled plate {name!r} lies inside numpyro's scan, which shows its rows "
                "to nobody: a minibatch cannot be chosen there. Put the plate around a Python loop "
                "over the steps, or around jax.lax.scan with the log density of each row in a "
                "numpyro.factor; or leave subsample_size out and take all rows, order='full'."
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
            self.notes.read.add(id(msg["value"]))
        rows = {}
        if self.streamed is not None:
            rows = {
                name: Rows(None, jnp.arange(plate.subsample_size), jnp.float32(1))
                for name, plate in self.notes.plates.items()
                if plate.subsampled
            }
        answer_subsample(msg, self.streamed, rows, self.notes.indices)


def inspect_model(
    model: Callable, args, kwargs, streamed: Streamed | None, hidden: bool = False
) -> Model:
    """Run the model once without computing anything, and note what the samplers need of it.

    With ``hidden``, nobody knows the values of the arguments that are jax's arrays.

    Raises:
        Unknown: the model's course depends on the value of an array, which it may know in numpy.
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
        try:
            filled = handlers.substitute(model, substitute_fn=_filled)
            watch = handlers.trace(_watch(handlers.seed(filled, key), notes, streamed))
            sites = watch.get_trace(*args, **kwargs)
            _check_values(sites)
        except Exception as error:
            sentence = _explained(error, notes, (args, kwargs))
            raise sentence from (None if sentence is error else error)
        for name in _live(model, args, kwargs, notes.params):
            _refuse_param(name)
        results.append(_describe(notes, sites))

    jax.eval_shape(once, jax.random.key(0), [leaves[place] for place in places])
    return results[0]


def counts_with_values(model: Callable, args, kwargs) -> bool:
    """Whether the model needs the values of its arguments to be known while it is compiled."""
    try:
        inspect_model(model, args, kwargs, None, hidden=True)
    except Unknown:
        return True
    except Exception:
        return False
    return False


def folds_constants() -> bool:
    """Whether jax computes now what it would leave to the program: then values are known."""
    seen = []

    def look(_):
        seen.append(not isinstance(jnp.arange(2) + 1, Tracer))

    jax.eval_shape(look, 0)
    return seen[0]


def _check_values(trace: Mapping[str, Any]) -> None:
    """Raise an error unless each site's value goes with its distribution, as numpyro does not."""
    for name, site in trace.items():
        if site["type"] == "sample":
            shape, value = tuple(site["fn"].shape()), jnp.shape(site["value"])
            try:
                np.broadcast_shapes(shape, value)
            except ValueError as error:
                raise _Misfit(
                    f"the distribution of site {name!r} has shape {shape}, its value {value}"
                ) from error


class _Misfit(Exception):
    pass


def _filled(site: Any) -> Any:
    """A value for a latent site, in the middle of its support, for those that cannot be drawn."""
    if site["type"] != "sample" or site["is_observed"] or site["value"] is not None:
        return None
    fn = site["fn"]
    try:
        transform = biject_to(fn.support)
    except NotImplementedError:
        return None
    shape = (*site["kwargs"].get("sample_shape", ()), *fn.shape())
    return transform(jnp.zeros(transform.inverse_shape(shape)))


@contextmanager
def explained(arguments: tuple) -> Iterator[None]:
    """Within this, what a model raises is said in a sentence."""
    try:
        yield
    except Exception as error:
        sentence = _explained(error, _Notes(), arguments)
        if sentence is error:
            raise
        raise sentence from error


def _explained(error: Exception, notes: _Notes, arguments: tuple) -> Exception:
    """An error of a model as a sentence."""
    if isinstance(error, Unknown | jax.errors.ConcretizationTypeError):
        return Unknown()
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return ValueError(
            "the model turns a traced value into a numpy array, most likely by indexing a numpy "
            "array of its own with the plate's indices: pass the array as an argument, or wrap it "
            "in jnp.asarray."
        )
    if _raised_here(error.__traceback__) and isinstance(error, TypeError | ValueError):
        return error
    what = first_line(error)
    if type(error).__name__ not in what and not isinstance(error, _Misfit):
        what = f"{type(error).__name__}: {what}"
    if "PRNG key" in what:
        what += "; a log density must not draw random numbers"
    shapes = "".join(
        f" The array of shape {leaf.shape} may be {name}."
        for name, leaf in names_of(arguments).values()
        if leaf.shape and str(tuple(leaf.shape)) in str(error)
    )
    hint = _whole_rows(str(error), notes, arguments) or shapes
    return ValueError(f"the model fails{_place(error.__traceback__)} ({what}).{hint}")


def _whole_rows(text: str, notes: _Notes, arguments: tuple) -> str:
    """A hint where a minibatch seems to meet whole data."""
    numbers = {int(number) for number in re.findall(r"\d+", text)}
    for name, plate in notes.plates.items():
        if plate.subsampled and {plate.size, plate.subsample_size} <= numbers:
            whole = [
                f"{what}, shape {leaf.shape}"
                for identity, (what, leaf) in names_of(arguments).items()
                if plate.size in leaf.shape and identity not in notes.read
            ]
            without = f" ({'; '.join(whole)} did not go through it)" if whole else ""
            return (
                f" A minibatch of {plate.subsample_size} rows of the plate {name!r} meets all "
                f"{plate.size}: read everything that has rows with numpyro.subsample{without}, or "
                "index it with the plate's indices."
            )
    return ""


def _place(traceback: TracebackType | None) -> str:
    """At which site a model failed, as far as numpyro's own frames tell."""
    place = ""
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_globals.get("__name__") == "numpyro.primitives":
            name, function = frame.f_locals.get("name"), frame.f_code.co_name
            if isinstance(name, str) and function in ("sample", "param", "deterministic"):
                place = f" at the site {name!r}"
            elif isinstance(name, str) and function in ("__init__", "_subsample"):
                place = f" at the plate {name!r}"
            elif function == "subsample":
                place = " at numpyro.subsample"
        traceback = traceback.tb_next
    return place


def _raised_here(traceback: TracebackType | None) -> bool:
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name.startswith("stochgrad.")


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
        filled = handlers.substitute(handlers.substitute(model, params), substitute_fn=_filled)
        notes = _Notes()
        sites = handlers.trace(_watch(handlers.seed(filled, key), notes, None))
        return [
            site["fn"].log_prob(site["value"])
            for site in sites.get_trace(*args, **kwargs).values()
            if site["type"] == "sample"
        ]

    shapes = jax.eval_shape(lambda x: x, params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr: Any = jax.make_jaxpr(log_probs)(key, shapes).jaxpr
    live = {var for var in jaxpr.outvars if not hasattr(var, "val")}
    for equation in reversed(jaxpr.eqns):
        if not live.isdisjoint(equation.outvars):
            live.update(var for var in equation.invars if not hasattr(var, "val"))
    flags = [var in live for var in jaxpr.invars[len(jax.tree.leaves(key)) :]]
    used = jax.tree.unflatten(jax.tree.structure(shapes), flags)
    return [name for name, leaves in used.items() if any(jax.tree.leaves(leaves))]


def _describe(notes: _Notes, trace: Mapping[str, Any]) -> Model:
    if notes.branches:
        raise ValueError(
            "the model uses numpyro's cond: stochastic control flow is not supported; write both "
            "branches and choose with jnp.where."
        )
    subsampled = {name for name, plate in notes.plates.items() if plate.subsampled}
    shapes, dims, inside, sites = {}, {}, {}, {}
    for name, site in trace.items():
        latent = site["type"] == "sample" and not site["is_observed"]
        within = subsampled & {frame.name for frame in site["cond_indep_stack"]}
        if latent:
            shapes[name] = _unconstrained_shape(name, site)
            if within:
                inside[name] = min(within)
        if site["type"] == "sample":
            sites[name] = _site(site)
        if latent or (site["type"] == "deterministic" and not within):
            dims[name] = _site_dims(name, site)
    return Model(notes.plates, shapes, dims, inside, sites)


def _unconstrained_shape(name: str, site: Any) -> tuple[int, ...]:
    try:
        support = site["fn"].support
        if not support.is_discrete:
            return tuple(biject_to(support).inverse_shape(jnp.shape(site["value"])))
    except NotImplementedError as error:
        raise ValueError(
            f"latent site {name!r} has a support without a map from unconstrained space "
            f"({type(site['fn']).__name__}): reparameterize it, for example with "
            "numpyro.handlers.reparam."
        ) from error
    raise ValueError(
        f"latent site {name!r} is discrete, which a gradient cannot sample: "
        "sum it out of the likelihood."
    )


def own_distribution(fn: Any) -> Any:
    """A site's distribution before plates expand it and handlers mask it."""
    while isinstance(fn, ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    return fn


def _site(site: Any) -> Site:
    fn, own = site["fn"], own_distribution(site["fn"])
    value = jnp.shape(site["value"])
    value = value[: len(value) - len(fn.event_shape)]
    shape = np.broadcast_shapes(tuple(fn.batch_shape), value)
    kind = "factor" if isinstance(own, Unit) else "observed" if site["is_observed"] else "latent"
    plates = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    return Site(kind, shape, tuple(own.batch_shape), tuple(fn.batch_shape), value, plates)


def _site_dims(name: str, site: Any) -> tuple[str, ...]:
    """A name for each dimension of a site's value: its plates', then ``name_dim_i``."""
    shape = jnp.shape(site["value"])
    event_names = tuple(site.get("infer", {}).get("event_dims", ()))
    event_dim = len(site["fn"].event_shape) if site["type"] == "sample" else 0
    batch_ndim = len(shape) - event_dim
    plates = {frame.dim: frame for frame in site["cond_indep_stack"]}
    names = []
    for i in range(len(shape)):
        frame = plates.get(i - batch_ndim) if i < batch_ndim else None
        if frame is not None and frame.size == shape[i]:
            names.append(frame.name)
        elif i >= batch_ndim and i - batch_ndim < len(event_names):
            names.append(event_names[i - batch_ndim])
        else:
            names.append(f"{name}_dim_{i}")
    return tuple(names)
