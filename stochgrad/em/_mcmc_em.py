"""MCMC-EM: the gradient of a marginal log-likelihood, from a chain for each example's latent."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from stochgrad.core import (
    Gradient,
    Order,
    Position,
    PRNGKey,
    check_callable,
    check_count,
    check_flag,
    check_instance,
    check_path,
    data_batches,
    describe,
    first_line,
)
from stochgrad.em._allocate import Allocator, Tally, uniform
from stochgrad.em._e_step import (
    Memory,
    Proposals,
    Stats,
    Visit,
    empty_memory,
    latent_shapes,
    propose,
    read,
    slopes,
    walk,
    write,
)
from stochgrad.em._estimators import Estimator, trice
from stochgrad.em._m_step import Items, in_pieces, joined, times, weighed
from stochgrad.em._model import (
    Guide,
    LatentModel,
    Questions,
    Rationales,
    called,
    check_draws,
    check_model,
    check_numbers,
    check_policy,
    check_questions,
    take,
)
from stochgrad.em._shelf import Shelf, on_device, on_disk


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
    questions, size = _check(model, questions, estimator, allocator, proposal, start)
    pieces = check_count("pieces", pieces)
    if memory_path is not None:
        memory_path = _writable(memory_path)
    if model.check is not None:
        model.check(questions.answers)
    learned = proposal is not None and proposal.learned
    one = take(questions, jnp.zeros(1, jnp.int32))
    starts = (model.initial, proposal.initial) if learned else (model.initial,)  # type: ignore
    for begin in starts:
        if begin is not None:
            called("model.initial", jax.eval_shape, begin, jax.random.key(0), one)
    batches = data_batches((questions, jnp.arange(size, dtype=jnp.int32)), batch_size, order)

    def of(position: Position) -> tuple[Any, Any]:
        """The model's parameters, and those that a guide is called with."""
        return position if learned else (position, position)  # type: ignore[return-value]

    def shelf_of(theta) -> Shelf:
        if memory_path is None:
            return on_device()
        one = latent_shapes(model, theta, questions)
        return on_disk(memory_path, (one.tokens, one.mask))

    def log_weight(theta, phi, rows: Questions, latent: Rationales, log_likelihood):
        """Log of joint over proposal."""
        if proposal is None:
            return log_likelihood
        prior = model.policy.log_prob(theta, rows.prompts, latent.tokens, latent.mask)
        return prior + log_likelihood - latent.log_prob

    def e_step(key: PRNGKey, position: Position, rows: Questions, index, present, memory: Memory):
        theta, phi = lax.stop_gradient(of(position))
        draw_key, walk_key, direction_key = jax.random.split(key, 3)
        shelf = shelf_of(theta)
        held = read(shelf, memory, index)
        past = Tally.none(present.shape[0])._replace(tries=held.tries, successes=held.successes)
        if proposal is not None:
            draw = lambda key, rows: proposal.policy.sample(phi, key, rows.hints)  # type: ignore
        elif estimator.greedy:
            draw = lambda key, rows: model.policy.greedy(theta, rows.prompts)  # type: ignore
        else:
            draw = lambda key, rows: model.policy.sample(theta, key, rows.prompts)
        found = propose(
            draw_key, draw, model, theta, rows, present, allocator, past, estimator.unbounded
        )
        asking = take(rows, found.owner)

        likelihood = held.log_likelihood
        if not model.fixed:
            known = jnp.isfinite(likelihood)
            again = model.log_likelihood(theta, rows.prompts, held.tokens, held.mask, rows.answers)
            likelihood = jnp.where(known, again, -jnp.inf)
        log_q = jnp.zeros_like(likelihood)
        if proposal is not None:
            log_q = proposal.policy.log_prob(phi, rows.hints, held.tokens, held.mask)
        before = log_weight(theta, phi, rows, Rationales(held.tokens, log_q, held.mask), likelihood)
        proposed = log_weight(theta, phi, asking, found.drawn, found.log_likelihood)
        chosen, weight, accept = walk(
            walk_key, before, proposed, found.owner, found.asked & (present > 0)[found.owner]
        )

        moved = chosen >= 0
        at = jnp.maximum(chosen, 0)
        tokens, mask, likelihood = jax.tree.map(
            lambda drawn, held: jnp.where(
                moved.reshape(-1, *[1] * (held.ndim - 1)), jnp.take(drawn, at, axis=0), held
            ),
            (found.drawn.tokens, found.drawn.mask, found.log_likelihood),
            (held.tokens, held.mask, likelihood),
        )
        reward = jnp.where(found.asked, found.reward, 0.0)
        right = jnp.isfinite(weight).astype(reward.dtype) * present

        def all_slopes():
            rows_, tokens, mask = joined(rows, asking, held, found)
            along = slopes(
                lambda p: model.policy.log_prob(p, rows_.prompts, tokens, mask),
                theta,
                direction_key,
                estimator.directions,
            )
            return along[present.shape[0] :], along[: present.shape[0]]

        real = lambda flags: flags.astype(reward.dtype)
        visit = Visit(
            found.owner,
            reward,
            accept,
            real(found.used),
            present,
            real(jnp.isfinite(before)) * present,
            right,
            chosen,
            all_slopes,
        )
        tries = visit.sums(real(found.asked))
        updated = Memory(
            tokens,
            mask,
            likelihood,
            allocator.decay * held.tries + tries,
            allocator.decay * held.successes + visit.sums(jnp.clip(reward, 0.0, 1.0)),
            jnp.where(moved, 0, held.age + 1),
        )
        into = jnp.where(present > 0, index, size)
        memory = write(shelf, memory, into, updated, moved)
        stats = _stats(visit, found, updated, memory)
        return visit, held, found, asking, memory, stats

    def surrogate(position: Position, items: Items):
        theta, phi = of(position)

        def value(items: Items):
            rows = items.rows
            prior = model.policy.log_prob(theta, rows.prompts, items.tokens, items.mask)
            total = jnp.sum(times(items.prior, prior))
            if not model.fixed:
                likelihood = model.log_likelihood(
                    theta, rows.prompts, items.tokens, items.mask, rows.answers
                )
                total += jnp.sum(times(items.likelihood, likelihood))
            if learned:
                assert proposal is not None
                log_q = proposal.policy.log_prob(phi, rows.hints, items.tokens, items.mask)
                total += jnp.sum(times(items.likelihood, log_q))
            return total

        return in_pieces(value, items, pieces)

    def next(key: PRNGKey, position: Position, state: EMState):
        step_key, subsample_key = jax.random.split(key)
        batch, batch_state = batches.next(state.batches)
        rows, index = batch.data
        present = jnp.broadcast_to(batch.weight > 0, index.shape).astype(jnp.float32)
        visit, held, found, asking, memory, stats = e_step(
            step_key, position, rows, index, present, state.memory
        )
        items = weighed(subsample_key, estimator, visit, held, found, rows, asking)
        items = lax.stop_gradient(items)

        def score(position: Position):
            return stats.reward, jax.grad(surrogate)(position, items)

        return score, EMState(batch_state, memory, stats)

    def init(key: PRNGKey, position: Position) -> EMState:
        batch_key, start_key = jax.random.split(key)
        if learned and not (isinstance(position, tuple) and len(position) == 2):
            raise ValueError(
                "position must be a pair of the model's parameters and the learned guide's, got "
                f"{describe(position)}."
            )
        theta, phi = of(position)
        count = allocator.per_round * min(batch_size, size)
        _try(model, questions, theta, phi, proposal, start, estimator.greedy, count)
        shelf, one = shelf_of(theta), latent_shapes(model, theta, questions)
        memory = empty_memory(shelf, jax.random.fold_in(start_key, 0), one, size)
        if start is not None:
            memory = _started(start_key, start, model, theta, questions, shelf, memory, batch_size)
        zero = jnp.zeros(())
        return EMState(batches.init(batch_key), memory, Stats(*(zero,) * len(Stats._fields)))

    def initial(key: PRNGKey):
        keys = jax.random.split(key, len(starts))
        found = tuple(start(key, one) for start, key in zip(starts, keys, strict=True))  # type: ignore
        return found if learned else found[0]

    def stands_for(position: Position):
        theta, phi = of(position)
        found = model.constrain(theta, one) if model.constrain is not None else theta
        return (found, phi) if learned else found

    return Gradient(init, next, None, None if None in starts else initial, stands_for)


def unsolved(state: Any) -> Int[Array, " examples"]:
    """Numbers of the examples for which no latent was ever right.

    They are masked, and take no part in means.

    Args:
        state: The kernel's state, the gradient's, or a memory.

    Raises:
        TypeError: it is none of these.
    """
    memory = state
    while not isinstance(memory, Memory):
        memory = getattr(memory, "gradient_state", None) or getattr(memory, "memory", None)
        if memory is None:
            raise TypeError(
                "state must be a state of a kernel with mcmc_em, of the gradient, or a memory, got "
                f"{describe(state)}."
            )
    return jnp.flatnonzero(jnp.isneginf(memory.log_likelihood))


def _started(
    key, guide: Guide, model, theta, questions: Questions, shelf: Shelf, memory: Memory, at_once
):
    """The memory with a draw of a guide for each example, as many at once as in a minibatch."""
    size = memory.age.shape[0]
    blocks = -(-size // at_once)
    index = jnp.arange(blocks * at_once, dtype=jnp.int32).reshape(blocks, at_once)

    def block(memory: Memory, given):
        key, index = given
        rows = take(questions, index % size)
        drawn = guide.policy.sample(theta, key, rows.hints)
        likelihood = model.log_likelihood(
            theta, rows.prompts, drawn.tokens, drawn.mask, rows.answers
        )
        none = jnp.zeros(at_once)
        found = Memory(drawn.tokens, drawn.mask, likelihood, none, none, jnp.zeros_like(index))
        return write(shelf, memory, index, found, index < size), None

    return lax.scan(block, memory, (jax.random.split(key, blocks), index))[0]


def _stats(visit: Visit, found: Proposals, updated: Memory, memory: Memory) -> Stats:
    real = visit.reward.dtype
    present = visit.present
    asked = found.asked.astype(real) * present[visit.owner]
    questions, proposals = jnp.sum(present), jnp.sum(asked)
    per_proposal = jnp.maximum(proposals, 1.0)
    return Stats(
        jnp.sum(visit.accept * asked) / per_proposal,
        jnp.sum(visit.reward * asked) / per_proposal,
        jnp.sum(visit.right * present) / questions,
        jnp.mean(jnp.isfinite(memory.log_likelihood), dtype=real),
        jnp.sum(updated.age.astype(real) * present) / questions,
        proposals,
        jnp.sum(jnp.sum(found.drawn.mask, axis=1, dtype=real) * asked),
    )


def _writable(memory_path: str | Path) -> Path:
    place = check_path("memory_path", memory_path)
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / ".written").touch()
        (place / ".written").unlink()
    except OSError as error:
        raise OSError(
            f"memory_path={str(memory_path)!r} cannot be written to: {first_line(error)}."
        ) from error
    return place


def _try(
    model, questions: Questions, theta, phi, proposal, start, greedy: bool, count: int
) -> None:
    """Raise where the policy, a guide or the likelihood does not do what it should: by shapes."""
    drawn = check_draws(
        "model.policy", model.policy, theta, questions.prompts, count, greedy=greedy
    )
    for name, guide, params in (("proposal", proposal, phi), ("start", start, theta)):
        if guide is None:
            continue
        its = check_draws(f"{name}.policy", guide.policy, params, questions.hints, count)
        shapes = [
            jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), (of.tokens, of.mask))
            for of in (drawn, its)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name}.policy must draw what the model's policy draws, {shapes[0]}, got "
                f"{shapes[1]}."
            )
    some = take(questions, jnp.zeros(count, jnp.int32))
    found = called(
        "model.log_likelihood",
        jax.eval_shape,
        model.log_likelihood,
        theta,
        some.prompts,
        drawn.tokens,
        drawn.mask,
        some.answers,
    )
    check_numbers("model.log_likelihood", found, count)


def _check(
    model, questions, estimator: Estimator, allocator: Allocator, proposal, start
) -> tuple[Questions, int]:
    """Raise where parts are not what they should be, or do not fit each other."""
    check_model(model)
    questions, size = check_questions(questions)
    check_instance("estimator", estimator, Estimator, "an Estimator, as stochgrad.em.trice() is")
    check_callable("estimator.weights", estimator.weights, "a function of a Visit")
    check_instance("allocator", allocator, Allocator, "an Allocator, as stochgrad.em.uniform() is")
    check_callable("allocator.counts", allocator.counts)
    check_count("allocator.per_round", allocator.per_round)
    check_count("allocator.rounds", allocator.rounds)
    for name, guide in (("proposal", proposal), ("start", start)):
        if guide is None:
            continue
        check_instance(name, guide, Guide, "a Guide")
        check_policy(f"{name}.policy", guide.policy)
        check_flag(f"{name}.learned", guide.learned)
        if guide.initial is not None:
            check_callable(f"{name}.initial", guide.initial, "a function, or None")
        if questions.hints is None:
            raise ValueError(f"{name} sees hints, but questions.hints is None.")
    if start is not None and start.learned:
        raise ValueError(
            "start must be a guide with the model's parameters, got a learned one: give it as "
            "proposal."
        )
    if proposal is not None and not estimator.chains:
        raise ValueError(
            f"{estimator.name} needs the policy's own proposals: leave proposal out, or use trice."
        )
    if proposal is not None and estimator.control:
        raise ValueError(
            "a control variate needs the policy's own proposals: with a proposal use trice('none')."
        )
    if not model.fixed and (not estimator.chains or estimator.subsample is not None):
        raise ValueError(
            f"{estimator.name} is for likelihoods that are free of the parameters, as a verifier "
            "is: use trice() without subsample."
        )
    if estimator.greedy and model.policy.greedy is None:
        raise ValueError(f"{estimator.name}(greedy=True) needs a policy with greedy, got None.")
    most = allocator.per_round * allocator.rounds
    if most < estimator.least:
        raise ValueError(
            f"{estimator.name} needs at least {estimator.least} proposals a question, got {most}: "
            "set allocator=stochgrad.em.uniform(n)."
        )
    return questions, size
