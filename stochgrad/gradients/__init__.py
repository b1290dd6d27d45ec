"""Stochastic estimates of gradients."""

from stochgrad._deprecations import renamed as _renamed
from stochgrad.gradients._control_variate import control_variate as control_variate
from stochgrad.gradients._directions import directional_derivatives as directional_derivatives
from stochgrad.gradients._divergence import FDivergence as FDivergence
from stochgrad.gradients._divergence import RenyiBound as RenyiBound
from stochgrad.gradients._divergence import alpha_family as alpha_family
from stochgrad.gradients._divergence import jensen_shannon_family as jensen_shannon_family
from stochgrad.gradients._divergence import renyi as renyi
from stochgrad.gradients._like import check_like as check_like
from stochgrad.gradients._like import evaluated as evaluated
from stochgrad.gradients._minibatch import as_gradient as as_gradient
from stochgrad.gradients._minibatch import minibatch as minibatch
from stochgrad.gradients._mode_check import check_center as check_center
from stochgrad.gradients._mode_check import why_no_mode as why_no_mode
from stochgrad.gradients._path import Pushed as Pushed
from stochgrad.gradients._path import by_inverse as by_inverse
from stochgrad.gradients._path import dense as dense
from stochgrad.gradients._path import elementwise as elementwise
from stochgrad.gradients._path import freeze as freeze
from stochgrad.gradients._path import path_log_density as path_log_density
from stochgrad.gradients._path import push_score as push_score
from stochgrad.gradients._path import triangular as triangular
from stochgrad.gradients._path_total_mix import (
    leave_one_out_coefficients as leave_one_out_coefficients,
)
from stochgrad.gradients._pullback import mixed_precision as mixed_precision
from stochgrad.gradients._pullback import trainable as trainable
from stochgrad.gradients._reach import beyond_the_path as beyond_the_path
from stochgrad.gradients._reach import depends as depends
from stochgrad.gradients._registry import GRADIENTS as GRADIENTS
from stochgrad.gradients._saga import SAGAState as SAGAState
from stochgrad.gradients._saga import saga as saga
from stochgrad.gradients._score_function import Baseline as Baseline
from stochgrad.gradients._score_function import leave_one_out as leave_one_out
from stochgrad.gradients._score_function import score_function as score_function
from stochgrad.gradients._svrg import SVRGState as SVRGState
from stochgrad.gradients._svrg import svrg as svrg

__getattr__ = _renamed(
    __name__,
    conducive="stochgrad.federated.conducive",
    Surrogates="stochgrad.federated.Surrogates",
    Precision="stochgrad.federated.Precision",
    Diagonal="stochgrad.federated.Diagonal",
    Full="stochgrad.federated.Full",
    LowRank="stochgrad.federated.LowRank",
)

__all__ = [
    "Pushed",
    "SAGAState",
    "SVRGState",
    "by_inverse",
    "control_variate",
    "dense",
    "directional_derivatives",
    "elementwise",
    "freeze",
    "leave_one_out",
    "leave_one_out_coefficients",
    "minibatch",
    "mixed_precision",
    "path_log_density",
    "push_score",
    "saga",
    "score_function",
    "svrg",
    "trainable",
    "triangular",
]


def __dir__() -> list[str]:
    return sorted(__all__)
