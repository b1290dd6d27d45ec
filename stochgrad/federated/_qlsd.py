"""Langevin dynamics at the server, on compressed gradients of all clients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from stochgrad.core import (
    Kernel,
    Position,
    Posterior,
    Shared,
    StepSize,
    as_schedule,
    check_count,
    noise_like,
    tree_bytes,
    tree_dot,
    tree_size,
)
from stochgrad.federated._clients import require_clients
from stochgrad.federated._parallel_clients import (
    client_gradients,
    local_minibatches,
    local_score,
    start,
)


class QLSDState(NamedTuple):
    """State of a chain.

    Attributes:
        position: The position, at the server.
        batch_state: The clients' streams.
        anchor: Where the clients' gradients are centered.
        at_anchor: Their gradients there, on all of their data.
        memory: What server and clients take a client's gradient to be before it comes.
        count: Number of steps taken.
    """

    position: Position
    batch_state: Any
    anchor: Position
    at_anchor: PyTree
    memory: PyTree
    count: Shared


class QLSDInfo(NamedTuple):
    """What a step reports.

    Attributes:
        step_size: h.
        log_density: Minibatch estimate of the log density.
        gradient_norm: Norm of the gradient that the server put together.
        rounds: Rounds of communication until now.
    """

    step_size: Float[Array, ""]
    log_density: Scalar
    gradient_norm: Float[Array, ""]
    rounds: Array


def quantized(key: Any, x: Float[Array, " d"], levels: int) -> Float[Array, " d"]:
    r"""A vector rounded at random to multiples of $|x| / s$, right on average.

    $$Q(x)_j = |x|\, \operatorname{sign}(x_j)\, \frac{\lfloor r_j \rfloor +
      \operatorname{Bern}(r_j - \lfloor r_j \rfloor)}{s}, \qquad r_j = s |x_j| / |x|$$

    (Alistarh et al., NeurIPS 2017).
    """
    norm = jnp.sqrt(jnp.sum(x**2))
    scaled = levels * jnp.abs(x) / jnp.where(norm > 0, norm, 1)
    low = jnp.floor(scaled)
    up = jax.random.uniform(key, x.shape, x.dtype) < scaled - low
    return norm * jnp.sign(x) * (low + up.astype(x.dtype)) / levels


def quantized_bits(size: int, levels: int) -> float:
    """Bits of a quantized vector: the smallest of its sender's codes, of plain ones and of none."""
    s, d = float(levels), float(size)
    sparse = s * (s + np.sqrt(d))
    elias = 3 * sparse * (1 + 0.5 * np.log2(2 * (s**2 + d) / sparse)) + 32
    plain = d * np.ceil(np.log2(2 * s + 1)) + 32
    dense = 2.8 * d + 32 if s <= np.sqrt(d) else np.inf
    return min(elias, plain, dense, 32 * d)


def qlsd(
    posterior: Posterior, step_size: StepSize, *, levels: int = 16, refresh_every: int = 100
) -> Kernel:
    r"""Quantized Langevin stochastic dynamics, QLSD++ (Vono et al., AISTATS 2022).

    $$\theta' = \theta + h \sum_i \left(\eta_i + Q(\hat g_i(\theta) - \eta_i)\right) +
      \sqrt{2h}\,\xi, \qquad \eta_i' = \eta_i + a\,Q(\hat g_i(\theta) - \eta_i)$$

    with $\hat g_i$ the client's minibatch gradient, centered at an anchor that moves to the chain's
    position every ``refresh_every`` steps, the unbiased quantizer Q, applied once, and
    $a = 1/(1 + \min(\omega, \omega^2))$ for $\omega = \sqrt d/s$. Every step is a round of
    communication with all clients. The step h is the papers' $\gamma$.

    Args:
        posterior: A posterior of data that clients own.
        step_size: h.
        levels: s, levels of the quantizer.
        refresh_every: Steps between two anchors.

    Raises:
        TypeError: the posterior's data are not federated.
        ValueError: a number is out of range.
    """
    clients = require_clients(posterior)
    schedule, _ = as_schedule(step_size)
    levels = check_count("levels", levels)
    refresh_every = check_count("refresh_every", refresh_every)
    minibatches = local_minibatches(posterior)
    draw_noise = noise_like("normal")

    def anchored(position):
        spread = lambda x: jnp.broadcast_to(x, (clients.count, *x.shape))
        return position, client_gradients(posterior, jax.tree.map(spread, position))

    def init(position: Position, rng_key) -> QLSDState:
        anchor, whole = anchored(position)
        count = Shared(jnp.zeros((), jnp.int32))
        return QLSDState(position, start(rng_key), anchor, whole, whole, count)

    def step(rng_key, state: QLSDState) -> tuple[QLSDState, QLSDInfo]:
        count = state.count.value + 1
        h = jnp.asarray(schedule(state.count.value), float)
        batches, batch_state = minibatches(state.batch_state)
        omega = np.sqrt(tree_size(state.position)) / levels
        a = float(1 / (1 + min(omega, omega**2)))

        def sent(key, batch, whole, memory):
            value, here = local_score(posterior, True, state.position, batch)
            there = local_score(posterior, True, state.anchor, batch)[1]
            change = jax.tree.map(lambda x, y, w, m: x - y + w - m, here, there, whole, memory)
            flat, unravel = ravel_pytree(change)
            return value, unravel(quantized(key, flat, levels))

        keys = jax.random.split(jax.random.fold_in(rng_key, 1), clients.count)
        values, q = jax.vmap(sent)(keys, batches, state.at_anchor, state.memory)
        g = jax.tree.map(lambda m, q: jnp.sum(m + q, axis=0), state.memory, q)
        memory = jax.tree.map(lambda m, q: m + a * q, state.memory, q)
        xi = draw_noise(rng_key, state.position)
        position = jax.tree.map(
            lambda x, g, n: x + h.astype(x.dtype) * g + jnp.sqrt(2 * h).astype(x.dtype) * n,
            state.position,
            g,
            xi,
        )
        anchor, at_anchor = lax.cond(
            count % refresh_every == 0,
            anchored,
            lambda _: (state.anchor, state.at_anchor),
            position,
        )
        info = QLSDInfo(h, jnp.sum(values), jnp.sqrt(tree_dot(g, g)), count)
        following = QLSDState(position, batch_state, anchor, at_anchor, memory, Shared(count))
        return following, info

    settings = (("step_size", step_size), ("levels", levels), ("refresh_every", refresh_every))
    return Kernel(init, step, "QLSD++", settings, posterior)


def qlsd_costs(posterior: Posterior, position: Position, levels: int) -> dict[str, tuple[int, int]]:
    """Bytes up and down of each round."""
    count = require_clients(posterior).count
    up = int(np.ceil(quantized_bits(tree_size(position), levels) / 8))
    return {"rounds": (count * up, count * tree_bytes(position))}
