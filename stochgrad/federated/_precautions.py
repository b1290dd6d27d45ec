"""What is done before a run with visits that are too long for the surrogates."""

import warnings
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from stochgrad.core import Kernel, Posterior, check_choice, tree_size
from stochgrad.federated._choice import choose_surrogates, too_wide
from stochgrad.federated._clients import require_clients
from stochgrad.federated._curvature import hessian, precisions
from stochgrad.federated._gaussians import Full, Precision, Surrogates
from stochgrad.federated._matrices import (
    MOST_CLIENTS,
    Curvatures,
    curvature_matrices,
    fits_matrices,
)
from stochgrad.federated._spread import (
    Spread,
    StabilityWarning,
    diagonal_spread,
    spread_of_draws,
    step_time,
)
from stochgrad.federated._stability import Margins, Stability, margins_about, margins_of, safe_scale

_MOST_DIMENSIONS = 1000


def visit_times(posterior: Posterior, kernel: Kernel) -> np.ndarray | None:
    """Time of a visit to each client in Langevin dynamics; None if it is not known."""
    time = step_time(kernel)
    return None if time is None else time * require_clients(posterior).steps.astype(np.float64)


def enforce_stability(
    posterior: Posterior,
    surrogates: Surrogates,
    on_unsafe: str,
    kernel: Kernel,
    *,
    choose: bool = False,
    period: int | None = None,
) -> tuple[Surrogates, str]:
    """What is to be done with surrogates before a run.

    Args:
        posterior: A posterior of data that clients own, visited as it will be.
        surrogates: The surrogates.
        on_unsafe: What to do.
        kernel: The dynamics.
        choose: Whether surrogates of first order may get the curvature that they need.
        period: Visits after which slopes are taken anew, if they are.

    Returns:
        The surrogates, and of what kind they are now if they were chosen.
    """
    clients, origin = require_clients(posterior), surrogates.origin
    chosen = "global_first_order"
    if clients.count == 1 or (on_unsafe == "ignore" and not choose):
        return surrogates, chosen
    time, times = step_time(kernel), visit_times(posterior, kernel)
    here = None
    if fits_matrices(posterior, origin):
        flat = np.asarray(ravel_pytree(origin)[0])
        here = curvature_matrices(posterior, origin, flat[None]).at(0)
    spread_of = lambda made: (
        None if time is None else spread_of_draws(posterior, made, time, here, period)
    )
    margins = cache(lambda: margins_about(posterior, origin))
    few = clients.count <= MOST_CLIENTS
    if choose and few:
        chosen, surrogates, spread = choose_surrogates(
            surrogates,
            time,
            clients.steps,
            here is not None,
            partial(_precision, posterior, origin, here),
            spread_of,
            lambda made: safe_scale(margins_of(margins(), made), clients.count, times=times),
        )
    else:
        spread = spread_of(surrogates)
    if on_unsafe == "ignore":
        return surrogates, chosen
    messages = []
    long = clients.steps.max() > 1
    if long and not few and surrogates.precision is not None:
        messages.append(_not_looked_at(clients.count, on_unsafe))
    elif (
        long and few and not (surrogates.precision is None and tree_size(origin) > _MOST_DIMENSIONS)
    ):
        drawn_back, message = _drawn_back(margins(), surrogates, on_unsafe, times)
        messages += [message] if message else []
        if drawn_back is not surrogates:
            surrogates, spread = drawn_back, spread_of(drawn_back)
    if spread is not None and too_wide(spread):
        known = surrogates.precision is not None
        messages.append(describe_spread(spread, f"client {spread.client}", curved=known))
    if long and not few and surrogates.precision is not None and on_unsafe == "cap":
        raise ValueError(messages[0])
    for message in messages:
        if on_unsafe == "raise":
            raise ValueError(message)
        warnings.warn(message, StabilityWarning, stacklevel=3)
    return surrogates, chosen


def _not_looked_at(count: int, on_unsafe: str) -> str:
    return (
        f"whether visits are stable is looked at for up to {MOST_CLIENTS:,} clients, and there are "
        f"{count:,} whose surrogates have curvature: take surrogate='global_first_order', which is "
        "stable where likelihoods are log-concave"
        + (", or on_unsafe='ignore'." if on_unsafe == "warn" else ", or on_unsafe='warn'.")
    )


def _precision(posterior, origin, here: Curvatures | None, form: str, rank: int) -> Precision:
    if here is not None:
        return Full(jnp.asarray(here.own, ravel_pytree(origin)[0].dtype))
    return precisions(posterior, hessian(posterior), lambda _: origin, form, rank)


def _drawn_back(
    margins: Margins, surrogates: Surrogates, on_unsafe: str, times: np.ndarray | None
) -> tuple[Surrogates, str]:
    """The surrogates, shrunk if so wanted, and what is wrong with them."""
    report = margins(surrogates.precision)
    if not report.unsafe(times=times).any():
        return surrogates, ""
    message = (
        f"long local runs are unstable at {report.describe(times=times)}: take fewer local_steps, "
        "a smaller step, or probabilities in proportion to the clients' rows."
    )
    if on_unsafe == "cap" and surrogates.precision is not None:
        scale = safe_scale(margins_of(margins, surrogates), surrogates.count, times=times)
        shrunk = [f"{s} to {x:.2g}" for s, x in enumerate(scale) if x < 1]
        message = f"the curvature of clients {', '.join(shrunk)} of itself: {message}"
        surrogates = surrogates.scaled(scale)
    return surrogates, message


def describe_spread(spread: Spread, client: str, *, curved: bool = False) -> str:
    """What is wrong with the spread of draws, and what helps."""
    size = (
        "without bound"
        if not np.isfinite(spread.ratio)
        else f"about {spread.ratio:.2g} times the posterior's"
    )
    curvature = "Take surrogate='global_quadratic', which knows the curvature, or fewer"
    return (
        f"visits are too long for these surrogates: by the curvatures at the reference, standard "
        f"deviations of the draws come out {size}, most of all in {spread.coordinate}, which "
        f"{client} informs most (h N T = {spread.steps_to_forget:.2g}: step size times its "
        f"curvature times local steps). {'Take fewer' if curved else curvature} local_steps or a "
        "smaller step_size: the error falls with h N T."
    )


def warn_of_own_effects(
    clients: Sequence[str],
    slopes: Any,
    shares: np.ndarray,
    rows: np.ndarray,
    kernel: Kernel,
    local_steps: int,
) -> None:
    """Warn of what only some clients inform, where nothing but slopes is known of clients.

    A row counts for a precision of one in every coordinate in which its client has a slope.
    """
    time = step_time(kernel)
    if time is None or local_steps == 1 or len(clients) == 1:
        return
    flat = np.stack([np.asarray(ravel_pytree(_row(slopes, s))[0]) for s in range(len(clients))])
    size = np.abs(flat)
    informed = size > 1e-4 * np.maximum(size.max(axis=0), 1e-30)
    own = informed * rows[:, None].astype(np.float64)
    times = np.full(len(clients), time * local_steps)
    spread = diagonal_spread(_row(slopes, 0), own, 1.0, shares, shares, times)
    if spread is not None and too_wide(spread):
        message = describe_spread(spread, f"client {clients[spread.client]}")
        warnings.warn(
            f"if each row counts for a precision of one, {message}", StabilityWarning, stacklevel=3
        )


def warn_of_unstable_visits(
    clients: Sequence[str],
    own: np.ndarray,
    precision: np.ndarray,
    shares: np.ndarray,
    kernel: Kernel,
    local_steps: int,
) -> None:
    """Warn of clients whose visits run away, where curvatures are known as matrices.

    Args:
        clients: Names.
        own: Of each client's log likelihood, at the reference and at other points
            (points, clients, d, d).
        precision: Of the surrogates (clients, d, d).
        shares: The shares of steps.
        kernel: The dynamics.
        local_steps: Steps of a visit.
    """
    over = shares[:, None, None]
    values = np.linalg.eigvalsh(precision.sum(axis=0) + (own - precision) / over)
    report = Stability(values[0, :, 0], values[:, :, 0].min(axis=0), values[0, :, -1])
    time = step_time(kernel)
    times = None if time is None else np.full(len(clients), time * local_steps)
    message = describe_unstable(clients, report, times)
    if message:
        warnings.warn(message, StabilityWarning, stacklevel=3)


def describe_unstable(clients: Sequence[str], report: Stability, times: Any) -> str:
    """Which clients' visits run away, and what helps; empty if none do."""
    unsafe = report.unsafe(times=times)
    if not unsafe.any():
        return ""
    named = ", ".join(clients[int(s)] for s in np.flatnonzero(unsafe)[:5])
    return (
        f"long local runs are unstable at {report.describe(times=times)}, which are {named}: "
        "take fewer local_steps or a smaller step_size."
    )


def _row(tree: Any, s: int) -> Any:
    return jax.tree.map(lambda x: x[s], tree)


def check_on_unsafe(value: Any) -> None:
    """Raise a ValueError unless it is known what to do."""
    check_choice("on_unsafe", value, ("warn", "cap", "raise", "ignore"))
