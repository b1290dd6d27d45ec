"""Lists of neighbors that are made on the device, from cells, as atoms move."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from stochgrad.core import check_array, check_number
from stochgrad.potentials._geometry import as_box
from stochgrad.potentials._neighbors import Neighbors, count_pairs

_ROOM = 1.25
"""Room in a list, over the longest at the start."""


class ListPlan(NamedTuple):
    """How lists of neighbors are made for some number of atoms: what the compiler has to know.

    Attributes:
        cutoff: How far a neighbor may be.
        skin: How much farther the pairs of a list may be.
        pairs: Length of a list.
        grid: Cells along each lattice vector, or axis.
        per_cell: How many atoms a cell may hold.
        shifts: Images that are looked at where the box is too narrow for cells, or None.
        box: Lattice vectors in columns, or None, as tuples.
    """

    cutoff: float
    skin: float
    pairs: int
    grid: tuple[int, ...]
    per_cell: int
    shifts: tuple[tuple[int, ...], ...] | None
    box: tuple[tuple[float, ...], ...] | None

    @property
    def reach(self) -> float:
        """How far the pairs of a list may be."""
        return self.cutoff + self.skin


class Lists(NamedTuple):
    """Lists of neighbors of moving atoms, with any leading axes.

    Attributes:
        neighbors: The pairs.
        origin: Where the atoms were when the list was made.
        overflow: Whether there were more pairs, or atoms in a cell, than there is room for.
    """

    neighbors: Neighbors
    origin: Float[Array, "*batch atoms dim"]
    overflow: Bool[Array, "*batch"]


def plan_lists(
    positions: Any, cutoff: float, skin: float | None = None, *, box: Any = None
) -> ListPlan:
    """A plan for lists of neighbors, with room for those of some frames and a quarter more.

    Args:
        positions: Frames, shape (frames, atoms, dim).
        cutoff: How far a neighbor may be.
        skin: How much farther the pairs of a list may be; a fifth of the cut-off if None.
        box: Edge lengths, a matrix of lattice vectors in columns, or None.

    Raises:
        TypeError: these are no numbers.
        ValueError: a number is not positive, or a shape does not fit.

    Example:
        >>> import numpy as np, stochgrad
        >>> at = np.stack(np.meshgrid(*[np.arange(6.0)] * 3), -1).reshape(1, -1, 3)
        >>> plan = stochgrad.potentials.plan_lists(at, 1.1, 0.2, box=np.full(3, 6.0))
        >>> plan.grid, plan.pairs
        ((4, 4, 4), 1664)
    """
    cutoff = check_number("cutoff", cutoff)
    skin = 0.2 * cutoff if skin is None else check_number("skin", skin, zero=True)
    positions = check_array("positions", positions).astype(np.float64)
    if positions.ndim != 3 or 0 in positions.shape:
        raise ValueError(f"positions must have shape (frames, atoms, dim), got {positions.shape}.")
    dim, reach = positions.shape[-1], cutoff + skin
    if box is not None:
        box = np.asarray(as_box(box, dim), np.float64)
    pairs = max(count_pairs(frame, reach, box) for frame in positions)
    if box is None:
        matrix, shifts = None, None
        extent = np.ptp(positions.reshape(-1, dim), axis=0)
        grid = np.maximum(np.ceil(extent / reach).astype(int) + 1, 3)
    else:
        matrix = np.diag(box) if box.ndim == 1 else box
        widths = 1 / np.linalg.norm(np.linalg.inv(matrix), axis=1)
        grid = np.floor(widths / reach).astype(int)
        shifts = None
        if grid.min() < 3:
            steps = [np.arange(-n, n + 1) for n in np.ceil(reach / widths).astype(int)]
            shifts = np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, dim)
    plan = ListPlan(
        float(cutoff),
        float(skin),
        64 * int(np.ceil((_ROOM * pairs + 1) / 64)),
        tuple(map(int, grid)),
        1,
        None if shifts is None else tuple(map(tuple, shifts.tolist())),
        None if matrix is None else tuple(map(tuple, matrix.tolist())),
    )
    if plan.shifts is not None:
        return plan
    crowd = 0
    for frame in positions:
        cells = np.asarray(_cells(plan, frame, np)[0])
        crowd = max(crowd, np.bincount(cells).max())
    return plan._replace(per_cell=int(np.ceil(_ROOM * crowd)) + 2)


def with_room(plan: ListPlan, frames: Any) -> ListPlan:
    """The plan with room for the list of every frame, shape (..., atoms, dim).

    Raises:
        ValueError: a frame's list cannot be held, as atoms lie on each other.
    """
    of_all = jax.jit(lambda frames, plan: make_lists(plan, frames).overflow, static_argnums=1)
    for _ in range(8):
        if not np.any(of_all(frames, plan)):
            return plan
        plan = plan._replace(pairs=2 * plan.pairs, per_cell=2 * plan.per_cell)
    raise ValueError(f"positions: a frame has more than {plan.pairs} pairs within the cut-off.")


def make_lists(plan: ListPlan, positions: Float[Array, "*batch atoms dim"]) -> Lists:
    """Lists of neighbors at positions with any leading axes."""
    lead = positions.shape[:-2]
    flat = positions.reshape(-1, *positions.shape[-2:])
    neighbors, overflow = lax.map(lambda frame: _make_one(plan, frame), flat)
    neighbors = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), neighbors)
    return Lists(neighbors, positions, overflow.reshape(lead))


def refresh(
    plan: ListPlan,
    positions: Float[Array, "*batch atoms dim"],
    lists: Lists,
    travel: Float[Array, "*batch"],
) -> Lists:
    """Lists that hold until the next step: made again where an atom may leave half the skin.

    All chains and replicas make theirs again together, so that a loop over many of them does not
    make lists at every step.

    Args:
        plan: Their plan.
        positions: Where the atoms are.
        lists: Their lists.
        travel: How far an atom may go in a step, of each.
    """

    @custom_vmap
    def of_all(positions, lists, travel):
        moved = jnp.sqrt(jnp.max(jnp.sum((positions - lists.origin) ** 2, -1), -1))
        due = jnp.any(2 * (moved + travel) > plan.skin)
        return lax.cond(due, lambda: make_lists(plan, positions), lambda: lists)

    @of_all.def_vmap
    def _(size, batched, positions, lists, travel):
        def with_axis(x, has):
            return x if has else jnp.broadcast_to(x, (size, *x.shape))

        args = jax.tree.map(with_axis, (positions, lists, travel), tuple(batched))
        out = of_all(*args)
        return out, jax.tree.map(lambda _: True, out)

    return of_all(positions, lists, travel)


def _cells(plan: ListPlan, positions: Any, xp: Any) -> tuple[Any, Any, Any]:
    """The number of each atom's cell, its own lattice vectors, and where it is without them."""
    grid = xp.asarray(plan.grid, np.int32)
    if plan.box is None:
        whole = xp.zeros(positions.shape, grid.dtype)
        place = xp.mod(xp.floor(positions / plan.reach).astype(grid.dtype), grid[None])
        inside = positions
    else:
        lattice = np.asarray(plan.box).T
        fractional = positions @ np.linalg.inv(lattice).astype(positions.dtype)
        floor = xp.floor(fractional)
        place = xp.floor((fractional - floor) * grid[None].astype(positions.dtype))
        place = xp.minimum(place.astype(grid.dtype), grid[None] - 1)
        inside = positions - floor @ lattice.astype(positions.dtype)
        whole = floor.astype(grid.dtype)
    return place @ _strides(plan.grid), whole, inside


def _strides(grid: tuple[int, ...]) -> np.ndarray:
    return np.cumprod([1, *grid[:-1]]).astype(np.int32)


def _around(plan: ListPlan) -> tuple[np.ndarray, np.ndarray]:
    """The cells around each cell, (cells, near), and the lattice vectors to them."""
    dim = len(plan.grid)
    if plan.shifts is not None:
        images = np.asarray(plan.shifts, np.int32)[None]
        return np.zeros(images.shape[:2], np.int32), images
    grid = np.asarray(plan.grid)
    cells = np.stack(np.meshgrid(*map(np.arange, plan.grid), indexing="ij"), -1)
    cells = cells.reshape(-1, 1, dim)[np.argsort(cells.reshape(-1, dim) @ _strides(plan.grid))]
    steps = np.stack(np.meshgrid(*[[-1, 0, 1]] * dim, indexing="ij"), -1).reshape(1, -1, dim)
    wrapped = np.mod(cells + steps, grid)
    turns = (cells + steps - wrapped) // grid if plan.box is not None else 0 * (cells + steps)
    return (wrapped @ _strides(plan.grid)).astype(np.int32), turns.astype(np.int32)


def _make_one(plan: ListPlan, positions: Float[Array, "atoms dim"]) -> tuple[Neighbors, Any]:
    """A list, and whether there was no room for it: distances cell by cell, packed."""
    atoms, dim = positions.shape
    near, turns = _around(plan)
    cell, whole, inside = _cells(plan, positions, jnp)
    if plan.shifts is None:
        table, crowded = _table(cell, len(near), plan.per_cell)
    else:
        table, crowded = jnp.arange(atoms, dtype=jnp.int32)[None], jnp.zeros((), bool)
    nowhere = jnp.full((1, dim), jnp.nan, positions.dtype)  # no distance from it is below another
    at = jnp.concatenate([inside, nowhere])[table]
    steps = jnp.zeros((*turns.shape[:2], dim), positions.dtype)
    if plan.box is not None:
        steps = steps + turns.astype(positions.dtype) @ np.asarray(plan.box).T.astype(
            positions.dtype
        )
    others = at[near] + steps[:, :, None]
    square = sum(
        (others[:, None, :, :, axis] - at[:, :, None, None, axis]) ** 2 for axis in range(dim)
    )
    itself = np.asarray((near == np.arange(len(near))[:, None]) & ~turns.any(-1))
    same = np.eye(table.shape[1], dtype=bool)
    close = (square < plan.reach**2) & ~(
        jnp.asarray(itself)[:, None, :, None] & same[None, :, None]
    )
    chosen, count = _set_bits(close.ravel(), plan.pairs)
    mask = jnp.arange(plan.pairs, dtype=jnp.int32) < count
    c, a, o, b = jnp.unravel_index(chosen, close.shape)
    i, j = table[c, a], table[jnp.asarray(near)[c, o], b]
    i, j = jnp.where(mask, i, 0), jnp.where(mask, j, 0)
    shifts = jnp.asarray(turns)[c, o] + whole[i] - whole[j]
    found = Neighbors(
        j,
        i,
        jnp.where(mask[:, None], shifts, 0),
        mask,
        jnp.asarray(plan.cutoff, positions.dtype),
    )
    return found, crowded | (count > plan.pairs)


def _table(cell: Int[Array, " atoms"], cells: int, room: int) -> tuple[Array, Array]:
    """The atoms of each cell, (cells, room), and whether a cell has no room for all of its own."""
    atoms = len(cell)
    order = jnp.argsort(cell).astype(jnp.int32)
    ranked = cell[order]
    slot = jnp.arange(atoms) - jnp.searchsorted(ranked, ranked)
    table = jnp.full((cells, room), atoms, jnp.int32)
    return table.at[ranked, slot].set(order, mode="drop"), jnp.max(slot) >= room


def _set_bits(flags: Bool[Array, " n"], size: int) -> tuple[Int[Array, " size"], Int[Array, ""]]:
    """Where the first ``size`` true ones are, and how many there are: ``jnp.nonzero``, faster.

    Flags are packed into words, so that only words are summed up and searched.
    """
    words = jnp.pad(flags, (0, -len(flags) % 32)).reshape(-1, 32)
    bits = jnp.left_shift(jnp.uint32(1), jnp.arange(32, dtype=jnp.uint32))
    words = jnp.sum(jnp.where(words, bits[None], jnp.uint32(0)), -1, dtype=jnp.uint32)
    sums = jnp.cumsum(lax.population_count(words).astype(jnp.int32))
    rank = jnp.arange(size, dtype=jnp.int32)
    word = jnp.minimum(jnp.searchsorted(sums, rank, side="right"), len(words) - 1)
    left = rank - jnp.where(word > 0, sums[word - 1], 0)
    rest, place = words[word], jnp.zeros(size, jnp.int32)
    for width in (16, 8, 4, 2, 1):
        low = lax.population_count(rest & jnp.uint32(2**width - 1)).astype(jnp.int32)
        beyond = left >= low
        left = jnp.where(beyond, left - low, left)
        rest = jnp.where(beyond, rest >> jnp.uint32(width), rest)
        place = jnp.where(beyond, place + width, place)
    return word.astype(jnp.int32) * 32 + place, sums[-1]
