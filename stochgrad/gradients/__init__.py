"""Stochastic estimates of gradients."""

from stochgrad.gradients._minibatch import as_gradient as as_gradient
from stochgrad.gradients._minibatch import minibatch as minibatch
