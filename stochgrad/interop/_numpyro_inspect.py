"""What a numpyro model tells of itself: its plates, latent sites and dimensions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import biject_to

from stochgrad.core import Rows
from stochgrad.interop._numpyro_handler import Streamed, answer_subsample


class Plate(NamedTuple):
    """A plate of a model, and how many of its rows the model asks for."""

    size: int
    subsample_size: int

    @property
    def subsampled(self) -> bool:
        return self.subsample_size < self.size


class Model(NamedTuple):
    """What one run of a model tells of it."""

    plates: dict[str, Plate]
    shapes: dict[str, tuple[int, ...]]  # of the latent sites, unconstrained
    dims: dict[str, tuple[str, ...]]  # of what is reported
    inside: dict[str, str]  # latent sites inside a subsampled plate


class _watch_plates(handlers.trace):
    """Record the plates of a model, and give each of them its first rows."""

    def __init__(self, fn: Callable, streamed: Streamed | None):
        self.plates: dict[str, Plate] = {}
        self.streamed = streamed
        self.branches = False
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate":
            size, subsample_size = msg["args"]
            self.plates[msg["name"]] = Plate(size, subsample_size or size)
            msg["value"] = jnp.arange(subsample_size or size)
        if msg["type"] == "control_flow" and "cond" in getattr(msg["fn"], "__name__", ""):
            self.branches = True

    def postprocess_message(self, msg: Any) -> None:
        if self.streamed is not None:
            rows = {
                name: Rows(None, jnp.arange(plate.subsample_size), jnp.float32(1))
                for name, plate in self.plates.items()
                if plate.subsampled
            }
            answer_subsample(msg, self.streamed, rows)
        super().postprocess_message(msg)


def inspect_model(model: Callable, args, kwargs, streamed: Streamed | None) -> Model:
    """Run the model once without computing anything, and note what the samplers need of it."""
    found = []

    def once(key):
        watch = _watch_plates(handlers.seed(model, key), streamed)
        found.append(_describe(watch, watch.get_trace(*args, **kwargs)))

    try:
        jax.eval_shape(once, jax.random.key(0))
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            "the model's course depends on the value of a latent site or of a row (a Python if, "
            "while or range over it): stochastic control flow is not supported; use jnp.where."
        ) from error
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            "the model turns a traced value into a numpy array, most likely by indexing a numpy "
            "array of its own with the plate's indices: pass the array as an argument, or wrap it "
            "in jnp.asarray."
        ) from error
    return found[0]


def _describe(watch: "_watch_plates", sites: Mapping[str, Any]) -> Model:
    if watch.branches:
        raise ValueError(
            "the model uses numpyro's cond: stochastic control flow is not supported; write both "
            "branches and choose with jnp.where."
        )
    subsampled = {name for name, plate in watch.plates.items() if plate.subsampled}
    shapes, dims, inside = {}, {}, {}
    for name, site in sites.items():
        latent = site["type"] == "sample" and not site["is_observed"]
        within = subsampled & {frame.name for frame in site["cond_indep_stack"]}
        if latent:
            support = site["fn"].support
            if support.is_discrete:
                raise ValueError(
                    f"latent site {name!r} is discrete, which a gradient cannot sample: "
                    "sum it out of the likelihood."
                )
            shapes[name] = tuple(biject_to(support).inverse_shape(jnp.shape(site["value"])))
            if within:
                inside[name] = min(within)
        if latent or (site["type"] == "deterministic" and not within):
            dims[name] = _site_dims(name, site)
    return Model(watch.plates, shapes, dims, inside)


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
