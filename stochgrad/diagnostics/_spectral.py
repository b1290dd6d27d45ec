"""Stationary moments of a chain on the line, by a spectral method."""

from collections.abc import Callable
from itertools import product
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import noise_law
from stochgrad.kernels import NoiseExposedStep

NoiseLaw: TypeAlias = Literal["normal", "quantized", "discrete"]

_DEGREES = (36, 14)
_NODES = {"q": 160, "p": 28}
_NOISE_NODES = {1: 8, 2: 6, 3: 5, 4: 4}


def spectral_moments(
    opened: NoiseExposedStep, log_density: Callable, noise: NoiseLaw
) -> tuple[float, float]:
    r"""Variance of the position and second moment of the momentum under a chain's stationary law.

    The transition operator $(Pf)(q, p) = E f(\Phi(q, p, \xi))$ of the step $\Phi$ is projected on
    the polynomials $\phi_a(q)\,\mathrm{He}_b(p)$ that are orthonormal under
    $w \propto \pi(q) e^{-p^2/2}$, all integrals by quadrature. The stationary law is $w$ times the
    left eigenvector of eigenvalue one.

    Args:
        opened: The step, of a kernel whose state is a function of position and momentum.
        log_density: Log density of a scalar position.
        noise: The law of the noise.
    """
    q, weight_q, basis_q = _line(log_density)
    p, weight_p = np.polynomial.hermite_e.hermegauss(_NODES["p"])
    weight_p = weight_p / weight_p.sum()
    if opened.momentum is None:
        p, weight_p = np.zeros(1), np.ones(1)
    rank = (_DEGREES[0], _DEGREES[1] if opened.momentum is not None else 1)
    count = opened.noise_size
    if count not in _NOISE_NODES:
        raise ValueError(f"weak_order takes up to 4 noises a step off the Gaussian, got {count}.")
    node, node_weight = _quadrature(noise, _NOISE_NODES[count])
    xi = np.array(list(product(node, repeat=count)))
    weight_xi = np.array([np.prod(x) for x in product(node_weight, repeat=count)])
    weight_xi = jnp.asarray(weight_xi / weight_xi.sum())

    def basis_p(x):
        values = [jnp.ones_like(x), x]
        for n in range(1, rank[1]):
            values.append((x * values[n] - np.sqrt(n) * values[n - 1]) / np.sqrt(n + 1))
        return jnp.stack(values[: rank[1]], axis=-1)

    def ahead(point):
        """Expectation of every basis function after one step from a point."""
        z = opened.start(point[:1], point[1:], 0)
        after = jax.vmap(lambda noise: opened.step(z, noise, 0))(jnp.asarray(xi))
        later_p = after[:, opened.momentum[0]] if opened.momentum is not None else after[:, 0] * 0
        values = basis_q(after[:, opened.position[0]]) * weight_xi[:, None]
        return values.T @ basis_p(later_p)

    points = jnp.asarray([(a, b) for a in q for b in p])
    weights = np.array([a * b for a in weight_q for b in weight_p])
    size = rank[0] * rank[1]
    following = np.asarray(jax.jit(lambda x: jax.lax.map(ahead, x, batch_size=32))(points))
    following = following.reshape(-1, size)
    here = np.asarray(basis_q(points[:, 0])[:, :, None] * basis_p(points[:, 1])[:, None, :])
    here = here.reshape(-1, size)
    operator = here.T @ (weights[:, None] * following)
    rest = np.linalg.solve((np.eye(size - 1) - operator[1:, 1:]).T, operator[0, 1:])
    law = np.append(1.0, rest)

    def expect(values):
        return law @ (here.T @ (weights * values))

    x, y = np.asarray(points).T
    mean = expect(x)
    momentum = expect(y**2) if opened.momentum is not None else np.nan
    return expect((x - mean) ** 2), momentum


def _quadrature(noise: NoiseLaw, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss's quadrature under a law of noise."""
    if noise == "normal":
        return np.polynomial.hermite_e.hermegauss(count)
    values, probabilities = noise_law(noise)
    if count >= len(values):
        return values, probabilities
    degree = 2 * count - 1
    moments = [probabilities @ values**k for k in range(degree + 2)]
    root = np.linalg.cholesky(
        [[moments[i + j] for j in range(count + 1)] for i in range(count + 1)]
    )
    off = np.diag(root)[1:count] / np.diag(root)[: count - 1]  # Golub & Welsch; laws are symmetric
    node, vectors = np.linalg.eigh(np.diag(off, 1) + np.diag(off, -1))
    return node, vectors[0] ** 2


def _line(log_density: Callable):
    """Nodes and weights of a density on the line, and its orthonormal polynomials."""
    wide = np.linspace(-12, 12, 4801)
    log_p = np.asarray(jax.vmap(log_density)(jnp.asarray(wide)))
    inside = wide[log_p > log_p.max() - 60]
    q = np.linspace(inside[0], inside[-1], _NODES["q"])
    log_w = np.asarray(jax.vmap(log_density)(jnp.asarray(q)))
    weight = np.exp(log_w - log_w.max())
    weight /= weight.sum()
    degree = _DEGREES[0]
    center, scale = np.zeros(degree), np.zeros(degree)
    before, now, norm = np.zeros_like(q), np.ones_like(q), 0.0
    for n in range(degree):  # Stieltjes
        center[n] = weight @ (q * now * now)
        following = (q - center[n]) * now - norm * before
        norm = np.sqrt(weight @ following**2)
        scale[n] = norm
        before, now = now, following / norm

    def basis(x):
        values = [jnp.ones_like(x)]
        previous = jnp.zeros_like(x)
        for n in range(degree - 1):
            following = (x - center[n]) * values[n]
            following = following - (scale[n - 1] if n else 0.0) * previous
            previous = values[n]
            values.append(following / scale[n])
        return jnp.stack(values, axis=-1)

    return q, weight, basis
