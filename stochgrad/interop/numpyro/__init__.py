"""The bridge to numpyro; ``auto_flow`` needs flowjax and is imported on its own."""

import numpyro as _numpyro  # noqa: F401  whole: "from numpyro.x" loads a lazy one, as ArviZ's, twice

from stochgrad.interop.numpyro import _transforms as _transforms
from stochgrad.interop.numpyro._handler import all_rows as all_rows
from stochgrad.interop.numpyro._kernels import PSGLD as PSGLD
from stochgrad.interop.numpyro._kernels import SGHMC as SGHMC
from stochgrad.interop.numpyro._kernels import SGLD as SGLD
from stochgrad.interop.numpyro._kernels import SGNHT as SGNHT
from stochgrad.interop.numpyro._kernels import Cyclical as Cyclical
from stochgrad.interop.numpyro._kernels import ReplicaExchange as ReplicaExchange
from stochgrad.interop.numpyro._latent import latent_guide as latent_guide
from stochgrad.interop.numpyro._latent import latent_model as latent_model
from stochgrad.interop.numpyro._model import from_numpyro as from_numpyro
from stochgrad.interop.numpyro._path_elbo import GradientVariances as GradientVariances
from stochgrad.interop.numpyro._path_elbo import PathGradientELBO as PathGradientELBO
from stochgrad.interop.numpyro._report import to_draws as to_draws
