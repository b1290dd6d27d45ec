"""Stochastic estimates of gradients."""

from stochgrad.gradients._control_variate import control_variate as control_variate
from stochgrad.gradients._minibatch import as_gradient as as_gradient
from stochgrad.gradients._minibatch import minibatch as minibatch
