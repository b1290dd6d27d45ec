"""Lists of neighbors: which atoms, or images of atoms, are within a cut-off of which."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int


class Neighbors(NamedTuple):
    """Pairs of atoms within a cut-off, each in both directions, padded to one length.

    Attributes:
        senders: The neighbor of each pair, shape (..., pairs); zero for padding.
        receivers: The atom that it is a neighbor of, likewise.
        shifts: Lattice vectors between the neighbor and the image of it that is meant, whole
            numbers of shape (..., pairs, dim).
        mask: Which pairs there are; the others are padding.
        cutoff: The cut-off, shape (...).
    """

    senders: Int[ArrayLike, "... pairs"]
    receivers: Int[ArrayLike, "... pairs"]
    shifts: Int[ArrayLike, "... pairs dim"]
    mask: Bool[ArrayLike, "... pairs"]
    cutoff: Float[ArrayLike, "..."]


def pair_vectors(
    positions: Float[Array, "atoms dim"],
    neighbors: Neighbors,
    box: Float[Array, "..."] | None = None,
) -> Float[Array, "pairs dim"]:
    r"""Vectors from atoms to their neighbors, the box's lattice vectors among them.

    $$\Delta_{ij} = r_j + L s_{ij} - r_i.$$

    A pair that is padding is two cut-offs long and depends on nothing, so that whatever ends at the
    cut-off leaves it out; sums of what does not end there take ``neighbors.mask``.

    Args:
        positions: Where the atoms are.
        neighbors: Of one configuration.
        box: As in ``stochgrad.potentials.displacement``, where the list was made in one.

    Raises:
        TypeError: it is no list of neighbors.

    Example:
        >>> import numpy as np, stochgrad
        >>> from stochgrad import potentials
        >>> at = np.array([[[0.1, 0.0, 0.0], [0.9, 0.0, 0.0]]])
        >>> data = potentials.configurations(at, at, box=np.ones(3)).with_neighbors(0.5)
        >>> one = potentials.Neighbors(*(x[0] for x in data.neighbors))
        >>> vectors = potentials.pair_vectors(at[0], one, np.ones(3))[one.mask]
        >>> np.asarray(vectors, float).round(1).tolist()
        [[-0.2, 0.0, 0.0], [0.2, 0.0, 0.0]]
    """
    if not isinstance(neighbors, Neighbors):
        raise TypeError(
            "neighbors must be stochgrad.potentials.Neighbors, as configurations' with_neighbors "
            f"makes them, got {type(neighbors).__name__}."
        )
    positions = jnp.asarray(positions)
    senders, receivers = jnp.asarray(neighbors.senders), jnp.asarray(neighbors.receivers)
    delta = positions[senders] - positions[receivers]
    if box is not None:
        box = jnp.asarray(box, positions.dtype)
        shifts = jnp.asarray(neighbors.shifts).astype(positions.dtype)
        delta = delta + (shifts @ box.T if box.ndim == 2 else shifts * box[None])
    far = jnp.zeros(delta.shape[-1], delta.dtype).at[0].set(2)
    far = far * jnp.asarray(neighbors.cutoff).astype(delta.dtype)
    return jnp.where(jnp.asarray(neighbors.mask)[:, None], delta, far[None])


def neighbor_lists(positions: Any, cutoff: float, box: Any, mask: Any) -> Neighbors:
    """Lists of neighbors of many configurations, padded to the longest."""
    count, atoms, dim = positions.shape
    lists = []
    for n in range(count):
        there = np.arange(atoms) if mask is None else np.flatnonzero(mask[n])
        own = None if box is None else box if box.ndim == 1 else box[n]
        i, j, shifts = _pairs(positions[n, there].astype(np.float64), cutoff, own)
        lists.append((there[j], there[i], shifts))
    longest = max(1, *(len(one[0]) for one in lists))
    senders = np.zeros((count, longest), np.int32)
    receivers = np.zeros_like(senders)
    shifts = np.zeros((count, longest, dim), np.int32)
    known = np.zeros(senders.shape, bool)
    for n, (j, i, s) in enumerate(lists):
        pairs = len(j)
        senders[n, :pairs], receivers[n, :pairs], shifts[n, :pairs] = j, i, s
        known[n, :pairs] = True
    return Neighbors(senders, receivers, shifts, known, np.full(count, cutoff, positions.dtype))


def count_pairs(points: np.ndarray, cutoff: float, box: Any) -> int:
    """How many pairs there are within a cut-off, each counted in both directions."""
    return len(_pairs(points, cutoff, box)[0])


def _pairs(points: np.ndarray, cutoff: float, box: Any):
    """Pairs i, j with the images of j within the cut-off of i, ordered by i."""
    from scipy.spatial import KDTree

    atoms, dim = points.shape
    if box is None:
        pairs = KDTree(points).query_pairs(cutoff, output_type="ndarray").reshape(-1, 2)
        pairs = np.concatenate([pairs, pairs[:, ::-1]])
        pairs = pairs[np.lexsort(pairs.T[::-1])]
        return pairs[:, 0], pairs[:, 1], np.zeros((len(pairs), dim), int)
    matrix = np.asarray(np.diag(box) if box.ndim == 1 else box, np.float64)
    inverse = np.linalg.inv(matrix)
    whole = np.floor(points @ inverse.T).astype(int)
    inside = points - whole @ matrix.T
    reach = np.ceil(cutoff * np.linalg.norm(inverse, axis=1)).astype(int)
    steps = np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij")
    shifts = np.stack(steps, -1).reshape(-1, dim)
    images = (inside[None] + (shifts @ matrix.T)[:, None]).reshape(-1, dim)
    low, high = inside.min(0) - cutoff, inside.max(0) + cutoff
    near = np.flatnonzero(((images >= low) & (images <= high)).all(1))
    found = KDTree(inside).sparse_distance_matrix(
        KDTree(images[near]), cutoff, output_type="coo_matrix"
    )
    i, image = found.row, near[found.col]
    j, shift = image % atoms, shifts[image // atoms]
    itself = (i == j) & ~shift.any(1)
    i, j, shift = i[~itself], j[~itself], shift[~itself]
    order = np.lexsort((*shift.T, j, i))
    i, j, shift = i[order], j[order], shift[order]
    return i, j, shift + whole[i] - whole[j]
