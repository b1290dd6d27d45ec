"""Samplers driven by stochastic gradients."""

from stochgrad.sgmcmc._center import find_center as find_center
from stochgrad.sgmcmc._sghmc import SGHMCInfo as SGHMCInfo
from stochgrad.sgmcmc._sghmc import SGHMCState as SGHMCState
from stochgrad.sgmcmc._sghmc import sghmc as sghmc
from stochgrad.sgmcmc._sgld import SGLDInfo as SGLDInfo
from stochgrad.sgmcmc._sgld import SGLDState as SGLDState
from stochgrad.sgmcmc._sgld import sgld as sgld
