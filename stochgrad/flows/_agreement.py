"""Whether a flow's weighted draws and chains of its density say the same."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import AbstractTransformed
from jaxtyping import Array, Float

from stochgrad.core import Draws, evenly
from stochgrad.flows._draw import unwrap_flow
from stochgrad.flows._strata import mixture_of
from stochgrad.flows._weighted import WeightedDraws, mapped

_ERRORS = 4.0
_LEAST_RATIO = 0.5
_MOST_HALVES = 64


class Agreement(NamedTuple):
    """What forward draws, of chains, and reverse ones, of the flow with weights, say.

    Attributes:
        evaluations: Energy evaluations so far.
        khat: Shape of the tail of the reverse weights.
        good_khat: The largest to be trusted.
        ess: Relative effective sample size of the reverse draws.
        ess_target: The same from draws of chains that the flow was not trained on.
        acceptance: Acceptance rate of the Metropolis chains.
        acceptance_reverse: What the reverse weights say that it is.
        weights: Weights of the modes by the Metropolis chains.
        weights_error: Their standard errors, from the spread between chains.
        weights_reverse: The same by the reverse draws.
        weights_reverse_error: Their standard errors.
        log_z: Log of the normalizer from the reverse weights.
        log_z_error: Its standard error.
        reasons: Where they disagree, or cannot be trusted, in sentences.
    """

    evaluations: int
    khat: float
    good_khat: float
    ess: float
    ess_target: float
    acceptance: float
    acceptance_reverse: float
    weights: Float[np.ndarray, " k"]
    weights_error: Float[np.ndarray, " k"]
    weights_reverse: Float[np.ndarray, " k"]
    weights_reverse_error: Float[np.ndarray, " k"]
    log_z: float
    log_z_error: float
    reasons: tuple[str, ...]


def agreement(
    weighted: WeightedDraws,
    chains: Draws,
    ess_target: float,
    modes: Callable[[Array], Array],
    tolerance: float,
    evaluations: int,
) -> Agreement:
    """Compare a flow's weighted draws with chains that it is the proposal of.

    Args:
        weighted: Draws of the flow.
        chains: Draws of ``metropolis``, without the first ones.
        ess_target: ``ess_under_target`` of draws that the flow was not trained on.
        modes: ``x -> array`` of numbers between 0 and 1.
        tolerance: The largest difference that does not matter.
        evaluations: Energy evaluations so far.
    """
    labels = jax.jit(jax.vmap(modes))
    positions = jnp.asarray(chains.positions)
    flat = positions.reshape(-1, *positions.shape[2:])
    forward = np.asarray(labels(flat), np.float64).reshape(*positions.shape[:2], -1)
    by_chain = forward.mean(1)
    error = by_chain.std(0, ddof=1) / np.sqrt(len(by_chain))
    values = np.asarray(labels(weighted.value), np.float64).reshape(len(weighted.value), -1)
    share = np.exp(np.asarray(weighted.smoothed, np.float64))[:, None]
    reverse = np.sum(share * values, axis=0)
    reverse_error = np.sqrt(np.sum((share * (values - reverse)) ** 2, axis=0))
    rates = np.asarray(chains.stats["acceptance_rate"], np.float64).mean(1)
    found = Agreement(
        evaluations=evaluations,
        khat=weighted.khat,
        good_khat=weighted.good_khat,
        ess=weighted.ess,
        ess_target=ess_target,
        acceptance=float(rates.mean()),
        acceptance_reverse=expected_acceptance(np.asarray(weighted.log_weight)),
        weights=by_chain.mean(0),
        weights_error=error,
        weights_reverse=reverse,
        weights_reverse_error=reverse_error,
        log_z=weighted.log_z,
        log_z_error=weighted.log_z_error,
        reasons=(),
    )
    rate_error = float(rates.std(ddof=1) / np.sqrt(len(rates)))
    return found._replace(reasons=tuple(_reasons(found, rate_error, tolerance)))


def _reasons(found: Agreement, rate_error: float, tolerance: float) -> list[str]:
    reasons = []
    if not found.khat <= found.good_khat:
        reasons.append(
            f"k-hat of the weights is {found.khat:.2f}, above {found.good_khat:.2f}: their tail is "
            "too heavy."
        )
    if found.ess_target < _LEAST_RATIO * found.ess:
        reasons.append(
            f"the effective sample size is {found.ess_target:.2g} by draws of chains that the flow "
            f"was not trained on and {found.ess:.2g} by its own: it misses a mode, or has far too "
            "little of one."
        )
    apart = abs(found.acceptance - found.acceptance_reverse)
    if not apart <= max(_ERRORS * rate_error, tolerance):
        reasons.append(
            f"the acceptance rate is {found.acceptance:.2f} in chains and "
            f"{found.acceptance_reverse:.2f} by the weights."
        )
    both = np.hypot(found.weights_error, found.weights_reverse_error)
    differences = np.abs(found.weights - found.weights_reverse)
    off = ~(differences <= np.maximum(_ERRORS * both, tolerance))
    if off.any():
        k = int(np.argmax(np.where(off, differences, -1)))
        reasons.append(
            f"mode {k} has the weight {found.weights[k]:.3f} +- {found.weights_error[k]:.3f} in "
            f"chains and {found.weights_reverse[k]:.3f} +- {found.weights_reverse_error[k]:.3f} by "
            f"the flow's draws" + (f", and {off.sum() - 1} more differ." if off.sum() > 1 else ".")
        )
    unknown = ~(both <= tolerance)
    if unknown.any():
        k = int(np.argmax(np.where(np.isnan(both), np.inf, both)))
        reasons.append(
            f"the weight of mode {k} is known to {both[k]:.2g} only (tolerance {tolerance:g}): "
            "take more chains."
        )
    return reasons


def expected_acceptance(log_weight: Float[np.ndarray, " n"]) -> float:
    r"""Acceptance of independence Metropolis by the weights of its proposals.

    $$\mathbb E_{x\sim p,\,x'\sim q}\min(1, w'/w) = \frac{\sum_{ij}\min(w_i, w_j)}{n\sum_i w_i}.$$
    """
    w = np.sort(np.exp(log_weight.astype(np.float64) - np.max(log_weight)))
    n = len(w)
    return float(np.sum(w * (2 * np.arange(n)[::-1] + 1)) / (n * np.sum(w)))


def default_modes(flow: Any, positions: Float[Array, "n ..."]) -> Callable[[Array], Array]:
    """What to compare where nobody says what the modes are.

    The responsibilities of a mixture's components, where the flow is one or starts from one;
    otherwise on which side of the chains' median each coordinate lies, of at most 64.
    """
    flow = unwrap_flow(flow)
    mixture = mixture_of(flow)
    if mixture is None:
        flat = positions.reshape(len(positions), -1)
        some = evenly(flat.shape[1], _MOST_HALVES)
        middle = jnp.median(flat[:, some], axis=0)
        return lambda x: (x.reshape(-1)[some] > middle).astype(x.dtype)
    layered = isinstance(flow, AbstractTransformed)

    def responsibilities(x):
        z = flow.bijection.inverse(x, None) if layered else x
        each = eqx.filter_vmap(lambda component: component._log_prob(z, None))(mixture.dist)
        return jax.nn.softmax(each + mixture.log_normalized_weights)

    return responsibilities


def check_modes(modes: Any, positions: Float[Array, "n ..."]) -> Callable[[Array], Array]:
    """A caller's function of what the modes are, as one of floating-point numbers."""
    array = np.asarray(mapped("modes", modes, positions, "point"), np.float64)
    if not (np.isfinite(array).all() and np.min(array) >= 0 and np.max(array) <= 1):
        raise ValueError(
            "modes must return numbers between 0 and 1, got "
            f"{array.min():g} to {array.max():g}: whether a point is of a mode, not which "
            "(jax.nn.one_hot makes one of the other)."
        )
    return lambda x: jnp.asarray(modes(x)).astype(positions.dtype)
