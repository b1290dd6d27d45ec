"""Sets of configurations in one."""

from typing import Any

import numpy as np

from stochgrad.potentials._configurations import Configurations, configurations
from stochgrad.potentials._data_checks import TERMS


def concatenate(parts: list[Configurations]) -> Configurations:
    """Configurations of several sets in one, padded to the most atoms.

    A label that a set lacks counts for nothing in its configurations. Lists of neighbors are made
    again where every set has them with one cut-off, and left out elsewhere.

    Args:
        parts: Sets of configurations.

    Raises:
        TypeError: these are no configurations.
        ValueError: there are none; some have a box, species, or further arrays and others not; or
            their elements or reference energies differ.

    Example:
        >>> import numpy as np, stochgrad
        >>> at = np.random.default_rng(0).normal(size=(5, 3, 3))
        >>> small = stochgrad.potentials.configurations(at[:, :2], -at[:, :2])
        >>> large = stochgrad.potentials.configurations(at, -at)
        >>> stochgrad.potentials.concatenate([small, large])
        <10 configurations of 2 to 3 atoms with forces>
    """
    if isinstance(parts, Configurations) or not isinstance(parts, list | tuple):
        raise TypeError("parts must be a list of configurations: concatenate([one, other]).")
    if not parts or not all(isinstance(part, Configurations) for part in parts):
        raise TypeError(f"parts must be configurations, got {[type(p).__name__ for p in parts]}.")
    for name in ("species", "box", "elements", "reference_energies"):
        having = [getattr(part, name) is not None for part in parts]
        if any(having) and not all(having):
            raise ValueError(
                f"parts must all have {name} or none, but part {having.index(False)} has none."
            )
    for name in ("elements", "reference_energies"):
        own = [getattr(part, name) for part in parts]
        if any(not np.array_equal(own[0], other) for other in own if other is not None):
            raise ValueError(
                f"parts must have the same {name}: read all sets with the first one's {name}."
            )
    if len({tuple(sorted(part.graph)) for part in parts}) > 1:
        raise ValueError(
            f"parts must have the same further arrays, got {[sorted(p.graph) for p in parts]}."
        )
    atoms = max(part.positions.shape[1] for part in parts)
    sizes = [part.positions.shape[1] for part in parts]

    def padded(values: list[Any]) -> np.ndarray:
        """Rows of all, with zeros for the atoms that a set lacks."""
        wide = [
            np.pad(v, [(0, 0), (0, atoms - size), *[(0, 0)] * (np.ndim(v) - 2)])
            for v, size in zip(values, sizes, strict=True)
        ]
        return np.concatenate(wide)

    def joined(name: str) -> np.ndarray:
        """A further array of all, padded where its second axis is that of atoms."""
        values = [part.graph[name] for part in parts]
        of_atoms = all(np.shape(v)[1:2] == (n,) for v, n in zip(values, sizes, strict=True))
        if not of_atoms and len({np.shape(v)[1:] for v in values}) > 1:
            shapes = [np.shape(v) for v in values]
            raise ValueError(f"parts must have {name} of one shape a row, got {shapes}.")
        return padded(values) if of_atoms else np.concatenate(values)

    labels: dict[str, Any] = {}
    weights: dict[str, np.ndarray] = {}
    for name in TERMS:
        having = [getattr(part, name).shape[1:] for part in parts if name in part.labels]
        if not having:
            continue
        if name == "virials" and len(set(having)) > 1:
            raise ValueError(f"parts must have virials of one shape, got {sorted(set(having))}.")
        values = [
            part.labels.get(name, np.full((len(part), *_blank(name, part, having[0])), np.nan))
            for part in parts
        ]
        labels[name] = padded(values) if name == "forces" else np.concatenate(values)
        weights[name] = np.concatenate(
            [p.weights.get(name, np.full(len(p), float(name in p.labels))) for p in parts]
        )
    whole = all(part.mask is None for part in parts) and len(set(sizes)) == 1
    species = None
    if parts[0].species is not None:
        own = [np.broadcast_to(np.asarray(part.species), part.shape) for part in parts]
        same = whole and all(np.array_equal(own[0][0], row) for rows in own for row in rows)
        species = own[0][0] if same else padded(own)
    further: dict[str, Any] = {name: joined(name) for name in parts[0].graph}
    result = configurations(
        padded([part.positions for part in parts]),
        **labels,
        species=species,
        box=None if parts[0].box is None else np.concatenate(_boxes(parts)),
        mask=None if whole else padded([_mask(part) for part in parts]),
        weights=weights,
        elements=parts[0].elements,
        reference_energies=parts[0].reference_energies,
        **further,
    )
    cutoffs = {part.cutoff for part in parts}
    cutoff = cutoffs.pop()
    return result if cutoffs or cutoff is None else result.with_neighbors(cutoff)


def _blank(name: str, part: Configurations, row: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a label's row in a set that lacks it."""
    return part.positions.shape[1:] if name == "forces" else row


def _mask(part: Configurations) -> np.ndarray:
    return np.ones(part.shape, bool) if part.mask is None else part.mask


def _boxes(parts: list[Configurations]) -> list[np.ndarray]:
    """A box for each configuration, matrices where some are."""
    dim = parts[0].positions.shape[-1]
    boxes = [np.asarray(part.box) for part in parts]
    boxes = [
        np.broadcast_to(box, (len(part), dim)) if box.ndim == 1 else box
        for box, part in zip(boxes, parts, strict=True)
    ]
    if any(box.ndim == 3 for box in boxes):
        boxes = [box if box.ndim == 3 else box[:, :, None] * np.eye(dim) for box in boxes]
    return boxes
