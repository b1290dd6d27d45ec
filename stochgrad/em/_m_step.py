"""The M-step: which latents of a visit are differentiated, with what weights."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from stochgrad.core import PRNGKey
from stochgrad.em._e_step import Memory, Proposals, Visit
from stochgrad.em._estimators import Estimator
from stochgrad.em._model import Questions, take
from stochgrad.kernels import systematic


class Items(NamedTuple):
    """Latents to differentiate, with their questions and weights in prior and likelihood."""

    rows: Questions
    tokens: PyTree
    mask: Bool[Array, "items length"]
    prior: Float[Array, " items"]
    likelihood: Float[Array, " items"]


def weighed(
    key: PRNGKey,
    estimator: Estimator,
    visit: Visit,
    held: Memory,
    found: Proposals,
    rows: Questions,
    asking: Questions,
) -> Items:
    """The latents that an estimator weighs: chains where they were, then proposals.

    A chain that has moved stands at a proposal, whose weight its own is added to.
    """
    chains, proposals = estimator.weights(visit)
    drawn = jnp.zeros_like(visit.reward) if proposals is None else proposals
    if chains is None:
        return Items(asking, found.drawn.tokens, found.drawn.mask, drawn, 0.0 * drawn)
    stays = jnp.where(visit.chosen >= 0, 0.0, chains)
    goes = jnp.zeros_like(drawn).at[jnp.maximum(visit.chosen, 0)].add(chains - stays)
    prior = jnp.concatenate([stays, goes + drawn])
    items = Items(*joined(rows, asking, held, found), prior, jnp.concatenate([stays, goes]))
    if estimator.subsample is None:
        return items
    return _subsampled(key, items, estimator.subsample)


def joined(
    rows: Questions, asking: Questions, held: Memory, found: Proposals
) -> tuple[Questions, Any, Array]:
    """Chains and proposals one after another: their questions, tokens and masks."""
    first = (rows, held.tokens, held.mask)
    then = (asking, found.drawn.tokens, found.drawn.mask)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, then)


def in_pieces(value: Callable[[Items], Scalar], items: Items, pieces: int) -> Scalar:
    """A sum over items, differentiated piece by piece with the memory of one."""
    if pieces == 1:
        return value(items)
    parts = jax.tree.map(partial(_cut, pieces=pieces), items)
    return jnp.sum(lax.map(jax.checkpoint(value), parts))


def times(weight: Float[Array, " n"], value: Float[Array, " n"]) -> Float[Array, " n"]:
    """A product in which a weight of zero wins over an infinite value."""
    return weight * jnp.where(weight != 0, value, 0.0)


def _subsampled(key: PRNGKey, items: Items, count: int) -> Items:
    """Systematic resampling in proportion to the weights' sizes, signs kept."""
    size = jnp.abs(items.prior)
    chosen: Items = take(items, systematic(key, size, count))
    weight = jnp.sign(chosen.prior) * jnp.sum(size) / count
    return chosen._replace(prior=weight, likelihood=jnp.zeros_like(weight))


def _cut(leaf, pieces: int):
    """An array with its first axis cut in pieces, filled up with zeros: items of no weight."""
    missing = -leaf.shape[0] % pieces
    fill = jnp.zeros((missing, *leaf.shape[1:]), leaf.dtype)
    return jnp.concatenate([leaf, fill]).reshape(pieces, -1, *leaf.shape[1:])
