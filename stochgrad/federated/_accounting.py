r"""What draws and answers tell of one row, counted by Gaussian differential privacy.

All that leaves a client is a Gaussian mechanism: a step of Langevin dynamics adds
$\sqrt{2hT}\,\xi$ to a sum of rows, a slope and a curvature have noise added to them. Mechanisms of
$\mu_1, \mu_2, \dots$, each chosen after what the last ones told, are together one of
$\mu^2 = \sum_t \mu_t^2$ (Dong, Roth & Su, J. R. Stat. Soc. B 2022; adaptively stopped: Smith &
Thakurta, NeurIPS 2022), so that one number, the cost $\mu^2$, is all that there is to count. In
terms of Rényi divergences it is $\alpha\mu^2/2$.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from stochgrad.core import (
    ORDERS,
    Posterior,
    PRNGKey,
    check_array,
    check_choice,
    check_number,
    describe,
    key_words,
    permuted,
)
from stochgrad.federated._checks import check_federated
from stochgrad.federated._clients import require_clients

Adjacency: TypeAlias = Literal["replace", "zero_out"]


def check_adjacency(adjacency: Any) -> str:
    """The adjacency, if it is known."""
    return check_choice("adjacency", adjacency, get_args(Adjacency))


def check_delta(delta: Any) -> float:
    """The probability, if it is below one."""
    number = check_number("delta", delta)
    if number >= 1:
        raise ValueError(
            f"delta must be below 1, and far below one over the number of rows, got {number:g}."
        )
    return number


def sensitivity(norm: float, adjacency: str) -> float:
    """The most by which one row changes a sum of vectors of at most a norm."""
    return 2 * norm if adjacency == "replace" else norm


def fisher_sensitivity(norm: float, adjacency: str) -> float:
    r"""Likewise a sum of $g g^\top$, whose inner products are not negative, or its diagonal."""
    return (np.sqrt(2) if adjacency == "replace" else 1.0) * norm**2


def langevin_cost(
    step_size: float, weight: float, norm: float, adjacency: str, temperature: float = 1.0
) -> float:
    r"""$\mu^2 = (h w \Delta)^2 / 2hT$ of a step of SGLD with a row's minibatch.

    The step is $\theta + h(\dots + w \sum_{i \in b} \bar g_i) + \sqrt{2hT}\,\xi$: with w = N/B and
    $\Delta = C$ its noise multiplier is $\sqrt{2/h}\, B/(NC)$.
    """
    return step_size * (weight * sensitivity(norm, adjacency)) ** 2 / (2 * temperature)


def epsilon_of(cost: float, delta: float) -> float:
    r"""The $\varepsilon$ of a cost at a $\delta$, exactly (Balle & Wang, ICML 2018).

    Args:
        cost: $\mu^2$.
        delta: $\delta$.

    Raises:
        ModuleNotFoundError: ``dp-accounting`` is not installed.
    """
    accounting = _accounting()
    if cost == 0:
        return 0.0
    return float(accounting.get_epsilon_gaussian(1 / np.sqrt(cost), delta))


def most_cost(epsilon: float, delta: float) -> float:
    r"""The cost at which $\varepsilon$ is spent at a $\delta$."""
    return float(1 / _accounting().get_sigma_gaussian(epsilon, delta) ** 2)


def block_visits(
    posterior: Posterior, key: PRNGKey, before: int, steps: int
) -> Float[np.ndarray, " blocks"]:
    """How often each of the only client's minibatches is visited, after so many were handed out."""
    clients = require_clients(posterior)
    count = int(clients.blocks[0])
    order, words = ORDERS[clients.order], key_words(key)

    def block(t):
        where = order(t, jnp.uint32(count))
        return permuted(words, where.permutation, where.slot, count, 1)

    numbers = jnp.arange(steps, dtype=np.uint32) + np.uint32(before)
    return np.bincount(np.asarray(jax.vmap(block)(numbers)), minlength=count).astype(np.float64)


def privacy_of_steps(
    posterior: Posterior,
    step_size: float,
    norm: float,
    steps: Any,
    *,
    delta: float,
    adjacency: Adjacency = "replace",
    temperature: float = 1.0,
    noise_multipliers: Sequence[float] = (),
) -> Float[np.ndarray, " clients"]:
    r"""The $\varepsilon$ of each client after steps of SGLD on ``clipped_minibatch``.

    A row counts in the steps whose minibatch has it. Each is a Gaussian mechanism of cost
    $\mu^2 = h (w_s\Delta)^2 / 2T$ with $w_s = K_s / f_s$, costs add up, and whoever sees every step
    of every chain learns of one row no more than $(\varepsilon, \delta)$:

    $$P(\text{seen} \mid \text{data}) \le e^\varepsilon P(\text{seen} \mid \text{data with another
      row}) + \delta.$$

    In ``"reshuffled"`` and ``"symmetric"`` order a chain that has taken n steps with a client has
    met each row at most $\lceil n / K_s \rceil$ times. That is all that minibatches gain: blocks
    are those of one fixed partition and no Poisson samples of rows, so that there is no
    amplification by subsampling. In ``"iid"`` order any row may have been in all of the steps.

    Args:
        posterior: A posterior of data that clients own, visited as it is sampled.
        step_size: h of SGLD, a number.
        norm: C.
        steps: Steps with each client of each chain, warm-up included: (clients,) for one chain or
            (chains, clients).
        delta: $\delta$, far below one over a client's number of rows.
        adjacency: What one row more or less means: ``"replace"``, it is another, $\Delta = 2C$;
            or ``"zero_out"``, its gradient is zero, $\Delta = C$, which is what others call add
            or remove where numbers of rows are public.
        temperature: T.
        noise_multipliers: z of each slope and curvature that every client sent besides.

    Raises:
        TypeError: the posterior's data are not federated.
        ValueError: a number is out of range; ``steps`` are not of the clients.
        ModuleNotFoundError: ``dp-accounting`` is missing: ``pip install 'stochgrad[privacy]'``.

    Example:
        >>> import jax.numpy as jnp, stochgrad
        >>> target = stochgrad.federated.posterior(
        ...     lambda mean: -0.5 * mean**2,
        ...     lambda mean, x: -0.5 * (x - mean) ** 2,
        ...     [jnp.zeros(10_000)],
        ...     order="full",
        ... )
        >>> spent = stochgrad.federated.privacy_of_steps(target, 2e-6, 1.0, [5000], delta=1e-6)
        >>> round(float(spent[0]), 2)
        0.58
    """
    check_federated(posterior)
    h, C = check_number("step_size", step_size), check_number("norm", norm)
    T = check_number("temperature", temperature)
    delta = check_delta(delta)
    check_adjacency(adjacency)
    clients = require_clients(posterior)
    steps = check_array("steps", steps, kind="integer")
    if steps.ndim not in (1, 2) or steps.shape[-1] != clients.count or np.any(steps < 0):
        raise ValueError(
            f"steps must be numbers of steps with each of the {clients.count} clients, of shape "
            f"(clients,) or (chains, clients), got {describe(steps)}."
        )
    if not isinstance(noise_multipliers, Sequence | np.ndarray):
        raise TypeError(
            f"noise_multipliers must be a list of numbers, got {describe(noise_multipliers)}."
        )
    answers = sum(1 / check_number("noise_multipliers", z) ** 2 for z in noise_multipliers)
    met = np.atleast_2d(np.asarray(steps, np.float64))
    if ORDERS[clients.order].balanced:
        met = np.ceil(met / clients.blocks)
    met = met.sum(axis=0)
    weights = clients.blocks / clients.shares
    costs = [
        n * langevin_cost(h, float(w), C, adjacency, T) + answers
        for n, w in zip(met, weights, strict=True)
    ]
    return np.array([epsilon_of(float(cost), delta) for cost in costs])


def _accounting() -> Any:
    try:
        import dp_accounting
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "counting privacy needs dp-accounting: pip install 'stochgrad[privacy]'."
        ) from error
    return dp_accounting
