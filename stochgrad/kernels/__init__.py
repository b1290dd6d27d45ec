"""Dynamics that several methods drive with."""

from stochgrad._deprecations import renamed as _renamed
from stochgrad.kernels._ascend import AscendInfo as AscendInfo
from stochgrad.kernels._ascend import AscendState as AscendState
from stochgrad.kernels._ascend import ascend as ascend
from stochgrad.kernels._fit import Fit as Fit
from stochgrad.kernels._fit import fit as fit
from stochgrad.kernels._independence import IndependenceInfo as IndependenceInfo
from stochgrad.kernels._independence import IndependenceState as IndependenceState
from stochgrad.kernels._independence import acceptance as acceptance
from stochgrad.kernels._independence import independence as independence
from stochgrad.kernels._linear_maps import LinearMaps as LinearMaps
from stochgrad.kernels._linear_maps import joint_maps as joint_maps
from stochgrad.kernels._linear_maps import mode_maps as mode_maps
from stochgrad.kernels._mala import MALAInfo as MALAInfo
from stochgrad.kernels._mala import MALAState as MALAState
from stochgrad.kernels._mala import mala as mala
from stochgrad.kernels._mala import on_all_rows as on_all_rows
from stochgrad.kernels._noise_exposed import Affine as Affine
from stochgrad.kernels._noise_exposed import KernelFactory as KernelFactory
from stochgrad.kernels._noise_exposed import NoiseExposedStep as NoiseExposedStep
from stochgrad.kernels._noise_exposed import affine_steps as affine_steps
from stochgrad.kernels._noise_exposed import expose_noise as expose_noise
from stochgrad.kernels._resample import systematic as systematic

__getattr__ = _renamed(__name__, open_step="expose_noise", OpenStep="NoiseExposedStep")

__all__ = [
    "Fit",
    "ascend",
    "fit",
    "independence",
    "mala",
]


def __dir__() -> list[str]:
    return sorted(__all__)
