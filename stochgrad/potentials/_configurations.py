"""Reference configurations: what forces were computed for, checked once."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from stochgrad.core import check_array, check_number, describe


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
        """Some of the configurations.

        Args:
            rows: One number, a slice, numbers, or booleans of shape (N,). The axis of
                configurations stays: ``data[0]`` holds one.

        Raises:
            TypeError: it is none of these.
            ValueError: it chooses nothing, there is no such configuration, or there are not as
                many booleans as configurations.
        """
        chosen = _rows(rows, self.count)
        each = {name: array[chosen] for name, array in self._of_each().items()}
        graph = {name: array[chosen] for name, array in self.graph.items()}
        return self._replace(**each, graph=graph)

    @property
    def count(self) -> int:
        """How many there are, N."""
        return len(self.positions)

    def known_species(self) -> np.ndarray | None:
        """Species with zeros for padding."""
        if self.species is None or self.mask is None:
            return self.species
        there = self.mask if self.species.ndim == 2 else self.mask.any(0)
        return np.where(there, self.species, np.int32(0))

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
            What positions, forces and species hold elsewhere is of no account.
        cutoff: Where interactions end; a box has to be twice as wide.
        graph: Further arrays for the energy function, one row for each configuration: neighbors,
            charges, features.

    Raises:
        TypeError: an array is not of numbers (or, for the mask, booleans).
        ValueError: shapes do not fit; a number is not finite (its configuration is named); two
            atoms of one configuration lie on each other; the box is too small for the cut-off.

    Example:
        >>> import numpy as np, stochgrad
        >>> frames = np.random.default_rng(0).normal(size=(5, 3, 3))
        >>> stochgrad.potentials.configurations(frames, -frames).count
        5
    """
    positions, forces = _as_floats("positions", positions), _as_floats("forces", forces)
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
        "energies": (energies, _as_floats, [(count,)]),
        "virials": (virials, _as_floats, [(count, dim), (count, dim, dim)]),
        "species": (species, _as_integers, [(atoms,), (count, atoms)]),
        "box": (box, _as_floats, [(dim,), (count, dim), (count, dim, dim)]),
        "mask": (mask, _as_booleans, [(count, atoms)]),
    }
    given: dict[str, Any] = {}
    for name, (value, convert, shapes) in optional.items():
        given[name] = None if value is None else convert(name, value)
        if value is not None and given[name].shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must have shape {wanted}, got {given[name].shape}.")
    if cutoff is not None:
        cutoff = check_number("cutoff", cutoff)
    if given["mask"] is not None:
        empty = np.flatnonzero(~given["mask"].any(1))
        if len(empty):
            raise ValueError(f"mask leaves no atoms in configuration {empty[0]}.")
    arrays = {
        name: _checked_graph(name, value, count, given["mask"]) for name, value in graph.items()
    }
    given["species"] = _checked_species(given["species"], given["mask"])
    for name, value in {"positions": positions, "forces": forces, **given}.items():
        if value is not None and value.dtype.kind == "f":
            _refuse_unless_finite(name, value, count, given["mask"])
    if given["mask"] is not None:  # padding may hold anything, and counts for nothing
        there = given["mask"][..., None]
        positions = np.where(np.isfinite(positions), positions, 0)
        forces = np.where(there, forces, 0)
    _check_box(given["box"], given["virials"], cutoff)
    _refuse_overlap(positions, given["mask"], given["box"])
    return Configurations(positions, forces, **given, graph=arrays)


def _rows(rows: Any, count: int) -> Any:
    """What chooses configurations, as a slice or an array of numbers or booleans."""
    wanted = "a number, a slice, numbers or booleans of configurations"
    if isinstance(rows, bool | np.bool_ | tuple | str | bytes) or rows is None or rows is Ellipsis:
        raise TypeError(f"data[rows] takes {wanted}, got {describe(rows)}.")
    if isinstance(rows, slice):
        try:
            chosen = range(count)[rows]
        except TypeError as error:
            raise TypeError(f"data[rows] takes {wanted}, got {rows}.") from error
        if not chosen:
            raise ValueError(f"data[{rows.start}:{rows.stop}] chooses none of {count}.")
        return rows
    kind = "boolean" if holds_booleans(rows) else "integer"
    empty = isinstance(rows, list) and not rows
    array = np.zeros(0, int) if empty else check_array("data[rows]: rows", rows, kind=kind)
    array = np.atleast_1d(array)
    if not array.size or (kind == "boolean" and array.shape == (count,) and not array.any()):
        raise ValueError(f"data[rows] chooses none of the {count} configurations.")
    if array.ndim != 1:
        raise ValueError(f"data[rows] takes rows along one axis, got shape {array.shape}.")
    if kind == "boolean":
        if len(array) != count:
            raise ValueError(
                f"data[rows] takes a boolean for each of the {count} configurations, got "
                f"{len(array)}."
            )
        return array
    beyond = array[(array < -count) | (array >= count)]
    if len(beyond):
        raise ValueError(f"data[rows] has {count} configurations, and none of number {beyond[0]}.")
    return array


def holds_booleans(value: Any) -> bool:
    """Whether numpy makes an array of booleans of a value."""
    try:
        return np.asarray(value).dtype == bool
    except Exception:
        return False


def _as_floats(name, value):
    array = check_array(name, value, finite=False)
    return array.astype(np.float32) if array.dtype.kind in "iu" else array


def _as_integers(name, value):
    array = check_array(name, value, finite=False)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers from 0 on, got dtype {array.dtype}.")
    return array


def _as_booleans(name, value):
    if holds_booleans(value):
        return check_array(name, value, kind="boolean")
    array = check_array(name, value)
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be booleans, or zeros and ones, got {describe(array)}.")
    return array.astype(bool)


def _checked_graph(name, value, count, mask):
    """One of the further arrays, with rows; NaN is for padding alone."""
    kind = "boolean" if holds_booleans(value) else "number"
    array = check_array(name, value, kind=kind, finite=False)
    if array.shape[:1] != (count,):
        raise ValueError(
            f"{name} must have a row for each of the {count} configurations, got shape "
            f"{array.shape}; close over what all have in common."
        )
    if array.dtype.kind == "f":
        bad = np.isnan(array)
        if mask is not None and array.shape[:2] == mask.shape:
            bad = bad & mask.reshape(*mask.shape, *(1,) * (array.ndim - 2))
        if bad.any():
            row = int(np.argwhere(bad)[0, 0])
            raise ValueError(f"{name} must be finite, but that of configuration {row} holds NaN.")
    return array


def _checked_species(species, mask):
    """Species from 0 on; of padding, which counts for nothing, those below become 0."""
    if species is None:
        return None
    if mask is not None:
        there = mask if species.ndim == 2 else mask.any(0)
        species = np.where(~there & (species < 0), 0, species)
    if species.min() < 0:
        raise ValueError(
            f"species must be integers from 0 on, got {species.dtype} of least {species.min()}."
        )
    if species.max() > np.iinfo(np.int32).max:
        raise ValueError(f"species must be integers from 0 on, got one of {species.max()}.")
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
    """Raise where two atoms are nearer than a hundredth of what neighbors usually are."""
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
            f"positions: atoms must not overlap: in configuration {n} atom {atom} is "
            f"{nearest[n, atom]:g} from another."
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
