"""Neural-network potentials: posteriors of their weights, and what these mean for observables."""

from stochgrad.potentials._configurations import Configurations as Configurations
from stochgrad.potentials._configurations import configurations as configurations
from stochgrad.potentials._force_matching import force_matching as force_matching
from stochgrad.potentials._geometry import angle as angle
from stochgrad.potentials._geometry import dihedral as dihedral
from stochgrad.potentials._geometry import displacement as displacement
from stochgrad.potentials._geometry import distances as distances
from stochgrad.potentials._noise_model import Learned as Learned
from stochgrad.potentials._noise_model import learned as learned
from stochgrad.potentials._predict import Predicted as Predicted
from stochgrad.potentials._predict import predict as predict
