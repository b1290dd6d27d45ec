"""MCMC-EM: the gradient of a marginal log-likelihood, from a chain for each example's latent."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochgrad.core import Gradient, Order, Position, PRNGKey, check_count, data_batches
from stochgrad.em._allocate import Allocator, uniform
from stochgrad.em._check_arguments import (
    check_parts,
    check_position,
    check_shapes,
    writable_directory,
)
from stochgrad.em._e_step import StepInputs, accept, minibatch_of, propose, summarize, update
from stochgrad.em._estimators import Estimator, trice
from stochgrad.em._latent_store import LatentStore, device_store, file_store
from stochgrad.em._m_step import policy_slopes, surrogate, weighted_items
from stochgrad.em._memory import Memory, empty_memory, guided_memory, latent_shapes, read, write
from stochgrad.em._minibatch import Stats
from stochgrad.em._model import Guide, LatentModel, Questions, called, take
from stochgrad.em._proposal_kinds import proposal_kind


class EMState(NamedTuple):
    """State of the gradient: chains and what was last seen.

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
    $w(z) = p_\theta(z, y\mid x)/q(z)$, of the proposal and of the latent at hand under the
    parameters of today. With proposals from the policy and a verifier that is: take it if it is
    right. The M-step's gradient is the estimator's.

    ``stochgrad.fit`` and ``stochgrad.ascend`` drive it as any gradient. The value of its score is
    the mean likelihood of the proposals: with a verifier, their accuracy. What the E-step reports
    is in the kernel's state, at ``state.gradient_state.stats``, the chains at
    ``state.gradient_state.memory``; a checkpoint holds both.

    Args:
        model: What ``stochgrad.em.verified`` or ``stochgrad.numpyro.latent_model`` make.
        questions: Prompts and answers, with a leading axis of N examples.
        batch_size: Questions in a minibatch, M.
        estimator: ``trice()`` by default; ``star``, ``raft``, ``rest_em``, ``reinforce``, ``grpo``,
            ``bnpo``, ``maxk``.
        allocator: How many proposals each question gets: one by default; ``uniform``, ``gvm``,
            ``reinforce_ada``, ``vade``.
        proposal: A guide to draw proposals from, instead of the policy. Then only the estimator
            ``trice("none")`` is right.
        start: A guide for the first latents of the chains, ``log_likelihood`` decides which are
            right; without, a chain begins with its first right proposal. Its policy is called with
            the model's parameters at the start.
        order: Order of the minibatches.
        pieces: In how many pieces the M-step's latents are differentiated, one after another, with
            the memory of one.
        memory_path: A directory for the latents of all examples, where there are too many for the
            device: a file that grows by each latent that changes. A checkpoint needs it beside
            itself, and each of several restarts has a file of its own.

    Raises:
        TypeError: the model is no ``LatentModel``, or another part not what it should be.
        ValueError: there are no questions, or the minibatch does not fit them; the estimator needs
            more proposals than there are, the policy's own proposals, or a likelihood that is free
            of parameters; a guide is without hints; when it begins, the policy, a guide or the
            likelihood fails on the parameters, or returns something else than it should.
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
        ...     gradient, jax.random.key(0), 300, init=jnp.zeros((3, 8)), learning_rate=0.1)
        >>> bool(jax.nn.softmax(fit.model)[1, :2].sum() > 0.95)
        True
    """
    estimator = trice() if estimator is None else estimator
    allocator = uniform() if allocator is None else allocator
    questions, size = check_parts(model, questions, estimator, allocator, proposal, start)
    pieces = check_count("pieces", pieces)
    directory = None if memory_path is None else writable_directory(memory_path)
    if model.check is not None:
        model.check(questions.answers)
    kind = proposal_kind(model, proposal, estimator.greedy)
    one = take(questions, jnp.zeros(1, jnp.int32))
    learned = kind.log_prob is not None
    starts = (model.initial, proposal.initial) if learned else (model.initial,)  # type: ignore
    for begin in starts:
        if begin is not None:
            called("model.initial", jax.eval_shape, begin, jax.random.key(0), one)
    batches = data_batches((questions, jnp.arange(size, dtype=jnp.int32)), batch_size, order)

    def store_of(theta) -> LatentStore:
        if directory is None:
            return device_store()
        latent = latent_shapes(model, theta, questions)
        return file_store(directory, (latent.tokens, latent.mask))

    def next(key: PRNGKey, position: Position, state: EMState):
        step_key, subsample_key = jax.random.split(key)
        propose_key, sweep_key, slopes_key = jax.random.split(step_key, 3)
        batch, batch_state = batches.next(state.batches)
        rows, index = batch.data
        mask = jnp.broadcast_to(batch.weight > 0, index.shape).astype(jnp.float32)
        theta, phi = lax.stop_gradient(kind.split(position))
        store = store_of(theta)
        previous = read(store, state.memory, index)
        inputs = StepInputs(model, kind, theta, phi, rows, mask, previous)

        proposals = propose(propose_key, inputs, allocator, estimator.unbounded)
        chains = accept(sweep_key, inputs, proposals)
        slopes = partial(policy_slopes, slopes_key, inputs, proposals, estimator.directions)
        minibatch = minibatch_of(mask, proposals, chains, slopes)
        items = weighted_items(subsample_key, estimator, minibatch, inputs, proposals)
        items = lax.stop_gradient(items)
        latest, new = update(allocator.decay, previous, proposals, chains, minibatch)
        memory = write(store, state.memory, jnp.where(mask > 0, index, size), latest, new)
        stats = summarize(minibatch, proposals, latest, memory.log_likelihood)

        def score(position: Position):
            objective = lambda position: surrogate(kind.split(position), items, model, kind, pieces)
            return stats.reward, jax.grad(objective)(position)

        return score, EMState(batch_state, memory, stats)

    def init(key: PRNGKey, position: Position) -> EMState:
        batch_key, start_key = jax.random.split(key)
        check_position(position, learned)
        theta, phi = kind.split(position)
        count = allocator.per_round * min(batch_size, size)
        check_shapes(model, questions, theta, phi, proposal, start, estimator.greedy, count)
        store, latent = store_of(theta), latent_shapes(model, theta, questions)
        memory = empty_memory(store, jax.random.fold_in(start_key, 0), latent, size)
        if start is not None:
            memory = guided_memory(
                start_key, start, model, theta, questions, store, memory, batch_size
            )
        zero = jnp.zeros(())
        return EMState(batches.init(batch_key), memory, Stats(*(zero,) * len(Stats._fields)))

    def initial(key: PRNGKey):
        keys = jax.random.split(key, len(starts))
        positions = tuple(start(key, one) for start, key in zip(starts, keys, strict=True))  # type: ignore
        return positions if learned else positions[0]

    def constrain(position: Position):
        theta, phi = kind.split(position)
        value = model.constrain(theta, one) if model.constrain is not None else theta
        return (value, phi) if learned else value

    return Gradient(init, next, None, None if None in starts else initial, constrain)
