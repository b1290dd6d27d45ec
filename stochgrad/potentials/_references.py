"""Reference energies of elements, which make total energies small."""

import numpy as np
from jaxtyping import Float, Int


def composition(species: Int[np.ndarray, "N atoms"], count: int) -> Int[np.ndarray, "N species"]:
    """How many atoms of each species each configuration has; those below zero are padding."""
    return np.stack([(species == k).sum(1) for k in range(count)], 1)


def fit_reference_energies(
    energies: Float[np.ndarray, " N"], species: Int[np.ndarray, "N atoms"], count: int
) -> Float[np.ndarray, " species"]:
    r"""Energies $e$ of single atoms that come nearest to total energies, in float64.

    $$\min_e \sum_i \Big(U_i - \sum_a e_{s_{ia}}\Big)^2,$$

    the shortest such vector where compositions do not tell elements apart.

    Args:
        energies: Total energies; NaN ones are left out.
        species: Numbers of species, negative for padding.
        count: How many species there are.
    """
    amounts = composition(species, count).astype(np.float64)
    known = np.isfinite(energies)
    return np.linalg.lstsq(amounts[known], energies[known].astype(np.float64), rcond=None)[0]
