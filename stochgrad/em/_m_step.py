"""The M-step: which latents of a minibatch are differentiated, with what weights."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from stochgrad.core import PRNGKey
from stochgrad.em._e_step import Proposals, StepInputs, slopes
from stochgrad.em._estimators import Estimator
from stochgrad.em._minibatch import Minibatch
from stochgrad.em._model import LatentModel, ProposalKind, Questions, take
from stochgrad.kernels import systematic


class Items(NamedTuple):
    """Latents to differentiate, with their questions and weights in prior and likelihood."""

    rows: Questions
    tokens: PyTree
    mask: Bool[Array, "items length"]
    prior: Float[Array, " items"]
    likelihood: Float[Array, " items"]


def chains_and_proposals(inputs: StepInputs, proposals: Proposals) -> tuple[Questions, Any, Array]:
    """Chains and proposals one after another: their questions, tokens and masks."""
    chains = (inputs.rows, inputs.previous.tokens, inputs.previous.mask)
    latents = (proposals.questions, proposals.latents.tokens, proposals.latents.mask)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), chains, latents)


def policy_slopes(
    key: PRNGKey, inputs: StepInputs, proposals: Proposals, directions: int | None
) -> tuple[Array, Array]:
    """Derivatives of log p(z|x) at proposals and chains, along common directions."""
    rows, tokens, mask = chains_and_proposals(inputs, proposals)
    log_prob = lambda p: inputs.model.policy.log_prob(p, rows.prompts, tokens, mask)
    along = slopes(log_prob, inputs.theta, key, directions)
    questions = inputs.mask.shape[0]
    return along[questions:], along[:questions]


def weights_of(
    estimator: Estimator, minibatch: Minibatch, fold: Array, folds: int
) -> tuple[Array | None, Array | None]:
    """The estimator's weights, or the mean of those that it has for each fold."""
    if folds == 1:
        return estimator.weights(minibatch)
    mask = minibatch.unbiased_mask
    parts = [
        estimator.weights(minibatch._replace(unbiased_mask=jnp.where(fold == number, mask, 0.0)))
        for number in range(folds)
    ]
    return jax.tree.map(lambda *leaves: sum(leaves) / folds, *parts)


def weighted_items(
    key: PRNGKey,
    estimator: Estimator,
    folds: int,
    minibatch: Minibatch,
    inputs: StepInputs,
    proposals: Proposals,
) -> Items:
    """Chains where they were, then proposals; a moved chain's weight is added to its proposal's."""
    chains, weights = weights_of(estimator, minibatch, proposals.fold, folds)
    weights = jnp.zeros_like(minibatch.reward) if weights is None else weights
    index = minibatch.proposal_index
    if chains is None:
        latents = proposals.latents
        return Items(proposals.questions, latents.tokens, latents.mask, weights, 0.0 * weights)
    stays = jnp.where(index >= 0, 0.0, chains)
    goes = jnp.zeros_like(weights).at[jnp.maximum(index, 0)].add(chains - stays)
    prior = jnp.concatenate([stays, goes + weights])
    latents = chains_and_proposals(inputs, proposals)
    items = Items(*latents, prior, jnp.concatenate([stays, goes]))
    if estimator.subsample is None:
        return items
    return _subsample(key, items, estimator.subsample)


def surrogate(
    params: tuple[Any, Any], items: Items, model: LatentModel, kind: ProposalKind, microbatches: int
) -> Scalar:
    """The weighted log probability whose gradient is the estimate."""
    theta, phi = params

    def value(items: Items):
        rows, latents = items.rows, (items.tokens, items.mask)
        total = jnp.sum(times(items.prior, model.policy.log_prob(theta, rows.prompts, *latents)))
        if not model.fixed:
            likelihood = model.log_likelihood(theta, rows.prompts, *latents, rows.answers)
            total += jnp.sum(times(items.likelihood, likelihood))
        if kind.log_prob is not None:
            total += jnp.sum(times(items.likelihood, kind.log_prob(phi, rows, *latents)))
        return total

    return accumulate_over_microbatches(value, items, microbatches)


def accumulate_over_microbatches(
    value: Callable[[Items], Scalar], items: Items, count: int
) -> Scalar:
    """A sum over items, differentiated microbatch by microbatch with the memory of one."""
    if count == 1:
        return value(items)
    parts = jax.tree.map(partial(_split, count=count), items)
    return jnp.sum(lax.map(jax.checkpoint(value), parts))


def times(weight: Float[Array, " n"], value: Float[Array, " n"]) -> Float[Array, " n"]:
    """A product in which a weight of zero wins over an infinite value."""
    return weight * jnp.where(weight != 0, value, 0.0)


def _subsample(key: PRNGKey, items: Items, count: int) -> Items:
    """Systematic resampling in proportion to the weights' sizes, signs kept."""
    size = jnp.abs(items.prior)
    sample: Items = take(items, systematic(key, size, count))
    weight = jnp.sign(sample.prior) * jnp.sum(size) / count
    return sample._replace(prior=weight, likelihood=jnp.zeros_like(weight))


def _split(leaf, count: int):
    """An array with its first axis split, padded with zeros: items of no weight."""
    missing = -leaf.shape[0] % count
    padding = jnp.zeros((missing, *leaf.shape[1:]), leaf.dtype)
    return jnp.concatenate([leaf, padding]).reshape(count, -1, *leaf.shape[1:])
