"""Draws in the groups that ArviZ reads, in memory or on disk."""

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core._identity import package_version

if TYPE_CHECKING:
    import xarray

    from stochgrad.core._draws import Draws

_STATS_NAMES = {
    "log_density": "lp",
    "logdensity": "lp",
    "is_divergent": "diverging",
    "num_integration_steps": "n_steps",
}


class Group(NamedTuple):
    """A group of variables that share their coordinates.

    Attributes:
        variables: ``(dims, array)`` by name; the first two dimensions are chain and draw.
        coords: Values along the dimensions.
        attrs: Notes.
    """

    variables: dict[str, tuple[tuple[str, ...], np.ndarray]]
    coords: dict[str, Any]
    attrs: dict[str, Any]

    @classmethod
    def joined(cls, pieces: "Sequence[Group]") -> "Group":
        """Pieces of one run, one after another."""
        variables = {
            name: (dims, np.concatenate([p.variables[name][1] for p in pieces], axis=1))
            for name, (dims, _) in pieces[0].variables.items()
        }
        return pieces[0]._replace(variables=variables)


def groups(
    draws: "Draws",
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Group]:
    """The groups ``posterior`` and ``sample_stats`` of some draws."""
    posterior = draws.posterior
    known_dims = dict(posterior.dims) if posterior is not None and not draws.collected else {}
    known_coords = dict(posterior.coords) if posterior is not None else {}
    known_dims.update({name: tuple(names) for name, names in (dims or {}).items()})
    known_coords.update(coords or {})

    variables = {
        name: (("chain", "draw", *_dims(name, value.ndim - 2, known_dims.get(name, ()))), value)
        for name, value in draws.constrained().items()
    }
    stats = {stats_name(name): value for name, value in draws.stats.items()}
    stats["diverging"] = stats.get("diverging", False) | ~draws.finite
    attrs = _attributes(draws)
    return {
        "posterior": _group(draws, variables, known_coords, attrs),
        "sample_stats": _group(
            draws, {name: (("chain", "draw"), value) for name, value in stats.items()}, {}, attrs
        ),
    }


def unconstrained_group(draws: "Draws") -> Group:
    """The positions as the sampler has them, by the names of their leaves."""
    variables = {
        name: (("chain", "draw", *_dims(name, value.ndim - 2, ())), value)
        for name, value in by_name(draws.positions).items()
    }
    return _group(draws, variables, {}, _attributes(draws))


def by_name(positions: PyTree) -> dict[str, Any]:
    """The leaves of a position by their paths: ``w`` for ``{"w": ...}``, ``x`` for a bare array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "x": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(positions)
    }


def stats_name(name: str) -> str:
    """What ArviZ calls a number that a kernel reports."""
    return _STATS_NAMES.get(name, name)


def to_datatree(
    draws: "Draws",
    *,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> "xarray.DataTree":
    """See ``Draws.to_datatree``."""
    import xarray

    found = groups(draws, coords, dims)
    attrs = next(iter(found.values())).attrs
    return xarray.DataTree.from_dict(
        {
            "/": xarray.Dataset(attrs=attrs),
            **{name: xarray.Dataset(*group) for name, group in found.items()},
        }
    )


def _group(draws, variables, coords, attrs) -> Group:
    used = {
        dim: size
        for own, value in variables.values()
        for dim, size in zip(own, value.shape, strict=True)
    }
    axes = {"chain": np.arange(draws.num_chains), "draw": np.arange(draws.num_draws)}
    axes |= {dim: np.arange(size) for dim, size in used.items() if dim not in axes}
    axes |= {dim: values for dim, values in coords.items() if dim in used}
    return Group(variables, axes, attrs)


def _dims(name: str, ndim: int, given: Sequence[str]) -> tuple[str, ...]:
    if len(given) > ndim:
        raise ValueError(f"dims of {name!r} must be at most {ndim} names, got {list(given)}.")
    return (*given, *(f"{name}_dim_{i}" for i in range(len(given), ndim)))


def _attributes(draws: "Draws") -> dict[str, Any]:
    attrs: dict[str, Any] = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "inference_library": "stochgrad",
        "inference_library_version": package_version("stochgrad"),
        "jax_version": package_version("jax"),
        "sampling_time": draws.timings.get("sample", 0.0),
        **draws.attrs,
    }
    # netCDF knows numbers and strings, no booleans
    return {name: int(value) if isinstance(value, bool) else value for name, value in attrs.items()}
