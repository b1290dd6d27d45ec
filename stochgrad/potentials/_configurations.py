"""Reference configurations: what forces were computed for, checked once."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from stochgrad.core import check_number
from stochgrad.potentials._data_checks import (
    TERMS,
    as_booleans,
    as_floats,
    as_integers,
    check_boxes,
    check_rows,
    check_virials,
    checked_elements,
    checked_graph,
    checked_references,
    checked_species,
    checked_weights,
    refuse_overlap,
    refuse_unless_finite,
)
from stochgrad.potentials._neighbors import Neighbors, neighbor_lists


@dataclass(frozen=True, eq=False)
class Configurations:
    """Configurations of atoms, and the forces, energies and virials of a reference.

    ``len(data)`` is how many there are, ``data[rows]`` some of them (``data[0]`` holds one),
    ``potentials.concatenate`` joins several.

    Attributes:
        positions: Shape (N, atoms, dim).
        forces: Likewise, or None.
        energies: Shape (N,), or None.
        virials: Shape (N, dim) or (N, dim, dim), or None.
        species: Number of each atom's species, shape (atoms,) or (N, atoms), or None.
        box: Edge lengths, shape (dim,) or (N, dim), or matrices of lattice vectors in columns,
            shape (N, dim, dim), or None.
        mask: Which atoms there are, shape (N, atoms), where configurations differ in size.
        graph: Further arrays that the energy function takes by name, one row a configuration.
        weights: How much each configuration's forces, energies and virials count, shape (N,) by
            name, where they do not all count alike; zero where there is no such label, which is
            then NaN.
        neighbors: Lists of neighbors, or None.
        elements: Atomic number of each species, or None.
        reference_energies: What was subtracted from ``energies`` for each atom of a species, shape
            (species,) in float64, or None.
    """

    positions: Float[np.ndarray, "N atoms dim"]
    forces: Float[np.ndarray, "N atoms dim"] | None = None
    energies: Float[np.ndarray, " N"] | None = None
    virials: Float[np.ndarray, "..."] | None = None
    species: Int[np.ndarray, "..."] | None = None
    box: Float[np.ndarray, "..."] | None = None
    mask: Bool[np.ndarray, "N atoms"] | None = None
    graph: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    neighbors: Neighbors | None = None
    elements: tuple[int, ...] | None = None
    reference_energies: Float[np.ndarray, " species"] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> "Iterator[Configurations]":
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        sizes = self.atoms
        size = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"
        held = [
            name if name not in self.weights else f"{name} ({np.sum(self.weights[name] > 0)})"
            for name in self.labels
        ]
        return f"<{len(self)} configurations of {size} atoms with {', '.join(held)}>"

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
        chosen = check_rows(rows, len(self))
        return replace(self, **jax.tree.map(lambda array: array[chosen], self._of_each()))

    @property
    def count(self) -> int:
        """How many there are, N."""
        return len(self)

    @property
    def atoms(self) -> Int[np.ndarray, " N"]:
        """How many atoms each has."""
        if self.mask is None:
            return np.full(len(self), self.positions.shape[1])
        return self.mask.sum(1)

    @property
    def cutoff(self) -> float | None:
        """That of the lists of neighbors, None where there are none."""
        return None if self.neighbors is None else float(np.asarray(self.neighbors.cutoff)[0])

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """The forces, energies and virials that there are."""
        values = {name: getattr(self, name) for name in TERMS}
        return {name: value for name, value in values.items() if value is not None}

    def known_species(self) -> np.ndarray | None:
        """Species with zeros for padding."""
        if self.species is None or self.mask is None:
            return self.species
        there = self.mask if self.species.ndim == 2 else self.mask.any(0)
        return np.where(there, self.species, np.int32(0))

    def numbers(self) -> Int[np.ndarray, "N atoms"]:
        """Atomic numbers, zero for padding.

        Raises:
            ValueError: the data do not say what elements their species are.
        """
        if self.elements is None or self.species is None:
            raise ValueError("elements are needed: configurations(..., elements=('H', 'O')).")
        of_all = np.broadcast_to(np.asarray(self.elements)[self.known_species()], self.shape)
        return of_all if self.mask is None else np.where(self.mask, of_all, 0)

    @property
    def shape(self) -> tuple[int, int]:
        """Configurations and atoms."""
        return self.positions.shape[:2]

    def with_neighbors(self, cutoff: float) -> "Configurations":
        """The same configurations with lists of neighbors, which the energy gets as ``neighbors``.

        Args:
            cutoff: How far a neighbor may be. The box may be narrower than it: atoms meet several
                images of another then.

        Raises:
            ValueError: the cut-off is not positive.
        """
        cutoff = check_number("cutoff", cutoff)
        lists = neighbor_lists(self.positions, cutoff, self.box, self.mask)
        return replace(self, neighbors=lists)

    def inputs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the energy function takes beside positions: one row each, and what all share."""
        names = ("species", "box", "mask", "neighbors")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        each = {name: value for name, value in given.items() if name in self._of_each()}
        return {**each, **self.graph}, {k: v for k, v in given.items() if k not in each}

    def _of_each(self) -> dict[str, Any]:
        """The fields that have a row for each configuration."""
        shared = {"elements", "reference_energies"}
        if self.species is not None and self.species.ndim == 1:
            shared.add("species")
        if self.box is not None and self.box.ndim == 1:
            shared.add("box")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if v is not None and k not in shared}


def configurations(
    positions: Any,
    forces: Any = None,
    *,
    energies: Any = None,
    virials: Any = None,
    species: Any = None,
    box: Any = None,
    mask: Any = None,
    weights: Any = None,
    elements: Any = None,
    reference_energies: Any = None,
    cutoff: float | None = None,
    **graph: Any,
) -> Configurations:
    r"""Check reference data, and put them together.

    Any consistent units will do: forces are energy over length, virials energies.

    Args:
        positions: Shape (N, atoms, dim).
        forces: Likewise; may be left out where there are energies or virials.
        energies: Total energies, shape (N,).
        virials: $W = -\partial U/\partial\varepsilon$ at $r \to (1+\varepsilon)r$, the box strained
            along with the atoms: shape (N, dim) for the diagonal, (N, dim, dim) for all of it
            (which needs a box of matrices, or none). It is $-V$ times ASE's stress, and without a
            box $\sum_i F_i r_i^T$, which is checked.
        species: Numbers of the atoms' species from 0 on, shape (atoms,) or (N, atoms).
        box: Edge lengths, shape (dim,) or (N, dim), or lattice vectors as the columns of matrices,
            shape (N, dim, dim). ASE's cells hold them in rows.
        mask: Which atoms there are, shape (N, atoms), if configurations are padded to one size.
            What positions, forces and species hold elsewhere is of no account.
        weights: How much each configuration counts, shape (N,), or by name of what is labeled,
            ``{"energies": ..., "forces": ...}``. Zero where a label is missing, which may be NaN.
        elements: Symbols or atomic numbers of the species, for files and calculators.
        reference_energies: What was subtracted from ``energies`` for an atom of each species, for
            those who need totals again.
        cutoff: Where interactions end; a box has to be twice as wide.
        graph: Further arrays for the energy function, one row for each configuration: charges,
            features. Lists of neighbors come from ``Configurations.with_neighbors``.

    Raises:
        TypeError: an array is not of numbers (or, for the mask, booleans).
        ValueError: shapes do not fit; a number is not finite (its configuration is named); two
            atoms of one configuration lie on each other; the box is too small for the cut-off;
            there is no label; virials without a box are not those of the forces.

    Example:
        >>> import numpy as np, stochgrad
        >>> frames = np.random.default_rng(0).normal(size=(5, 3, 3))
        >>> len(stochgrad.potentials.configurations(frames, -frames))
        5
    """
    positions = as_floats("positions", positions)
    if positions.ndim != 3 or 0 in positions.shape:
        raise ValueError(
            "positions must have shape (configurations, atoms, dimensions) and not be empty, "
            f"got {positions.shape}."
        )
    if forces is not None:
        forces = as_floats("forces", forces)
        if forces.shape != positions.shape:
            raise ValueError(
                f"forces must have the shape of positions, {positions.shape}, got {forces.shape}."
            )
    count, atoms, dim = positions.shape
    optional = {
        "energies": (energies, as_floats, [(count,)]),
        "virials": (virials, as_floats, [(count, dim), (count, dim, dim)]),
        "species": (species, as_integers, [(atoms,), (count, atoms)]),
        "box": (box, as_floats, [(dim,), (count, dim), (count, dim, dim)]),
        "mask": (mask, as_booleans, [(count, atoms)]),
    }
    given: dict[str, Any] = {}
    for name, (value, convert, shapes) in optional.items():
        given[name] = None if value is None else convert(name, value)
        if value is not None and given[name].shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must have shape {wanted}, got {given[name].shape}.")
    if forces is None and given["energies"] is None and given["virials"] is None:
        raise ValueError("forces must be given, or energies or virials, got none of them.")
    if cutoff is not None:
        cutoff = check_number("cutoff", cutoff)
    mask = given["mask"]
    if mask is not None:
        empty = np.flatnonzero(~mask.any(1))
        if len(empty):
            raise ValueError(f"mask leaves no atoms in configuration {empty[0]}.")
    arrays = {name: checked_graph(name, value, count, mask) for name, value in graph.items()}
    given["species"] = checked_species(given["species"], mask)
    labels = {"forces": forces, "energies": given["energies"], "virials": given["virials"]}
    labels = {name: value for name, value in labels.items() if value is not None}
    counts = checked_weights(weights, labels, count)
    for name, value in {"positions": positions, **given, **labels}.items():
        if value is not None and value.dtype.kind == "f":
            refuse_unless_finite(name, value, count, mask, counts.get(name))
    if mask is not None:  # padding may hold anything, and counts for nothing
        positions = np.where(np.isfinite(positions), positions, 0)
        if forces is not None:
            labels["forces"] = np.where(mask[..., None], forces, 0)
    check_boxes(given["box"], given["virials"], cutoff)
    refuse_overlap(positions, mask, given["box"])
    if given["box"] is None and {"virials", "forces"} <= set(labels):
        check_virials(positions, labels, counts, mask)
    for name, weight in counts.items():
        if not weight.all():
            missing = weight.reshape(-1, *(1,) * (labels[name].ndim - 1)) == 0
            labels[name] = np.where(missing, np.nan, labels[name]).astype(labels[name].dtype)
    elements = checked_elements(elements, given["species"])
    return Configurations(
        positions,
        **{**given, "forces": None, **labels},
        graph=arrays,
        weights=counts,
        elements=elements,
        reference_energies=checked_references(reference_energies, given["species"]),
    )
