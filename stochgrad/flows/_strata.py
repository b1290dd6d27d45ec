r"""Draws of every component of a mixture, which reach its weights.

Which component is drawn has no derivative, so none of the weights $w$ of $q = \sum_k w_k q_k$ is on
the path of a draw. They are where the draws are stratified: of any g,

$$\mathbb E_q[g(x)] = \sum_k w_k\,\mathbb E_{q_k}[g(x)], \qquad
  \nabla_w\mathbb E_q[g] = \mathbb E\,\sum_k\nabla w_k\;g(x_k), \quad x_k\sim q_k,$$

with $x_k$ on a path of its own. A row of strata is one draw of each component.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.distributions import AbstractTransformed, VmapMixture
from jaxtyping import Array, Float

from stochgrad.flows._draw import FlowDraws, draws_of, one_draw, pushed_draw, unwrap_flow


class Strata(NamedTuple):
    """Draws with weights, in rows that are independent of one another.

    Attributes:
        draws: The draws, of shape (n, ...), row after row.
        weight: What each counts for, of shape (n,) and mean one, with a gradient in the weights of
            the mixture; None where all count the same.
        width: Draws of a row.
    """

    draws: FlowDraws
    weight: Float[Array, " n"] | None
    width: int

    def mean(self, values: Float[Array, " n"], constant: bool = False) -> Array:
        """The mean under the flow of a function of the draws, from its values.

        Args:
            values: The function's values.
            constant: Whether the weights are to be constant for differentiation.
        """
        if self.weight is None:
            return jnp.mean(values)
        weight = jax.lax.stop_gradient(self.weight) if constant else self.weight
        return jnp.mean(weight * values)

    def rows(self, values: Float[Array, "n ..."]) -> Float[Array, "rows m"]:
        """Values of the draws of a row side by side, as they count."""
        flat = values.reshape(len(values), -1)
        if self.weight is not None:
            flat = jax.lax.stop_gradient(self.weight)[:, None] * flat
        return flat.reshape(len(values) // self.width, -1)


def stratified(flow, key, count: int, condition) -> Strata:
    """At least so many draws of a flow, of each component of a mixture as many."""
    flow = unwrap_flow(flow)
    mixture = mixture_of(flow)
    if mixture is None:
        return Strata(draws_of(flow, key, count, condition), None, 1)
    width = len(mixture.log_normalized_weights)
    rows = -(-count // width)
    keys = jax.random.split(key, rows)
    draws = jax.vmap(lambda key: _one_row(flow, mixture, key, condition))(keys)
    weight = jnp.tile(width * jnp.exp(mixture.log_normalized_weights), rows)
    return Strata(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), draws), weight, width)


def one_weighted(flow, key, condition) -> tuple[Array, FlowDraws]:
    """Weights and draws of one row of an unwrapped flow; of one draw where it is no mixture."""
    mixture = mixture_of(flow)
    if mixture is None:
        draws = one_draw(flow, key, condition)
        return jnp.ones(()), draws
    return mixture.log_normalized_weights, _one_row(flow, mixture, key, condition)


def mixture_of(flow) -> Any:
    """The ``VmapMixture`` that an unwrapped flow is or has for its base, or None."""
    base = flow.base_dist if isinstance(flow, AbstractTransformed) else flow
    return base if isinstance(base, VmapMixture) else None


def _one_row(flow, mixture, key, condition) -> FlowDraws:
    keys = jax.random.split(key, len(mixture.log_normalized_weights))
    starts = eqx.filter_vmap(lambda component, key: component._sample(key, condition))(
        mixture.dist, keys
    )
    return jax.vmap(lambda z: pushed_draw(flow, z, mixture._log_prob(z, condition), condition))(
        starts
    )
