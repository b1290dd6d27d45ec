"""What a network needs to be used on other atoms than those it was trained on."""

from collections.abc import Callable
from typing import Any, NamedTuple

from stochgrad.potentials._configurations import Configurations


class Potential(NamedTuple):
    """An energy function, and what the data were of that its weights were found from.

    Attributes:
        energy_fn: ``(params, positions, **graph) -> scalar``.
        inputs: Names of what it takes beside positions.
        elements: Atomic number of each species, or None where the data do not say.
        reference_energies: What was subtracted from total energies for an atom of each species.
        cutoff: That of the lists of neighbors that it takes, or None.
        lengths: Whether a box is given by edge lengths.
    """

    energy_fn: Callable[..., Any]
    inputs: tuple[str, ...] = ()
    elements: tuple[int, ...] | None = None
    reference_energies: tuple[float, ...] | None = None
    cutoff: float | None = None
    lengths: bool = False

    def __call__(self, params: Any, positions: Any, **graph: Any) -> Any:
        return self.energy_fn(params, positions, **graph)


def potential_of(energy_fn: Callable[..., Any], data: Configurations) -> Potential:
    """The potential of an energy function on data such as these."""
    each, shared = data.inputs()
    return Potential(
        energy_fn,
        tuple(sorted({**each, **shared})),
        data.elements,
        None if data.reference_energies is None else tuple(data.reference_energies.tolist()),
        data.cutoff,
        data.box is not None and data.box.ndim < 3,
    )
