"""Dynamics that several methods drive with."""

from stochgrad.kernels._ascend import AscendInfo as AscendInfo
from stochgrad.kernels._ascend import AscendState as AscendState
from stochgrad.kernels._ascend import ascend as ascend
