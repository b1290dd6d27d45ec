"""Training: an objective climbed by an optimizer, its best state on held-out estimates kept."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from stochgrad._deprecations import key_first
from stochgrad.core import (
    DivergenceWarning,
    Gradient,
    Online,
    Position,
    PrecisionWarning,
    PRNGKey,
    Target,
    as_schedule,
    by_name,
    check_count,
    check_flag,
    check_key,
    check_number,
    check_path,
    check_position,
    first_line,
    initial_of,
    sample,
)
from stochgrad.gradients import as_gradient, check_like, evaluated
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


@key_first
def fit(
    key: PRNGKey,
    objective: Target,
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
    r"""Climb an objective with an optimizer, and keep the best of what is met.

    Each ``every`` steps a held-out value is estimated, with the same random numbers each time so
    that two positions can be compared, and the best position is kept. Training ends early where the
    held-out value has not risen ``patience`` times in a row, where it leaves the finite numbers
    (the best state before is returned) and on Ctrl-C.

    It is ``stochgrad.sample`` with the kernel ``stochgrad.ascend``: restarts are its chains.

    Args:
        key: A PRNG key.
        objective: A gradient, as ``stochgrad.flows.reverse_kl`` makes it, or a posterior.
        num_steps: Steps, rounded down to a multiple of ``every``.
        learning_rate: Of Adam's: a number, from which it falls to zero as a cosine, or an optax
            schedule. Gradients are clipped at a norm of 100.
        optimizer: Any optax optimizer instead, its learning rate included.
        init: Where to start, or ``key -> position``, called for every restart; where the objective
            starts by default. What holds arrays is a position, even if it can be called (an
            equinox module). A ``Fit`` is taken at its position.
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
        TypeError: the key is not a typed PRNG key, the objective not a gradient, or the optimizer
            none of optax's.
        ValueError: a number is out of range; no ``init``, or one of another structure than the
            objective's position; ``held_out`` takes other positions; the objective, or
            ``held_out``, fails or is not finite at the start.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(9), order="full"
        ... )
        >>> fit = stochgrad.fit(jax.random.key(0), target, 500, init=jnp.array(0.0),
        ...     learning_rate=0.05)
        >>> round(float(fit.model), 2)
        0.9
    """
    import optax

    check_key(key)
    gradient = as_gradient(objective, "objective")
    num_steps, every = check_count("num_steps", num_steps), check_count("every", every)
    num_restarts = check_count("num_restarts", num_restarts)
    draws = check_count("held_out_draws", held_out_draws)
    patience = num_steps if patience is None else check_count("patience", patience)
    every = min(every, num_steps)
    evaluations = num_steps // every
    progress, resume = check_flag("progress", progress), check_flag("resume", resume)
    checkpoint = None if checkpoint is None else check_path("checkpoint", checkpoint)
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint, the directory to resume from.")
    if optimizer is None:
        if callable(learning_rate):
            as_schedule(learning_rate, "learning_rate", zero=True)
        else:
            peak = check_number("learning_rate", learning_rate)
            learning_rate = optax.cosine_decay_schedule(peak, evaluations * every)
        optimizer = optax.chain(optax.clip_by_global_norm(100.0), optax.adam(learning_rate))
    elif callable(learning_rate) or learning_rate != 1e-3:
        raise ValueError(
            "learning_rate is Adam's, and optimizer stands in its place: give the rate to that."
        )
    judge = gradient if held_out is None else as_gradient(held_out, "held_out")

    judge_key, start_key, run_key = jax.random.split(key, 3)
    kernel = ascend(gradient, optimizer)
    starts = _starts(init, initial_of(kernel), start_key, num_restarts)
    _warn_of_narrow_weights(starts[0])
    name = "objective" if held_out is None else "held_out"

    def evaluate(position):
        def one(key):
            state = judge.init(key, position)
            score, _ = judge.next(key, position, state)
            return evaluated(name, score, position)[0]

        return jnp.mean(jnp.stack([one(k) for k in jax.random.split(judge_key, draws)]))

    if held_out is not None:
        _check_judge(judge, starts[0])
    _refuse_unless_finite(name, evaluate, starts)
    online = _keep_best(evaluate, evaluations, patience)
    each = iter(starts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivergenceWarning)
        run = sample(
            run_key,
            kernel,
            init=lambda key: jax.tree.map(jnp.array, next(each)),
            num_samples=evaluations,
            thin=every,
            num_chains=num_restarts,
            collect=online,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
        )
    return _as_fit(run, gradient, every, num_restarts, starts)


def _warn_of_narrow_weights(position: Position) -> None:
    narrow = {name: x.dtype for name, x in by_name(position).items() if x.dtype.itemsize < 4}
    if narrow:
        dtype = next(iter(narrow.values()))
        some, least = ", ".join(list(narrow)[:3]), float(jnp.finfo(dtype).eps) / 2
        warnings.warn(
            f"init has weights of type {dtype} ({some}), which do not move by less "
            f"than {least:.2g} of themselves: begin at float32 weights and climb "
            f"stochgrad.mixed_precision(objective, jnp.{dtype}).",
            PrecisionWarning,
            stacklevel=3,
        )


def _check_judge(judge: Gradient, position: Position) -> None:
    initial = initial_of(judge)
    if initial is not None:
        like = jax.eval_shape(initial, jax.random.key(0))
        check_like("the objective's position", position, like, "the position of held_out")


def _starts(init: Any, initial: Any, key: PRNGKey, count: int) -> list[Position]:
    """Where each restart begins. What holds arrays is a position, even if it can be called."""
    init = getattr(init, "position", init)
    begin = initial if init is None else init
    if begin is None:
        raise ValueError("init is needed: this objective defines no starting point.")
    if callable(begin) and not any(_is_array(leaf) for leaf in jax.tree.leaves(begin)):
        try:
            starts = [begin(k) for k in jax.random.split(key, count)] if count > 1 else [begin(key)]
        except Exception as error:
            raise ValueError(
                f"init must be a position or a function key -> position, and fails on a key: "
                f"{first_line(error)}."
            ) from error
    else:
        starts = [begin] * count
    for start in starts:
        check_position(start)
        check_like("init", start, starts[0], "the first restart's position")
    if init is not None and initial is not None:
        check_like("init", starts[0], jax.eval_shape(initial, key), "the objective's position")
    return [jax.tree.map(jnp.asarray, start) for start in starts]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float)


def _refuse_unless_finite(name: str, evaluate, starts: list[Position]) -> None:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    one = len(starts) == 1 or all(start is starts[0] for start in starts)
    values = jax.jit(evaluate if one else jax.vmap(evaluate))(starts[0] if one else stacked)
    bad = np.flatnonzero(~np.isfinite(np.atleast_1d(values)))
    if bad.size:
        which = "" if one else f" of restart {bad[0]}"
        raise ValueError(
            f"{name} must be finite at the start{which}, got {np.atleast_1d(values)[bad[0]]}: "
            "is the log density finite wherever the model draws?"
        )


def _not_finite_in(gradient: Gradient, position: Position) -> str:
    """Which arrays of the gradient are not finite at a position, in words; nothing if all are."""
    key = jax.random.key(0)

    @jax.jit
    def finite(position):
        score, _ = gradient.next(key, position, gradient.init(key, position))
        return jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), score(position)[1])

    leaves = jax.tree_util.tree_leaves_with_path(finite(position))
    bad = [jax.tree_util.keystr(path) or "as a whole" for path, good in leaves if not good]
    return f" The gradient at the start is not finite: {', '.join(bad)}." if bad else ""


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


def _as_fit(run, gradient: Gradient, every: int, num_restarts: int, starts) -> Fit:
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
        first = min(bad, key=lambda item: item[1])
        cause = _not_finite_in(gradient, starts[first[0]]) if first[1] < every else ""
        warnings.warn(
            f"training diverged {which}; the best state before, of step "
            f"{int(chosen.at) * every}, is returned." + (cause or " Try a smaller learning_rate."),
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
