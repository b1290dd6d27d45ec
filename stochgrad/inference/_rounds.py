"""Rounds of draws, until they are enough, and once more with half the step."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import (
    Draws,
    Kernel,
    Position,
    PRNGKey,
    effective_draws,
    last_draws,
    rhat,
    sample,
    some_series,
)
from stochgrad.diagnostics import Law, excursion_reasons, worst_bias
from stochgrad.inference._modes import unvisited
from stochgrad.sgmcmc import WarmUp

_MOST_ROUNDS, _PATIENCE = 16, 4
_MOST_HALVINGS, _MOST_REPEATS = 4, 3
_MOST_RHAT = 1.02
_MOST_SERIES = 256
_ERRORS, _GAP = 4.0, 0.1
_MOST_SD_BIAS = 0.1

Say = Callable[[str], None]


class Budget(NamedTuple):
    """What may be spent.

    Attributes:
        begun: When it began, on the clock of ``time.perf_counter``.
        seconds: In all.
        gradients: After the warm-up.
    """

    begun: float
    seconds: float
    gradients: float

    def allows(self, gradients: float, seconds: float) -> bool:
        """Whether there is room for so many gradients in all, and so many more seconds."""
        left = self.seconds - (time.perf_counter() - self.begun)
        return gradients <= self.gradients and seconds <= left


class _Goal(NamedTuple):
    num_samples: int
    num_chains: int
    target_ess: float
    budget: Budget
    say: Say


class _Rounds(NamedTuple):
    """Some rounds of draws, one after another.

    Attributes:
        draws: All draws, every ``thin`` steps.
        count: Rounds.
        thin: Steps of a draw.
        effective: The fewest effective draws of a number.
        gradients: What has been spent, rounds before included.
        starts: Where the chains are.
        notes: Why the goal was not reached.
        diverged: Whether a chain diverged.
    """

    draws: Draws
    count: int
    thin: int
    effective: float
    gradients: float
    starts: Position
    notes: tuple[str, ...]
    diverged: bool

    @property
    def seconds(self) -> float:
        """What they took."""
        return self.draws.timings["total"]


def sample_until(
    key: PRNGKey,
    tuned: WarmUp,
    kernel: Kernel,
    finer: Callable[[Kernel, float], Kernel],
    law: Law | None,
    num_samples: int,
    num_chains: int,
    target_ess: float,
    budget: Budget,
    say: Say,
) -> Draws:
    """Draws that are enough, and that half the step would not change.

    Without a Metropolis step draws are biased by the step size, most where the posterior is curved,
    which no law around a center knows. So a run with half the step and twice as many steps follows;
    where means or spreads differ by more than their errors it is halved again. The draws of the
    last, finest run are returned. A run in which a chain diverges, or is thrown to where the
    posterior is next to nothing, is made anew with half the step. ``finer(kernel, step_size)``
    makes the kernel of another step.
    """
    goal = _Goal(num_samples, num_chains, target_ess, budget, say)
    thin = _first_thin(tuned, kernel, goal)
    if math.isfinite(budget.gradients):
        each = num_samples * num_chains * _gradients_per_step(kernel)
        thin = max(min(thin, int(budget.gradients / each)), 1)
    run, kernel = _stable(key, kernel, finer, thin, tuned.starts, 0.0, goal)
    if law is not None:
        steps = run.draws.num_draws * run.thin * num_chains
        say(
            f"measured: {steps / max(run.effective, 1.0):.2g} steps an effective draw of the "
            f"slowest number, {law.gradients_per_draw:.2g} predicted"
        )
    notes = (*tuned.reasons, *run.notes) if run.notes else ()
    if kernel.method == "SGHMC" and not notes:
        run, kernel, notes = _halved(key, kernel, finer, run, goal)
        if law is not None and worst_bias(law) > _MOST_SD_BIAS:
            notes += (f"the law of the chain, predicted: {law}.",)
    notes += unvisited(tuned, run.draws, jax.random.fold_in(key, 2000))
    every = run.count
    draws = run.draws if every == 1 else run.draws[every - 1 :: every]
    attrs = {
        **draws.attrs,
        "thin": run.thin * every,
        "gradients": run.gradients,
        "warm_up_gradients": tuned.gradients,
        "warm_up_passes": tuned.approximation.passes,
        "warm_up_windows": len(tuned.windows),
        "warm_up_seconds": tuned.seconds,
        "warm_up_settled": int(tuned.settled),
    }
    return replace(draws, attrs=attrs, notes=notes, law=law)


def _halved(
    key: PRNGKey,
    kernel: Kernel,
    finer: Callable[[Kernel, float], Kernel],
    run: _Rounds,
    goal: _Goal,
) -> tuple[_Rounds, Kernel, tuple[str, ...]]:
    """Runs with half the step, until that changes nothing; the last of them."""
    gap = ""
    for i in range(_MOST_HALVINGS):
        cost = 2 * run.count * goal.num_samples * run.thin * goal.num_chains
        spent = run.gradients + cost * _gradients_per_step(kernel)
        if not goal.budget.allows(spent, 2 * run.seconds):
            return (
                run,
                kernel,
                (
                    "the budget ended before half the step was tried, which shows whether the step "
                    "size biases the draws; allow more.",
                ),
            )
        halved, kernel = _stable(
            jax.random.fold_in(key, 1000 + i),
            _with_half_the_step(kernel, finer),
            finer,
            2 * run.thin,
            run.starts,
            run.gradients,
            goal,
            least=run.count,
        )
        if halved.notes:
            return halved, kernel, halved.notes
        gap = _gap(run.draws, halved.draws)
        run = halved
        goal.say(f"with half the step, {_step_size(kernel):.3g}: {gap or 'the same'}")
        if not gap:
            return run, kernel, ()
    return (
        run,
        kernel,
        (
            f"with half the step {gap} still, after {_MOST_HALVINGS} halvings: the step size "
            "biases the draws. Reparameterize, or take method='nuts'.",
        ),
    )


def _stable(
    key: PRNGKey,
    kernel: Kernel,
    finer: Callable[[Kernel, float], Kernel],
    thin: int,
    starts: Position,
    spent: float,
    goal: _Goal,
    least: int = 1,
) -> tuple[_Rounds, Kernel]:
    """Rounds with the first step, halved again and again, at which no chain diverges.

    The step of the warm-up is stable where its chains went. One that goes farther, down the neck of
    a hierarchy, meets curvature that the step does not stand.
    """
    run = _rounds(key, kernel, thin, starts, spent, goal, least)
    for i in range(_MOST_REPEATS if kernel.method == "SGHMC" else 0):
        if not (run.diverged or excursion_reasons(run.draws)):
            break
        again = run.gradients + 2 * (run.gradients - spent)
        if not goal.budget.allows(again, 2 * run.seconds):
            break
        what = "diverged" if run.diverged else "was thrown far out"
        goal.say(f"a chain {what} with steps of {_step_size(kernel):.3g}: again with half of them")
        kernel, thin, spent = _with_half_the_step(kernel, finer), 2 * thin, run.gradients
        run = _rounds(jax.random.fold_in(key, 100 + i), kernel, thin, starts, spent, goal, least)
    return run, kernel


def _with_half_the_step(kernel: Kernel, finer: Callable[[Kernel, float], Kernel]) -> Kernel:
    return finer(kernel, _step_size(kernel) / 2)


def _step_size(kernel: Kernel) -> float:
    return dict(kernel.settings)["step_size"]


def _rounds(
    key: PRNGKey,
    kernel: Kernel,
    thin: int,
    starts: Position,
    spent: float,
    goal: _Goal,
    least: int = 1,
) -> _Rounds:
    """Rounds of draws until chains agree on enough of them, or the budget is spent."""
    parts: list[Draws] = []
    notes: tuple[str, ...] = ()
    diverged = False
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            part = sample(
                jax.random.fold_in(key, len(parts)),
                kernel,
                init=starts,
                num_samples=goal.num_samples,
                thin=thin,
                num_chains=goal.num_chains,
                progress=False,
            )
        parts.append(part)
        own = float(np.sum(part.stats["n_steps"])) if "n_steps" in part.stats else None
        steps = goal.num_samples * thin * goal.num_chains
        own = steps * _gradients_per_step(kernel) if own is None else own
        spent += own
        draws = _joined(parts)
        ratio, effective = _worst(draws)
        goal.say(
            f"{draws.num_draws} draws a chain, {thin} steps each: R-hat {ratio:.3f}, "
            f"{effective:.0f} effective draws"
        )
        if np.any(part.first_bad >= 0) or part.num_draws < goal.num_samples:
            diverged = True
            step = f" with steps of {_step_size(kernel):.3g}" if kernel.method == "SGHMC" else ""
            notes = (f"a chain diverged{step}.",)
            break
        starts = jax.tree.map(
            lambda x: jnp.asarray(x[:, -1] if goal.num_chains > 1 else x[0, -1]), part.positions
        )
        reached = ratio < _MOST_RHAT and effective >= goal.target_ess
        if reached and len(parts) >= least:
            break
        hopeless = len(parts) >= _PATIENCE and effective < goal.target_ess / 20
        room = goal.budget.allows(spent + own, part.timings["total"])
        if not reached and (len(parts) >= _MOST_ROUNDS or hopeless or not room):
            what, remedy = "the budget ended before the goal", "allow more"
            if hopeless:
                what, remedy = "chains do not mix", "they may lie in modes of their own"
            notes = (
                f"{what}: {effective:.0f} of {goal.target_ess:g} effective draws, "
                f"R-hat {ratio:.3f}, after {spent:,.0f} gradients; {remedy}.",
            )
            break
    return _Rounds(draws, len(parts), thin, effective, spent, starts, notes, diverged)


def _gap(coarse: Draws, fine: Draws) -> str:
    """By how much half the step moves means or spreads, where it does; else nothing."""
    names, a, _ = some_series(last_draws(coarse, coarse.first_bad < 0), _MOST_SERIES)
    _, b, _ = some_series(last_draws(fine, fine.first_bad < 0), _MOST_SERIES)
    if a.shape[2] != b.shape[2]:
        return "other numbers are finite"
    sd = np.maximum(b.std((0, 1)), 1e-300)
    error = np.sqrt(1 / effective_draws(a, "mean") + 1 / effective_draws(b, "mean"))
    moved = np.abs(a.mean((0, 1)) - b.mean((0, 1))) / sd
    squares = [effective_draws((x - x.mean((0, 1))) ** 2, "mean") for x in (a, b)]
    tails = [np.mean(((x - x.mean((0, 1))) / x.std((0, 1))) ** 4, axis=(0, 1)) for x in (a, b)]
    spread_error = 0.5 * np.sqrt(
        sum((tail - 1) / size for tail, size in zip(tails, squares, strict=True))
    )
    widened = np.abs(np.log(np.maximum(a.std((0, 1)), 1e-300) / sd))
    for values, errors, what in (
        (moved, error, "the mean of {} moves by {:.2f} sd"),
        (widened, spread_error, "the sd of {} changes by {:.0%}"),
    ):
        i = int(np.nanargmax(values - np.maximum(_ERRORS * errors, _GAP)))
        if values[i] > max(_ERRORS * errors[i], _GAP):
            return what.format(repr(names[i]), values[i])
    return ""


def _first_thin(tuned: WarmUp, kernel: Kernel, goal: _Goal) -> int:
    """Steps a draw, so that the last window's mixing gives what is asked, with a margin."""
    last = tuned.windows[-1] if tuned.windows else None
    if last is None or kernel.method == "NUTS":
        return 1
    per_effective = goal.num_chains * last.steps / 2 / max(last.effective, 1.0)
    per_effective *= last.step_size / _step_size(kernel)
    steps = 1.3 * goal.target_ess * per_effective / goal.num_chains
    return int(np.clip(math.ceil(steps / goal.num_samples), 1, 10_000))


def _gradients_per_step(kernel: Kernel) -> float:
    """Minibatch gradients of a step: two with a control variate, about."""
    return 1.0 if dict(kernel.settings).get("order") == "full" else 2.0


def _worst(draws: Draws) -> tuple[float, float]:
    """The largest R-hat and the fewest effective draws."""
    healthy = draws.first_bad < 0
    if not healthy.any() or not draws.num_draws:
        return math.inf, 0.0
    _, series, _ = some_series(last_draws(draws, healthy), _MOST_SERIES)
    return float(np.nanmax(rhat(series))), float(np.nanmin(effective_draws(series)))


def _joined(parts: list[Draws]) -> Draws:
    """Runs one after another as one."""
    if len(parts) == 1:
        return parts[0]
    join: Any = lambda *leaves: np.concatenate(leaves, axis=1)
    last = parts[-1]
    return replace(
        last,
        positions=jax.tree.map(join, *(p.positions for p in parts)),
        stats=jax.tree.map(join, *(p.stats for p in parts)),
        finite=join(*(p.finite for p in parts)),
        timings={
            name: float(np.sum([p.timings.get(name, 0.0) for p in parts])) for name in last.timings
        },
    )
