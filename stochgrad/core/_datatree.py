"""Draws as an ``xarray.DataTree`` in ArviZ's layout."""

import datetime
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray

    from stochgrad.core._draws import Draws

_STATS_NAMES = {
    "log_density": "lp",
    "logdensity": "lp",
    "is_divergent": "diverging",
    "num_integration_steps": "n_steps",
}


def to_datatree(
    draws: "Draws",
    *,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> "xarray.DataTree":
    """See ``Draws.to_datatree``."""
    import xarray

    posterior = draws.posterior
    known_dims = dict(posterior.dims) if posterior is not None and not draws.collected else {}
    known_coords = dict(posterior.coords) if posterior is not None else {}
    known_dims.update({name: tuple(names) for name, names in (dims or {}).items()})
    known_coords.update(coords or {})
    chain_draw = {"chain": np.arange(draws.num_chains), "draw": np.arange(draws.num_draws)}

    variables = {}
    for name, value in draws.constrained().items():
        own = _dims(name, value.ndim - 2, known_dims.get(name, ()))
        variables[name] = (("chain", "draw", *own), value)
    used = {
        dim: size
        for own, value in variables.values()
        for dim, size in zip(own, value.shape, strict=True)
    }
    axes = {dim: np.arange(size) for dim, size in used.items() if dim not in chain_draw}
    axes.update({dim: values for dim, values in known_coords.items() if dim in used})

    stats = {_STATS_NAMES.get(name, name): value for name, value in draws.stats.items()}
    stats["diverging"] = stats.get("diverging", False) | ~draws.finite
    attrs = _attributes(draws)
    groups = {
        "posterior": xarray.Dataset(variables, {**chain_draw, **axes}, attrs),
        "sample_stats": xarray.Dataset(
            {name: (("chain", "draw"), value) for name, value in stats.items()}, chain_draw, attrs
        ),
    }
    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attrs), **groups})


def _dims(name: str, ndim: int, given: Sequence[str]) -> tuple[str, ...]:
    if len(given) > ndim:
        raise ValueError(f"dims of {name!r} must be at most {ndim} names, got {list(given)}.")
    return (*given, *(f"{name}_dim_{i}" for i in range(len(given), ndim)))


def _attributes(draws: "Draws") -> dict[str, Any]:
    attrs: dict[str, Any] = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "inference_library": "stochgrad",
        "inference_library_version": _version("stochgrad"),
        "jax_version": _version("jax"),
        "sampling_time": draws.timings.get("sample", 0.0),
        **draws.attrs,
    }
    # netCDF knows numbers and strings, no booleans
    return {name: int(value) if isinstance(value, bool) else value for name, value in attrs.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
