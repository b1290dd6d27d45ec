"""Small helpers on pytrees, and the mark for what chains have in common."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, PyTree, Scalar


@jax.tree_util.register_pytree_node_class
class Shared:
    """Marks a part of a kernel's state that all chains have in common.

    The loop gives one copy of it to every chain and never batches it, so that what is computed
    from it alone is computed once: a shared minibatch turns the gradients of many chains into one
    matrix product. It must advance by itself, never by anything that belongs to a chain.

    Args:
        value: Any pytree.
        optional: Whether chains may also hold one each; then ``sample(..., share_batches=)`` says.
    """

    def __init__(self, value: Any, optional: bool = False):
        self.value = value
        self.optional = optional

    def tree_flatten(self):
        return (self.value,), self.optional

    @classmethod
    def tree_unflatten(cls, optional, children):
        return cls(children[0], optional)

    def __repr__(self) -> str:
        return f"Shared({self.value!r}, optional={self.optional})"


@jax.tree_util.register_pytree_node_class
class HostProvided(Shared):
    """Shared, and never changed by a step: the loop alone puts it in, between chunks.

    It is taken out of the states that the loop carries, saves and gives back.
    """


def insert_resident(state: PyTree, value: Any) -> PyTree:
    """Put a value into the empty places that ``strip`` left."""
    return _at_constants(state, HostProvided(value))


def remove_resident(state: PyTree) -> PyTree:
    """Take what is constant out of a state."""
    return _at_constants(state, HostProvided(None))


def _at_constants(state, constant):
    return jax.tree.map(
        lambda node: constant if isinstance(node, HostProvided) else node,
        state,
        is_leaf=lambda node: isinstance(node, HostProvided),
    )


def is_shared(node: Any) -> bool:
    return isinstance(node, Shared)


def shared_axes(state: PyTree, share_optional: bool) -> PyTree:
    """The ``in_axes`` of a state: None at what is shared, 0 elsewhere."""

    def axis(node):
        return None if is_shared(node) and (share_optional or not node.optional) else 0

    return jax.tree.map(axis, state, is_leaf=is_shared)


def own_parts(state: PyTree, share_optional: bool) -> list[bool]:
    """For each leaf of a state, a ``Shared`` node being one, whether every chain has its own."""
    return [
        not (is_shared(part) and (share_optional or not part.optional))
        for part in jax.tree.leaves(state, is_leaf=is_shared)
    ]


def share_first(state: PyTree, share_optional: bool) -> PyTree:
    """Keep the first chain's copy of what is shared in a state that has a leading chain axis."""

    def keep(node):
        if is_shared(node) and (share_optional or not node.optional):
            return jax.tree.map(lambda leaf: leaf[0], node)
        return node

    return jax.tree.map(keep, state, is_leaf=is_shared)


def block_of(array: Any, block: Any, size: int, axis: int = 0) -> Array:
    """Rows ``block * size`` to ``(block + 1) * size`` of an array, along an axis."""
    return lax.dynamic_slice_in_dim(array, block * size, size, axis)


def tree_size(tree: PyTree) -> int:
    """Number of scalars in a tree."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: PyTree) -> int:
    """Bytes that the arrays of a tree, or their shapes, take; a key counts as eight."""
    return sum(
        math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8) for leaf in jax.tree.leaves(tree)
    )


def tree_dot(a: PyTree, b: PyTree) -> Scalar:
    """Inner product of two trees of one structure."""
    parts = jax.tree.leaves(jax.tree.map(lambda x, y: jnp.vdot(x, y), a, b))
    return jax.tree.reduce(jnp.add, parts)


def tree_isfinite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number in a tree is finite."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jax.tree.reduce(jnp.logical_and, finite)


def at_least_float32(dtype: Any) -> Any:
    """The type itself, or float32 where it is narrower."""
    return dtype if dtype.itemsize > 4 else jnp.dtype(jnp.float32)


def ravel_draws(positions: PyTree) -> np.ndarray:
    """Leaves of shape (chain, draw, ...) as one array (chain, draw, d), in double precision."""
    parts = [np.asarray(x, np.float64) for x in jax.tree.leaves(positions)]
    return np.concatenate([x.reshape(*x.shape[:2], -1) for x in parts], axis=2)
