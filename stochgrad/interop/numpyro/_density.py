"""The log density of a numpyro model on minibatches, in unconstrained space."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.transforms import IdentityTransform
from numpyro.infer.util import constrain_fn, unconstrain_fn
from numpyro.infer.util import log_density as numpyro_log_density

from stochgrad.core import Posterior
from stochgrad.interop.numpyro._arguments import Arguments
from stochgrad.interop.numpyro._handler import Streamed, give_rows
from stochgrad.interop.numpyro._inspect import Summary
from stochgrad.interop.numpyro._minibatches import Minibatches
from stochgrad.interop.numpyro._rows import Density, site_densities

_RADIUS = 2.0


def model_posterior(
    model: Callable, arguments: Arguments, summary: Summary, minibatches: Minibatches
) -> tuple[Posterior, Callable[[Any, Any], dict[str, Density]]]:
    """A model's posterior, and ``(position, batch) -> log density of each site``."""
    args, kwargs = arguments
    batches, template, arrays = minibatches
    streamed = arrays if isinstance(arrays, Streamed) else None

    def on_rows(position, batch):
        change = _ChangeOfVariables(position)
        minibatch = give_rows(handlers.substitute(model, substitute_fn=change), batch, arrays)
        joint, trace = numpyro_log_density(minibatch, args, kwargs, {})
        return joint, trace, change

    def log_density(position, batch):
        joint, _, change = on_rows(position, batch)
        return joint + change.log_jacobian

    def by_site(position, batch):
        _, trace, change = on_rows(position, batch)
        return site_densities(trace, change.log_jacobians, summary.dims)

    def initial(key):
        keys = jax.random.split(key, len(summary.shapes))
        return {
            name: jax.random.uniform(k, shape, minval=-_RADIUS, maxval=_RADIUS)
            for k, (name, shape) in zip(keys, summary.shapes.items(), strict=True)
        }

    def constrain(position):
        minibatch = give_rows(model, template, streamed)
        values = constrain_fn(minibatch, args, kwargs, position, return_deterministic=True)
        return {name: value for name, value in values.items() if name in summary.dims}

    def unconstrain(values):
        latent = {name: values[name] for name in summary.shapes}
        return unconstrain_fn(give_rows(model, template, streamed), args, kwargs, latent)

    target = Posterior(log_density, batches, initial, constrain, unconstrain, summary.dims)
    return target, by_site


def lay_out(target: Posterior) -> None:
    """Run the model once without computing anything, which lays out what it subsamples."""

    def once(key):
        batch, _ = target.batches.next(target.batches.init(key))
        initial: Any = target.initial
        return target.log_density(initial(key), batch)

    density = jax.eval_shape(once, jax.random.key(0))
    if density.shape != () or not jnp.issubdtype(density.dtype, jnp.floating):
        raise ValueError(
            f"the model's log density must be a real number, got dtype {density.dtype} and shape "
            f"{density.shape}: its data or its parameters are of another kind."
        )


class _ChangeOfVariables:
    """Puts unconstrained values into a model's sites, and adds up the Jacobians on the way.

    numpyro's ``potential_energy`` adds them as factors of the model, which the model's own
    ``handlers.scale`` and ``handlers.mask`` then change; a change of variables must not be.
    """

    def __init__(self, position: Mapping[str, jax.Array]):
        self.position = position
        self.log_jacobian: Any = 0.0
        self.log_jacobians: dict[str, Any] = {}

    def __call__(self, site: Any) -> Any:
        name = site["name"]
        if name not in self.position:
            return None
        z = self.position[name]
        transform = biject_to(site["fn"].support)
        index = site["infer"].get("_scan_current_index")
        if index is not None and jnp.ndim(z) > len(transform.inverse_shape(site["fn"].shape())):
            z = z[index]
        value = transform(z)
        if not isinstance(transform, IdentityTransform):
            log_det = jnp.sum(transform.log_abs_det_jacobian(z, value))
            if index is None:
                self.log_jacobian = self.log_jacobian + log_det
                self.log_jacobians[name] = log_det
            else:  # inside a scan only a site of the scan can carry it out
                numpyro.factor(f"_{name}_log_jacobian", log_det)
        return value
