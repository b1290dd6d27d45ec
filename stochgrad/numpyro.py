"""Kernels for ``numpyro.infer.MCMC``."""

from stochgrad.interop import SGHMC as SGHMC
from stochgrad.interop import SGLD as SGLD
