"""Stochastic estimates of gradients."""

from stochgrad.gradients._control_variate import control_variate as control_variate
from stochgrad.gradients._minibatch import as_gradient as as_gradient
from stochgrad.gradients._minibatch import minibatch as minibatch
from stochgrad.gradients._saga import SAGAState as SAGAState
from stochgrad.gradients._saga import saga as saga
from stochgrad.gradients._svrg import SVRGState as SVRGState
from stochgrad.gradients._svrg import svrg as svrg
