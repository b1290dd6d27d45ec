"""From frames of ASE and files of extended XYZ to configurations, and back."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np

from stochgrad.core import describe, first_line
from stochgrad.potentials._ase_labels import (
    boxes_of,
    elements_of,
    filled,
    import_ase,
    labels_of,
    references_of,
    shaped,
    virials_of,
    voigt,
    warn_of_free_energy,
    weights_of,
)
from stochgrad.potentials._configurations import Configurations, configurations
from stochgrad.potentials._dynamics import Trajectories
from stochgrad.potentials._references import composition


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
            (``train.reference_energies``), or None for totals as they are: for a potential that is
            zero where atoms are far apart, and has no constant that could stand for a fit.
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
    found = {name: labels_of(frames, name, key) for name, key in asked.items() if key is not False}
    warn_of_free_energy(frames, energy)
    atoms = max(len(frame) for frame in frames)
    numbers = [frame.numbers for frame in frames]
    table = elements_of(elements, numbers)
    count = len(frames)
    positions, species = np.zeros((count, atoms, 3)), np.zeros((count, atoms), np.int32)
    there = np.arange(atoms) < np.array([[len(frame)] for frame in frames])
    for n, frame in enumerate(frames):
        positions[n, there[n]] = frame.positions
        species[n, there[n]] = [table.index(z) for z in numbers[n]]
    labels: dict[str, Any] = {}
    counts = {name: np.array([v is not None for v in values]) for name, values in found.items()}
    if counts.get("energy", np.zeros(1)).any():
        labels["energies"] = filled(found["energy"], ())
    if counts.get("forces", np.zeros(1)).any():
        labels["forces"] = np.full((count, atoms, 3), np.nan)
        for n, value in enumerate(found["forces"]):
            if value is not None:
                labels["forces"][n, there[n]] = shaped(value, (len(frames[n]), 3), "forces", n)
                labels["forces"][n, ~there[n]] = 0
    virials = virials_of(frames, found.get("stress"), found.get("virial"))
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
    own = weights_of(frames, weights)
    energies = labels.get("energies")
    references = None
    if energies is not None and reference_energies is not None:
        known = np.where(there, species, -1)
        references = references_of(reference_energies, energies, known, table)
        labels["energies"] = energies - composition(known, len(table)) @ references
    made = configurations(
        positions,
        labels.pop("forces", None),
        **labels,
        species=species[0] if there.all() and np.all(species == species[0]) else species,
        box=boxes_of(frames, 10.0 if cutoff is None else cutoff),
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
    io = import_ase("read_extxyz").io
    try:
        frames = io.read(path, index=index, format="extxyz")
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} is not extended XYZ: {first_line(error)}.") from error
    return from_ase(frames, **options)


def to_ase(data: Configurations | Trajectories, like: Any = None) -> list[Any]:
    """Frames of ASE: of configurations, with their labels, or of molecular dynamics.

    ``ase.io.write("run.extxyz", frames)`` writes them.

    Args:
        data: Configurations that know their ``elements``, whose total energies (their
            ``reference_energies`` are added again), forces and stress become results of a
            calculator; virials stay in ``info`` where there is no box. Or what ``simulate``
            returned: frames of all draws and replicas one after another, numbered in ``info``,
            without those after a replica exploded.
        like: An ``ase.Atoms`` with the elements and the cell of the trajectories.

    Raises:
        ImportError: ase is not installed.
        TypeError: these are no configurations and no trajectories, or ``like`` is no frame.
        ValueError: configurations do not say what elements they are of, or the trajectories are of
            another number of atoms than ``like``.
    """
    ase = import_ase("to_ase")
    if isinstance(data, Trajectories):
        if not isinstance(like, ase.Atoms):
            raise TypeError(
                "like must be an ase.Atoms with the elements and the cell of the trajectories, "
                f"got {describe(like)}."
            )
        return _frames_like(like, data)
    if not isinstance(data, Configurations):
        raise TypeError(
            f"data must be configurations, or trajectories of simulate, got {describe(data)}."
        )
    if like is not None:
        raise TypeError("like is for trajectories: configurations know their elements and cells.")
    return _labelled_frames(ase, data)


def _frames_like(like: Any, run: Trajectories) -> list[Any]:
    draws, replicas, frames, atoms, dim = run.positions.shape
    if (atoms, dim) != (len(like), 3):
        raise ValueError(f"like must have {atoms} atoms in {dim} dimensions, got {len(like)} in 3.")
    made = []
    for place in np.ndindex(draws, replicas):
        sound = run.sound[place]
        # after an explosion the last sound frame is repeated
        moves = np.any(np.diff(run.positions[place], axis=0) != 0, axis=(1, 2))
        last = frames if sound else 1 + int(np.max(np.flatnonzero(moves) + 1, initial=0))
        for number, positions in enumerate(run.positions[place][:last]):
            frame = like.copy()
            frame.calc = None
            frame.positions = positions
            frame.info = {"draw": place[0], "replica": place[1], "frame": number}
            made.append(frame)
    return made


def _labelled_frames(ase: Any, data: Configurations) -> list[Any]:
    from ase.calculators.singlepoint import SinglePointCalculator

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
    species = np.broadcast_to(np.asarray(data.known_species()), data.shape)
    known = species if data.mask is None else np.where(data.mask, species, -1)
    references = np.asarray(data.reference_energies, np.float64)
    totals = composition(known, len(references)) @ references
    return data.energies.astype(np.float64) + totals


def _cell_of(box: Any, row: int) -> np.ndarray | None:
    """Lattice vectors in rows, of one configuration."""
    if box is None:
        return None
    own = np.asarray(box if box.ndim == 1 else box[row], float)
    return np.diag(own) if own.ndim == 1 else own.T


def _as_frames(frames: Any) -> list[Any]:
    Atoms = import_ase("from_ase").Atoms
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
