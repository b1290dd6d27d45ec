"""Bridges to other libraries, each imported on first use."""

from stochgrad.interop import _numpyro_transforms as _numpyro_transforms
from stochgrad.interop._numpyro_handler import all_rows as all_rows
from stochgrad.interop._numpyro_kernels import PSGLD as PSGLD
from stochgrad.interop._numpyro_kernels import SGHMC as SGHMC
from stochgrad.interop._numpyro_kernels import SGLD as SGLD
from stochgrad.interop._numpyro_kernels import SGNHT as SGNHT
from stochgrad.interop._numpyro_kernels import Cyclical as Cyclical
from stochgrad.interop._numpyro_kernels import ReplicaExchange as ReplicaExchange
from stochgrad.interop._numpyro_latent import latent_guide as latent_guide
from stochgrad.interop._numpyro_latent import latent_model as latent_model
from stochgrad.interop._numpyro_model import from_numpyro as from_numpyro
from stochgrad.interop._parquet import ParquetColumns as ParquetColumns
from stochgrad.interop._path_elbo import GradientVariances as GradientVariances
from stochgrad.interop._path_elbo import PathGradientELBO as PathGradientELBO
from stochgrad.interop._path_elbo import PathGradientWarning as PathGradientWarning
