"""Checks of reference configurations."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stochgrad.core import check_array, describe

TERMS = ("forces", "energies", "virials")
"""What a reference labels configurations with."""


def check_rows(rows: Any, count: int) -> Any:
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


def as_floats(name, value):
    array = check_array(name, value, finite=False)
    return array.astype(np.float32) if array.dtype.kind in "iu" else array


def as_integers(name, value):
    array = check_array(name, value, finite=False)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers from 0 on, got dtype {array.dtype}.")
    return array


def as_booleans(name, value):
    if holds_booleans(value):
        return check_array(name, value, kind="boolean")
    array = check_array(name, value)
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be booleans, or zeros and ones, got {describe(array)}.")
    return array.astype(bool)


def checked_graph(name, value, count, mask):
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


def checked_species(species, mask):
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


def refuse_unless_finite(name, value, count, mask, weights=None) -> None:
    """Raise where a number is not finite that counts for something."""
    bad = ~np.isfinite(value)
    if mask is not None and name in ("positions", "forces"):
        bad &= mask[..., None]
    if weights is not None:
        bad &= weights.reshape(-1, *(1,) * (bad.ndim - 1)) > 0
    if not bad.any():
        return
    if len(value) != count:
        raise ValueError(f"{name} must be finite, got {value}.")
    rows = np.flatnonzero(bad.reshape(count, -1).any(1))
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    raise ValueError(
        f"{name} must be finite: configuration {', '.join(map(str, rows[:5]))}{more} is not"
        + ("; where there is no label, give it weight 0." if name in TERMS else ".")
    )


def check_boxes(box, virials, cutoff) -> None:
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
            "the minimum-image convention fails (lists of neighbors do without it)."
        )


def refuse_overlap(positions, mask, box) -> None:
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


def checked_weights(weights: Any, labels: dict[str, np.ndarray], count: int) -> dict[str, Any]:
    """How much each configuration's labels count, by name, of those that do not all count alike."""
    if weights is None:
        return {}
    named = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(labels, weights)
    unknown = sorted(set(map(str, named)) - set(labels))
    if unknown:
        raise ValueError(
            f"weights must name what the data have, {sorted(labels)}, got {unknown[0]!r}."
        )
    checked = {}
    for name, value in named.items():
        array = check_array(f"weights of {name}", value).astype(np.float64)
        if array.shape != (count,):
            raise ValueError(
                f"weights of {name} must have shape {(count,)}, one for each configuration, got "
                f"{array.shape}."
            )
        if np.any(array < 0) or not np.any(array > 0):
            raise ValueError(
                f"weights of {name} must not be negative, nor all zero, got {array.min():g} to "
                f"{array.max():g}."
            )
        if np.any(array != 1):
            checked[name] = array
    return checked


def check_virials(positions, labels, weights, mask) -> None:
    r"""Raise unless virials without a box are $\sum_i F_i r_i^T$ of the forces.

    The mean square of the difference may be a quarter of the virials' own: labels may be noisy, but
    a wrong sign is four, and a wrong unit more than a quarter.
    """
    forces, virials = labels["forces"], labels["virials"]
    counted = np.ones(len(forces), bool)
    for name in ("forces", "virials"):
        counted &= weights.get(name, np.ones(len(forces))) > 0
    there = np.ones(forces.shape[:2]) if mask is None else mask.astype(float)
    share = there / there.sum(1, keepdims=True)
    at = np.where(there[..., None] > 0, positions, 0).astype(np.float64)
    f = forces.astype(np.float64) * there[..., None]
    about = np.einsum("nai,naj->nij", f, at)
    about_center = about - np.einsum("nai,nbj,nb->nij", f, at, share)
    given = virials[counted].astype(np.float64)
    for tensor in (about_center, about):
        due = (np.einsum("nii->ni", tensor) if virials.ndim == 2 else tensor)[counted]
        size = np.sum(due**2)
        if not size > 0 or np.sum((given - due) ** 2) <= size / 4:
            return
    slope = np.sum(given * due) / size
    hint = "the sign is that of a stress" if slope < 0 else f"they are {slope:.3g} times as large"
    raise ValueError(
        "virials without a box must be the sums of forces times positions, but that of "
        f"configuration {np.flatnonzero(counted)[0]} is {np.round(np.ravel(given[0]), 4)} and not "
        f"{np.round(np.ravel(due[0]), 4)}: {hint} (virial = -volume * stress, in units of energy)."
    )


def checked_elements(elements: Any, species: Any) -> tuple[int, ...] | None:
    """Atomic numbers of the species."""
    if elements is None:
        return None
    if isinstance(elements, str | bytes) or not hasattr(elements, "__iter__"):
        raise TypeError(f"elements must be a list, ('H', 'O'), got {describe(elements)}.")
    numbers = tuple(atomic_number(one) for one in elements)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"elements must differ, got {list(elements)}.")
    if species is None:
        raise ValueError("elements are of species: give the atoms' species too.")
    if species.max() >= len(numbers):
        raise ValueError(
            f"elements must have one for each species, got {len(numbers)} for a species "
            f"{species.max()}."
        )
    return numbers


def atomic_number(element: Any) -> int:
    """Of a symbol, which needs ase, or a number."""
    if isinstance(element, str):
        try:
            from ase.data import atomic_numbers
        except ImportError as error:
            raise ImportError(
                "elements by symbol need ase (pip install stochgrad[ase]), or give atomic numbers."
            ) from error
        if atomic_numbers.get(element, 0) == 0:
            raise ValueError(f"elements must be symbols or atomic numbers, got {element!r}.")
        return atomic_numbers[element]
    whole = isinstance(element, int | np.integer) and not isinstance(element, bool)
    if whole and 0 < element <= 118:
        return int(element)
    raise ValueError(f"elements must be symbols or atomic numbers, got {describe(element)}.")


def checked_references(energies: Any, species: Any) -> np.ndarray | None:
    """Reference energies, one for each species."""
    if energies is None:
        return None
    array = check_array("reference_energies", energies).astype(np.float64)
    if species is None or array.ndim != 1 or len(array) <= species.max():
        raise ValueError(
            f"reference_energies must have one number for each species, got shape {array.shape}."
        )
    return array
