"""Replica exchange: chains at several temperatures that trade places."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from stochgrad.core import (
    Kernel,
    Position,
    Shared,
    Target,
    check_count,
    check_number,
    describe,
    number,
)
from stochgrad.gradients import as_gradient
from stochgrad.kernels import on_all_rows
from stochgrad.sgmcmc._common import make_kernel
from stochgrad.sgmcmc._kernel import StepInfo, step_counter, successor


class ReplicaState(NamedTuple):
    """State of a chain.

    Attributes:
        position: The position of the coldest replica, which is the one that is drawn.
        replicas: The states of all replicas, coldest first.
        energy_state: The state of the gradient that estimates energies.
        swap_probability: Mean probability of the swaps tried last, NaN before the first.
        count: Number of steps taken.
    """

    position: Position
    replicas: tuple[Any, ...]
    energy_state: Any
    swap_probability: Float[Array, ""]
    count: Shared


def replica_exchange(
    kernel_factory: Callable[..., Kernel],
    target: Target,
    step_size: float | Sequence[float],
    *,
    temperatures: Sequence[float],
    swap_every: int = 10,
    energy_batches: int = 8,
) -> Kernel:
    r"""Replica-exchange SG-MCMC with the correction for noisy energies, over any kernel.

    Replicas at temperatures $T_1 < T_2 < \dots$ each follow a kernel of their own; every few steps
    neighboring replicas propose swaps. With $L = \log\pi$, $\tau = 1/T_i - 1/T_{i+1}$ and an
    estimate $\hat D$ of $L(\theta_{i+1}) - L(\theta_i)$ of variance $\sigma^2$, the probability

    $$\min\left(1, e^{\tau\hat D - u}\right), \qquad
      u = \frac{\chi^2}{2} + \frac{\chi^4}{4(n+1)} + \frac{\chi^6}{3(n+1)(n+3)}, \qquad
      \chi^2 = \tau^2\hat\sigma^2,$$

    keeps detailed balance for normal noise: $u = \tau^2\sigma^2/2$ is exact where the variance is
    known (the penalty method of Ceperley & Dewing, J. Chem. Phys. 1999, which is what Deng et al.,
    ICML 2020, use), and the other terms make up, to that order, for its estimate from n
    minibatches. Both positions see the same minibatches, so that only the noise of the difference
    counts. Without the correction noisy energies make swaps too easy, and the cold chain too hot.

    Args:
        kernel_factory: ``(target, step_size, temperature=...) -> Kernel``.
        target: A posterior, or a gradient; its values are the energies, so that a control variate
            makes swaps less noisy, too.
        step_size: h, one number or one for each temperature.
        temperatures: Two or more, rising. The first is that of the draws.
        swap_every: Steps between two attempts; even and odd pairs take turns.
        energy_batches: n, minibatches for an energy difference, at least 2, or 1 where the target
            takes all rows at every step and energies have no noise. They are drawn from a stream of
            their own in the target's order; ``order="iid"`` is what the variance assumes, others
            make the correction a little too strong.

    Raises:
        ValueError: there is one temperature only, they do not rise, or a number is out of range;
            and what the factory raises.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(10), order="full"
        ... )
        >>> kernel = stochgrad.replica_exchange(
        ...     stochgrad.sgld, target, 0.01, temperatures=(1.0, 4.0)
        ... )
        >>> kernel.method
        'replica exchange SGLD'
    """
    if not isinstance(temperatures, Sequence | np.ndarray) or isinstance(temperatures, str):
        raise TypeError(f"temperatures must be a list of numbers, got {describe(temperatures)}.")
    heats = tuple(check_number("temperatures", t) for t in temperatures)
    if len(heats) < 2:
        raise ValueError(
            f"temperatures must be two or more, got {list(heats)}: with one temperature there is "
            "nothing to exchange; use the kernel itself."
        )
    if any(a >= b for a, b in pairwise(heats)):
        raise ValueError(f"temperatures must rise, got {list(heats)}.")
    steps = [step_size] * len(heats) if not isinstance(step_size, Sequence) else list(step_size)
    if len(steps) != len(heats):
        raise ValueError(f"step_size must be one number, or {len(heats)}, got {len(steps)}.")
    swap_every = check_count("swap_every", swap_every)
    n = check_count("energy_batches", energy_batches, least=1 if on_all_rows(target) else 2)
    energy = as_gradient(target)
    kernels = [make_kernel(kernel_factory, target, h, t) for h, t in zip(steps, heats, strict=True)]

    def init(position: Position, rng_key) -> ReplicaState:
        keys = jax.random.split(rng_key, len(kernels) + 1)
        replicas = tuple(
            kernel.init(position, key) for kernel, key in zip(kernels, keys[1:], strict=True)
        )
        unknown = jnp.full((), jnp.nan)
        return ReplicaState(
            position, replicas, energy.init(keys[0], position), unknown, step_counter()
        )

    def attempt(key, replicas, energy_state, parity):
        """Try to exchange the pairs whose colder member has this parity."""
        replicas, probabilities = list(replicas), []
        for i in range(parity, len(replicas) - 1, 2):
            cold, warm = replicas[i], replicas[i + 1]

            def difference(state, key, cold=cold, warm=warm):
                score, state = energy.next(key, cold.position, state)
                return state, score(warm.position)[0] - score(cold.position)[0]

            pair_key = jax.random.fold_in(key, i)
            keys = jax.random.split(jax.random.fold_in(pair_key, 0), n)
            energy_state, values = lax.scan(difference, energy_state, keys)
            tau = 1 / heats[i] - 1 / heats[i + 1]
            spread = jnp.var(values, ddof=1) if n > 1 else jnp.zeros((), values.dtype)
            chi = number(tau**2, values.dtype) * spread / n
            penalty = chi / 2 + chi**2 / (4 * (n + 1)) + chi**3 / (3 * (n + 1) * (n + 3))
            log_probability = jnp.minimum(number(tau, values.dtype) * jnp.mean(values) - penalty, 0)
            uniform = jax.random.uniform(jax.random.fold_in(pair_key, 1), (), values.dtype)
            swap = jnp.log(uniform) < log_probability
            replicas[i], replicas[i + 1] = _given(cold, warm, swap), _given(warm, cold, swap)
            probabilities.append(jnp.exp(log_probability))
        return tuple(replicas), energy_state, jnp.mean(jnp.stack(probabilities)).astype(float)

    def step(rng_key, state: ReplicaState) -> tuple[ReplicaState, StepInfo]:
        count = state.count.value
        keys = [jax.random.fold_in(rng_key, i) for i in range(len(kernels) + 1)]
        moved = [
            kernel.step(key, replica)
            for kernel, key, replica in zip(kernels, keys[1:], state.replicas, strict=True)
        ]
        replicas = tuple(following for following, _ in moved)
        both = len(kernels) > 2

        def stay(key, replicas, energy_state):
            return replicas, energy_state, state.swap_probability

        def trade(parity):
            return lambda key, replicas, energy_state: attempt(key, replicas, energy_state, parity)

        turn = (count + 1) // swap_every
        choice = jnp.where((count + 1) % swap_every == 0, 1 + (turn % 2 if both else 0), 0)
        branches = [stay, trade(0), trade(1)] if both else [stay, trade(0)]
        replicas, energy_state, probability = lax.switch(
            choice, branches, keys[0], replicas, state.energy_state
        )
        info = moved[0][1]
        own = {"swap_probability": probability}
        info = StepInfo(info.step_size, info.log_density, info.gradient_norm, info.noise_ratio, own)
        following = ReplicaState(
            replicas[0].position, replicas, energy_state, probability, successor(state.count)
        )
        return following, info

    cold = kernels[0]
    settings = (
        *cold.settings,
        ("temperatures", repr(heats)),
        ("swap_every", swap_every),
        ("energy_batches", n),
    )
    return cold._replace(
        init=init, step=step, method=f"replica exchange {cold.method}", settings=settings
    )


def _given(own: Any, other: Any, swap: Any) -> Any:
    """A replica's state with the other's position, and the gradient there, if they swap."""
    fields = [name for name in ("position", "gradient") if hasattr(own, name)]
    chosen = {
        name: jax.tree.map(
            lambda a, b: jnp.where(swap, b, a), getattr(own, name), getattr(other, name)
        )
        for name in fields
    }
    return own._replace(**chosen)
