"""Federated averaging with noise: all clients step at once, and are averaged now and then."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree, Scalar

from stochgrad.core import (
    Kernel,
    Position,
    Posterior,
    Shared,
    StepSize,
    as_schedule,
    check_count,
    check_flag,
    check_number,
    noise_like,
    tree_bytes,
    tree_dot,
)
from stochgrad.federated._clients import require_clients
from stochgrad.federated._parallel_clients import (
    client_gradients,
    local_minibatches,
    local_score,
    start,
)


class FALDState(NamedTuple):
    """State of a chain.

    Attributes:
        position: The last average of the clients' positions.
        replicas: The clients' positions, with a leading axis of clients.
        batch_state: The clients' streams.
        anchor: Where gradients are centered, or None.
        mean_gradient: The mean of the clients' gradients there.
        count: Number of steps taken.
    """

    position: Position
    replicas: PyTree
    batch_state: Any
    anchor: Position | None
    mean_gradient: Position | None
    count: Shared


class FALDInfo(NamedTuple):
    """What a step reports.

    Attributes:
        step_size: h.
        log_density: Minibatch estimate, each client's part at its own position.
        gradient_norm: Norm of the mean of the clients' gradients, times their number.
        rounds: Rounds of averaging until now.
        refreshes: How often the anchor was moved until now.
    """

    step_size: Float[Array, ""]
    log_density: Scalar
    gradient_norm: Float[Array, ""]
    rounds: Array
    refreshes: Array


def fald(
    posterior: Posterior,
    step_size: StepSize,
    *,
    local_steps: int = 1,
    variance_reduced: bool = False,
    refresh_every: int = 10,
    common_noise: float = 0.0,
) -> Kernel:
    r"""Federated averaging Langevin algorithm (Deng et al., UAI 2024), also with reduced variance.

    Each of b clients steps at a position of its own,

    $$\theta_i' = \theta_i + b h\, \hat g_i(\theta_i) + \sqrt{2bh}\,
      \left(\sqrt{\tau/b}\;\xi + \sqrt{1 - \tau}\;\xi_i\right),$$

    with the gradient $\hat g_i$ of its own log likelihood and of the b-th part of the prior, and
    every ``local_steps`` steps all positions become their mean, which is the chain's. The mean
    follows Langevin dynamics in steps of h; between two averages the clients drift apart, and the
    draws have a bias of order $b h$ times the local steps, in the mean as well.

    With ``variance_reduced`` (VR-FALD*, Plassier et al., AISTATS 2023) the clients use
    $\hat g_i(\theta_i) - \hat g_i(\tilde\theta) + \frac1b\sum_j g_j(\tilde\theta)$, centered at the
    chain's position ``refresh_every`` rounds ago or less, which holds the drift up.

    Args:
        posterior: A posterior of data that clients own.
        step_size: h, time in the dynamics of the mean. The step $\gamma$ of the papers' code is
            $b h$.
        local_steps: Steps between two averages.
        variance_reduced: Whether to center the gradients.
        refresh_every: Averages between two anchors.
        common_noise: $\tau$, from zero to one.

    Raises:
        TypeError: the posterior's data are not federated.
        ValueError: a number is out of range.
    """
    clients = require_clients(posterior)
    b = clients.count
    schedule, _ = as_schedule(step_size)
    local_steps = check_count("local_steps", local_steps)
    refresh_every = check_count("refresh_every", refresh_every)
    variance_reduced = check_flag("variance_reduced", variance_reduced)
    tau = check_number("common_noise", common_noise, zero=True)
    if tau > 1:
        raise ValueError(f"common_noise must be from zero to one, got {tau:g}.")
    minibatches = local_minibatches(posterior)
    draw_noise = noise_like("normal")

    def spread(position):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (b, *x.shape)), position)

    def anchored(position):
        whole = client_gradients(posterior, spread(position))
        return position, jax.tree.map(lambda g: jnp.mean(g, axis=0), whole)

    def init(position: Position, rng_key) -> FALDState:
        anchor, mean = anchored(position) if variance_reduced else (None, None)
        count = Shared(jnp.zeros((), jnp.int32))
        return FALDState(position, spread(position), start(rng_key), anchor, mean, count)

    def step(rng_key, state: FALDState) -> tuple[FALDState, FALDInfo]:
        count = state.count.value + 1
        h = jnp.asarray(schedule(state.count.value), float)
        batches, batch_state = minibatches(state.batch_state)

        def score(position, batch):
            value, g = local_score(posterior, True, position, batch)
            if variance_reduced:
                there = local_score(posterior, True, state.anchor, batch)[1]
                g = jax.tree.map(lambda x, y, z: x - y + z, g, there, state.mean_gradient)
            return value, g

        values, g = jax.vmap(score)(state.replicas, batches)
        common, own = draw_noise(rng_key, (state.position, state.replicas))

        def moved(x, g, common, own):
            size = (b * h).astype(x.dtype)
            noise = np.sqrt(tau / b).astype(x.dtype) * common[None]
            noise = noise + np.sqrt(1 - tau).astype(x.dtype) * own
            return x + size * g + jnp.sqrt(2 * size) * noise

        replicas = jax.tree.map(moved, state.replicas, g, common, own)

        def averaged(replicas, _):
            mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), replicas)
            return mean, spread(mean)

        position, replicas = lax.cond(
            count % local_steps == 0, averaged, lambda r, p: (p, r), replicas, state.position
        )
        anchor, mean = state.anchor, state.mean_gradient
        period = local_steps * refresh_every
        if variance_reduced:
            kept = (state.anchor, state.mean_gradient)
            anchor, mean = lax.cond(count % period == 0, anchored, lambda _: kept, position)
        total = jax.tree.map(lambda x: jnp.sum(x, axis=0), g)
        refreshes = 1 + count // period if variance_reduced else jnp.zeros_like(count)
        norm = jnp.sqrt(tree_dot(total, total))
        info = FALDInfo(h, jnp.sum(values), norm, count // local_steps, refreshes)
        return FALDState(position, replicas, batch_state, anchor, mean, Shared(count)), info

    settings = (
        ("step_size", step_size),
        ("local_steps", local_steps),
        ("refresh_every", refresh_every if variance_reduced else 0),
        ("common_noise", tau),
    )
    name = "VR-FALD*" if variance_reduced else "FALD"
    return Kernel(init, step, name, settings, posterior)


def fald_costs(posterior: Posterior, position: Position) -> dict[str, tuple[int, int]]:
    """Bytes up and down of each round and of each refresh."""
    size = require_clients(posterior).count * tree_bytes(position)
    return {"rounds": (size, size), "refreshes": (size, size)}
