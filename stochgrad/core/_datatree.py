"""Draws in the groups that ArviZ reads, in memory or on disk.

xarray and zarr have no room for some names. A slash, with which numpyro's ``scope`` makes names,
becomes a dot there; ``chain`` and ``draw``, which are dimensions, and what is a name of the file
system's get an underscore at the end.
"""

import datetime
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core._checks import describe, first_line
from stochgrad.core._fingerprint import package_version

if TYPE_CHECKING:
    import xarray

    from stochgrad.core._draws import Draws

_STATS_NAMES = {
    "log_density": "lp",
    "logdensity": "lp",
    "is_divergent": "diverging",
    "num_integration_steps": "n_steps",
}
_RESERVED = ("chain", "draw", ".", "..", "zarr.json")


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
    """The groups ``posterior`` and ``sample_stats`` of some draws.

    Raises:
        TypeError: ``coords`` or ``dims`` is no mapping, or holds something else than names.
        ValueError: they do not fit the variables; two variables have one name.
    """
    posterior, values = draws.posterior, draws.constrained()
    named = tree_names(values)
    own = None if draws.collected else posterior
    known = {name: tuple(map(dotted, ds)) for name, ds in own.dims.items()} if own else {}
    labels = {} if posterior is None else {dotted(d): c for d, c in posterior.coords.items()}
    chosen = _chosen_dims(dims, values)

    variables = {}
    for site, (name, value) in zip(values, named.items(), strict=True):
        first = chosen.get(site) or [_free(dim, named) for dim in known.get(site, ())]
        variables[name] = (("chain", "draw", *_dims(name, value.ndim - 2, first, named)), value)
    attrs = _attributes(draws)
    numbers = {name: (("chain", "draw"), x) for name, x in _statistics(draws).items()}
    group = _group(draws, variables, labels, attrs)
    return {
        "posterior": group._replace(coords=_with_chosen(group.coords, coords)),
        "sample_stats": _group(draws, numbers, {}, attrs),
    }


def unconstrained_group(draws: "Draws") -> Group:
    """The positions as the sampler has them, by the names of their leaves."""
    named = tree_names(by_name(draws.positions))
    variables = {
        name: (("chain", "draw", *_dims(name, value.ndim - 2, (), named)), value)
        for name, value in named.items()
    }
    return _group(draws, variables, {}, _attributes(draws))


def by_name(positions: PyTree) -> dict[str, Any]:
    """The leaves of a position by their paths: ``w`` for ``{"w": ...}``, ``x`` for a bare array.

    Raises:
        ValueError: two leaves have one name.
    """
    leaves = jax.tree_util.tree_leaves_with_path(positions)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "x" for path, _ in leaves]
    _check_unique(names)
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def tree_names(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables by the names that they have in a tree of xarray's and in a store.

    Raises:
        ValueError: two variables have one name, or one has a name that no file can have.
    """
    names = [dotted(name) for name in variables]
    _check_unique(names)
    for name in names:
        if "\0" in name or len(name.encode()) > 200:
            raise ValueError(
                f"the name {describe(name)} cannot be that of a variable: it must have at most "
                "200 bytes, none of them zero."
            )
    return dict(zip(names, variables.values(), strict=True))


def stats_names(stats: Iterable[str]) -> dict[str, str]:
    """What ArviZ calls the numbers that a kernel reports, unless another is called so already."""
    stats = list(stats)
    names = {name: _STATS_NAMES.get(name, name) for name in stats}
    counts = Counter(names.values())
    return {name: other if counts[other] == 1 else dotted(name) for name, other in names.items()}


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
    used: dict[str, int] = {}
    for name, (own, value) in variables.items():
        if len(set(own)) < len(own):
            raise ValueError(f"dims of {name!r} must be different names, got {list(own[2:])}.")
        for dim, size in zip(own, value.shape, strict=True):
            if used.setdefault(dim, size) != size:
                raise ValueError(
                    f"dims: {dim!r} has {used[dim]} entries in one variable and {size} in "
                    f"{name!r}: give them different names."
                )
    axes: dict[str, Any] = {
        "chain": np.arange(draws.num_chains),
        "draw": np.arange(draws.num_draws),
    }
    axes |= {dim: np.arange(size) for dim, size in used.items() if dim not in axes}
    model = {dim: values for dim, values in coords.items() if dim in used}
    return Group(variables, _with_chosen(axes, model), attrs)


def _dims(name: str, ndim: int, first: Sequence[str], taken: Container[str]) -> tuple[str, ...]:
    if len(first) > ndim:
        raise ValueError(f"dims of {name!r} must be at most {ndim} names, got {list(first)}.")
    return (*first, *(_free(f"{name}_dim_{i}", taken) for i in range(len(first), ndim)))


def _free(dim: str, taken: Container[str]) -> str:
    """A name for a dimension that no variable has."""
    while dim in taken:
        dim += "_"
    return dim


def dotted(name: str) -> str:
    """A name that xarray and zarr have room for."""
    name = str(name).replace("/", ".") or "x"
    return f"{name}_" if name in _RESERVED else name


def _check_unique(names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"two arrays have the name {twice[0]!r} (slashes and levels of a tree become dots): "
            "rename one of them."
        )


def _chosen_dims(dims: Any, values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of dimensions by the site they belong to, as the caller wants them."""
    if dims is None:
        return {}
    if not isinstance(dims, Mapping):
        raise TypeError(f"dims must be a mapping from variables to names, got {describe(dims)}.")
    sites = {dotted(site): site for site in values}
    chosen = {}
    for name, own in dims.items():
        site = name if name in values else sites.get(name)
        if site is None:
            raise ValueError(f"dims names {name!r}; the variables are {list(sites)}.")
        if not isinstance(own, list | tuple) or not all(isinstance(d, str) and d for d in own):
            raise TypeError(f"dims of {name!r} must be a list of names, got {describe(own)}.")
        bad = [d for d in own if "/" in d or d in sites or d in _RESERVED]
        if bad:
            raise ValueError(
                f"dims of {name!r} cannot be called {bad[0]!r}: the name has a slash or is that "
                "of a variable, of the chains or of the draws."
            )
        chosen[site] = list(own)
    return chosen


def _with_chosen(axes: Mapping[str, Any], coords: Any) -> dict[str, Any]:
    """Coordinates of which some are as the caller, or the model, wants them."""
    if coords is not None and not isinstance(coords, Mapping):
        raise TypeError(
            f"coords must be a mapping from dimensions to labels, got {describe(coords)}."
        )
    result = dict(axes)
    for dim, labels in (coords or {}).items():
        if dim not in axes:
            raise ValueError(f"coords names {dim!r}; the dimensions are {list(axes)}.")
        wanted = f"coords of {dim!r} must be {len(axes[dim])} labels"
        if isinstance(labels, str | bytes | Mapping | set) or labels is None:
            raise TypeError(f"{wanted}, got {describe(labels)}.")
        try:
            array = np.asarray(labels)
        except Exception as error:
            raise TypeError(f"{wanted}, got {describe(labels)} ({first_line(error)}).") from error
        if array.shape != np.shape(axes[dim]):
            raise ValueError(f"{wanted}, got {describe(labels)}.")
        result[dim] = array
    return result


def _statistics(draws: "Draws") -> dict[str, Any]:
    """Numbers of the draws by ArviZ's names, with what says whether they are finite."""
    names = stats_names(draws.stats)
    stats = {names[name]: value for name, value in draws.stats.items()}
    own = stats.get("diverging")
    if own is None:
        return {**stats, "diverging": ~draws.finite}
    # a kernel's own mark is not only for what is not finite
    return {**stats, "diverging": np.asarray(own, bool) | ~draws.finite, "finite": draws.finite}


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
