"""Stochastic estimates of gradients."""

from stochgrad.gradients._conducive import conducive as conducive
from stochgrad.gradients._control_variate import control_variate as control_variate
from stochgrad.gradients._minibatch import as_gradient as as_gradient
from stochgrad.gradients._minibatch import minibatch as minibatch
from stochgrad.gradients._saga import SAGAState as SAGAState
from stochgrad.gradients._saga import saga as saga
from stochgrad.gradients._surrogates import Diagonal as Diagonal
from stochgrad.gradients._surrogates import Full as Full
from stochgrad.gradients._surrogates import LowRank as LowRank
from stochgrad.gradients._surrogates import Precision as Precision
from stochgrad.gradients._surrogates import Surrogates as Surrogates
from stochgrad.gradients._svrg import SVRGState as SVRGState
from stochgrad.gradients._svrg import svrg as svrg
