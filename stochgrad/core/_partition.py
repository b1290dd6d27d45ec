"""Rows of a minibatch, and the fixed partition of the data that blocks of them come from."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from stochgrad.core._distributed import put_global
from stochgrad.core._trees import block_of

_PARTITION_SEED = 20130101


class Rows(NamedTuple):
    """Which rows a minibatch holds.

    Attributes:
        block: Number of the block, or None where the rows do not lie side by side.
        index: Numbers of the rows in the data as they came; padding repeats rows of weight zero.
        weight: What each row counts for: the number of minibatches in an epoch, zero for padding.
        resident: The super-block of streamed arrays that ``block`` is a slice of.
    """

    block: Int[Array, ""] | None
    index: Int[Array, " batch"]
    weight: Float[Array, ""] | Float[Array, " batch"]
    resident: PyTree = None


class Batch(NamedTuple):
    """Rows of the data and their weights."""

    data: PyTree[Array]
    weight: Float[Array, ""] | Float[Array, " batch"]


class Partition(NamedTuple):
    """A fixed random partition of ``range(size)`` into blocks of ``batch_size``.

    Attributes:
        order: Row numbers in the order of the blocks, padded at the end to whole blocks.
        size: Number of rows.
        batch_size: Rows of a block.
        mesh: Devices to spread the rows of each block over, along the mesh's axis ``"data"``.
    """

    order: np.ndarray
    size: int
    batch_size: int
    mesh: Mesh | None = None

    @classmethod
    def random(cls, size: int, batch_size: int, mesh: Mesh | None = None) -> "Partition":
        """Split ``range(size)`` at random, the same way each time."""
        order = np.random.default_rng(_PARTITION_SEED).permutation(size).astype(np.int32)
        return cls(np.resize(order, -(-size // batch_size) * batch_size), size, batch_size, mesh)

    def lay_out(self, leaf: Any, axis: int = 0) -> Array:
        """A copy of an array in which every block is a contiguous slice along ``axis``.

        With a mesh the axis becomes two, of the blocks and of the rows in each.
        """
        with jax.ensure_compile_time_eval():
            if self.mesh is not None:
                axis %= np.ndim(leaf)
                rows = np.take(np.asarray(leaf), self.order, axis=axis)
                shape = (*rows.shape[:axis], -1, self.batch_size, *rows.shape[axis + 1 :])
                spec = PartitionSpec(*(None,) * (axis + 1), "data")
                return put_global(rows.reshape(shape), NamedSharding(self.mesh, spec))
            if isinstance(leaf, jax.Array):
                return jnp.take(leaf, self.order, axis=axis)
            return jnp.asarray(np.take(np.asarray(leaf), self.order, axis=axis))

    def fetch(self, laid_out: Any, block: Any, axis: int = 0) -> Array:
        """One block of an array that ``lay_out`` made."""
        if self.mesh is not None:
            where = axis if axis >= 0 else axis - 1
            return lax.dynamic_index_in_dim(laid_out, block, where, keepdims=False)
        return block_of(laid_out, block, self.batch_size, axis)

    def rows(self, block: Any) -> Array:
        """Numbers of a block's rows."""
        return block_of(self.order, block, self.batch_size)

    def take(self, laid_out: PyTree) -> Callable[[np.ndarray], Batch]:
        """What gives rows by their numbers, of arrays that ``lay_out`` made."""

        @cache
        def places():
            return np.unique(self.order, return_index=True)[1]

        def take(index):
            where = places()[index]
            if self.mesh is not None:
                where = where // self.batch_size, where % self.batch_size
            return taken(laid_out, where)

        return take


def numbered_rows(index: Any, resident: PyTree = None) -> Rows:
    """The rows with these numbers, each of weight one."""
    block: Any = None if resident is None else np.int32(0)
    return Rows(block, np.asarray(index, np.int32), np.float32(1), resident)  # pyright: ignore


def taken(data: PyTree, index: Any) -> Batch:
    return Batch(jax.tree.map(lambda leaf: leaf[index], data), np.float32(1))  # pyright: ignore
