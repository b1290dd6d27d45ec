"""Sampling from the posterior of data that stay with their owners."""

from stochgrad.core import visiting as visiting
from stochgrad.federated._curvature import gauss_newton as gauss_newton
from stochgrad.federated._fald import fald as fald
from stochgrad.federated._posterior import posterior as posterior
from stochgrad.federated._qlsd import qlsd as qlsd
from stochgrad.federated._reference import Reference as Reference
from stochgrad.federated._reference import find_reference as find_reference
from stochgrad.federated._reference import maximize_over_clients as maximize_over_clients
from stochgrad.federated._sample import sample as sample
from stochgrad.federated._stability import Stability as Stability
from stochgrad.federated._stability import StabilityWarning as StabilityWarning
from stochgrad.federated._stability import capped as capped
from stochgrad.federated._stability import stability as stability
from stochgrad.federated._stability import warn_of_own_effects as warn_of_own_effects
from stochgrad.federated._surrogates import exact as exact
from stochgrad.federated._surrogates import fisher_merge as fisher_merge
from stochgrad.federated._surrogates import gaussian as gaussian
from stochgrad.federated._surrogates import global_first_order as global_first_order
from stochgrad.federated._surrogates import global_quadratic as global_quadratic
from stochgrad.federated._surrogates import laplace_local as laplace_local
from stochgrad.federated._surrogates import sampled as sampled
from stochgrad.federated._visits import with_visits as with_visits
