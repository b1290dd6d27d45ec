"""One call from a model to draws that can be trusted, or that say that they cannot."""

import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import (
    ConvergenceWarning,
    Draws,
    Gradient,
    Kernel,
    Position,
    Posterior,
    PRNGKey,
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_key,
    check_number,
    effective_draws,
    last_draws,
    rhat,
    sample,
    some_series,
)
from stochgrad.diagnostics import Law
from stochgrad.inference._nuts import nuts_at
from stochgrad.inference._step import with_law, worst_bias
from stochgrad.interop import from_numpyro
from stochgrad.sgmcmc import WarmUp, warm_up

Method: TypeAlias = Literal["auto", "sghmc", "nuts"]

_CHEAP_RATIO, _CHEAP_OPERATIONS, _TRANSCENDENTAL = 8.0, 1e6, 10.0
"""All rows are cheap where a gradient on them takes less than eight of a minibatch's, or less than
a million operations (half a millisecond), a transcendental function counted as ten."""
_MOST_ROUNDS = 16
_MOST_RHAT = 1.02
_MOST_SD_BIAS = 0.1
_MOST_SERIES = 256


def infer(
    key: PRNGKey,
    model: Callable | Posterior | Gradient,
    *args: Any,
    batch_size: int | None = None,
    method: Method = "auto",
    init: Position | Callable[[PRNGKey], Position] | None = None,
    num_samples: int = 1000,
    num_chains: int = 4,
    target_ess: float = 400,
    max_gradients: float | None = None,
    max_seconds: float | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Draws:
    """Draws from the posterior of a model, from warm-up to verdict.

    Reads the model (``stochgrad.from_numpyro``, with symmetric sweeps), finds where its posterior
    lies and tunes a kernel to it (``stochgrad.warm_up``), samples until chains agree and the draws
    are worth ``target_ess`` independent ones (``stochgrad.sample``), and judges what came out
    (``stochgrad.diagnose``): ``draws.verdict`` says whether to use it. Where a gradient on all rows
    takes less than a million operations, or less than eight of a minibatch's, NUTS on all rows is
    taken, and a line says so: it has no bias, and is the faster one there.

    Args:
        key: A typed PRNG key.
        model: A numpyro model, a posterior or a gradient of one.
        *args: The model's arguments, with the whole data.
        batch_size: Rows of a minibatch, as in ``stochgrad.from_numpyro``. Left out, and where the
            model subsamples no plate itself, all rows are used.
        method: ``"sghmc"`` (BAOAB on minibatches with a control variate), ``"nuts"`` (on all rows),
            or ``"auto"``.
        init: Where to start; optional for numpyro models.
        num_samples: Draws to keep, per chain.
        num_chains: Chains.
        target_ess: Effective draws to reach, of the parameter that has the fewest.
        max_gradients: Gradients to spend after the warm-up, at most, over all chains: minibatch
            gradients, or those on all rows with NUTS.
        max_seconds: Seconds to spend in all, about.
        progress: Whether to print what is being done, and the verdict.
        **kwargs: The model's keyword arguments, and options of ``stochgrad.from_numpyro``.

    Returns:
        The draws, evenly thinned from all that were made after the warm-up.

    Raises:
        TypeError, ValueError: as ``stochgrad.from_numpyro`` and ``stochgrad.warm_up`` do.

    Warns:
        ConvergenceWarning: the verdict is not ok.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, stochgrad
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("rows", len(x)):
        ...         numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> draws = stochgrad.infer(jax.random.key(0), model, jnp.ones(100), progress=False)
        >>> draws.verdict.ok, draws.attrs["method"]
        (True, 'NUTS')
    """
    check_key(key)
    check_choice("method", method, ("auto", "sghmc", "nuts"))
    num_samples = check_count("num_samples", num_samples, least=20)
    num_chains = check_count("num_chains", num_chains)
    target_ess = check_number("target_ess", target_ess)
    budget = _Budget(
        time.perf_counter(),
        math.inf if max_seconds is None else check_number("max_seconds", max_seconds),
        math.inf if max_gradients is None else check_number("max_gradients", max_gradients),
    )
    say = _printer(check_flag("progress", progress))
    target = _as_target(model, args, kwargs, batch_size, method, say)
    posterior = target if isinstance(target, Posterior) else target.posterior
    if posterior is None:
        raise ValueError("model must be a numpyro model, a posterior or a gradient of one.")
    chosen = _choose(posterior, target, method, say)
    warm_key, run_key = jax.random.split(key)
    tuned = warm_up(
        target,
        warm_key,
        init=init,
        num_chains=num_chains,
        kernel_at=nuts_at(posterior) if chosen == "nuts" else None,
        max_seconds=None if budget.seconds == math.inf else budget.seconds / 2,
        report=say,
    )
    kernel, law = with_law(tuned, jax.random.fold_in(run_key, 0))
    if law is not None:
        say(f"predicted, with steps of {dict(kernel.settings)['step_size']:.3g}: {law}")
    draws = _sample(run_key, tuned, kernel, law, num_samples, num_chains, target_ess, budget, say)
    verdict = draws.verdict
    say(f"verdict: {verdict}")
    if not verdict.ok:
        warnings.warn("do not use: " + " Also: ".join(verdict.reasons), ConvergenceWarning, 2)
    return draws


class _Budget(NamedTuple):
    begun: float
    seconds: float
    gradients: float

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.begun)


def _printer(progress: bool) -> Callable[[str], None]:
    def say(line: str) -> None:
        if progress:
            print(line, file=sys.stderr, flush=True)

    return say


def _as_target(model, args, kwargs, batch_size, method, say) -> Posterior | Gradient:
    if isinstance(model, Posterior | Gradient):
        if args or kwargs or batch_size is not None:
            raise TypeError(
                "model is a posterior already: its data and batch_size are given where it is made."
            )
        return model
    check_callable("model", model, "a numpyro model, a Posterior or a Gradient")
    if method == "nuts":
        return from_numpyro(model, *args, order="full", **kwargs)
    options = {"order": "symmetric", **kwargs}
    try:
        return from_numpyro(model, *args, batch_size=batch_size, **options)
    except ValueError as error:
        if batch_size is not None or method == "sghmc" or "order" in kwargs:
            raise
        try:
            target = from_numpyro(model, *args, order="full", **kwargs)
        except Exception:
            raise error from None
        say(f"no minibatches, all rows at every step: {error}")
        return target


def _choose(posterior: Posterior, target: Any, method: str, say) -> str:
    """NUTS where all rows are cheap, and the target is a posterior in memory."""
    if method != "auto":
        return method
    batches = posterior.batches
    if not isinstance(target, Posterior) or batches.full is None or batches.owners is not None:
        return "sghmc"
    if batches.batch_size >= batches.size:
        say("NUTS on all rows: there are no minibatches.")
        return "nuts"
    whole, part = _cost(posterior, batches.full), _cost(posterior, _first_batch(posterior))
    if whole > max(_CHEAP_RATIO * part, _CHEAP_OPERATIONS):
        return "sghmc"
    say(
        f"NUTS on all rows: a gradient on them takes {whole:.2g} operations, one on a minibatch "
        f"{part:.2g}."
    )
    return "nuts"


def _first_batch(posterior: Posterior) -> Any:
    return posterior.batches.next(posterior.batches.init(jax.random.key(0)))[0]


def _cost(posterior: Posterior, batch: Any) -> float:
    """Operations of a gradient, as the compiler counts them; rows, where it does not."""
    if posterior.initial is not None:
        position = jax.eval_shape(posterior.initial, jax.random.key(0))
        slope = jax.jit(jax.grad(posterior.log_density))
        counts = slope.lower(position, batch).cost_analysis() or {}
        if "flops" in counts:
            return counts["flops"] + _TRANSCENDENTAL * counts.get("transcendentals", 0.0)
    return 100.0 * (
        posterior.batches.size if batch is posterior.batches.full else posterior.batches.batch_size
    )


def _sample(
    key: PRNGKey,
    tuned: WarmUp,
    kernel: Kernel,
    law: Law | None,
    num_samples: int,
    num_chains: int,
    target_ess: float,
    budget: _Budget,
    say: Callable[[str], None],
) -> Draws:
    """Rounds of draws, until they are enough or the budget is spent."""
    thin = _first_thin(tuned, kernel, num_samples, num_chains, target_ess)
    each = _gradients_per_step(kernel)
    if math.isfinite(budget.gradients):
        thin = max(min(thin, int(budget.gradients / (num_samples * num_chains * each))), 1)
    parts: list[Draws] = []
    starts, spent = tuned.starts, 0.0
    notes: tuple[str, ...] = ()
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            part = sample(
                jax.random.fold_in(key, len(parts)),
                kernel,
                init=starts,
                num_samples=num_samples,
                thin=thin,
                num_chains=num_chains,
                progress=False,
            )
        parts.append(part)
        steps = num_samples * thin * num_chains
        spent += float(np.sum(part.stats["n_steps"])) if "n_steps" in part.stats else steps * each
        draws = _joined(parts)
        worst, fewest = _worst(draws)
        say(
            f"{draws.num_draws} draws a chain, {thin} steps each: R-hat {worst:.3f}, "
            f"{fewest:.0f} effective draws"
        )
        if np.any(part.first_bad >= 0) or part.num_draws < num_samples:
            notes = tuned.reasons
            break
        if worst < _MOST_RHAT and fewest >= target_ess:
            break
        share = 1 + 1 / len(parts)  # of what another round makes of all
        seconds = float(np.sum([p.timings["total"] for p in parts])) / len(parts)
        if (
            len(parts) == _MOST_ROUNDS
            or spent * share > budget.gradients
            or (seconds > budget.left())
        ):
            notes = (
                *tuned.reasons,
                f"the budget ended before the goal: {fewest:.0f} of {target_ess:g} effective "
                f"draws, R-hat {worst:.3f}, after {spent:,.0f} gradients; allow more.",
            )
            break
        starts = jax.tree.map(
            lambda x: jnp.asarray(x[:, -1] if num_chains > 1 else x[0, -1]), part.positions
        )
    if law is not None:
        steps = draws.num_draws * thin * num_chains
        say(
            f"measured: {steps / max(fewest, 1.0):.2g} steps an effective draw of the slowest "
            f"number, {law.gradients_per_draw:.2g} predicted"
        )
        if worst_bias(law) > _MOST_SD_BIAS:
            notes += (f"the law of the chain, predicted: {law}.",)
    draws = replace(draws, notes=notes)
    every = len(parts)
    kept = draws if every == 1 else draws[every - 1 :: every]
    return replace(kept, attrs=_attrs(kept, tuned, thin * every, spent), notes=notes)


def _attrs(draws: Draws, tuned: WarmUp, thin: int, gradients: float) -> dict[str, Any]:
    return {
        **draws.attrs,
        "thin": thin,
        "gradients": gradients,
        "warm_up_gradients": tuned.gradients,
        "warm_up_passes": tuned.approximation.passes,
        "warm_up_windows": len(tuned.windows),
        "warm_up_seconds": tuned.seconds,
        "warm_up_settled": tuned.settled,
    }


def _first_thin(
    tuned: WarmUp, kernel: Kernel, num_samples: int, num_chains: int, target_ess: float
) -> int:
    """Steps a draw, so that the last window's mixing gives what is asked, with a margin."""
    last = tuned.windows[-1] if tuned.windows else None
    if last is None or kernel.method == "NUTS":
        return 1
    per_effective = num_chains * last.steps / 2 / max(last.effective, 1.0)
    per_effective *= last.step_size / dict(kernel.settings)["step_size"]
    steps = 1.3 * target_ess * per_effective / num_chains
    return int(np.clip(math.ceil(steps / num_samples), 1, 10_000))


def _gradients_per_step(kernel: Kernel) -> float:
    """Minibatch gradients of a step: two with a control variate, about."""
    order = dict(kernel.settings).get("order")
    return 1.0 if order == "full" else 2.0


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
