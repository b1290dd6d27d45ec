"""What frames of ASE hold: labels by the names that they go by, elements, cells."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from stochgrad.core import check_array, check_number, describe
from stochgrad.potentials._data_checks import atomic_number
from stochgrad.potentials._references import fit_reference_energies

_KEYS = {
    "energy": ("REF_energy", "ref_energy", "dft_energy", "energy", "Energy"),
    "forces": ("REF_forces", "ref_forces", "dft_forces", "forces", "force", "Forces"),
    "stress": ("REF_stress", "ref_stress", "dft_stress", "stress"),
    "virial": ("REF_virial", "REF_virials", "ref_virial", "dft_virial", "virial", "virials"),
}
"""Names that labels go by in files, of several the first where they agree."""


def import_ase(what: str) -> Any:
    """The package ase.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import ase.io
    except ImportError as error:
        raise ImportError(f"{what} needs ase: pip install stochgrad[ase].") from error
    return ase


def voigt(tensor: np.ndarray) -> np.ndarray:
    """Six numbers of a symmetric tensor, xx, yy, zz, yz, xz, xy."""
    symmetric = (tensor + np.swapaxes(tensor, -1, -2)) / 2
    return symmetric[..., [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def _values(frame: Any, key: str) -> Any:
    """What a frame holds by a name: of atoms, of the frame, or of its calculator."""
    for where in (frame.arrays, frame.info, getattr(frame.calc, "results", {})):
        if where.get(key) is not None:
            return where[key]
    return None


def labels_of(frames: list[Any], name: str, key: Any) -> list[Any]:
    """A label of each frame, None where it has none.

    Raises:
        TypeError: the key is none.
        ValueError: no frame has the key that was asked for, or two names hold different numbers.
    """
    if key is not None:
        if not isinstance(key, str):
            raise TypeError(f"{name} must be a key, None or False, got {describe(key)}.")
        values = [_values(frame, key) for frame in frames]
        if all(value is None for value in values):
            raise ValueError(f"{name}={key!r} names nothing: no frame has it.")
        return values
    values: list[Any] = [None] * len(frames)
    for n, frame in enumerate(frames):
        held = {k: _values(frame, k) for k in _KEYS[name]}
        held = {
            k: check_array(f"{k} of frame {n}", v, finite=False).astype(np.float64)
            for k, v in held.items()
            if v is not None
        }
        if not held:
            continue
        first, value = next(iter(held.items()))
        for other, rival in held.items():
            same = rival.shape == value.shape
            if not (same and np.allclose(rival, value, rtol=1e-6, atol=1e-8, equal_nan=True)):
                raise ValueError(
                    f"{name} goes by two names with different numbers in frame {n}, {first!r} and "
                    f"{other!r}: say which, {name}={first!r}."
                )
        values[n] = value
    return values


def warn_of_free_energy(frames: list[Any], key: Any) -> None:
    if key is not None:
        return
    for n, frame in enumerate(frames):
        results = getattr(frame.calc, "results", {})
        energy, free = results.get("energy"), results.get("free_energy")
        if energy is None or free is None or not np.isfinite([energy, free]).all():
            continue
        if abs(energy - free) > 1e-3 * len(frame):
            warnings.warn(
                f"energies are the calculator's 'energy', but forces belong to its 'free_energy', "
                f"which is {abs(energy - free) / len(frame):.2g} eV an atom away in frame {n}: "
                "energy='free_energy' takes that.",
                UserWarning,
                stacklevel=3,
            )
            return


def filled(values: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of all frames, NaN where there are none."""
    out = np.full((len(values), *shape), np.nan)
    for n, value in enumerate(values):
        if value is not None:
            out[n] = shaped(value, shape, "energy", n)
    return out


def shaped(value: Any, shape: tuple[int, ...], name: str, n: int) -> np.ndarray:
    array = check_array(f"{name} of frame {n}", value, finite=False).astype(np.float64)
    if shape == () and array.size == 1:
        return array.reshape(())
    if array.shape != shape:
        raise ValueError(f"{name} of frame {n} must have shape {shape}, got {array.shape}.")
    return array


def _tensor(value: Any, name: str, n: int) -> np.ndarray:
    """A matrix of six numbers in Voigt's order, nine, or three times three."""
    array = check_array(f"{name} of frame {n}", value).astype(np.float64)
    if array.shape == (6,):
        return array[np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])]
    if array.size != 9:
        raise ValueError(f"{name} of frame {n} must be 6 or 9 numbers, got shape {array.shape}.")
    return array.reshape(3, 3)


def virials_of(frames: list[Any], stresses: Any, virials: Any) -> np.ndarray | None:
    """Virials of shape (N, 3, 3), NaN where there are none; None if nowhere."""
    none = [None] * len(frames)
    out = np.full((len(frames), 3, 3), np.nan)
    for n, (stress, virial) in enumerate(zip(stresses or none, virials or none, strict=True)):
        if stress is not None:
            if frames[n].cell.rank < 3:
                raise ValueError(
                    f"stress of frame {n} needs a cell of three vectors, for the volume: leave "
                    "stresses out, stress=False."
                )
            out[n] = -frames[n].get_volume() * _tensor(stress, "stress", n)
        if virial is not None:
            own = _tensor(virial, "virial", n)
            if stress is not None and not np.allclose(own, out[n], rtol=1e-2, atol=1e-3):
                opposite = np.allclose(own, -out[n], rtol=1e-2, atol=1e-3)
                why = "its sign is that of a stress" if opposite else "they disagree"
                raise ValueError(
                    f"virial of frame {n} must be minus volume times stress, but {why}: leave one "
                    "out, stress=False or virial=False."
                )
            out[n] = own
    return out if np.isfinite(out).any() else None


def elements_of(elements: Any, numbers: list[np.ndarray]) -> tuple[int, ...]:
    there = sorted({int(z) for frame in numbers for z in frame})
    if elements is None:
        if 0 in there:
            raise ValueError("frames must be of elements, but an atom has number 0 ('X').")
        return tuple(there)
    if isinstance(elements, str | bytes) or not hasattr(elements, "__iter__"):
        raise TypeError(f"elements must be a list, ('H', 'O'), got {describe(elements)}.")
    table = tuple(atomic_number(one) for one in elements)
    missing = [z for z in there if z not in table]
    if missing:
        symbols = import_ase("from_ase").data.chemical_symbols
        raise ValueError(
            f"elements must have those of the frames, but {symbols[missing[0]]} is not among them."
        )
    return table


def weights_of(frames: list[Any], weights: Any) -> np.ndarray:
    if isinstance(weights, str):
        every = [
            check_number(f"{weights} of frame {n}", frame.info.get(weights, 1.0), zero=True)
            for n, frame in enumerate(frames)
        ]
        return np.array(every)
    if weights is None:
        return np.ones(len(frames))
    return check_array("weights", weights, shape=(len(frames),)).astype(np.float64)


def references_of(wanted: Any, energies, species, table: tuple[int, ...]) -> np.ndarray:
    """Energies of single atoms, in the order of the elements."""
    if isinstance(wanted, str):
        if wanted != "fit":
            raise ValueError(f"reference_energies must be 'fit' or numbers, got {wanted!r}.")
        return fit_reference_energies(energies, species, len(table))
    if isinstance(wanted, Mapping):
        named = {atomic_number(k): v for k, v in wanted.items()}
        missing = [z for z in table if z not in named]
        if missing:
            symbols = import_ase("from_ase").data.chemical_symbols
            raise ValueError(f"reference_energies must have one for {symbols[missing[0]]}.")
        wanted = [named[z] for z in table]
    return check_array("reference_energies", wanted, shape=(len(table),)).astype(np.float64)


def boxes_of(frames: list[Any], reach: float, always: bool = False) -> Any:
    """Lattice vectors in columns, with vectors beyond all reach where nothing is periodic.

    None where no frame is periodic along any axis, unless ``always``.
    """
    if not always and not any(frame.pbc.any() for frame in frames):
        return None
    boxes = []
    for n, frame in enumerate(frames):
        cell = np.array(frame.cell, float)
        if any(frame.pbc[axis] and not cell[axis].any() for axis in range(3)):
            raise ValueError(f"cell of frame {n} has no vector along an axis that is periodic.")
        cell[~frame.pbc] = 0
        cell = np.array(frame.cell.new(cell).complete(), float)
        for axis in np.flatnonzero(~frame.pbc):
            along = cell[axis] / np.linalg.norm(cell[axis])
            extent = np.ptp(frame.positions @ along)
            cell[axis] = along * (2 * extent + 4 * reach)
        if np.linalg.det(cell) < 0:
            cell[0] *= -1
        boxes.append(cell.T)
    return np.stack(boxes)
