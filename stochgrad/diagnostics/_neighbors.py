"""The divergence between two sets of draws, from distances to neighbors."""

from typing import Any

import numpy as np

from stochgrad.core import check_count
from stochgrad.diagnostics._inputs import arrays_of, flattened


def knn_divergence(draws: Any, reference: Any, *, k: int = 5) -> float:
    r"""Kullback-Leibler divergence from one set of draws to another, by nearest neighbors.

    $$\widehat{\mathrm{KL}} = \frac dn\sum_{i=1}^n \log\frac{\nu_k(x_i)}{\rho_k(x_i)}
      + \log\frac{m}{n-1},$$

    with the distance $\rho_k$ from a draw to its k-th neighbor among the other n - 1 draws, and
    $\nu_k$ to its k-th among the m of the reference (Wang, Kulkarni & Verdú, IEEE Trans. Inf.
    Theory 2009). Good in a few dimensions; in many, compare a few numbers of interest at a time.
    Coordinates are scaled by the reference's standard deviations. Draws that repeat another are
    left out. Autocorrelated draws are each other's neighbors: thin them first.

    Args:
        draws: ``stochgrad.Draws`` or an ArviZ object, with the same variables as ``reference``.
        reference: Likewise.
        k: Which neighbor; more is smoother and more biased.

    Raises:
        TypeError: they are neither draws nor ArviZ objects.
        ValueError: the two differ in their dimensions, have k draws or fewer, or only repeats.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> from stochgrad.diagnostics import knn_divergence
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(9), order="full"
        ... )
        >>> kernel = stochgrad.sghmc(target, 0.05, 5.0)
        >>> one, two = (
        ...     stochgrad.sample(
        ...         jax.random.key(i), kernel, init=jnp.float32(0.9), num_samples=2000, thin=20
        ...     )
        ...     for i in range(2)
        ... )
        >>> abs(knn_divergence(one, two)) < 0.1
        True
    """
    from scipy.spatial import KDTree

    k = check_count("k", k)
    x, y = flattened(arrays_of(draws)), flattened(_reference_of(reference))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"draws have {x.shape[1]} dimensions, the reference {y.shape[1]}.")
    if min(len(x) - 1, len(y)) < k:
        raise ValueError(f"k must be below the number of draws, {min(len(x), len(y))}, got {k}.")
    scale = np.maximum(y.std(axis=0), np.finfo(y.dtype).tiny)
    x, y = ((a - y.mean(axis=0)) / scale for a in (x, y))
    own = KDTree(x).query(x, k + 1)[0][:, -1]
    other = np.reshape(KDTree(y).query(x, k)[0], (len(x), -1))[:, -1]
    apart = (own > 0) & (other > 0)
    if not apart.any():
        raise ValueError("every draw repeats another: there are no distances to go by.")
    ratio = np.log(other[apart] / own[apart])
    return float(x.shape[1] * ratio.mean() + np.log(len(y) / (len(x) - 1)))


def _reference_of(reference: Any) -> Any:
    try:
        return arrays_of(reference)
    except (TypeError, ValueError) as error:
        raise type(error)(f"reference: {error}") from error
