"""Bridges to other libraries, each imported on first use."""

from stochgrad.interop._parquet import ParquetColumns as ParquetColumns
from stochgrad.interop.numpyro import PSGLD as PSGLD
from stochgrad.interop.numpyro import SGHMC as SGHMC
from stochgrad.interop.numpyro import SGLD as SGLD
from stochgrad.interop.numpyro import SGNHT as SGNHT
from stochgrad.interop.numpyro import Cyclical as Cyclical
from stochgrad.interop.numpyro import GradientVariances as GradientVariances
from stochgrad.interop.numpyro import PathGradientELBO as PathGradientELBO
from stochgrad.interop.numpyro import ReplicaExchange as ReplicaExchange
from stochgrad.interop.numpyro import all_rows as all_rows
from stochgrad.interop.numpyro import from_numpyro as from_numpyro
from stochgrad.interop.numpyro import latent_guide as latent_guide
from stochgrad.interop.numpyro import latent_model as latent_model
