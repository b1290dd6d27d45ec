"""Several processes that run one program: what each must see of the others."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import PyTree


def is_lead_process() -> bool:
    """Whether this process is the one that writes files and reports."""
    return jax.process_index() == 0


def to_host(tree: PyTree) -> PyTree:
    """A tree's arrays in the memory of every process, whole; keys by their bits."""

    def fetch(leaf: Any) -> np.ndarray:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if jax.process_count() > 1 and not leaf.is_fully_addressable:
            if leaf.is_fully_replicated:
                return np.asarray(leaf.addressable_data(0))
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def broadcast_from_lead(numbers: Any) -> Any:
    """The first process's numbers, on all of them."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(np.asarray(numbers))


def barrier(name: str) -> None:
    """Go on when all processes have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def put_global(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays that every process holds whole, spread as one sharding or a tree of them says."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf, sharding):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
    return jax.tree.map(put, tree, shardings)
