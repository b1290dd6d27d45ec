"""One call from a model to draws that can be trusted, or that say that they cannot."""

import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import jax

from stochgrad.core import (
    ConvergenceWarning,
    Draws,
    Gradient,
    Position,
    Posterior,
    PRNGKey,
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_key,
    check_number,
)
from stochgrad.diagnostics import with_law, with_step
from stochgrad.inference._nuts import nuts_at
from stochgrad.inference._robust import robust_kernel
from stochgrad.inference._rounds import Budget, sample_until
from stochgrad.interop import from_numpyro
from stochgrad.sgmcmc import warm_up

Method: TypeAlias = Literal["auto", "sghmc", "nuts"]

_CHEAP_RATIO, _CHEAP_OPERATIONS, _TRANSCENDENTAL = 8.0, 5e6, 10.0
"""All rows are cheap where a gradient on them takes less than eight of a minibatch's, or less than
five million operations (some two milliseconds), a transcendental function counted as ten: there
NUTS and minibatches took equally long for a run of default length (docs/results/posteriors.md)."""


def infer(
    key: PRNGKey,
    model: Callable | Posterior | Gradient,
    *args: Any,
    batch_size: int | None = None,
    method: Method = "auto",
    target: Literal["posterior", "sandwich"] = "posterior",
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
    lies and tunes a kernel to it (``stochgrad.warm_up``), samples until chains agree, the draws
    are worth ``target_ess`` independent ones and a run with half the step gives the same
    (``stochgrad.sample``), and judges what came out (``stochgrad.diagnose``): ``draws.verdict``
    says whether to use it. Where a gradient on all rows takes less than five million operations, or
    less than eight of a minibatch's, NUTS on all rows is taken, and a line says so: it has no bias,
    and is the faster one there.

    Args:
        key: A typed PRNG key.
        model: A numpyro model, a posterior or a gradient of one.
        *args: The model's arguments, with the whole data.
        batch_size: Rows of a minibatch, as in ``stochgrad.from_numpyro``. Left out, and where the
            model subsamples no plate itself, all rows are used.
        method: ``"sghmc"`` (BAOAB on minibatches with a control variate), ``"nuts"`` (on all rows),
            or ``"auto"``.
        target: What the draws are to spread as: the posterior, or the ``"sandwich"`` around its
            mode, the spread of estimates over data sets, which holds where the model is wrong
            (``stochgrad.diagnostics.sandwich``). For models whose parameters all rows inform.
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
    check_choice("target", target, ("posterior", "sandwich"))
    robust = target == "sandwich"
    if robust and method == "nuts":
        raise ValueError("method must be 'sghmc' (or 'auto') with target='sandwich', got 'nuts'.")
    num_samples = check_count("num_samples", num_samples, least=20)
    num_chains = check_count("num_chains", num_chains)
    target_ess = check_number("target_ess", target_ess)
    budget = Budget(
        time.perf_counter(),
        math.inf if max_seconds is None else check_number("max_seconds", max_seconds),
        math.inf if max_gradients is None else check_number("max_gradients", max_gradients),
    )
    say = _printer(check_flag("progress", progress))
    source = _as_source(model, args, kwargs, batch_size, method, say)
    posterior = source if isinstance(source, Posterior) else source.posterior
    if posterior is None:
        raise ValueError("model must be a numpyro model, a posterior or a gradient of one.")
    chosen = "sghmc" if robust else _choose(posterior, source, method, say)
    warm_key, run_key = jax.random.split(key)
    tuned = warm_up(
        warm_key,
        source,
        init=init,
        num_chains=num_chains,
        kernel_at=nuts_at(posterior) if chosen == "nuts" else None,
        max_seconds=None if budget.seconds == math.inf else budget.seconds / 2,
        report=say,
    )
    law_key = jax.random.fold_in(run_key, 0)
    finer = with_step
    if robust:
        kernel, law, finer = robust_kernel(tuned, law_key)
    else:
        kernel, law = with_law(law_key, tuned)
    if law is not None:
        say(f"predicted, with steps of {dict(kernel.settings)['step_size']:.3g}: {law}")
    draws = sample_until(
        run_key, tuned, kernel, finer, law, num_samples, num_chains, target_ess, budget, say
    )
    if robust:
        draws = replace(draws, attrs={**draws.attrs, "target": target})
    verdict = draws.verdict
    say(f"verdict: {verdict}")
    if not verdict.ok:
        warnings.warn("do not use: " + " Also: ".join(verdict.reasons), ConvergenceWarning, 2)
    return draws


def _printer(progress: bool) -> Callable[[str], None]:
    def say(line: str) -> None:
        if progress:
            print(line, file=sys.stderr, flush=True)

    return say


def _as_source(model, args, kwargs, batch_size, method, say) -> Posterior | Gradient:
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
            source = from_numpyro(model, *args, order="full", **kwargs)
        except Exception:
            raise error from None
        say(f"no minibatches, all rows at every step: {error}")
        return source


def _choose(posterior: Posterior, source: Any, method: str, say) -> str:
    """NUTS where all rows are cheap, and the target is a posterior in memory."""
    if method != "auto":
        return method
    batches = posterior.batches
    if not isinstance(source, Posterior) or batches.full is None or batches.owners is not None:
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
