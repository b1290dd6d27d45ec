"""Kernels for ``numpyro.infer.MCMC``."""

from stochgrad.interop import PSGLD as PSGLD
from stochgrad.interop import SGHMC as SGHMC
from stochgrad.interop import SGLD as SGLD
from stochgrad.interop import SGNHT as SGNHT
from stochgrad.interop import Cyclical as Cyclical
from stochgrad.interop import ReplicaExchange as ReplicaExchange
