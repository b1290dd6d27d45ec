"""Scales of the noise of reference forces, energies and virials: known, or learned."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from stochgrad.core import check_array, check_number, describe


class Learned(NamedTuple):
    r"""A noise scale to be learned, with an exponential prior.

    Attributes:
        mean: Mean of the prior, a number or one for each species.
    """

    mean: Any


def learned(mean: Any) -> Learned:
    r"""A noise scale to be learned beside the weights.

    $$\sigma = m\,e^{s}, \qquad \sigma \sim \mathrm{Exponential}(\text{mean } m),$$

    where the position holds s, so that no step can make the scale negative; the density of s is
    that of $\sigma$ times $d\sigma/ds$.

    Args:
        mean: m, the scale expected, in the units of what it is the noise of (energies and virials:
            per atom). An array of one number for each species gives each species its own.

    Raises:
        TypeError: these are no numbers.
        ValueError: a number is not positive.

    Example:
        >>> import stochgrad
        >>> float(stochgrad.potentials.learned(200.0).mean)
        200.0
    """
    return Learned(_positive("mean", mean))


def _positive(name: str, value: Any) -> np.ndarray:
    """A positive number, or an array of them."""
    array = check_array(name, value, finite=False)
    for number in array.ravel() if array.size else [np.nan]:
        check_number(name, number)
    return array.astype(np.float64)


Noise = Mapping[str, Any]


def checked_noise(noise: Any, wanted: list[str]) -> dict[str, Any]:
    """The noise of forces, energies and virials by name, each a number, an array or ``Learned``."""
    named = dict(noise) if isinstance(noise, Mapping) else {"forces": noise}
    if set(named) != set(wanted):
        raise ValueError(
            f"noise must name a scale for each of {wanted}, which the data have, got "
            f"{sorted(map(str, named))}."
        )
    for name, value in named.items():
        free = isinstance(value, Learned)
        if isinstance(value, type) or callable(value):
            raise TypeError(f"noise of {name} must be a number or learned, got {describe(value)}.")
        scale = _positive(f"noise of {name}", value.mean if free else value)
        if scale.ndim > (name == "forces"):
            raise ValueError(
                f"noise of {name} must be one number"
                + (" or one for each species" if name == "forces" else "")
                + f", got shape {scale.shape}."
            )
    return named


def initial_noise(noise: dict[str, Any]) -> dict[str, Array]:
    """Where the learned scales start: at the means of their priors."""
    return {k: jnp.zeros(np.shape(v.mean)) for k, v in noise.items() if isinstance(v, Learned)}


def noise_scale(
    value: Any, free: Float[Array, "..."] | None, species: Array | None
) -> Float[Array, "..."]:
    """The scale, of each atom where it is one of each species."""
    scale = jnp.asarray(value.mean if isinstance(value, Learned) else value, float)
    if free is not None:
        scale = scale.astype(free.dtype) * jnp.exp(free)
    return scale if scale.ndim == 0 else scale[species]


def noise_log_prior(free: dict[str, Array]) -> tuple[Array, Array]:
    """Log prior densities of the learned scales, and the log derivative of the way to them."""
    density = sum((jnp.sum(-jnp.exp(s)) for s in free.values()), jnp.zeros(()))
    return density, sum((jnp.sum(s) for s in jax.tree.leaves(free)), jnp.zeros(()))
