"""MCMC-EM: the gradient of a marginal log-likelihood, from a chain for each example's latent."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochgrad.core import Gradient, Order, Position, PRNGKey, check_count, data_batches
from stochgrad.em._allocate import Allocator, uniform
from stochgrad.em._checks import check_parts, check_shapes, writable_directory
from stochgrad.em._e_step import StepInputs, accept, propose, summarize, update
from stochgrad.em._estimators import Estimator, trice
from stochgrad.em._latent_store import Memory, initial_memory, latent_store, read, write
from stochgrad.em._m_step import policy_slopes, surrogate, weighted_items
from stochgrad.em._minibatch import Stats
from stochgrad.em._model import Guide, LatentModel, Questions, position_functions, proposal_kind


class EMState(NamedTuple):
    """State of the gradient: the chains and the last E-step's stats.

    Attributes:
        batches: State of the stream of minibatches.
        memory: Latents of all examples.
        stats: Of the last E-step.
    """

    batches: Any
    memory: Memory
    stats: Stats


def mcmc_em(
    model: LatentModel,
    questions: Questions,
    *,
    batch_size: int,
    estimator: Estimator | None = None,
    allocator: Allocator | None = None,
    proposal: Guide | None = None,
    start: Guide | None = None,
    order: Order = "reshuffled",
    pieces: int = 1,
    memory_path: str | Path | None = None,
) -> Gradient:
    r"""A stochastic gradient of the marginal log-likelihood of the answers.

    $$L(\theta) = \frac1N\sum_n\log\sum_z p_\theta(z\mid x_n)\,p_\theta(y_n\mid z, x_n),\qquad
      \nabla\log p_\theta(y\mid x) =
      \mathbb E_{p_\theta(z\mid x, y)}\bigl[\nabla\log p_\theta(z, y\mid x)\bigr].$$

    Each step visits a minibatch of questions. The E-step draws proposals from the policy, or from a
    guide q, and moves each question's chain by independence Metropolis-Hastings, whose weight is
    $w(z) = p_\theta(z, y\mid x)/q(z)$, under the current parameters. With proposals from the policy
    and a verifier, a right proposal is accepted. The M-step's gradient is the estimator's.

    ``stochgrad.fit`` and ``stochgrad.ascend`` drive it as any gradient. The value of its score is
    the mean likelihood of the proposals: with a verifier, their accuracy. The kernel's state holds
    stats at ``state.gradient_state.stats`` and chains at ``state.gradient_state.memory``.

    Args:
        model: What ``stochgrad.em.verified`` or ``stochgrad.numpyro.latent_model`` make.
        questions: Prompts and answers, with a leading axis of N examples.
        batch_size: Questions in a minibatch, M.
        estimator: ``trice()`` by default; ``star``, ``raft``, ``rest_em``, ``reinforce``, ``grpo``,
            ``bnpo``, ``maxk``.
        allocator: How many proposals each question gets: one by default; ``uniform``, ``gvm``,
            ``reinforce_ada``, ``vade``.
        proposal: A guide to draw proposals from, instead of the policy; for ``trice("none")`` only.
        start: A guide for the first latents of the chains, called with the model's parameters;
            without, a chain begins with its first right proposal.
        order: Order of the minibatches.
        pieces: Number of microbatches over which the M-step's gradient is accumulated.
        memory_path: A directory for the latents of all examples, where there are too many for the
            device: a file for each chain, to which each latent that changes is appended. A
            checkpoint needs it.

    Raises:
        TypeError: the model is no ``LatentModel``, or another part is of a wrong type.
        ValueError: there are no questions, or the minibatch does not fit them; the estimator needs
            more proposals, the policy's own, or a likelihood that is free of parameters; a guide
            has no hints; at the start, the policy, a guide or the likelihood fails on the
            parameters, or returns an invalid result.
        OSError: ``memory_path`` cannot be written to.

    Example:
        >>> import jax, jax.numpy as jnp, optax, stochgrad
        >>> from stochgrad import em
        >>> def log_probs(logits, prompts):
        ...     return jax.nn.log_softmax(logits)[prompts]
        >>> def sample(logits, key, prompts):
        ...     z = jax.random.categorical(key, log_probs(logits, prompts))
        ...     chosen = jnp.take_along_axis(log_probs(logits, prompts), z[:, None], 1)[:, 0]
        ...     return em.Rationales(z[:, None], chosen, jnp.ones((len(z), 1), bool))
        >>> def log_prob(logits, prompts, tokens, mask):
        ...     return jnp.take_along_axis(log_probs(logits, prompts), tokens, 1)[:, 0]
        >>> model = em.verified(
        ...     em.Policy(sample, log_prob), lambda tokens, mask, answers: tokens[:, 0] < answers)
        >>> questions = em.Questions(jnp.arange(3), jnp.array([1, 2, 1]))
        >>> gradient = em.mcmc_em(model, questions, batch_size=3, order="full")
        >>> fit = stochgrad.fit(
        ...     jax.random.key(0), gradient, 300, init=jnp.zeros((3, 8)), learning_rate=0.1)
        >>> bool(jax.nn.softmax(fit.model)[1, :2].sum() > 0.95)
        True
    """
    estimator = trice() if estimator is None else estimator
    allocator = uniform() if allocator is None else allocator
    questions, size = check_parts(model, questions, estimator, allocator, proposal, start)
    pieces = check_count("pieces", pieces)
    directory = None if memory_path is None else writable_directory(memory_path)
    kind = proposal_kind(model, proposal, estimator.greedy)
    initial, constrain = position_functions(model, proposal, questions)
    batches = data_batches((questions, jnp.arange(size, dtype=jnp.int32)), batch_size, order)

    def next(key: PRNGKey, position: Position, state: EMState):
        step_key, subsample_key = jax.random.split(key)
        propose_key, sweep_key, slopes_key = jax.random.split(step_key, 3)
        batch, batch_state = batches.next(state.batches)
        rows, index = batch.data
        mask = jnp.broadcast_to(batch.weight > 0, index.shape).astype(jnp.float32)
        theta, phi = lax.stop_gradient(kind.split(position))
        store = latent_store(directory, model, theta, questions)
        previous = read(store, state.memory, index)
        inputs = StepInputs(model, kind, theta, phi, rows, mask, previous)

        proposals = propose(propose_key, inputs, allocator, estimator.unbounded)
        slopes = partial(policy_slopes, slopes_key, inputs, proposals, estimator.directions)
        minibatch, log_likelihood = accept(sweep_key, inputs, proposals, slopes)
        items = weighted_items(
            subsample_key, estimator, allocator.folds, minibatch, inputs, proposals
        )
        items = lax.stop_gradient(items)
        latest = update(allocator.decay, previous, proposals, minibatch, log_likelihood)
        into, new = jnp.where(mask > 0, index, size), minibatch.proposal_index >= 0
        memory = write(store, state.memory, into, latest, new)
        stats = summarize(minibatch, proposals, latest, memory.log_likelihood)

        def score(position: Position):
            objective = lambda position: surrogate(kind.split(position), items, model, kind, pieces)
            return stats.reward, jax.grad(objective, allow_int=True)(position)

        return score, EMState(batch_state, memory, stats)

    def init(key: PRNGKey, position: Position) -> EMState:
        batch_key, start_key = jax.random.split(key)
        theta, phi = kind.split(position)
        count = allocator.per_round * min(batch_size, size)
        check_shapes(model, questions, theta, phi, proposal, start, estimator.greedy, count)
        store = latent_store(directory, model, theta, questions)
        memory = initial_memory(start_key, store, model, theta, questions, start, batch_size)
        zero = jnp.zeros(())
        return EMState(batches.init(batch_key), memory, Stats(*(zero,) * len(Stats._fields)))

    return Gradient(init, next, None, initial, constrain)
