"""Checks on draws."""

from stochgrad.diagnostics._calibration import Calibration as Calibration
from stochgrad.diagnostics._calibration import calibration as calibration
from stochgrad.diagnostics._calibration import interval_coverage as interval_coverage
from stochgrad.diagnostics._errors import mcse as mcse
from stochgrad.diagnostics._errors import rhat as rhat
from stochgrad.diagnostics._neighbors import knn_divergence as knn_divergence
from stochgrad.diagnostics._richardson import Extrapolated as Extrapolated
from stochgrad.diagnostics._richardson import richardson as richardson
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
