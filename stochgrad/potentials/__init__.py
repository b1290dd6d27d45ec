"""Neural-network potentials: posteriors of their weights, and what these mean for observables."""

from stochgrad.potentials._approximate import Approximation as Approximation
from stochgrad.potentials._approximate import last_layer_laplace as last_layer_laplace
from stochgrad.potentials._approximate import swag as swag
from stochgrad.potentials._ase import from_ase as from_ase
from stochgrad.potentials._ase import read_extxyz as read_extxyz
from stochgrad.potentials._ase import to_ase as to_ase
from stochgrad.potentials._calculator import UncertaintyError as UncertaintyError
from stochgrad.potentials._calculator import calculator as calculator
from stochgrad.potentials._cell_lists import ListPlan as ListPlan
from stochgrad.potentials._cell_lists import plan_lists as plan_lists
from stochgrad.potentials._concatenate import concatenate as concatenate
from stochgrad.potentials._configurations import Configurations as Configurations
from stochgrad.potentials._configurations import configurations as configurations
from stochgrad.potentials._disagreement import force_rhat as force_rhat
from stochgrad.potentials._disagreement import novelty as novelty
from stochgrad.potentials._dynamics import Trajectories as Trajectories
from stochgrad.potentials._dynamics import simulate as simulate
from stochgrad.potentials._force_matching import force_matching as force_matching
from stochgrad.potentials._freeze import freeze as freeze
from stochgrad.potentials._geometry import angle as angle
from stochgrad.potentials._geometry import dihedral as dihedral
from stochgrad.potentials._geometry import displacement as displacement
from stochgrad.potentials._geometry import distances as distances
from stochgrad.potentials._intervals import Intervals as Intervals
from stochgrad.potentials._intervals import intervals as intervals
from stochgrad.potentials._langevin import langevin as langevin
from stochgrad.potentials._neighbors import Neighbors as Neighbors
from stochgrad.potentials._neighbors import pair_vectors as pair_vectors
from stochgrad.potentials._networks import Networks as Networks
from stochgrad.potentials._networks import load_networks as load_networks
from stochgrad.potentials._networks import networks as networks
from stochgrad.potentials._noise_model import Learned as Learned
from stochgrad.potentials._noise_model import learned as learned
from stochgrad.potentials._observables import Observable as Observable
from stochgrad.potentials._observables import adf as adf
from stochgrad.potentials._observables import average as average
from stochgrad.potentials._observables import dihedrals as dihedrals
from stochgrad.potentials._observables import free_energy as free_energy
from stochgrad.potentials._observables import rdf as rdf
from stochgrad.potentials._potential import Potential as Potential
from stochgrad.potentials._predict import Predicted as Predicted
from stochgrad.potentials._predict import predict as predict
from stochgrad.potentials._pressure import pressure as pressure
from stochgrad.potentials._propagate import Propagated as Propagated
from stochgrad.potentials._propagate import Reweighted as Reweighted
from stochgrad.potentials._propagate import mean_energy as mean_energy
from stochgrad.potentials._propagate import propagate as propagate
from stochgrad.potentials._propagate import reweight as reweight
from stochgrad.potentials._transport import diffusion as diffusion
from stochgrad.potentials._transport import mean_square_displacement as mean_square_displacement

__all__ = [
    "Approximation",
    "Configurations",
    "Intervals",
    "Learned",
    "ListPlan",
    "Neighbors",
    "Networks",
    "Observable",
    "Potential",
    "Predicted",
    "Propagated",
    "Reweighted",
    "Trajectories",
    "UncertaintyError",
    "adf",
    "angle",
    "average",
    "calculator",
    "concatenate",
    "configurations",
    "diffusion",
    "dihedral",
    "dihedrals",
    "displacement",
    "distances",
    "force_matching",
    "force_rhat",
    "free_energy",
    "freeze",
    "from_ase",
    "intervals",
    "langevin",
    "last_layer_laplace",
    "learned",
    "load_networks",
    "mean_energy",
    "mean_square_displacement",
    "networks",
    "novelty",
    "pair_vectors",
    "plan_lists",
    "predict",
    "pressure",
    "propagate",
    "rdf",
    "read_extxyz",
    "reweight",
    "simulate",
    "swag",
    "to_ase",
]


def __dir__() -> list[str]:
    return sorted(__all__)
