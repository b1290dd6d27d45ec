"""Training: an objective climbed by an optimiser, its best state on held-out estimates kept."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from stochgrad.core import (
    DivergenceWarning,
    Gradient,
    Online,
    Position,
    PRNGKey,
    Target,
    check_count,
    check_key,
    check_number,
    initial_of,
    sample,
)
from stochgrad.gradients import as_gradient
from stochgrad.kernels._ascend import ascend


class Fit(NamedTuple):
    """What training gave.

    Attributes:
        model: What the best position stands for, a flow for example; the position itself where the
            objective does not say.
        position: The position with the highest held-out value, of all restarts.
        last: The last finite position of that restart.
        values: Minibatch value of the objective at every evaluation, shape (restarts, evaluations).
        held_out: Held-out values likewise; NaN where training had ended.
        best_step: The step of the best position.
        restart: The restart that it is of.
        every: Steps between two evaluations.
        seconds: What training took, compilation included.
    """

    model: Any
    position: Position
    last: Position
    values: Float[np.ndarray, "restarts evaluations"]
    held_out: Float[np.ndarray, "restarts evaluations"]
    best_step: int
    restart: int
    every: int
    seconds: float

    @property
    def value(self) -> float:
        """The best held-out value."""
        return float(np.nanmax(self.held_out))


class _Best(NamedTuple):
    """The best and the last of a training so far."""

    position: Any
    last: Any
    value: Any
    at: Any
    count: Any
    history: Any


def fit(
    objective: Target,
    key: PRNGKey,
    num_steps: int,
    *,
    learning_rate: float | Callable[[Any], Any] = 1e-3,
    optimizer: Any = None,
    init: PyTree | Callable[[PRNGKey], Position] | None = None,
    num_restarts: int = 1,
    held_out: Target | None = None,
    held_out_draws: int = 4,
    every: int = 100,
    patience: int | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> Fit:
    r"""Climb an objective with an optimiser, and keep the best of what is met.

    Each ``every`` steps a held-out value is estimated, with the same random numbers each time so
    that two positions can be compared, and the best position is kept. Training ends early where the
    held-out value has not risen ``patience`` times in a row, where it leaves the finite numbers
    (the best state before is returned) and on Ctrl-C.

    It is ``stochgrad.sample`` with the kernel ``stochgrad.ascend``: restarts are its chains.

    Args:
        objective: A gradient, as ``stochgrad.flows.reverse_kl`` makes it, or a posterior.
        key: A PRNG key.
        num_steps: Steps, rounded down to a multiple of ``every``.
        learning_rate: Of Adam's: a number, from which it falls to zero as a cosine, or an optax
            schedule. Gradients are clipped at a norm of 100.
        optimizer: Any optax optimiser instead.
        init: Where to start, or ``key -> position``, called for every restart; where the objective
            starts by default.
        num_restarts: Independent runs, side by side. The best is returned.
        held_out: What to judge by: a gradient of the same position, ``forward_kl`` of samples set
            aside for example. By default the objective itself.
        held_out_draws: Draws of what is random in ``held_out`` that are averaged.
        every: Steps between two evaluations.
        patience: Evaluations without a rise before training ends; None to go on to the end.
        progress: Whether to show a progress bar.
        checkpoint: A directory for the state of the training, saved as it goes.
        resume: Whether to go on from there.

    Raises:
        TypeError: the key is not a typed PRNG key, or the objective not a gradient.
        ValueError: a number is out of range; no ``init``; the objective is not finite at the start.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(9), order="full"
        ... )
        >>> fit = stochgrad.fit(target, jax.random.key(0), 500, init=jnp.array(0.0),
        ...     learning_rate=0.05)
        >>> round(float(fit.model), 2)
        0.9
    """
    import optax

    check_key(key)
    num_steps, every = check_count("num_steps", num_steps), check_count("every", every)
    num_restarts = check_count("num_restarts", num_restarts)
    draws = check_count("held_out_draws", held_out_draws)
    patience = num_steps if patience is None else check_count("patience", patience)
    every = min(every, num_steps)
    evaluations = num_steps // every
    if optimizer is None:
        if not callable(learning_rate):
            peak = check_number("learning_rate", learning_rate)
            learning_rate = optax.cosine_decay_schedule(peak, evaluations * every)
        optimizer = optax.chain(optax.clip_by_global_norm(100.0), optax.adam(learning_rate))
    gradient = as_gradient(objective)
    judge = gradient if held_out is None else as_gradient(held_out)

    judge_key, start_key, run_key = jax.random.split(key, 3)
    kernel = ascend(gradient, optimizer)
    begin = init if init is not None else initial_of(kernel)
    if begin is None:
        raise ValueError("init is needed: this objective does not know where to start.")
    several = num_restarts > 1 and callable(begin)
    if several:
        each = [begin(k) for k in jax.random.split(start_key, num_restarts)]
        begin = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    elif callable(begin):
        begin = begin(start_key)

    def evaluate(position):
        def one(key):
            state = judge.init(key, position)
            score, _ = judge.next(key, position, state)
            return score(position)[0]

        return jnp.mean(jnp.stack([one(k) for k in jax.random.split(judge_key, draws)]))

    _refuse_unless_finite(evaluate, begin, several)
    online = _keep_best(evaluate, evaluations, patience)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivergenceWarning)
        run = sample(
            run_key,
            kernel,
            init=begin,
            num_samples=evaluations,
            thin=every,
            num_chains=num_restarts,
            collect=online,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
        )
    return _as_fit(run, gradient, every, num_restarts)


def _refuse_unless_finite(evaluate, begin, several: bool) -> None:
    values = jax.jit(jax.vmap(evaluate) if several else evaluate)(begin)
    if not np.all(np.isfinite(values)):
        raise ValueError(
            f"the objective must be finite at the start, got {np.min(values)}: is the log density "
            "finite wherever the model draws?"
        )


def _keep_best(evaluate, evaluations: int, patience: int) -> Online:
    def start(position):
        low = jax.eval_shape(evaluate, position)
        none, zero = jnp.full((), -jnp.inf, low.dtype), jnp.zeros((), jnp.int32)
        return _Best(
            position, position, none, zero, zero, jnp.full(evaluations, jnp.nan, low.dtype)
        )

    def over(best: _Best):
        return best.count - best.at >= patience

    def update(best: _Best, position) -> _Best:
        value = evaluate(position)
        value = jnp.where(jnp.isnan(value), -jnp.inf, value)
        better = value > best.value
        keep = partial(jnp.where, better)
        new = _Best(
            jax.tree.map(keep, position, best.position),
            position,
            keep(value, best.value),
            jnp.where(better, best.count + 1, best.at),
            best.count + 1,
            best.history.at[best.count].set(value),
        )
        return jax.tree.map(lambda new, old: jnp.where(over(best), old, new), new, best)

    return Online(start, update, over)


def _as_fit(run, gradient: Gradient, every: int, num_restarts: int) -> Fit:
    best: _Best = run.summary
    if num_restarts == 1:
        best = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], best)
    at = int(np.argmax(np.asarray(best.value)))
    chosen = jax.tree.map(lambda leaf: jnp.asarray(leaf)[at], best)
    bad = [(n, int(step)) for n, step in enumerate(run.first_bad) if step >= 0]
    if bad:
        which = ", ".join(
            f"at step {step}" + (f" (restart {n})" if num_restarts > 1 else "") for n, step in bad
        )
        warnings.warn(
            f"training left the finite numbers {which}; the best state before, of step "
            f"{int(chosen.at) * every}, is returned. Try a smaller learning_rate.",
            DivergenceWarning,
            stacklevel=3,
        )
    values = np.asarray(run.stats["log_density"], np.float64).reshape(num_restarts, -1)
    return Fit(
        chosen.position if gradient.model is None else gradient.model(chosen.position),
        chosen.position,
        chosen.last,
        values,
        np.asarray(best.history, np.float64),
        int(chosen.at) * every,
        at,
        every,
        float(run.timings["total"]),
    )
