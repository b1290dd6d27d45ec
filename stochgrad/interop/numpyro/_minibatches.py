"""How the rows of a numpyro model's plates reach it: from memory, from storage, by clients."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from stochgrad.core import (
    Batches,
    Blocks,
    Layout,
    Order,
    Rows,
    check_batch_size,
    check_no_mesh,
    describe,
    row_batches,
    streamed_rows,
)
from stochgrad.federated import client_rows, concatenate_clients, map_batches
from stochgrad.interop.numpyro._handler import LaidOut, Streamed
from stochgrad.interop.numpyro._sites import Plate

Plates = Mapping[str, Plate]
Sizes = Mapping[str, int]


class Minibatches(NamedTuple):
    """Minibatches of a model.

    Attributes:
        batches: A stream of dicts of rows, by plate.
        template: Rows of each plate, in the form of a minibatch.
        arrays: What answers the model's ``numpyro.subsample``.
    """

    batches: Batches
    template: dict[str, Rows]
    arrays: LaidOut | Streamed


def from_memory(
    plates: Plates, sizes: Sizes, order: Order, layout: Layout, mesh: Mesh | None
) -> Minibatches:
    """Minibatches of data in memory, in blocks or row by row, of several plates independently."""
    if mesh is not None:
        _single_plate(sizes)
    streams, partitions = {}, {}
    for name, rows in sizes.items():
        size = plates[name].size
        streams[name], partition = row_batches(size, rows, order, layout, mesh)
        if partition is not None:
            partitions[name] = partition
    return Minibatches(_together(streams), _template(streams), LaidOut(partitions))


def from_storage(
    plates: Plates, sizes: Sizes, arrays: Streamed, resident_bytes: int, mesh: Mesh | None
) -> Minibatches:
    """Minibatches of one plate, of arrays that are read as they are needed."""
    name = _single_plate(sizes)
    check_no_mesh(mesh)
    sources = tuple(arrays.sources)
    streams = {name: streamed_rows(sources, plates[name].size, sizes[name], resident_bytes)}
    return Minibatches(_together(streams), _template(streams), arrays)


def from_clients(
    plates: Plates, sizes: Sizes, client_sizes: Sequence[int], order: Order
) -> Minibatches:
    """Minibatches of one plate, each of the rows of one client."""
    name = _single_plate(sizes)
    if plates[name].size != sum(client_sizes):
        raise ValueError(
            f"the subsampled plate {name!r} has {plates[name].size} rows where the clients have "
            f"{sum(client_sizes)} together."
        )
    stream, partition = client_rows(client_sizes, None if order == "full" else sizes[name], order)
    batches = map_batches(stream, lambda rows: {name: rows}, {name: stream.full})
    batches = batches._replace(take=_by_name(name, stream))
    return Minibatches(batches, _template({name: stream}), LaidOut({name: partition}))


def pool_clients(args: tuple, clients: Any, layout: str, mesh: Any) -> tuple[tuple, list[int]]:
    """The model's arguments with the rows of all clients, and how many each has."""
    if args:
        raise ValueError("give the model's arguments either as they are or by clients, not both.")
    if layout != "blocks" or mesh is not None:
        raise ValueError("clients need layout='blocks' and no mesh.")
    for s, client in enumerate(clients if isinstance(clients, Sequence) else ()):
        if not isinstance(client, list | tuple):
            raise TypeError(
                f"clients must be a list of tuples, each of the model's arguments: client {s} is "
                f"{describe(client)}; with one argument it is (x,)."
            )
    pooled_args, sizes = concatenate_clients(clients)
    return pooled_args, sizes


def batch_sizes(
    plates: Plates, batch_size: int | Mapping[str, int] | None, order: str
) -> dict[str, int]:
    """How many rows of each subsampled plate a minibatch holds."""
    subsampled = {name: plate for name, plate in plates.items() if plate.subsampled}
    if not subsampled:
        if order == "full" or batch_size in [plate.size for plate in plates.values()]:
            return {}
        raise ValueError(
            "the model has no subsampled plate: give the plate that holds the data a "
            "subsample_size and read the data with numpyro.subsample, or take the whole data "
            "with order='full'."
        )
    if isinstance(batch_size, Mapping):
        unknown = sorted(set(batch_size) - set(subsampled), key=str)
        if unknown:
            raise ValueError(
                f"batch_size names {unknown}, but the model's subsampled plates are "
                f"{sorted(subsampled)}."
            )
        by_plate = dict(batch_size)
    elif batch_size is not None and len(subsampled) > 1:
        raise ValueError(
            f"the model has the subsampled plates {sorted(subsampled)}: "
            "give batch_size as a dict by plate name."
        )
    else:
        by_plate = dict.fromkeys(subsampled, batch_size)
    sizes = {}
    for name, plate in subsampled.items():
        rows = by_plate.get(name)
        if rows is None and order != "full":
            rows = plate.subsample_size
        sizes[name] = check_batch_size(rows, plate.size, order)
    return sizes


def _by_name(name: str, stream: Batches) -> Any:
    """Rows of one plate by their numbers, as a dict."""
    take: Any = stream.take
    return lambda index: {name: take(index)}


def _single_plate(sizes: Sizes) -> str:
    if len(sizes) != 1:
        raise ValueError(
            "streamed data, a mesh and clients need one subsampled plate, the model has "
            f"{sorted(sizes)}."
        )
    return next(iter(sizes))


def _template(streams: Mapping[str, Batches]) -> dict[str, Rows]:
    return {
        name: Rows(None, np.arange(stream.batch_size, dtype=np.int32), np.float32(1))  # pyright: ignore
        for name, stream in streams.items()
    }


def _together(streams: Mapping[str, Batches]) -> Batches:
    """Independent streams for several plates as one stream of dicts."""

    def init(key):
        return {
            name: stream.init(jax.random.fold_in(key, i))
            for i, (name, stream) in enumerate(streams.items())
        }

    def next(state):
        following = {name: stream.next(state[name]) for name, stream in streams.items()}
        batch = {name: rows for name, (rows, _) in following.items()}
        return batch, {name: state for name, (_, state) in following.items()}

    full = {name: stream.full for name, stream in streams.items()}
    main = max(streams.values(), key=lambda stream: stream.size, default=None)
    if main is None:
        block = Blocks(1, lambda state: (np.int32(0), state), lambda block: full)
        return Batches(init, next, full, 0, 0, blocks=block)
    together = main._replace(init=init, next=next, full=full, blocks=None)
    if main.stream is not None or main.mesh is not None:
        together = together._replace(full=None)
    if len(streams) > 1:
        return together._replace(take=None)
    ((name, stream),) = streams.items()
    together = together._replace(take=_by_name(name, stream))
    if main.blocks is None:
        return together
    count, next_in, at = main.blocks

    def next_block(state):
        block, following = next_in(state[name])
        return block, {name: following}

    return together._replace(blocks=Blocks(count, next_block, lambda block: {name: at(block)}))
