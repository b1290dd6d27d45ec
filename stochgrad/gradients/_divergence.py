r"""Divergences as functions of log weights, and the coefficients of their path gradients.

With draws $x_i = T_\theta(z_i)$, log weights $\log w_i = \log p(x_i) - \log q_\theta(x_i)$ and

$$P_i = (\partial_\theta x_i)^\top\,\nabla_x\log w\,(x_i),$$

the path gradient of $\log w_i$, each climbs $\sum_i c_i P_i$ with coefficients of its own,
functions of the weights alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float


class FDivergence(NamedTuple):
    r"""$\mathbb E_q[f(u)]$, $u = p/(Zq)$, whose negative gradient is $\mathbb E_q[u^2 f''(u)P]$.

    For the reparameterized gradient of $f(u)$ is $f'(u)\,u\,(P - \partial_\theta\log q|_x)$, and
    by parts $\mathbb E_q[g\,\partial_\theta\log q|_x]$ is the path gradient of $g = f'(u)\,u$.

    Attributes:
        value: $f(u)$ as a function of $\log u$.
        coefficient: $u^2 f''(u)$ as a function of $\log u$.
    """

    value: Callable[[Array], Array]
    coefficient: Callable[[Array], Array]

    def slope(self, log_u: Array) -> Array:
        r"""$u f'(u)$, the derivative of the value in $\log u$."""
        return jax.grad(lambda log_u: jnp.sum(self.value(log_u)))(log_u)


def alpha_family(alpha: float) -> FDivergence:
    r"""$f(u) = (u^\alpha - 1) / \alpha(\alpha - 1)$ and its limits, of coefficient $u^\alpha$."""

    def value(log_u):
        if alpha == 0:
            return -log_u
        if alpha == 1:
            return jnp.exp(log_u) * log_u
        return (jnp.exp(alpha * log_u) - 1.0) / (alpha * (alpha - 1.0))

    return FDivergence(value, lambda log_u: jnp.exp(alpha * log_u))


def jensen_shannon_family() -> FDivergence:
    r"""$f(u) = \tfrac12 u\log u - \tfrac12(1 + u)\log\tfrac{1 + u}2$."""

    def value(log_u):
        mixed = jnp.logaddexp(log_u, jnp.zeros_like(log_u)) - jnp.log(2.0).astype(log_u.dtype)
        return 0.5 * (jnp.exp(log_u) * (log_u - mixed) - mixed)

    return FDivergence(value, lambda log_u: 0.5 * jax.nn.sigmoid(log_u))


class RenyiBound(NamedTuple):
    r"""Rényi's bounds of rows of log weights.

    Attributes:
        bound: $\frac1{1-\alpha}\log\frac1K\sum_i w_i^{1-\alpha}$.
        share: Its derivatives in the log weights, $\tilde w = \mathrm{softmax}((1-\alpha)\log w)$.
        coefficient: Those of the path gradient, $\alpha\tilde w + (1-\alpha)\tilde w^2$.
    """

    bound: Float[Array, "..."]
    share: Float[Array, "... K"]
    coefficient: Float[Array, "... K"]


def renyi(log_weights: Float[Array, "... K"], alpha: float) -> RenyiBound:
    """The bound of order alpha, not 1, along the last axis."""
    powered = (1.0 - alpha) * log_weights
    count = float(log_weights.shape[-1])
    bound = (logsumexp(powered, axis=-1) - jnp.log(count).astype(powered.dtype)) / (1.0 - alpha)
    share = jax.nn.softmax(powered, axis=-1)
    return RenyiBound(bound, share, alpha * share + (1.0 - alpha) * share**2)
