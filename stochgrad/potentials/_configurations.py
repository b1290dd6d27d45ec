"""Reference configurations: what forces were computed for, checked once."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Configurations(NamedTuple):
    """Configurations of atoms, and the forces, energies and virials of a reference.

    Attributes:
        positions: Shape (N, atoms, dim).
        forces: Likewise.
        energies: Shape (N,), or None.
        virials: Shape (N, dim) or (N, dim, dim), or None.
        species: Number of each atom's species, shape (atoms,) or (N, atoms), or None.
        box: Edge lengths, shape (dim,) or (N, dim), or matrices of lattice vectors in columns,
            shape (N, dim, dim), or None.
        mask: Which atoms there are, shape (N, atoms), where configurations differ in size.
        graph: Further arrays that the energy function takes by name, one row a configuration.
    """

    positions: Float[np.ndarray, "N atoms dim"]
    forces: Float[np.ndarray, "N atoms dim"]
    energies: Float[np.ndarray, " N"] | None = None
    virials: Float[np.ndarray, "..."] | None = None
    species: Int[np.ndarray, "..."] | None = None
    box: Float[np.ndarray, "..."] | None = None
    mask: Bool[np.ndarray, "N atoms"] | None = None
    graph: dict[str, Any] = {}

    def __getitem__(self, rows: Any) -> "Configurations":
        """Some of the configurations."""
        chosen = {name: array[rows] for name, array in self._of_each().items()}
        graph = {name: array[rows] for name, array in self.graph.items()}
        return self._replace(**chosen, graph=graph)

    @property
    def count(self) -> int:
        """How many there are, N."""
        return len(self.positions)

    def inputs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the energy function takes beside positions: one row each, and what all share."""
        named = {"species": self.species, "box": self.box, "mask": self.mask}
        given = {name: value for name, value in named.items() if value is not None}
        each = {name: value for name, value in given.items() if name in self._of_each()}
        return {**each, **self.graph}, {k: v for k, v in given.items() if k not in each}

    def _of_each(self) -> dict[str, Any]:
        """The fields that have a row for each configuration."""
        shared = {"graph"}
        if self.species is not None and self.species.ndim == 1:
            shared.add("species")
        if self.box is not None and self.box.ndim == 1:
            shared.add("box")
        values = self._asdict()
        return {k: v for k, v in values.items() if v is not None and k not in shared}


def configurations(
    positions: Any,
    forces: Any,
    *,
    energies: Any = None,
    virials: Any = None,
    species: Any = None,
    box: Any = None,
    mask: Any = None,
    cutoff: float | None = None,
    **graph: Any,
) -> Configurations:
    r"""Check reference data, and put them together.

    Any consistent units will do: forces are energy over length, virials energies.

    Args:
        positions: Shape (N, atoms, dim).
        forces: Likewise.
        energies: Total energies, shape (N,).
        virials: $W = -\partial U/\partial\varepsilon$ at $r \to (1+\varepsilon)r$, the box strained
            along with the atoms: shape (N, dim) for the diagonal, (N, dim, dim) for all of it
            (which needs a box of matrices, or none).
        species: Numbers of the atoms' species from 0 on, shape (atoms,) or (N, atoms).
        box: Edge lengths, shape (dim,) or (N, dim), or lattice vectors as the columns of matrices,
            shape (N, dim, dim).
        mask: Which atoms there are, shape (N, atoms), if configurations are padded to one size.
        cutoff: Where interactions end; a box has to be twice as wide.
        graph: Further arrays for the energy function, one row for each configuration: neighbours,
            charges, features.

    Raises:
        ValueError: shapes do not fit; a number is not finite (its configuration is named); two
            atoms of one configuration lie on each other; the box is too small for the cut-off.

    Example:
        >>> import numpy as np, stochgrad
        >>> frames = np.random.default_rng(0).normal(size=(5, 3, 3))
        >>> stochgrad.potentials.configurations(frames, -frames).count
        5
    """
    positions, forces = _as_floats(positions), _as_floats(forces)
    if positions.ndim != 3 or 0 in positions.shape:
        raise ValueError(
            "positions must have shape (configurations, atoms, dimensions) and not be empty, "
            f"got {positions.shape}."
        )
    if forces.shape != positions.shape:
        raise ValueError(
            f"forces must have the shape of positions, {positions.shape}, got {forces.shape}."
        )
    count, atoms, dim = positions.shape
    optional = {
        "energies": (energies, [(count,)]),
        "virials": (virials, [(count, dim), (count, dim, dim)]),
        "species": (species, [(atoms,), (count, atoms)]),
        "box": (box, [(dim,), (count, dim), (count, dim, dim)]),
        "mask": (mask, [(count, atoms)]),
    }
    given = {}
    for name, (value, shapes) in optional.items():
        given[name] = None if value is None else np.asarray(value)
        if value is not None and given[name].shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must have shape {wanted}, got {given[name].shape}.")
    for name, value in graph.items():
        if np.shape(value)[:1] != (count,):
            raise ValueError(
                f"{name} must have a row for each of the {count} configurations, got shape "
                f"{np.shape(value)}; close over what all have in common."
            )
    if given["mask"] is not None:
        given["mask"] = given["mask"].astype(bool)
        empty = np.flatnonzero(~given["mask"].any(1))
        if len(empty):
            raise ValueError(f"mask leaves no atoms in configuration {empty[0]}.")
    if given["box"] is not None:
        given["box"] = _as_floats(given["box"])
    given["species"] = _checked_species(given["species"])
    for name, value in {"positions": positions, "forces": forces, **given}.items():
        if value is not None and value.dtype.kind == "f":
            _refuse_unless_finite(name, value, count, given["mask"])
    if given["mask"] is not None:  # padding may hold anything, and counts for nothing
        there = given["mask"][..., None]
        positions = np.where(np.isfinite(positions), positions, 0)
        forces = np.where(there, forces, 0)
    _check_box(given["box"], given["virials"], cutoff)
    _refuse_overlap(positions, given["mask"], given["box"])
    graph = {name: np.asarray(value) for name, value in graph.items()}
    return Configurations(positions, forces, **given, graph=graph)


def _as_floats(array):
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.kind in "iub" else array


def _checked_species(species):
    if species is None:
        return None
    if species.dtype.kind not in "iu" or species.min() < 0:
        raise ValueError(
            f"species must be integers from 0 on, got {species.dtype} of least {species.min()}."
        )
    return species.astype(np.int32)


def _refuse_unless_finite(name, value, count, mask) -> None:
    bad = ~np.isfinite(value)
    if mask is not None and name in ("positions", "forces"):
        bad &= mask[..., None]
    if not bad.any():
        return
    if len(value) != count:
        raise ValueError(f"{name} must be finite, got {value}.")
    rows = np.flatnonzero(bad.reshape(count, -1).any(1))
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    raise ValueError(
        f"{name} must be finite: configuration {', '.join(map(str, rows[:5]))}{more} is not."
    )


def _check_box(box, virials, cutoff) -> None:
    """Raise unless the box is one, and fits cut-off and virials."""
    if box is None:
        return
    box = box.astype(np.float64)
    if box.ndim == 3:
        if np.any(np.linalg.det(box) <= 0):
            raise ValueError("box must have lattice vectors that span a positive volume.")
        widths = 1 / np.linalg.norm(np.linalg.inv(box), axis=-1)
    elif np.any(box <= 0):
        raise ValueError(f"box must have positive edges, got {box.min():g}.")
    else:
        widths = box
        if virials is not None and virials.ndim == 3:
            raise ValueError(
                "virials of shape (N, dim, dim) need a box of matrices, (N, dim, dim): edge "
                "lengths cannot be sheared."
            )
    if cutoff is not None and widths.min() < 2 * cutoff:
        raise ValueError(
            f"box must be at least twice as wide as the cut-off {cutoff:g}, got {widths.min():g}: "
            "an atom would meet two images of another."
        )


def _refuse_overlap(positions, mask, box) -> None:
    """Raise where two atoms are nearer than a hundredth of what neighbours usually are."""
    nearest = np.full(positions.shape[:2], np.inf)
    for n, frame in enumerate(positions):
        there = slice(None) if mask is None else mask[n]
        points = np.asarray(frame[there], np.float64)
        if len(points) > 1:
            own = box if box is None or box.ndim == 1 else box[n]
            nearest[n, there] = _nearest(points, own)
    apart = nearest[np.isfinite(nearest)]
    if not len(apart):
        return
    bad = np.argwhere(nearest <= np.median(apart) / 100)
    if len(bad):
        n, atom = bad[0]
        raise ValueError(
            f"atoms must not overlap: in configuration {n} atom {atom} is {nearest[n, atom]:g} "
            "from another."
        )


def _nearest(points, box):
    """Distance of each point to the nearest other, or image of another."""
    from scipy.spatial import KDTree

    if box is None:
        return KDTree(points).query(points, k=2)[0][:, 1]
    dim = points.shape[1]
    matrix = np.asarray(np.diag(box) if box.ndim == 1 else box, np.float64)
    inside = np.mod(points @ np.linalg.inv(matrix).T, 1.0)
    shifts = np.stack(np.meshgrid(*[[-1, 0, 1]] * dim, indexing="ij"), -1).reshape(-1, 1, dim)
    images = (inside + shifts).reshape(-1, dim) @ matrix.T
    return KDTree(images).query(inside @ matrix.T, k=2)[0][:, 1]
