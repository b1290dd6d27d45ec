"""A function of draws and rows, evaluated in blocks of both: memory has a bound, results do not."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stochgrad.core._checks import check_path
from stochgrad.core._datatree import dotted, tree_names
from stochgrad.core._jit import hoisted_jit, remembered
from stochgrad.core._observations import Observations
from stochgrad.core._stored_draws import StoredArray, open_root, quiet, zarr_library

ROWS = 4096
"""Rows of a block: the unit in which rows are drawn, so that no limit of memory changes a draw."""
MEMORY = 2**30
_DRAWS = 64


def by_rows(
    function: Callable,
    positions: Any,
    observations: Observations,
    index: np.ndarray,
    *,
    key: Any,
    memory_bytes: int,
    store: "str | Path | None" = None,
    group: str = "posterior_predictive",
) -> dict[str, Any]:
    """``function(key, position, batch) -> {site: array}`` at all draws and some rows.

    Args:
        function: What to evaluate at one draw and a batch of rows.
        positions: Arrays of shape (chain, draw, ...), in memory or read where they are indexed.
        observations: Where rows come from.
        index: Numbers of rows.
        key: A key: a block of rows of a draw has its own, whatever the memory.
        memory_bytes: For the work at one time, and for results that are not stored.
        store: Where results go: a zarr group; by default they are returned in memory.
        group: What the results are called there.

    Returns:
        By site arrays of shape (chain, draw, ...); with a store they are its zarr arrays.

    Raises:
        ValueError: results do not fit into the memory and have no store; nor does one draw.
        OSError: the store cannot be made.
    """
    leaves = jax.tree.leaves(positions)
    chains, draws = leaves[0].shape[:2]
    rows = min(ROWS, len(index)) if observations.rows is not None else 1
    starts = range(0, max(len(index), 1), rows)

    def block(number: int) -> Any:
        some = index[number * rows : (number + 1) * rows]
        return observations.take(np.append(some, np.repeat(some[-1:], rows - len(some))))

    first = block(0)
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf[0, 0]), positions)
    program, shapes = jax.make_jaxpr(function, return_shape=True)(key, one, first)
    sites = {
        name: _Site.of(name, shape, observations, rows, len(index))
        for name, shape in shapes.items()
    }
    devices = jax.local_devices()
    need = max(_bytes_of(program.jaxpr), 1)
    if need > memory_bytes:
        raise ValueError(
            f"memory_bytes must be at least {need:,}, for one draw and {rows} rows, got "
            f"{memory_bytes:,}."
        )
    at_once = memory_bytes // (2 * need)  # host and device may be one
    at_once = min(max(at_once // _DRAWS * _DRAWS or at_once, 1), draws)
    at_once = -(-at_once // len(devices)) * len(devices)
    run = _in_bulk(function, Mesh(np.array(devices), ("draw",)) if len(devices) > 1 else None)
    with _results(sites, (chains, draws), index, memory_bytes, store, group) as results:
        for number, start in enumerate(starts):
            batch = first if number == 0 else block(number)
            for chain, begin in product(range(chains), range(0, draws, at_once)):
                end = begin + at_once
                some = jax.tree.map(lambda x: _padded(x[chain, begin:end], at_once), positions)
                places = np.arange(at_once, dtype=np.uint32) + np.uint32(chain * draws + begin)
                values = run(key, number, places, some, batch)
                for name, site in sites.items():
                    where = (chain, slice(begin, min(begin + at_once, draws)))
                    site.put(results[name], where, start, np.asarray(values[name]))
    if store is None:
        return results
    path = check_path("store", store)
    stored = open_root(path)[group]
    return {
        name: StoredArray(stored[file_name], path)
        for name, file_name in zip(sites, tree_names(sites), strict=True)
    }


class _Site(NamedTuple):
    """The shape of a site's results for one draw, its dimensions, and which are the rows."""

    shape: tuple[int, ...]
    dtype: Any
    dims: tuple[str, ...]
    axis: int | None

    @classmethod
    def of(cls, name: str, one: Any, observations: Observations, rows: int, size: int) -> "_Site":
        axis, shape = observations.axis(name), list(one.shape)
        if axis is not None:
            assert shape[axis] == rows, f"{name} has shape {shape} on {rows} rows"
            shape[axis] = size
        dims = observations.dims_of(name)
        dims = (*dims, *(f"{name}_dim_{i}" for i in range(len(dims), len(shape))))
        return cls(tuple(shape), one.dtype, tuple(map(dotted, dims)), axis)

    def put(self, result: Any, where: tuple[int, slice], start: int, value: np.ndarray) -> None:
        """The results of a block of draws and of rows, whose last may be there several times."""
        chain, draws = where
        value = value[: draws.stop - draws.start]
        if self.axis is None:
            result[chain, draws] = value
            return
        count = min(value.shape[1 + self.axis], self.shape[self.axis] - start)
        before = (slice(None),) * self.axis
        result[(chain, draws, *before, slice(start, start + count))] = value[
            (slice(None), *before, slice(count))
        ]


@remembered
def _in_bulk(function: Callable, mesh: Mesh | None) -> Callable:
    """The function for many draws, spread over the devices if there are several."""

    def one(key, number, place, position, batch):
        own = jax.random.fold_in(jax.random.fold_in(key, place), number)
        return function(own, position, batch)

    many = hoisted_jit(jax.vmap(one, in_axes=(None, None, 0, 0, None)), mesh)

    def run(key, number, places, positions, batch):
        if mesh is not None:
            spread = NamedSharding(mesh, PartitionSpec("draw"))
            places, positions = jax.device_put((places, positions), spread)
        return many(key, np.uint32(number), places, positions, batch)

    return run


def _padded(leaf: np.ndarray, size: int) -> np.ndarray:
    """Draws of which there are as many as others, by repeating the last."""
    return np.concatenate([leaf, np.repeat(leaf[-1:], size - len(leaf), axis=0)])


def _bytes_of(jaxpr: Any) -> int:
    """Bytes of all that a program computes on its way: more than it ever holds."""
    total = 0
    for equation in jaxpr.eqns:
        total += sum(x.aval.size * x.aval.dtype.itemsize for x in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            total += _bytes_of(inner)
    return total


@contextmanager
def _results(
    sites: dict[str, _Site],
    lead: tuple[int, int],
    index: np.ndarray,
    memory_bytes: int,
    store: str | Path | None,
    group: str,
) -> Iterator[dict[str, Any]]:
    """Arrays for the results, in memory or in a store that is there once they are whole."""
    total = sum(
        int(np.prod((*lead, *s.shape))) * np.dtype(s.dtype).itemsize for s in sites.values()
    )
    if store is None:
        if total > memory_bytes:
            raise ValueError(
                f"memory_bytes must be at least {total:,}, what {lead[0]} chains of {lead[1]} "
                f"draws for {len(index)} rows take, got {memory_bytes:,}: raise it, give store= a "
                "directory, or take fewer rows (rows=) or draws (draws[::10])."
            )
        yield {name: np.empty((*lead, *site.shape), site.dtype) for name, site in sites.items()}
        return
    path = check_path("store", store)
    if path.exists():
        raise ValueError(f"store={str(path)!r} is there already: give another, or remove it.")
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with quiet():
            root = zarr_library().create_group(part)
            made = root.create_group(group)
            for dim, values in _coordinates(sites, lead, index).items():
                made.create_array(dim, data=values, dimension_names=(dim,))
            yield {
                name: _stored(made, file_name, site, lead)
                for (name, site), file_name in zip(sites.items(), tree_names(sites), strict=True)
            }
            zarr_library().consolidate_metadata(root.store)
        part.rename(path)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"store={str(path)!r} cannot be written: {error.strerror}.") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _stored(group: Any, name: str, site: _Site, lead: tuple[int, int]) -> Any:
    chunks = (1, min(lead[1], _DRAWS), *(min(n, ROWS) for n in site.shape))
    return group.create_array(
        name,
        shape=(*lead, *site.shape),
        chunks=chunks,
        dtype=site.dtype,
        dimension_names=("chain", "draw", *site.dims),
    )


def _coordinates(
    sites: dict[str, _Site], lead: tuple[int, int], index: np.ndarray
) -> dict[str, np.ndarray]:
    coords = {"chain": np.arange(lead[0]), "draw": np.arange(lead[1])}
    for site in sites.values():
        for axis, (dim, size) in enumerate(zip(site.dims, site.shape, strict=True)):
            coords.setdefault(dim, index if axis == site.axis else np.arange(size))
    return coords
