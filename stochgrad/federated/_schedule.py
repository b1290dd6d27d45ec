"""Which client a chain visits when, and for how long."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from stochgrad.core import (
    ORDERS,
    Batches,
    Posterior,
    PRNGKey,
    Shared,
    check_array,
    check_choice,
    check_count,
    describe,
    key_words,
    permuted,
    threefry,
)
from stochgrad.federated._client_sums import anchored_by_client
from stochgrad.federated._clients import Clients, Visit, require_clients

Selection: TypeAlias = Literal["random", "permuted"]

_SELECT = np.uint32(2**32 - 1)


def visiting(
    posterior: Posterior,
    *,
    local_steps: int | Sequence[int] = 1,
    probabilities: Sequence[float] | None = None,
    selection: Selection = "random",
) -> Posterior:
    r"""The same posterior, its clients visited in another way.

    A chain stays with a client for $T_s$ steps, then goes on to another one. In the long run it
    spends the share $f_s = p_s T_s / \sum_t p_t T_t$ of its steps with client s, and a minibatch of
    that client counts for $K_s / f_s$, with its $K_s$ minibatches, so that the estimate of the log
    density is unbiased over clients and minibatches whatever the shares.

    Args:
        posterior: A posterior of data that clients own.
        local_steps: Steps of a visit, $T_s$: one number for all, or one for each; in proportion to
            the clients' speed, all visits take as long.
        probabilities: $p_s$, with which client s is visited next. By default proportional to its
            number of rows, which makes its own minibatches count as much as any other's.
        selection: ``"random"``, independent draws with the ``probabilities``; or ``"permuted"``,
            each client once in a round, in new random order each round.

    Raises:
        TypeError: the posterior's data are not federated.
        ValueError: the probabilities are not one positive number for each client that sum to one,
            or do not go with the selection; a number of steps is below one.
    """
    clients = require_clients(posterior)
    check_choice("selection", selection, get_args(Selection))
    steps = _steps(local_steps, clients.count)
    if selection == "permuted":
        if probabilities is not None:
            raise ValueError(
                "probabilities are for selection='random': with 'permuted' each client comes once "
                "a round, and local_steps may differ between them."
            )
        p = None
        shares = steps / steps.sum()
    else:
        p = _probabilities(probabilities, clients)
        shares = p * steps / np.sum(p * steps)
    clients = clients._replace(steps=steps, probabilities=p, shares=shares)
    return posterior._replace(batches=_visited(posterior.batches, clients))


def set_share(posterior: Posterior, share: float) -> Posterior:
    """The same posterior, of the data of one client that is visited for a share of the steps."""
    clients = require_clients(posterior)._replace(shares=np.array([share]))
    return posterior._replace(batches=_visited(posterior.batches, clients))


def _steps(local_steps: Any, count: int) -> np.ndarray:
    most = 2**31 - 1
    if not isinstance(local_steps, Sequence | np.ndarray | jax.Array) or isinstance(
        local_steps, str | bytes
    ):
        return np.full(count, check_count("local_steps", local_steps, most=most), np.int32)
    steps = check_array("local_steps", local_steps, kind="integer")
    if steps.shape != (count,):
        raise ValueError(
            f"local_steps must be one number, or one for each of the {count} clients, "
            f"got {describe(local_steps)}."
        )
    return np.array(
        [check_count(f"local_steps of client {s}", t, most=most) for s, t in enumerate(steps)],
        np.int32,
    )


def _probabilities(values: Any, clients: Clients) -> np.ndarray:
    if values is None:
        return clients.sizes / clients.sizes.sum()
    p = check_array("probabilities", values).astype(np.float64)
    if p.shape != (clients.count,):
        raise ValueError(
            f"probabilities must be one number for each of the {clients.count} clients, got shape "
            f"{p.shape}."
        )
    if not np.all(p > 0):
        s = int(np.flatnonzero(~(p > 0))[0])
        raise ValueError(
            f"probabilities must be positive, or a client's data are never seen: client {s} has "
            f"{p[s]:g}."
        )
    if not np.isclose(p.sum(), 1, rtol=1e-4):
        raise ValueError(f"probabilities must sum to one, got {p.sum():g}.")
    return p / p.sum()


def _visited(batches: Batches, clients: Clients) -> Batches:
    """A stream that goes from client to client."""
    count = clients.count
    steps, blocks = clients.steps, clients.blocks.astype(np.uint32)
    weights = (clients.blocks / clients.shares).astype(np.float32)
    select = partial(_select, _thresholds(clients.probabilities), count)
    order = ORDERS[clients.order]

    def init(key: PRNGKey):
        none = jnp.zeros((), jnp.int32)
        number, given = jnp.zeros((), jnp.uint32), jnp.zeros(count, jnp.uint32)
        return Shared(Visit(key_words(key), number, none, none, given), optional=True)

    def next(state):
        visit: Visit = state.value
        over = visit.left == 0
        client = jnp.where(over, select(visit.words, visit.number), visit.client)
        left = jnp.where(over, jnp.asarray(steps)[client], visit.left) - 1
        number = visit.number + over.astype(np.uint32)
        size = jnp.asarray(blocks)[client]
        where = order(visit.handed_out[client], size)
        stream = client.astype(np.uint32) + np.uint32(1)
        block = permuted(visit.words, where.permutation, where.slot, size, stream)
        handed_out = visit.handed_out.at[client].add(np.uint32(1))
        batch = clients.at(client, block, jnp.asarray(weights)[client])
        following = Visit(visit.words, number, client, left.astype(np.int32), handed_out)
        return batch, Shared(following, optional=True)

    return batches._replace(
        init=init, next=next, owners=clients, blocks=None, anchored=anchored_by_client
    )


def _thresholds(probabilities: np.ndarray | None) -> UInt32[np.ndarray, " clients"] | None:
    if probabilities is None:
        return None
    return np.minimum(np.cumsum(probabilities) * 2.0**32, 2.0**32 - 1).astype(np.uint32)


def _select(thresholds, count: int, words, number) -> Int[Array, ""]:
    """The client of a visit."""
    if thresholds is None:
        permutation, slot = number // np.uint32(count), number % np.uint32(count)
        return permuted(words, permutation, slot, count)
    word, _ = threefry(words, number, jnp.full_like(number, _SELECT))
    return jnp.searchsorted(jnp.asarray(thresholds[:-1]), word, side="right").astype(np.int32)
