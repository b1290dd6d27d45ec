"""Observables of frames, and their averages over trajectories."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from stochgrad.core import (
    check_array,
    check_callable,
    check_count,
    check_instance,
    check_number,
    first_line,
    hoisted_jit,
    remembered,
)
from stochgrad.potentials._geometry import as_atoms, as_box, dihedral, displacement, distances

_ROUNDING = 1e-9  # of probabilities: a jackknife takes one from a sum


class Observable(NamedTuple):
    """A function of a frame, on bins.

    Attributes:
        at: Middles of the bins, one array for each axis.
        of_frame: ``(atoms, dim) -> bins``, what is averaged.
    """

    at: tuple[np.ndarray, ...]
    of_frame: Callable[[Float[Array, "atoms dim"]], Float[Array, "..."]]


def rdf(
    box: Any,
    *,
    r_max: float | None = None,
    bins: int = 50,
    species: Any = None,
    pair: tuple[int, int] | None = None,
) -> Observable:
    r"""Radial distribution function in a periodic box, of all atoms or of a pair of species.

    $$g(r) = \frac{V}{N(N-1)/2}\,\frac{\langle n(r)\rangle}{v(r)}, \qquad
      g_{ab}(r) = \frac{V}{N_aN_b}\,\frac{\langle n_{ab}(r)\rangle}{v(r)},$$

    with n(r) pairs in a shell of volume v(r): one at every distance for an ideal gas.

    Args:
        box: Edge lengths, shape (2,) or (3,), or a matrix of lattice vectors in columns.
        r_max: Where to end; half the least width of the box by default.
        bins: Shells of equal width.
        species: Numbers of the atoms' species, shape (atoms,), for a partial function.
        pair: Which two species, which may be the same.

    Raises:
        TypeError: these are no numbers.
        ValueError: ``r_max`` exceeds half the least width, where shells leave the box; there is no
            pair of such atoms. On first use: a frame has another number of atoms than ``species``.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> gas = jax.random.uniform(jax.random.key(0), (2000, 20, 3))
        >>> g = stochgrad.potentials.rdf(jnp.ones(3), bins=5)
        >>> stochgrad.potentials.average(g, gas)[1:].round(1).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    box = check_array("box", box).astype(np.float64)
    if box.shape in ((2, 2), (3, 3)):
        box = np.asarray(as_box(box, len(box)), np.float64)
        volume_of_box = abs(np.linalg.det(box))
        half = float((1 / np.linalg.norm(np.linalg.inv(box), axis=1)).min()) / 2
    else:
        box = _edges(box)
        volume_of_box, half = np.prod(box), float(box.min()) / 2
    bins = check_count("bins", bins)
    r_max = half if r_max is None else check_number("r_max", r_max)
    if r_max > half * (1 + 1e-6):
        raise ValueError(f"r_max must be at most half the shortest edge, {half:g}, got {r_max:g}.")
    pairs = None if species is None and pair is None else _pairs_of(species, pair)
    edges = np.linspace(0.0, r_max, bins + 1)
    volume = np.pi * edges**2 if len(box) == 2 else 4 / 3 * np.pi * edges**3
    share = np.diff(volume) / volume_of_box
    atoms = 2 if species is None else len(species)

    def of_frame(frame):
        _check_frame(frame, (len(box),), atoms=atoms)
        if pairs is not None and len(frame) != atoms:
            raise ValueError(f"species are of {atoms} atoms, and a frame has {len(frame)}.")
        r = distances(frame, pairs, box=jnp.asarray(box, frame.dtype))
        place = jnp.floor(r / frame.dtype.type(edges[1])).astype(jnp.int32)
        counts = jnp.zeros(bins, frame.dtype).at[place].add(1, mode="drop")
        return counts / jnp.asarray(share * r.size, frame.dtype)

    return Observable((_middles(edges),), of_frame)


def _pairs_of(species: Any, pair: Any) -> Any:
    """Numbers of the atoms of each pair of two species, every pair once."""
    if species is None or pair is None:
        missing = "species" if species is None else "pair"
        raise ValueError(f"{missing} is needed too: a partial function is of species and a pair.")
    kinds = check_array("species", species, kind="integer")
    wanted = check_array("pair", pair, kind="integer")
    if kinds.ndim != 1 or wanted.shape != (2,):
        raise ValueError(
            f"species must have shape (atoms,) and pair two numbers, got {kinds.shape} and "
            f"{wanted.tolist()}."
        )
    one, other = np.triu_indices(len(kinds), 1)
    a, b = wanted
    of_pair = ((kinds[one] == a) & (kinds[other] == b)) | ((kinds[one] == b) & (kinds[other] == a))
    if not of_pair.any():
        raise ValueError(f"pair must be of species that there are, got {(int(a), int(b))}.")
    return np.stack([one[of_pair], other[of_pair]], 1)


def adf(box: Any = None, *, cutoff: float, bins: int = 60) -> Observable:
    r"""Angles between neighbors: how many an atom has, per radian.

    The number of triples i, j, k with both distances to j below the cut-off, by the angle at j,
    over the number of atoms and the width of a bin. Divided by its integral it is the usual
    angular distribution function.

    Args:
        box: Edge lengths, or None.
        cutoff: How far a neighbor may be.
        bins: Bins of equal width on $(0, \pi)$.

    Raises:
        ValueError: the cut-off exceeds half the shortest edge.
    """
    cutoff, bins = check_number("cutoff", cutoff), check_count("bins", bins)
    if box is not None:
        box = _edges(box)
        if cutoff > box.min() / 2:
            raise ValueError(
                f"cutoff must be at most half the shortest edge, {box.min() / 2:g}, got {cutoff:g}."
            )
    edges = np.linspace(0.0, np.pi, bins + 1)

    dims = (2, 3) if box is None else (len(box),)

    def of_frame(frame):
        _check_frame(frame, dims, atoms=1)
        atoms = frame.shape[0]
        one, other = jnp.triu_indices(atoms, 1)
        edge = None if box is None else jnp.asarray(box, frame.dtype)

        def about(center):
            delta = displacement(jnp.broadcast_to(center, frame.shape), frame, edge)
            r = jnp.sqrt(jnp.sum(delta**2, -1))
            near = (r > 0) & (r < cutoff)
            unit = delta / jnp.where(near, r, 1)[:, None]
            theta = jnp.arccos(jnp.clip(jnp.sum(unit[one] * unit[other], -1), -1, 1))
            place = jnp.minimum(theta / frame.dtype.type(edges[1]), bins - 1).astype(jnp.int32)
            counted = (near[one] & near[other]).astype(frame.dtype)
            return jnp.zeros(bins, frame.dtype).at[place].add(counted)

        return jnp.sum(lax.map(about, frame), 0) / frame.dtype.type(atoms * edges[1])

    return Observable((_middles(edges),), of_frame)


def dihedrals(*atoms: Any, bins: int = 24, box: Any = None) -> Observable:
    r"""Probability of the bins of one dihedral, or of two: a Ramachandran map.

    Args:
        atoms: One or two times four numbers of atoms.
        bins: Bins on $(-\pi, \pi)$ of each.
        box: As in ``displacement``.

    Raises:
        ValueError: there are not one or two dihedrals of four atoms each. On first use: a frame
            does not have these atoms.
    """
    if len(atoms) not in (1, 2) or any(np.shape(four) != (4,) for four in atoms):
        raise ValueError(f"atoms: one or two times four atoms are needed, got {atoms}.")
    quadruples = as_atoms("atoms", atoms, 4)
    numbers = np.asarray(quadruples)
    if any(len(set(four)) < 4 for four in numbers.tolist()):
        raise ValueError(f"atoms of a dihedral must be four different ones, got {atoms}.")
    bins = check_count("bins", bins)
    if box is not None:
        box = np.asarray(as_box(box, 3))
    middles = _middles(np.linspace(-np.pi, np.pi, bins + 1))

    def of_frame(frame):
        _check_frame(frame, (3,), atoms=int(numbers.max()) + 1)
        turns = dihedral(frame, quadruples, box) / frame.dtype.type(2 * np.pi)
        place = jnp.clip(jnp.floor((turns + 0.5) * bins).astype(jnp.int32), 0, bins - 1)
        one = jax.nn.one_hot(place, bins, dtype=frame.dtype)
        return one[0] if len(quadruples) == 1 else jnp.outer(one[0], one[1])

    return Observable((middles,) * len(quadruples), of_frame)


def average(observable: Observable, positions: Any, weights: Any = None) -> np.ndarray:
    """Average of an observable over the frames of each trajectory.

    Args:
        observable: What to average.
        positions: Shape (..., frames, atoms, dim), as ``Trajectories.positions`` have.
        weights: Of the frames, shape (..., frames), which need not add up to one; all alike if
            left out.

    Returns:
        Shape (..., bins); NaN for a trajectory whose weights are all zero.

    Raises:
        TypeError: the observable is none, or these are no arrays of numbers.
        ValueError: a shape does not fit, a frame is not finite, a weight is negative, or the
            observable fails on a frame or is not of the shape of its bins.
    """
    array = check_array("positions", positions, finite=False)
    if array.ndim < 3 or 0 in array.shape:
        raise ValueError(f"positions must have shape (..., frames, atoms, dim), got {array.shape}.")
    bad = ~np.isfinite(array).all((-1, -2))
    if bad.any():
        *trajectory, frame = map(int, np.argwhere(bad)[0])
        of = f" of trajectory {tuple(trajectory)}" if trajectory else ""
        raise ValueError(f"positions must be finite, but frame {frame}{of} holds NaN or infinity.")
    positions = jnp.asarray(array)
    if positions.dtype.kind != "f":
        positions = positions.astype(jnp.result_type(float))
    lead, frames = positions.shape[:-3], positions.shape[-3]
    w = np.ones((*lead, frames))
    if weights is not None:
        w = check_array("weights", weights).astype(np.float64)
    if w.shape != (*lead, frames):
        raise ValueError(f"weights must have shape {(*lead, frames)}, got {w.shape}.")
    if np.any(w < 0):
        raise ValueError(f"weights must not be negative, got {w.min():g}.")
    flat = positions.reshape(-1, *positions.shape[-3:])
    check_observable("observable", observable, flat[0, 0])
    with np.errstate(invalid="ignore"):
        w = jnp.asarray(w / w.sum(-1, keepdims=True), positions.dtype)
    found = np.asarray(_averages(observable.of_frame)(flat, w.reshape(-1, frames)))
    return found.reshape(*lead, *found.shape[1:]).astype(np.float64)


def check_observable(name: str, observable: Any, frame: Any) -> None:
    """Raise unless an observable gives numbers, of the shape of its bins, of such a frame.

    Raises:
        TypeError: it is no observable.
        ValueError: it fails on the frame, or returns something else.
    """
    check_instance(name, observable, Observable, "a stochgrad.potentials.Observable")
    check_callable(f"{name}.of_frame", observable.of_frame, "a function of a frame")
    frame = jnp.asarray(frame)
    frame = frame if frame.dtype.kind == "f" else frame.astype(jnp.result_type(float))
    try:
        hash(observable.of_frame)
        out = jax.eval_shape(lambda x: observable.of_frame(x), frame)
    except Exception as error:
        raise ValueError(
            f"{name} fails on a frame of shape {frame.shape}: {first_line(error)}."
        ) from error
    dtype = getattr(out, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or dtype.kind == "b"):
        raise ValueError(f"{name} must return one array of numbers of a frame, got {out}.")
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{name} must return real numbers, got {dtype}.")
    try:
        bins = tuple(len(np.atleast_1d(axis)) for axis in observable.at)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}.at must be a tuple of arrays, one for each axis.") from error
    if out.shape != bins:
        raise ValueError(
            f"{name} must have one number for each of its bins, shape {bins} by its 'at', got "
            f"shape {out.shape}."
        )


def _edges(box: Any) -> np.ndarray:
    """The edge lengths of a box of two or three dimensions."""
    edges = check_array("box", box).astype(np.float64)
    if edges.shape not in ((2,), (3,)) or not np.all(edges > 0):
        raise ValueError(f"box must be two or three positive edge lengths, got {edges.tolist()}.")
    return edges


@remembered
def _averages(of_frame: Callable):
    @hoisted_jit
    def over_trajectories(flat, weights):
        first = jax.eval_shape(of_frame, flat[0, 0])
        dtype = first.dtype if jnp.issubdtype(first.dtype, jnp.floating) else flat.dtype

        def one(trajectory):
            frames, w = trajectory

            def add(total, x):
                return total + x[1] * jnp.asarray(of_frame(x[0])).astype(dtype), None

            return lax.scan(add, jnp.zeros(first.shape, dtype), (frames, w.astype(dtype)))[0]

        return lax.map(one, (flat, weights), batch_size=min(8, len(flat)))

    return over_trajectories


def free_energy(probability: Any, kT: float = 1.0, *, floor: float = 0.0) -> np.ndarray:
    r"""Free energy of bins, $F = -k_BT\log p$.

    Args:
        probability: p of the bins.
        kT: $k_BT$, for the unit.
        floor: The least probability that can be told from zero: what is below counts as that much.

    Raises:
        TypeError: these are no numbers.
        ValueError: a probability is negative or not finite, or a number out of range.
    """
    kT, floor = check_number("kT", kT), check_number("floor", floor, zero=True)
    p = check_array("probability", probability).astype(np.float64)
    if np.any(p < -_ROUNDING * np.max(np.abs(p), initial=0)):
        raise ValueError(f"probability must not be negative, got {p.min():g}.")
    with np.errstate(divide="ignore"):
        return -kT * np.log(np.maximum(p, floor))


def _check_frame(frame, dims: tuple[int, ...], atoms: int) -> None:
    if frame.ndim != 2 or frame.shape[1] not in dims or frame.shape[0] < atoms:
        dim = " or ".join(map(str, dims))
        raise ValueError(
            f"it needs a shape (atoms, {dim}) of {atoms} atoms at least, got {frame.shape}."
        )


def _middles(edges: np.ndarray) -> np.ndarray:
    return (edges[1:] + edges[:-1]) / 2
