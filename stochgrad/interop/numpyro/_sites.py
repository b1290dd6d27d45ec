"""Plates and sites of a numpyro model's trace."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpyro.distributions import ExpandedDistribution, MaskedDistribution, Unit, biject_to


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
        scanned: Whether its first dimension is that of a scan's steps.
    """

    kind: str
    shape: tuple[int, ...]
    own_shape: tuple[int, ...]
    fn_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    plates: dict[str, int]
    scanned: bool = False


def unconstrained_shape(name: str, site: Any) -> tuple[int, ...]:
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


def is_latent(site: Any) -> bool:
    """Whether a site of a trace is sampled and not observed."""
    return site["type"] == "sample" and not site["is_observed"]


def own_distribution(fn: Any) -> Any:
    """A site's distribution before plates expand it and handlers mask it."""
    while isinstance(fn, ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    return fn


def is_factor(site: Any) -> bool:
    """Whether a sample site is a term of the log density and observes nothing."""
    return isinstance(own_distribution(site["fn"]), Unit)


def batch_shape(site: Any) -> tuple[int, ...]:
    """Shape of a site without the dimensions of an event."""
    if site["type"] != "sample":
        return tuple(jnp.shape(site["value"]))
    return np.broadcast_shapes(tuple(site["fn"].batch_shape), _without_event(site))


def batch_dims(name: str, site: Any) -> list[str]:
    """A name for each dimension of a site but for those of an event: its plate's, if it has one."""
    count = len(batch_shape(site))
    plates = {frame.dim + count: frame.name for frame in site["cond_indep_stack"]}
    return [plates.get(i, f"{name}_dim_{i}") for i in range(count)]


def _without_event(site: Any) -> tuple[int, ...]:
    value = jnp.shape(site["value"])
    return tuple(value[: len(value) - len(site["fn"].event_shape)])


def as_site(site: Any) -> Site:
    fn, own = site["fn"], own_distribution(site["fn"])
    kind = "factor" if is_factor(site) else "observed" if site["is_observed"] else "latent"
    plates = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    return Site(
        kind,
        batch_shape(site),
        tuple(own.batch_shape),
        tuple(fn.batch_shape),
        _without_event(site),
        plates,
        site.get("_control_flow_done", False),
    )


def site_dims(name: str, site: Any) -> tuple[str, ...]:
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
