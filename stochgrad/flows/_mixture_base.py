"""A mixture of normals at the clusters of some draws, to start a flow from."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import Normal, VmapMixture
from jaxtyping import Array, Float

from stochgrad.core import check_count, check_finite, check_number
from stochgrad.flows._forward import points

_ROUNDS = 20
_LEAST_SCALE = 1e-3


def mixture_of_normals(
    samples: Float[Array, "n d"], num_components: int, defensive: float = 0.1
) -> VmapMixture:
    """A mixture of diagonal normals, one for each cluster of some samples, with trained weights.

    Clusters by k-means, from centers of which each is the sample furthest from those before. It is
    a start and no fit: for a flow's base, or a flow by itself. One more component is as wide as all
    samples: without it the flow has next to nothing between the clusters, and the few points of the
    density there have weights without bound (a defensive mixture, Hesterberg 1995).

    Args:
        samples: Of shape (n, d).
        num_components: How many clusters.
        defensive: Share of the wide component at the start; without it where this is 0.

    Raises:
        ValueError: the samples are no matrix, or fewer than the components.

    Example:
        >>> import jax.numpy as jnp, stochgrad
        >>> x = jnp.array([[-5.1], [-4.9], [4.9], [5.1]])
        >>> mixture = stochgrad.flows.mixture_of_normals(x, 2, defensive=0.0)
        >>> float(jnp.exp(mixture.log_prob(jnp.array([5.0]))).round(1))
        2.0
    """
    array = points("samples", samples)
    count = check_count("num_components", num_components)
    defensive = check_number("defensive", defensive, zero=True, most=0.99)
    if array.ndim != 2 or len(array) < count:
        raise ValueError(
            f"samples must have shape (n, d) with n >= num_components={count}, got {array.shape}."
        )
    check_finite("samples", array)
    x = np.asarray(array, np.float64)
    centers, nearest = _clusters(x, count)
    share = np.bincount(nearest, minlength=count)
    within = np.sqrt(np.mean((x - centers[nearest]) ** 2, axis=0))
    scale = np.broadcast_to(within, centers.shape).copy()
    for k in np.flatnonzero(share > 1):
        scale[k] = x[nearest == k].std(0)
    weights = (1 - defensive) * np.maximum(share, 0.5) / np.sum(np.maximum(share, 0.5))
    if defensive:
        centers = np.vstack([centers, x.mean(0)])
        scale = np.vstack([scale, x.std(0)])
        weights = np.append(weights, defensive)
    scale = np.maximum(scale, np.maximum(_LEAST_SCALE * x.std(0), np.finfo(np.float32).tiny))
    components = eqx.filter_vmap(Normal)(
        jnp.asarray(centers, array.dtype), jnp.asarray(scale, array.dtype)
    )
    return VmapMixture(components, weights=jnp.asarray(weights, array.dtype))


def _clusters(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Centers by Lloyd's algorithm and the number of each sample's own."""
    chosen = [int(np.argmin(np.sum((x - x.mean(0)) ** 2, axis=1)))]
    distance = np.sum((x - x[chosen[0]]) ** 2, axis=1)
    while len(chosen) < count:
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.sum((x - x[chosen[-1]]) ** 2, axis=1))
    centers = x[chosen]
    nearest = _nearest(x, centers)
    for _ in range(_ROUNDS):
        sums = np.zeros_like(centers)
        np.add.at(sums, nearest, x)
        size = np.bincount(nearest, minlength=count)[:, None]
        centers = np.where(size > 0, sums / np.maximum(size, 1), centers)
        nearest = _nearest(x, centers)
    return centers, nearest


def _nearest(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
    square = np.sum(centers**2, axis=1) - 2 * x @ centers.T
    return np.argmin(square, axis=1)
