"""A mass that is the inverse of a covariance of low rank plus diagonal."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from stochgrad.core import check_array, check_number

DENSE_DIMENSION = 256
"""Up to here all eigenvectors of a correlation matrix are kept."""
_MOST_RANK = 32


@dataclass(frozen=True, eq=False, repr=False)
class Precision:
    r"""The inverse of a covariance, for ``mass`` and ``friction`` of ``stochgrad.sghmc``.

    $$\Sigma = S\,(I + Q(\Lambda - I)Q^\top)\,S, \qquad M = r\,\Sigma^{-1},$$

    a diagonal where Q has no columns, any covariance where it has d. A step with it costs 4dk
    multiplications more.

    Args:
        scale: The diagonal of S over the raveled position, shape (d,).
        basis: Orthonormal columns Q, shape (d, k).
        values: The diagonal of $\Lambda$, positive, shape (k,).
        rate: r, a positive number; ``2.0 * precision`` is a precision of twice the rate.

    Raises:
        ValueError: shapes do not fit, a number is not finite or not positive.

    Example:
        >>> import numpy as np
        >>> from stochgrad.sgmcmc import Precision
        >>> mass = Precision(np.array([1.0, 2.0]), np.zeros((2, 0)), np.zeros(0))
        >>> mass.variances.tolist()
        [1.0, 4.0]
    """

    scale: Float[np.ndarray, " d"]
    basis: Float[np.ndarray, "d k"]
    values: Float[np.ndarray, " k"]
    rate: float = 1.0

    ndim = 2
    __array_ufunc__ = None  # a number of numpy's on the left leaves the product to us

    def __post_init__(self):
        shapes = []
        for name, ndim in (("scale", 1), ("basis", 2), ("values", 1)):
            array = check_array(name, getattr(self, name)).astype(np.float64)
            if array.ndim != ndim or not np.all(np.isfinite(array)):
                raise ValueError(f"{name} must be finite and of {ndim} dimensions.")
            if name != "basis" and np.any(array <= 0):
                raise ValueError(f"{name} must be positive numbers, got {array.min():g}.")
            object.__setattr__(self, name, array)
            shapes.append(array.shape)
        if shapes[1] != (*shapes[0], *shapes[2]) or not shapes[0][0]:
            raise ValueError(
                f"basis must have the shape (d, k) of scale, (d,), and values, (k,), got {shapes}."
            )
        object.__setattr__(self, "rate", check_number("rate", self.rate))

    def __mul__(self, factor: Any) -> "Precision":
        return replace(self, rate=self.rate * check_number("factor", factor))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"Precision(d={self.scale.size}, rank={self.values.size}, rate={self.rate:g})"

    @classmethod
    def of_covariance(cls, covariance: Float[np.ndarray, "d d"]) -> "Precision":
        """That of a dense covariance."""
        scale = np.sqrt(np.diag(covariance))
        values, basis = np.linalg.eigh(covariance / scale[:, None] / scale)
        return cls(scale, basis, np.maximum(values, 1e-12 * values[-1]))

    def padded(self) -> "Precision":
        """The same of a rank that others of its size have too: programs depend on the rank."""
        d, k = self.basis.shape
        power = 2 ** (k - 1).bit_length() if k else 0
        more = (d if d <= DENSE_DIMENSION else power) - k
        basis = np.pad(self.basis, ((0, 0), (0, more)))
        return replace(self, basis=basis, values=np.pad(self.values, (0, more), constant_values=1))

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        r"""$\Sigma / r$."""
        root = self.color(np.eye(self.scale.size))
        return root.T @ root / self.rate

    @property
    def variances(self) -> Float[np.ndarray, " d"]:
        r"""The diagonal of $\Sigma / r$."""
        return self.scale**2 * (1 + self.basis**2 @ (self.values - 1)) / self.rate

    @property
    def log_determinant(self) -> float:
        r"""Of $\Sigma$."""
        return float(2 * np.sum(np.log(self.scale)) + np.sum(np.log(self.values)))

    def same_shape(self, other: Any) -> bool:
        """Whether another is a multiple of this one."""
        return (
            isinstance(other, Precision)
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.basis, other.basis)
            and np.array_equal(self.values, other.values)
        )

    def color(self, z: Any) -> Any:
        r"""$S(I + Q(\Lambda^{1/2} - I)Q^\top)z$, of covariance $\Sigma$ for white z, (..., d)."""
        scale, basis, root = self._as(z, np.sqrt(self.values) - 1)
        return scale * (z + ((z @ basis) * root) @ basis.T)

    def whiten(self, x: Any) -> Any:
        """The inverse of ``color``."""
        scale, basis, root = self._as(x, 1 / np.sqrt(self.values) - 1)
        x = x / scale
        return x + ((x @ basis) * root) @ basis.T

    def color_dual(self, g: Any) -> Any:
        """The transpose of ``color``, which takes gradients to white coordinates."""
        scale, basis, root = self._as(g, np.sqrt(self.values) - 1)
        g = g * scale
        return g + ((g @ basis) * root) @ basis.T

    def whiten_dual(self, g: Any) -> Any:
        """The inverse of ``color_dual``."""
        scale, basis, root = self._as(g, 1 / np.sqrt(self.values) - 1)
        return (g + ((g @ basis) * root) @ basis.T) / scale

    def _as(self, like: Any, root: np.ndarray) -> tuple:
        return tuple(np.asarray(x, like.dtype) for x in (self.scale, self.basis, root))


def precision_of(
    draws: Float[np.ndarray, "n d"], effective: float, before: Precision
) -> tuple[Float[np.ndarray, " d"], Precision]:
    r"""Mean and precision of draws, shrunk as far as their noise asks for.

    In coordinates that an earlier precision makes white the correlations R are taken as

    $$\hat R = (1 - \lambda) R + \lambda I, \qquad
      \lambda = \frac{\sum_{i \ne j} \operatorname{var}(R_{ij})}{\sum_{i \ne j} R_{ij}^2}$$

    (Schaefer & Strimmer, Stat. Appl. Genet. Mol. Biol. 2005), with the effective number of draws.
    Beyond 256 dimensions, in coordinates of unit variance, those of the largest eigenvalues are
    kept, 32 at most, that exceed what noise alone makes, $(1 + \sqrt{d/n})^2$ (Marchenko & Pastur
    1967).

    Args:
        draws: Finite numbers.
        effective: How many independent draws they are worth.
        before: An earlier precision.
    """
    n, d = draws.shape
    effective = float(np.clip(effective, 2, n))
    mean = draws.mean(0)
    centered = draws - mean
    if d > DENSE_DIMENSION:
        scale = _standard_deviations(centered, effective)
        singular, basis = np.linalg.svd(centered / scale, full_matrices=False)[1:]
        values = singular**2 / n
        clear = np.flatnonzero(values > 1.2 * (1 + np.sqrt(d / effective)) ** 2)[:_MOST_RANK]
        return mean, Precision(scale, basis[clear].T, values[clear])
    white = before.whiten(centered)
    scale = _standard_deviations(white, effective)
    z = white / scale
    correlation = z.T @ z / n
    off = ~np.eye(d, dtype=bool)
    squares = np.sum(correlation[off] ** 2)
    if squares > 0:
        noise = np.sum(((z**2).T @ z**2 / n - correlation**2)[off]) / effective
        correlation = np.where(off, (1 - min(noise / squares, 1.0)) * correlation, 1.0)
    root = before.color_dual(np.eye(d)) * scale
    return mean, Precision.of_covariance(root @ correlation @ root.T)


def _standard_deviations(centered: np.ndarray, effective: float) -> np.ndarray:
    sd = np.sqrt(np.mean(centered**2, axis=0) * effective / (effective - 1))
    return np.maximum(sd, max(1e-6 * np.max(sd, initial=0.0), 1e-30))
