"""Networks as a calculator of ASE, with their standard deviations."""

import warnings
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import check_choice, check_instance, check_number, hoisted_jit, remembered
from stochgrad.potentials._ase_labels import boxes_of, import_ase, voigt
from stochgrad.potentials._inputs import check_networks
from stochgrad.potentials._neighbors import Neighbors, neighbor_lists
from stochgrad.potentials._potential import Potential
from stochgrad.potentials._predict import predict_one


class UncertaintyError(RuntimeError):
    """Networks disagree about the forces on an atom by more than was allowed."""


def calculator(
    potential: Potential,
    params: PyTree,
    *,
    max_force_sd: float | None = None,
    above: Literal["warn", "stop"] = "warn",
) -> Any:
    r"""A calculator of ASE: the mean of many networks, and how much they differ.

    Over D networks, in ASE's units and signs,

    $$E = \frac1D\sum_d U_d + \sum_a e_{s_a}, \qquad F = \frac1D\sum_d F_d, \qquad
      \sigma = -\frac1{DV}\sum_d W_d,$$

    with the reference energies $e$ of single atoms, if the training set had some taken off. Beside
    ``energy``, ``free_energy``, ``forces`` and ``stress``, ``calc.results`` has their standard
    deviations over the networks, ``energy_sd``, ``forces_sd`` and ``stress_sd``; all networks'
    own, ``energy_members`` and ``forces_members``; and ``max_force_sd``, the largest
    $(\sum_k \mathrm{sd}_k^2)^{1/2}$ of an atom's force.

    Args:
        potential: ``posterior.model`` of ``force_matching``, or ``Networks.potential``.
        params: Weights of D networks, with a leading axis of D; of one network the deviations are
            zero.
        max_force_sd: How large ``max_force_sd`` may be, in eV/Å.
        above: What happens beyond: ``"warn"``, once, or ``"stop"``.

    Warns:
        RuntimeWarning: networks disagree by more than ``max_force_sd``.

    Raises:
        ImportError: ase is not installed.
        TypeError: an argument is of another kind.
        ValueError: the data did not say of what elements they were; the energy function takes what
            frames of ASE do not have. On use: an element that the networks do not know; a periodic
            frame where they were trained without a box.
        UncertaintyError: on use, with ``above="stop"``.
    """
    import_ase("calculator")
    check_instance("potential", potential, Potential, "a stochgrad.potentials.Potential")
    check_choice("above", above, ("warn", "stop"))
    params = jax.tree.map(jnp.asarray, check_networks(params))
    if max_force_sd is not None:
        max_force_sd = check_number("max_force_sd", max_force_sd)
    if potential.elements is None:
        raise ValueError(
            "potential must know its elements: train on configurations(..., elements=...), or on "
            "those of from_ase."
        )
    foreign = sorted(set(potential.inputs) - {"species", "box", "mask", "neighbors"})
    if foreign:
        raise ValueError(f"potential takes {foreign[0]}, which frames of ASE do not have.")
    return _calculator_class()(potential, params, max_force_sd, above)


@cache
def _calculator_class() -> type:
    from ase.calculators.calculator import Calculator, all_changes

    class NetworksCalculator(Calculator):
        """The mean of networks; see ``stochgrad.potentials.calculator``."""

        implemented_properties = ["energy", "free_energy", "forces", "stress"]

        def __init__(self, potential, params, max_force_sd, above):
            super().__init__()
            self.potential, self.params = potential, params
            self.max_force_sd, self.above = max_force_sd, above
            self._pairs, self._warned = 0, False

        def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
            super().calculate(atoms, properties, system_changes)
            frame: Any = self.atoms
            species = self._species(frame)
            graph = self._graph(frame, species)
            sheared = not ("box" in graph and graph["box"].ndim == 1)
            strain = (3, 3) if sheared else (3,)
            positions = jnp.asarray(frame.positions, jnp.result_type(float))
            found = _of_all(self.potential.energy_fn, strain)(self.params, positions, graph)
            energy, forces, virial = (np.asarray(x, np.float64) for x in found)
            references = self.potential.reference_energies
            if references is not None:
                energy = energy + np.sum(np.asarray(references)[species])
            self.results = {
                "energy": float(energy.mean()),
                "free_energy": float(energy.mean()),
                "forces": forces.mean(0),
                "energy_members": energy,
                "forces_members": forces,
                "energy_sd": float(_sd(energy)),
                "forces_sd": _sd(forces),
            }
            if frame.cell.rank == 3 and frame.pbc.any():
                virial = virial if sheared else virial[..., None] * np.eye(3)
                stress = voigt(-virial / frame.get_volume())
                self.results |= {"stress": stress.mean(0), "stress_sd": _sd(stress)}
            worst = float(np.sqrt((self.results["forces_sd"] ** 2).sum(-1)).max())
            self.results["max_force_sd"] = worst
            self._judge(worst)

        def _species(self, frame):
            table = list(self.potential.elements)
            unknown = [atom.symbol for atom in frame if atom.number not in table]
            if unknown:
                raise ValueError(f"networks were not trained on {unknown[0]}, which atoms have.")
            return np.array([table.index(z) for z in frame.numbers], np.int32)

        def _graph(self, frame, species):
            of, inputs = self.potential, self.potential.inputs
            if frame.pbc.any() and "box" not in inputs:
                raise ValueError(
                    "atoms must not be periodic: the networks were trained without a box."
                )
            reach = 10.0 if of.cutoff is None else of.cutoff
            box = boxes_of([frame], reach, always=True)[0] if "box" in inputs else None
            graph: dict[str, Any] = {}
            if "species" in inputs:
                graph["species"] = species
            if "mask" in inputs:
                graph["mask"] = np.ones(len(frame), bool)
            if box is not None:
                if of.lengths and not np.allclose(box, np.diag(np.diag(box))):
                    raise ValueError(
                        "atoms must have a cell of right angles: the networks were trained on edge "
                        "lengths."
                    )
                graph["box"] = np.diag(box) if of.lengths else box
            if of.cutoff is not None and "neighbors" in inputs:
                lists = neighbor_lists(
                    frame.positions[None], of.cutoff, None if box is None else box[None], None
                )
                graph["neighbors"] = self._padded(lists)
            return jax.tree.map(jnp.asarray, graph)

        def _padded(self, lists):
            """One list, of a length that seldom changes, so that nothing compiles anew."""
            pairs = lists.senders.shape[1]
            if pairs > self._pairs:
                self._pairs = 64 * int(np.ceil(1.1 * pairs / 64))

            def longer(x):
                x = np.asarray(x)[0]
                more = self._pairs - pairs
                return x if x.ndim == 0 else np.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)])

            return Neighbors(*map(longer, lists))

        def _judge(self, worst):
            if self.max_force_sd is None or worst <= self.max_force_sd:
                return
            said = (
                f"networks disagree about the force on an atom by {worst:.3g} eV/Å, more than "
                f"max_force_sd={self.max_force_sd:g}: label this frame and train on it."
            )
            if self.above == "stop":
                raise UncertaintyError(said)
            if not self._warned:
                self._warned = True
                warnings.warn(said, RuntimeWarning, stacklevel=2)

    return NetworksCalculator


def _sd(members: np.ndarray) -> np.ndarray:
    return members.std(0, ddof=1) if len(members) > 1 else np.zeros(members.shape[1:])


@remembered
def _of_all(energy_fn, strain):
    @hoisted_jit
    def of_all(params, positions, graph):
        def one(p):
            return predict_one(energy_fn, p, positions, graph, strain)

        return jax.vmap(one)(params)

    return of_all
