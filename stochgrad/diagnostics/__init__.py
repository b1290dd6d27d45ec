"""Checks on draws."""

from stochgrad.diagnostics._calibration import Calibration as Calibration
from stochgrad.diagnostics._calibration import calibration as calibration
from stochgrad.diagnostics._calibration import interval_coverage as interval_coverage
from stochgrad.diagnostics._errors import mcse as mcse
from stochgrad.diagnostics._errors import rhat as rhat
from stochgrad.diagnostics._excursions import excursion_reasons as excursion_reasons
from stochgrad.diagnostics._kfold import kfold as kfold
from stochgrad.diagnostics._law import Law as Law
from stochgrad.diagnostics._law import predict_law as predict_law
from stochgrad.diagnostics._longest_step import with_law as with_law
from stochgrad.diagnostics._longest_step import with_step as with_step
from stochgrad.diagnostics._longest_step import worst_bias as worst_bias
from stochgrad.diagnostics._loo import loo as loo
from stochgrad.diagnostics._neighbors import knn_divergence as knn_divergence
from stochgrad.diagnostics._report import report as report
from stochgrad.diagnostics._richardson import Extrapolated as Extrapolated
from stochgrad.diagnostics._richardson import richardson as richardson
from stochgrad.diagnostics._sandwich import Sandwich as Sandwich
from stochgrad.diagnostics._sandwich import sandwich as sandwich
from stochgrad.diagnostics._sbc import SBC as SBC
from stochgrad.diagnostics._sbc import sbc as sbc
from stochgrad.diagnostics._sensitivity import sensitivity as sensitivity
from stochgrad.diagnostics._stein import ksd as ksd
from stochgrad.diagnostics._temperature import Temperatures as Temperatures
from stochgrad.diagnostics._temperature import temperatures as temperatures
from stochgrad.diagnostics._verdict import Verdict as Verdict
from stochgrad.diagnostics._verdict import bias_reasons as bias_reasons
from stochgrad.diagnostics._verdict import diagnose as diagnose
from stochgrad.diagnostics._weak_order import Problem as Problem
from stochgrad.diagnostics._weak_order import WeakOrder as WeakOrder
from stochgrad.diagnostics._weak_order import double_well as double_well
from stochgrad.diagnostics._weak_order import gaussian as gaussian
from stochgrad.diagnostics._weak_order import minibatch_gaussian as minibatch_gaussian
from stochgrad.diagnostics._weak_order import weak_order as weak_order

__all__ = [
    "Calibration",
    "Extrapolated",
    "Law",
    "Problem",
    "SBC",
    "Sandwich",
    "Temperatures",
    "Verdict",
    "WeakOrder",
    "bias_reasons",
    "calibration",
    "diagnose",
    "double_well",
    "gaussian",
    "interval_coverage",
    "kfold",
    "knn_divergence",
    "ksd",
    "loo",
    "mcse",
    "minibatch_gaussian",
    "predict_law",
    "report",
    "rhat",
    "richardson",
    "sandwich",
    "sbc",
    "sensitivity",
    "temperatures",
    "weak_order",
    "with_law",
    "with_step",
    "worst_bias",
]


def __dir__() -> list[str]:
    return sorted(__all__)
