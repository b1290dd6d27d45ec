"""Whether visits to a client are drawn back, and what to do where they are not."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from stochgrad.core import Kernel, Posterior, check_choice, check_flag, hoisted_jit, tree_size
from stochgrad.federated._checks import check_federated, check_surrogates
from stochgrad.federated._client_sums import likelihood_sum, prior_only
from stochgrad.federated._clients import require_clients
from stochgrad.federated._curvature import extreme_eigenvalues
from stochgrad.federated._gaussians import Precision, Surrogates
from stochgrad.federated._rows import hessian_product
from stochgrad.federated._spread import (
    Spread,
    curvature_is_constant,
    diagonal_spread,
    spread_of_draws,
    step_time,
)

_TOLERANCE, _SHRINK, _ROUNDS = 1e-3, 0.7, 40
_MOST_DIMENSIONS = 1000
_SPREAD = 1.1
"""Error in standard deviations, as a factor, from which on visits are too long."""


class StabilityWarning(UserWarning):
    """Long visits to some client are unstable, or make the draws too wide or narrow."""


class Stability(NamedTuple):
    r"""What draws chains back while they visit each client.

    During a visit to client s the drift has the curvature

    $$\Lambda_0 + \sum_t \Lambda_t + \frac{H_s - \Lambda_s}{f_s},$$

    with the prior's $\Lambda_0$ and the client's own $H_s$ at the reference. Far away the
    likelihood of a logistic regression, say, is straight and its $H_s$ zero, and what is left must
    be positive too, $\Lambda_s \preceq f_s (\Lambda_0 + \sum_t \Lambda_t)$.

    Attributes:
        margin: The smallest eigenvalue at the reference, for each client. Below zero, positions
            grow as $\exp(|\cdot|\,t)$ over a visit of time t, $h T_s$ for Langevin dynamics.
        far_margin: The smallest eigenvalue with $H_s = 0$.
        largest: The largest eigenvalue at the reference.
    """

    margin: np.ndarray
    far_margin: np.ndarray
    largest: np.ndarray

    def unsafe(self, *, far: bool = True) -> np.ndarray:
        """Which clients' surrogates are unsafe, at the reference or (``far``) away from it."""
        least = np.minimum(self.margin, self.far_margin) if far else self.margin
        return least < -_TOLERANCE * np.abs(self.largest)

    def describe(self, *, far: bool = True) -> str:
        """The unsafe clients and their margins in words."""
        named = [
            f"client {s} (margin {self.margin[s]:.3g}"
            + (f", far away {self.far_margin[s]:.3g}" if far else "")
            + f", of a largest curvature of {self.largest[s]:.3g})"
            for s in np.flatnonzero(self.unsafe(far=far))
        ]
        return "; ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")


def stability(posterior: Posterior, surrogates: Surrogates) -> Stability:
    """The stability of visits to each client, by Lanczos iteration on products with vectors.

    A client works on its own data alone; what it tells is two numbers.

    Args:
        posterior: A posterior of data that clients own, visited as it will be.
        surrogates: The surrogates; the curvature is taken at their origin.

    Raises:
        TypeError: the posterior's data are not federated.
    """
    check_federated(posterior)
    check_surrogates(posterior, surrogates)
    return _margins(posterior, surrogates.origin)(surrogates.precision)


def _margins(posterior: Posterior, origin: Any) -> Callable[[Precision | None], Stability]:
    """The stability of precisions about an origin, compiled once for all of a form."""
    clients = require_clients(posterior)
    shares = clients.shares.astype(np.float32)
    flat, unravel = ravel_pytree(origin)
    bend = hessian_product(posterior)
    own = likelihood_sum(posterior, bend)

    def times(client, near, v, precision):
        v = unravel(v)
        share = jnp.asarray(shares)[client]
        prior = prior_only(posterior, bend)(origin, v)
        here = jax.tree.map(lambda x: near * x / share, own(client, origin, v))
        if precision is not None:
            rest = jax.tree.map(
                lambda all_, x: all_ - x / share, precision.total(v), precision.times(client, v)
            )
            here = jax.tree.map(jnp.add, here, rest)
        return ravel_pytree(jax.tree.map(jnp.add, prior, here))[0]

    run = hoisted_jit(times)

    def extremes(precision, client, near):
        def product(v):
            v = jnp.asarray(v, flat.dtype)
            return np.asarray(run(np.int32(client), np.float32(near), v, precision))

        return extreme_eigenvalues(product, flat.size)

    def of(precision):
        near = np.array([extremes(precision, s, 1.0) for s in range(clients.count)])
        far = np.array([extremes(precision, s, 0.0)[0] for s in range(clients.count)])
        return Stability(near[:, 0], far, near[:, 1])

    return of


def capped(posterior: Posterior, surrogates: Surrogates, *, far: bool = True) -> Surrogates:
    """The surrogates with the curvature of unsafe clients shrunk until all are safe.

    Slopes at the origin remain, so that what is shrunk to nothing is a surrogate of first order.
    Where a likelihood is convex in some direction even that may be unsafe: then the safest that was
    seen on the way.

    Args:
        posterior: A posterior of data that clients own, visited as it will be.
        surrogates: The surrogates.
        far: Whether visits must be safe far from the origin too.
    """
    check_federated(posterior)
    check_surrogates(posterior, surrogates)
    far = check_flag("far", far)
    if surrogates.precision is None:
        return surrogates
    return surrogates.scaled(_safe_scale(posterior, surrogates, far))


def _safe_scale(posterior: Posterior, surrogates: Surrogates, far: bool) -> np.ndarray:
    """What to multiply each client's curvature with."""
    margins = _margins(posterior, surrogates.origin)
    scale = best = np.ones(surrogates.count)
    least = -np.inf
    for _ in range(_ROUNDS):
        precision = surrogates.scaled(scale).precision
        found = margins(precision)
        worst = np.minimum(found.margin, found.far_margin) if far else found.margin
        worst = np.min(worst / np.abs(found.largest))
        if worst > least:
            least, best = worst, scale
        unsafe = found.unsafe(far=far)
        if not unsafe.any():
            break
        scale = np.where(unsafe, np.where(scale < 0.02, 0.0, scale * _SHRINK), scale)
    return best


def enforce_stability(
    posterior: Posterior,
    surrogates: Surrogates,
    on_unsafe: str,
    kernel: Kernel,
    *,
    curvature_known: bool,
) -> Surrogates:
    """What is to be done with surrogates before a run.

    Args:
        posterior: A posterior of data that clients own, visited as it will be.
        surrogates: The surrogates.
        on_unsafe: What to do.
        kernel: The dynamics.
        curvature_known: Whether the surrogates' curvature is the likelihoods' at their origin.
    """
    if on_unsafe == "ignore" or require_clients(posterior).steps.max() == 1:
        return surrogates
    flat = surrogates.precision is None
    messages = []
    if not (flat and tree_size(surrogates.origin) > _MOST_DIMENSIONS):
        surrogates, message = _drawn_back(posterior, surrogates, on_unsafe)
        messages += [message] if message else []
    time = step_time(kernel)
    if time is not None and not curvature_known:
        spread = spread_of_draws(posterior, surrogates, time)
        if spread is not None and too_wide(spread):
            messages.append(describe_spread(spread, f"client {spread.client}"))
    for message in messages:
        if on_unsafe == "raise":
            raise ValueError(message)
        warnings.warn(message, StabilityWarning, stacklevel=3)
    return surrogates


def _drawn_back(
    posterior: Posterior, surrogates: Surrogates, on_unsafe: str
) -> tuple[Surrogates, str]:
    """The surrogates, shrunk if so wanted, and what is wrong with them."""
    report = stability(posterior, surrogates)
    if not report.unsafe().any():
        return surrogates, ""
    # where curvatures are the same everywhere, nothing else is waiting far away
    far = not curvature_is_constant(posterior, surrogates.origin)
    if not report.unsafe(far=far).any():
        return surrogates, ""
    message = (
        f"long local runs are unstable at {report.describe(far=far)}: take fewer local_steps, a "
        "smaller step, or probabilities in proportion to the clients' rows."
    )
    if on_unsafe == "cap" and surrogates.precision is not None:
        scale = _safe_scale(posterior, surrogates, far)
        shrunk = [f"{s} to {x:.2g}" for s, x in enumerate(scale) if x < 1]
        message = f"the curvature of clients {', '.join(shrunk)} of itself: {message}"
        surrogates = surrogates.scaled(scale)
    return surrogates, message


def too_wide(spread: Spread) -> bool:
    """Whether the spread of draws is wrong by more than a tenth."""
    return not 1 / _SPREAD <= spread.ratio <= _SPREAD


def describe_spread(spread: Spread, client: str) -> str:
    """What is wrong with the spread of draws, and what helps."""
    size = (
        "without bound"
        if not np.isfinite(spread.ratio)
        else f"about {spread.ratio:.2g} times the posterior's"
    )
    return (
        f"visits are too long for these surrogates: by the curvatures at the reference, standard "
        f"deviations of the draws come out {size}, most of all in {spread.coordinate}, which "
        f"{client} informs most (h N T = {spread.steps_to_forget:.2g}: step size times its "
        "curvature times local steps). Take surrogate='global_quadratic', which knows the "
        "curvature, or fewer local_steps or a smaller step_size: the error falls with h N T."
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


def _row(tree: Any, s: int) -> Any:
    return jax.tree.map(lambda x: x[s], tree)


def check_on_unsafe(value: Any) -> None:
    """Raise a ValueError unless it is known what to do."""
    check_choice("on_unsafe", value, ("warn", "cap", "raise", "ignore"))
