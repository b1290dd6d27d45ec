"""From frames of ASE and files of extended XYZ to configurations, and back."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np

from stochgrad.core import check_array, describe, first_line
from stochgrad.potentials._configurations import Configurations, configurations
from stochgrad.potentials._data_checks import atomic_number
from stochgrad.potentials._references import fit_reference_energies

_KEYS = {
    "energy": ("REF_energy", "ref_energy", "dft_energy", "energy", "Energy"),
    "forces": ("REF_forces", "ref_forces", "dft_forces", "forces", "force", "Forces"),
    "stress": ("REF_stress", "ref_stress", "dft_stress", "stress"),
    "virial": ("REF_virial", "REF_virials", "ref_virial", "dft_virial", "virial", "virials"),
}
"""Names that labels go by in files, of several the first where they agree."""


def from_ase(
    frames: Any,
    *,
    energy: str | Literal[False] | None = None,
    forces: str | Literal[False] | None = None,
    stress: str | Literal[False] | None = None,
    virial: str | Literal[False] | None = None,
    elements: Sequence[str | int] | None = None,
    reference_energies: Literal["fit"] | Mapping[str, float] | Any | None = "fit",
    weights: str | Any = "config_weight",
    cutoff: float | None = None,
) -> Configurations:
    r"""Configurations from frames of ASE, of any mix of sizes.

    | | ASE and extended XYZ | here |
    | --- | --- | --- |
    | units | eV, Å, eV/Å | the same |
    | lattice vectors | rows of the cell | columns of the box |
    | virial | stress $\sigma$, eV/Å³ | $W = -V\sigma$, eV |
    | species | atomic numbers | 0, 1, ... in the order of ``elements`` |
    | energies | totals | totals less ``reference_energies`` of the atoms |

    A label that only some frames have counts for nothing in the others. Along an axis without
    periodicity the box is widened until no image is within reach. Forces are taken as calculated,
    without the constraints of the frames.

    Args:
        frames: ``ase.Atoms``, one or a list.
        energy: The key of total energies, in ``info`` or in the calculator's results; found by the
            usual names if None, left out if False.
        forces: Likewise of forces.
        stress: Likewise of stresses: six numbers in Voigt's order, or nine.
        virial: Likewise of virials, of the sign that $W = -V\sigma$ has.
        elements: Symbols or atomic numbers in the order of species; those that there are, from the
            lightest, if None. Give a test set the ``elements`` of the training set.
        reference_energies: Of one atom of each element, subtracted from total energies in float64:
            ``"fit"`` for least squares, numbers by symbol, an array in the order of ``elements``
            (``train.reference_energies``), or None for totals as they are.
        weights: How much each frame counts: an array, or the key of a number in ``info``, which is
            one where a frame has none.
        cutoff: Where interactions end, in Å: makes lists of neighbors, which the energy function
            gets as ``neighbors``.

    Warns:
        UserWarning: a calculator's energy is not the free energy that its forces belong to.

    Raises:
        ImportError: ase is not installed.
        TypeError: these are no frames.
        ValueError: there are no frames, or no labels; a label goes by two names with different
            numbers; a stress and a virial disagree; an element is not among ``elements``; and what
            ``stochgrad.potentials.configurations`` raises.

    Example:
        >>> import ase.build, stochgrad
        >>> from ase.calculators.emt import EMT
        >>> frames = [ase.build.bulk("Cu") * (n, 1, 1) for n in (1, 2, 3)]
        >>> for frame in frames:
        ...     frame.rattle(0.1, seed=1)
        ...     frame.calc = EMT()
        ...     _ = frame.get_stress(), frame.get_forces()
        >>> stochgrad.potentials.from_ase(frames, cutoff=3.0)
        <3 configurations of 1 to 3 atoms with forces, energies, virials>
    """
    frames = _as_frames(frames)
    asked: dict[str, Any] = {"energy": energy, "forces": forces, "stress": stress, "virial": virial}
    found = {
        name: _labels(frames, name, key) for name, key in asked.items() if not isinstance(key, bool)
    }
    _warn_of_free_energy(frames, energy)
    atoms = max(len(frame) for frame in frames)
    numbers = [frame.numbers for frame in frames]
    table = _elements(elements, numbers)
    count = len(frames)
    positions, species = np.zeros((count, atoms, 3)), np.full((count, atoms), 0, np.int32)
    there = np.arange(atoms) < np.array([[len(frame)] for frame in frames])
    for n, frame in enumerate(frames):
        positions[n, there[n]] = frame.positions
        species[n, there[n]] = [table.index(z) for z in numbers[n]]
    labels: dict[str, Any] = {}
    counts = {name: np.array([v is not None for v in values]) for name, values in found.items()}
    if counts.get("energy", np.zeros(1)).any():
        labels["energies"] = _filled(found["energy"], ())
    if counts.get("forces", np.zeros(1)).any():
        labels["forces"] = np.full((count, atoms, 3), np.nan)
        for n, value in enumerate(found["forces"]):
            if value is not None:
                labels["forces"][n, there[n]] = _shaped(value, (len(frames[n]), 3), "forces", n)
                labels["forces"][n, ~there[n]] = 0
    virials = _virials(frames, found.get("stress"), found.get("virial"))
    if virials is not None:
        labels["virials"] = virials
    if not labels:
        keys = sorted({k for frame in frames[:50] for k in (*frame.info, *frame.arrays)})
        raise ValueError(
            "frames must have energies, forces, stresses or virials, got none under the usual "
            f"names (of {', '.join(keys)}): name them, energy='my_energy', forces='my_forces'."
        )
    share = {name: np.isfinite(v.reshape(count, -1)).all(1) * 1.0 for name, v in labels.items()}
    for name, weight in share.items():
        of_nan = counts[{"energies": "energy"}.get(name, name)] if name != "virials" else None
        if of_nan is not None and np.any(of_nan & (weight == 0)):
            row = int(np.flatnonzero(of_nan & (weight == 0))[0])
            raise ValueError(f"{name} must be finite: that of frame {row} is not.")
    own = _weights(frames, weights)
    energies = labels.get("energies")
    references = None
    if energies is not None and reference_energies is not None:
        known = species if there.all() else np.where(there, species, -1)
        references = _references(reference_energies, energies, known, table)
        amounts = np.stack([(known == k).sum(1) for k in range(len(table))], 1)
        labels["energies"] = energies - amounts @ references
    made = configurations(
        positions,
        labels.pop("forces", None),
        **labels,
        species=species[0] if there.all() and np.all(species == species[0]) else species,
        box=_boxes(frames, 10.0 if cutoff is None else cutoff),
        mask=None if there.all() else there,
        weights={name: weight * own for name, weight in share.items()},
        elements=table,
        reference_energies=references,
    )
    return made if cutoff is None else made.with_neighbors(cutoff)


def read_extxyz(path: str | PathLike, index: str | int | slice = ":", **options: Any):
    """Configurations from a file of extended XYZ, as ``from_ase`` makes them of its frames.

    Args:
        path: The file; may be compressed (``.gz``).
        index: Which frames, as in ``ase.io.read``.
        options: As in ``stochgrad.potentials.from_ase``.

    Raises:
        ImportError: ase is not installed.
        FileNotFoundError: there is no such file.
        ValueError: ase cannot read it; and what ``from_ase`` raises.
    """
    io = _import_ase("read_extxyz").io
    try:
        frames = io.read(path, index=index, format="extxyz")
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} is not extended XYZ: {first_line(error)}.") from error
    return from_ase(frames, **options)


def to_ase(data: Configurations) -> list[Any]:
    """Frames of ASE with the labels in a calculator's results: total energies, forces, stress.

    Args:
        data: Configurations that know their ``elements``; their ``reference_energies`` are added
            again. Virials become stresses where there is a box, and stay in ``info`` elsewhere.

    Raises:
        ImportError: ase is not installed.
        TypeError: these are no configurations.
        ValueError: they do not say what elements they are of.
    """
    ase = _import_ase("to_ase")
    from ase.calculators.singlepoint import SinglePointCalculator

    if not isinstance(data, Configurations):
        raise TypeError(f"data must be configurations, got {describe(data)}.")
    numbers, totals = data.numbers(), total_energies(data)
    frames = []
    for n in range(len(data)):
        there = slice(None) if data.mask is None else data.mask[n]
        cell = _cell_of(data.box, n)
        frame = ase.Atoms(
            numbers[n][there],
            positions=data.positions[n][there],
            cell=cell,
            pbc=cell is not None,
        )
        results: dict[str, Any] = {}
        if totals is not None and np.isfinite(totals[n]):
            results["energy"] = float(totals[n])
        if data.forces is not None and np.isfinite(data.forces[n][there]).all():
            results["forces"] = np.asarray(data.forces[n][there], float)
        if data.virials is not None and np.isfinite(data.virials[n]).all():
            virial = np.asarray(data.virials[n], float)
            virial = virial if virial.ndim == 2 else np.diag(virial)
            if cell is None:
                frame.info["virial"] = virial
            else:
                results["stress"] = voigt(-virial / frame.get_volume())
        frame.calc = SinglePointCalculator(frame, **results)
        frames.append(frame)
    return frames


def total_energies(data: Configurations) -> np.ndarray | None:
    """Energies with those of single atoms added again, in float64."""
    if data.energies is None or data.reference_energies is None:
        return data.energies
    return data.energies.astype(np.float64) + reference_totals(data)


def reference_totals(data: Configurations) -> np.ndarray:
    """The sum of the reference energies of each configuration's atoms."""
    references = np.asarray(data.reference_energies, np.float64)
    of_atom = np.broadcast_to(references[data.known_species()], data.shape)
    return of_atom.sum(1) if data.mask is None else np.where(data.mask, of_atom, 0).sum(1)


def voigt(tensor: np.ndarray) -> np.ndarray:
    """Six numbers of a symmetric tensor, xx, yy, zz, yz, xz, xy."""
    symmetric = (tensor + np.swapaxes(tensor, -1, -2)) / 2
    return symmetric[..., [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def _cell_of(box: Any, row: int) -> np.ndarray | None:
    """Lattice vectors in rows, of one configuration."""
    if box is None:
        return None
    own = np.asarray(box if box.ndim == 1 else box[row], float)
    return np.diag(own) if own.ndim == 1 else own.T


def _import_ase(what: str) -> Any:
    try:
        import ase.io
    except ImportError as error:
        raise ImportError(f"{what} needs ase: pip install stochgrad[ase].") from error
    return ase


def _as_frames(frames: Any) -> list[Any]:
    Atoms = _import_ase("from_ase").Atoms
    if isinstance(frames, Atoms):
        return [frames]
    if not hasattr(frames, "__iter__") or isinstance(frames, str | bytes):
        raise TypeError(
            f"frames must be ase.Atoms or a list of them, got {describe(frames)}; a file is for "
            "stochgrad.potentials.read_extxyz."
        )
    listed = list(frames)
    for n, frame in enumerate(listed):
        if not isinstance(frame, Atoms):
            raise TypeError(f"frames must be ase.Atoms, but frame {n} is {describe(frame)}.")
        if not len(frame):
            raise ValueError(f"frames must have atoms, but frame {n} has none.")
    if not listed:
        raise ValueError("frames must not be empty.")
    return listed


def _values(frame: Any, key: str) -> Any:
    """What a frame holds by a name: of atoms, of the frame, or of its calculator."""
    for where in (frame.arrays, frame.info, getattr(frame.calc, "results", {})):
        if where.get(key) is not None:
            return where[key]
    return None


def _labels(frames: list[Any], name: str, key: str | None) -> list[Any]:
    """A label of each frame, None where it has none.

    Raises:
        ValueError: no frame has the key that was asked for, or two names hold different numbers.
    """
    if key is not None:
        values = [_values(frame, key) for frame in frames]
        if all(value is None for value in values):
            raise ValueError(f"{name}={key!r} names nothing: no frame has it.")
        return values
    values: list[Any] = [None] * len(frames)
    for n, frame in enumerate(frames):
        held = {k: _values(frame, k) for k in _KEYS[name]}
        held = {k: np.asarray(v, float) for k, v in held.items() if v is not None}
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


def _warn_of_free_energy(frames: list[Any], key: Any) -> None:
    import warnings

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


def _filled(values: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of all frames, NaN where there are none."""
    out = np.full((len(values), *shape), np.nan)
    for n, value in enumerate(values):
        if value is not None:
            out[n] = _shaped(value, shape, "energy", n)
    return out


def _shaped(value: Any, shape: tuple[int, ...], name: str, n: int) -> np.ndarray:
    array = check_array(f"{name} of frame {n}", value, finite=False).astype(np.float64)
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


def _virials(frames: list[Any], stresses: Any, virials: Any) -> np.ndarray | None:
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


def _elements(elements: Any, numbers: list[np.ndarray]) -> tuple[int, ...]:
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
        symbols = _import_ase("from_ase").data.chemical_symbols
        raise ValueError(
            f"elements must have those of the frames, but {symbols[missing[0]]} is not among them."
        )
    return table


def _weights(frames: list[Any], weights: Any) -> np.ndarray:
    if isinstance(weights, str):
        return np.array([float(frame.info.get(weights, 1.0)) for frame in frames])
    if weights is None:
        return np.ones(len(frames))
    return check_array("weights", weights, shape=(len(frames),)).astype(np.float64)


def _references(wanted: Any, energies, species, table: tuple[int, ...]) -> np.ndarray:
    """Energies of single atoms, in the order of the elements."""
    if isinstance(wanted, str):
        if wanted != "fit":
            raise ValueError(f"reference_energies must be 'fit' or numbers, got {wanted!r}.")
        return fit_reference_energies(energies, species, len(table))
    if isinstance(wanted, Mapping):
        named = {atomic_number(k): v for k, v in wanted.items()}
        missing = [z for z in table if z not in named]
        if missing:
            symbols = _import_ase("from_ase").data.chemical_symbols
            raise ValueError(f"reference_energies must have one for {symbols[missing[0]]}.")
        wanted = [named[z] for z in table]
    return check_array("reference_energies", wanted, shape=(len(table),)).astype(np.float64)


def _boxes(frames: list[Any], reach: float) -> np.ndarray | None:
    """Lattice vectors in columns, with vectors beyond all reach where nothing is periodic."""
    if not any(frame.pbc.any() for frame in frames):
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
