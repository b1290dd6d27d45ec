"""Sampling from the posterior of data that stay with their owners."""

from stochgrad.federated._accounting import Adjacency as Adjacency
from stochgrad.federated._accounting import block_visits as block_visits
from stochgrad.federated._accounting import check_adjacency as check_adjacency
from stochgrad.federated._accounting import check_delta as check_delta
from stochgrad.federated._accounting import epsilon_of as epsilon_of
from stochgrad.federated._accounting import langevin_cost as langevin_cost
from stochgrad.federated._accounting import most_cost as most_cost
from stochgrad.federated._accounting import privacy_of_steps as privacy_of_steps
from stochgrad.federated._between_clients import visit_notes as visit_notes
from stochgrad.federated._choice import choose_surrogates as choose_surrogates
from stochgrad.federated._choice import too_wide as too_wide
from stochgrad.federated._client_sums import likelihood_sum as likelihood_sum
from stochgrad.federated._client_sums import prior_only as prior_only
from stochgrad.federated._clients import Clients as Clients
from stochgrad.federated._clients import Visit as Visit
from stochgrad.federated._clients import client_rows as client_rows
from stochgrad.federated._clients import current_visit as current_visit
from stochgrad.federated._clients import map_batches as map_batches
from stochgrad.federated._clients import require_clients as require_clients
from stochgrad.federated._clipping import client_sums as client_sums
from stochgrad.federated._clipping import clipped_minibatch as clipped_minibatch
from stochgrad.federated._clipping import clipped_share as clipped_share
from stochgrad.federated._clipping import noisy_fisher as noisy_fisher
from stochgrad.federated._clipping import noisy_slope as noisy_slope
from stochgrad.federated._clipping import private_surrogates as private_surrogates
from stochgrad.federated._conducive import add_conducive as add_conducive
from stochgrad.federated._conducive import conducive as conducive
from stochgrad.federated._conducive import with_conducive as with_conducive
from stochgrad.federated._conducive_svrg import conducive_svrg as conducive_svrg
from stochgrad.federated._curvature import gauss_newton as gauss_newton
from stochgrad.federated._fald import fald as fald
from stochgrad.federated._gaussians import Diagonal as Diagonal
from stochgrad.federated._gaussians import Full as Full
from stochgrad.federated._gaussians import LowRank as LowRank
from stochgrad.federated._gaussians import Precision as Precision
from stochgrad.federated._gaussians import Surrogates as Surrogates
from stochgrad.federated._gaussians import conducive_parameters as conducive_parameters
from stochgrad.federated._layout import concatenate_clients as concatenate_clients
from stochgrad.federated._matrices import MOST_CLIENTS as MOST_CLIENTS
from stochgrad.federated._matrices import MOST_EXACT_DIAGONALS as MOST_EXACT_DIAGONALS
from stochgrad.federated._matrices import Curvatures as Curvatures
from stochgrad.federated._matrices import as_matrices as as_matrices
from stochgrad.federated._matrices import curvature_matrices as curvature_matrices
from stochgrad.federated._matrices import few_matrices as few_matrices
from stochgrad.federated._matrices import precision_diagonals as precision_diagonals
from stochgrad.federated._matrices import prior_curvature as prior_curvature
from stochgrad.federated._matrices import rim as rim
from stochgrad.federated._matrices import surrogate_matrices as surrogate_matrices
from stochgrad.federated._posterior import posterior as posterior
from stochgrad.federated._precautions import describe_spread as describe_spread
from stochgrad.federated._precautions import describe_unstable as describe_unstable
from stochgrad.federated._precautions import warn_of_own_effects as warn_of_own_effects
from stochgrad.federated._precautions import warn_of_unstable_visits as warn_of_unstable_visits
from stochgrad.federated._qlsd import qlsd as qlsd
from stochgrad.federated._reference import Reference as Reference
from stochgrad.federated._reference import find_reference as find_reference
from stochgrad.federated._reference import maximize_over_clients as maximize_over_clients
from stochgrad.federated._sample import sample as sample
from stochgrad.federated._schedule import set_share as set_share
from stochgrad.federated._schedule import visiting as visiting
from stochgrad.federated._spread import Spread as Spread
from stochgrad.federated._spread import StabilityWarning as StabilityWarning
from stochgrad.federated._spread import diagonal_spread as diagonal_spread
from stochgrad.federated._spread import matrix_spread as matrix_spread
from stochgrad.federated._spread import step_time as step_time
from stochgrad.federated._stability import Stability as Stability
from stochgrad.federated._stability import capped as capped
from stochgrad.federated._stability import safe_scale as safe_scale
from stochgrad.federated._stability import stability as stability
from stochgrad.federated._stability import visit_margins as visit_margins
from stochgrad.federated._surrogates import exact as exact
from stochgrad.federated._surrogates import fisher_merge as fisher_merge
from stochgrad.federated._surrogates import gaussian as gaussian
from stochgrad.federated._surrogates import global_first_order as global_first_order
from stochgrad.federated._surrogates import global_quadratic as global_quadratic
from stochgrad.federated._surrogates import laplace_local as laplace_local
from stochgrad.federated._surrogates import sampled as sampled
from stochgrad.federated._visits import with_visits as with_visits

__all__ = [
    "Clients",
    "Diagonal",
    "Full",
    "LowRank",
    "Reference",
    "Stability",
    "StabilityWarning",
    "Surrogates",
    "Visit",
    "capped",
    "clipped_minibatch",
    "clipped_share",
    "conducive",
    "conducive_svrg",
    "current_visit",
    "epsilon_of",
    "exact",
    "fald",
    "find_reference",
    "fisher_merge",
    "gauss_newton",
    "gaussian",
    "global_first_order",
    "global_quadratic",
    "langevin_cost",
    "laplace_local",
    "most_cost",
    "posterior",
    "privacy_of_steps",
    "private_surrogates",
    "qlsd",
    "require_clients",
    "sample",
    "sampled",
    "stability",
    "visiting",
    "with_visits",
]


def __dir__() -> list[str]:
    return sorted(__all__)
