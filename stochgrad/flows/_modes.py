"""Many modes in one call: tempered chains, a flow trained on both sides, Metropolis, checks."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import AbstractDistribution, AbstractTransformed, StandardNormal
from jaxtyping import Array

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Draws,
    Kernel,
    Posterior,
    PRNGKey,
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_instance,
    check_key,
    check_number,
)
from stochgrad.flows._agreement import Agreement, agreement, check_modes, default_modes
from stochgrad.flows._chains import run_chains, starts
from stochgrad.flows._draw import unwrap_flow
from stochgrad.flows._evaluations import evaluations_per_step, full_target
from stochgrad.flows._jeffreys import jeffreys
from stochgrad.flows._objective import LogDensity, check_density
from stochgrad.flows._sample import ess_under_target, metropolis, sample
from stochgrad.flows._strata import mixture_of
from stochgrad.flows._weighted import WeightedDraws, WeightsWarning
from stochgrad.kernels import Fit, fit

_HELD_OUT = 4
_LOOKS = 10
_COUNTED_STEPS = 240
_NEAR = 0.1


class ModesWarning(UserWarning):
    """A flow's weighted draws and the chains that it was trained on do not agree."""


class ModesFit(NamedTuple):
    """What ``fit_modes`` gave.

    Attributes:
        model: The flow.
        weighted: Its draws with weights, as ``stochgrad.flows.sample`` returns them.
        draws: Draws of Metropolis chains with the flow as their proposal, whose ``verdict`` knows
            the reasons, too.
        rounds: What was compared in each round.
        evaluations: Evaluations of the log density, alone or with its gradient, of all rounds.
        reasons: What speaks against the result, in sentences; none where all agrees.
    """

    model: AbstractDistribution
    weighted: WeightedDraws
    draws: Draws
    rounds: tuple[Agreement, ...]
    evaluations: int
    reasons: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


@key_first
def fit_modes(
    key: PRNGKey,
    flow: AbstractDistribution | Callable[[Array], AbstractDistribution],
    log_density: LogDensity,
    *,
    chains: Callable[[Posterior], Kernel],
    init: Any,
    num_chains: int = 64,
    num_draws: int = 64,
    thin: int = 10,
    num_warmup: int = 32,
    num_steps: int = 1000,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    num_samples: int = 64,
    forward: Literal["auto", "ml", "path"] = "auto",
    num_metropolis: int = 64,
    num_weighted: int = 4096,
    modes: Callable[[Array], Array] | None = None,
    tolerance: float = 0.05,
    most_rounds: int = 4,
    progress: bool = True,
) -> ModesFit:
    r"""Train a flow on a density of many modes, until forward and reverse draws agree.

    A round: tempered chains draw; the flow climbs ``jeffreys`` on the draws of three in four
    chains; ``metropolis`` with the flow as its proposal goes on from where the chains are; the
    flow's own draws are weighted. The next round's chains start where Metropolis ended, so that
    modes have the weights that the flow gives them. It ends when all agree:

    - k-hat of the weights is at most ``good_khat``;
    - the effective sample size by the draws of the other chains is at least half that by the flow's
      draws (a missing mode makes it nothing);
    - the acceptance rate of the chains is that which the weights predict;
    - the weights of the modes are the same by Metropolis and by the flow's weighted draws.

    What neither a chain nor the flow has ever seen, no comparison shows.

    Args:
        key: A PRNG key.
        flow: A flowjax distribution, or a function of draws of the chains, of shape (n, \*shape),
            that makes one, for example on ``mixture_of_normals``.
        log_density: ``x -> scalar``, unnormalized.
        chains: ``target -> Kernel``, such as ``lambda target: stochgrad.replica_exchange(
            stochgrad.mala, target, 0.1, temperatures=(1, 3, 9), energy_batches=1)``. The target is
            made of ``log_density``.
        init: Where chains start, ``key -> position`` or an array of shape (num_chains, \*shape).
            Spread wide: what no chain comes to is not found.
        num_chains: Chains, at least 8.
        num_draws: Draws of a chain and round.
        thin: Steps per draw.
        num_warmup: Draws to discard before them in each round.
        num_steps: Training steps of a round.
        learning_rate: As in ``stochgrad.fit``.
        batch_size: Samples of a training step.
        num_samples: Draws of the flow in a training step.
        forward: Estimator of the forward divergence, as in ``jeffreys``; ``"auto"`` is ``"path"``
            for a flow with layers whose effective sample size by the other chains was above 0.1 in
            the round before, else ``"ml"``.
        num_metropolis: Metropolis steps of a chain and round, of which the first half is discarded.
        num_weighted: Draws of the flow to weight.
        modes: ``x -> array`` of numbers between 0 and 1, whose means are the weights of the modes:
            ``jax.nn.one_hot`` of the nearest mode, or whether a coordinate is positive. By default
            responsibilities of the components, where the flow is a mixture or starts from one, else
            on which side of the chains' median each coordinate is.
        tolerance: Difference of weights of modes and of acceptance rates that does not matter.
        most_rounds: Rounds at most.
        progress: Whether to show progress bars.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a number is out of range, flow and density do not fit, or a chain diverged.

    Warns:
        ModesWarning: the last round does not agree; ``reasons`` says in what.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> def log_density(x):
        ...     return jnp.logaddexp(-((x[0] + 3.0) ** 2), jnp.log(4.0) - (x[0] - 3.0) ** 2)
        >>> found = stochgrad.flows.fit_modes(
        ...     jax.random.key(0), lambda x: stochgrad.flows.mixture_of_normals(x, 2), log_density,
        ...     chains=lambda target: stochgrad.replica_exchange(
        ...         stochgrad.mala, target, (0.3, 1.0), temperatures=(1, 8), energy_batches=1
        ...     ),
        ...     init=lambda key: 4.0 * jax.random.normal(key, (1,)),
        ...     modes=lambda x: x > 0, num_steps=300, learning_rate=0.01, progress=False,
        ... )
        >>> found.ok, found.rounds[-1].weights_reverse.round(2)
        (True, array([0.8]))
    """
    check_key(key)
    check_callable("log_density", log_density, "a function of a point")
    check_callable("chains", chains, "a function of a target that returns a kernel")
    if modes is not None:
        check_callable("modes", modes, "a function of a point")
    counts = {
        "num_chains": (num_chains, 8), "num_draws": (num_draws, 1), "thin": (thin, 1),
        "num_warmup": (num_warmup, 0), "num_steps": (num_steps, 1), "batch_size": (batch_size, 1),
        "num_samples": (num_samples, 1), "num_metropolis": (num_metropolis, 2),
        "num_weighted": (num_weighted, 100), "most_rounds": (most_rounds, 1),
    }  # fmt: skip
    for name, (value, least) in counts.items():
        check_count(name, value, least=least)
    tolerance = check_number("tolerance", tolerance, most=1.0)
    check_number("learning_rate", learning_rate)
    check_choice("forward", forward, ("auto", "ml", "path"))
    check_flag("progress", progress)
    shape = None if callable(flow) else unwrap_flow(flow).shape
    places = starts(init, num_chains, shape, jax.random.fold_in(key, 0))
    check_density(StandardNormal(places.shape[1:]) if callable(flow) else flow, log_density, None)
    labels: Any = None if modes is None else check_modes(modes, places)
    target = full_target(log_density, places)
    kernel = chains(target)
    check_instance("the result of chains", kernel, Kernel, "a stochgrad Kernel")
    counted = min((num_warmup + num_draws) * thin, _COUNTED_STEPS)
    per_step = evaluations_per_step(chains, log_density, places, counted)
    evaluations = round(counted * per_step)
    held_out = np.arange(num_chains) % _HELD_OUT == _HELD_OUT - 1
    options: dict[str, Any] = {"num_chains": num_chains, "progress": progress}
    settings = _Training(
        num_steps=num_steps, learning_rate=learning_rate, batch_size=batch_size,
        num_samples=num_samples, num_judged=num_weighted // _LOOKS, progress=progress,
    )  # fmt: skip

    rounds: list[Agreement] = []
    position = None
    made: Any = None
    while True:
        keys = jax.random.split(jax.random.fold_in(key, len(rounds) + 1), 4)
        tempered = run_chains(
            keys[0], kernel, places, num_samples=num_draws, num_warmup=num_warmup, thin=thin,
            **options,
        )  # fmt: skip
        steps = (num_warmup + num_draws) * thin
        evaluations += num_chains * (round(steps * per_step) + 1)  # a run looks at its start first
        x = jnp.asarray(tempered.positions)
        training, others = (x[rows].reshape(-1, *x.shape[2:]) for rows in (~held_out, held_out))
        if made is None:
            made = flow(training) if callable(flow) else flow
            check_density(made, log_density, None)
            labels = labels or default_modes(made, training)
        trained, spent = _trained(
            keys[1], made, log_density, training, others, position, _way(forward, made, rounds),
            settings,
        )  # fmt: skip
        model, position = trained.model, trained.position
        evaluations += spent
        moved = run_chains(
            keys[2], metropolis(model, log_density), x[:, -1], num_samples=num_metropolis,
            **options,
        )  # fmt: skip
        places = jnp.asarray(moved.positions)[:, -1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WeightsWarning)
            weighted = sample(keys[3], model, num_weighted, log_density)
        ess_target = ess_under_target(model, others, log_density)
        evaluations += num_chains * (num_metropolis + 1) + num_weighted + len(others)
        moved = moved[num_metropolis // 2 :]
        rounds.append(agreement(weighted, moved, ess_target, labels, tolerance, evaluations))
        if not rounds[-1].reasons or len(rounds) == most_rounds:
            break
    reasons = rounds[-1].reasons
    if reasons:
        warnings.warn(
            f"after {len(rounds)} rounds forward and reverse draws do not agree: "
            f"{' Also: '.join(reasons)} Take more rounds, chains or training steps, hotter "
            "temperatures, or a flow of more components or layers.",
            ModesWarning,
            stacklevel=2,
        )
    draws = replace(moved, posterior=target, notes=(*moved.notes, *reasons))
    return ModesFit(model, weighted, draws, tuple(rounds), evaluations, reasons)


class _Training(NamedTuple):
    num_steps: int
    learning_rate: float
    batch_size: int
    num_samples: int
    num_judged: int
    progress: bool


def _trained(
    key: PRNGKey,
    flow: AbstractDistribution,
    log_density: LogDensity,
    training: Array,
    others: Array,
    position: Any,
    way: Any,
    settings: _Training,
) -> tuple[Fit, int]:
    """A round's training, judged by draws that it does not see, and evaluations of the density."""
    num_samples, num_judged = settings.num_samples, settings.num_judged
    batch_size = min(settings.batch_size, len(training))
    trained = fit(
        key,
        jeffreys(flow, log_density, training, way, batch_size=batch_size, num_samples=num_samples),
        settings.num_steps,
        learning_rate=settings.learning_rate,
        init=position,
        held_out=jeffreys(flow, log_density, others, "ml", num_samples=num_judged),
        held_out_draws=1,
        every=math.ceil(settings.num_steps / _LOOKS),
        progress=settings.progress,
    )
    looks = trained.held_out.shape[1]
    scores = len(training) if way == "path" else 0
    steps = looks * trained.every * _in_rows(flow, num_samples)
    return trained, scores + steps + (looks + 1) * _in_rows(flow, num_judged)


def _way(forward: Any, flow: Any, rounds: list[Agreement]) -> Any:
    """The estimator of the forward divergence in the next round."""
    if forward != "auto":
        return forward
    near = bool(rounds) and rounds[-1].ess_target > _NEAR
    return "path" if near and isinstance(unwrap_flow(flow), AbstractTransformed) else "ml"


def _in_rows(flow: Any, count: int) -> int:
    """Draws that a step takes of a flow: of a mixture the same number of each component."""
    mixture = mixture_of(unwrap_flow(flow))
    width = 1 if mixture is None else len(mixture.log_normalized_weights)
    return -(-count // width) * width
