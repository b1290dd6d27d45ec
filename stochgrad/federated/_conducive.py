"""A client's stochastic gradient, corrected by surrogates of the other clients' likelihoods."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import (
    Gradient,
    Position,
    Target,
    check_instance,
    check_number,
    check_position,
    describe,
)
from stochgrad.federated._clients import current_visit, require_clients
from stochgrad.federated._gaussians import (
    Diagonal,
    Full,
    LowRank,
    Surrogates,
    conducive_parameters,
    quadratic,
)
from stochgrad.gradients import as_gradient


def conducive(target: Target, surrogates: Surrogates, *, strength: float = 1.0) -> Gradient:
    r"""The score of the client that is visited, and a conducive gradient.

    $$\hat g(\theta) = \hat g_s(\theta) + \alpha\, c_s(\theta), \qquad
      c_s(\theta) = \sum_t \nabla\log q_t(\theta) - \frac{1}{f_s} \nabla\log q_s(\theta),$$

    with the surrogate $q_s$ of the likelihood of client s, which is visited for the share $f_s$ of
    the steps (El Mekkaoui, Mesquita, Blomstedt & Kaski, UAI 2021, equation 6). $c_s$ averages to
    zero over the clients, so that the estimate remains unbiased; and where the surrogates are good,
    a visit of many steps follows the posterior of all the data instead of the client's own. With
    exact surrogates its law does not depend on how long visits are.

    It adds $O(d)$ to a step for surrogates of first order and diagonal ones, $O(d^2)$ for full
    matrices.

    Args:
        target: A posterior of data that clients own, or any gradient of it: plain, or with a
            control variate.
        surrogates: $q_s$.
        strength: $\alpha$; at zero, distributed SGLD (Ahn, Shahbaba & Welling, ICML 2014).

    Returns:
        The gradient, with all else that the target's has: its posterior, where to start, what a
        position stands for.

    Raises:
        TypeError: the target's data are not federated; ``surrogates`` are none.
        ValueError: the surrogates are those of another number of clients or of other positions, or
            the strength is negative.
    """
    inner = as_gradient(target)
    clients = require_clients(inner.posterior)
    strength = check_number("strength", strength, zero=True)
    check_surrogates_fit(surrogates, clients.count)
    return with_conducive(inner, surrogates, clients.shares, strength)


def with_conducive(
    inner: Gradient, surrogates: Surrogates, shares: np.ndarray, strength: float
) -> Gradient:
    """A gradient and the conducive gradient of the client that is visited.

    There may be more surrogates than clients in this process: one that holds its own data only has
    its own surrogate first, and the product of all others' second.
    """
    slope, precision = conducive_parameters(surrogates, shares)
    origin = jax.tree.map(jnp.asarray, surrogates.origin)
    return add_conducive(inner, origin, slope, precision, strength)


def add_conducive(
    inner: Gradient, origin: Position, slope: Position, precision: Any, strength: float
) -> Gradient:
    """A gradient and the conducive gradient by its parameters, which may be traced.

    Args:
        inner: The gradient.
        origin: Where the slopes were taken.
        slope: Slopes of the conducive gradient there, with a leading axis of clients.
        precision: The precisions that go with them, or None.
        strength: What the conducive gradient is multiplied with.
    """
    shapes = jax.tree.map(jnp.shape, origin)

    def init(key, position):
        if jax.tree.map(jnp.shape, position) != shapes:
            raise ValueError(
                f"surrogates are of positions of shape {shapes}, and the chain's have "
                f"{jax.tree.map(jnp.shape, position)}: does init match the model?"
            )
        return inner.init(key, position)

    def next(key, position, state):
        score, state = inner.next(key, position, state)
        client = current_visit(state).client

        def corrected(position):
            delta = jax.tree.map(jnp.subtract, position, origin)
            c = quadratic(slope, precision, client, delta)
            return jax.tree.map(lambda x, c: x + strength * c, score(position), c)

        return corrected, state

    return inner._replace(init=init, next=next)


def check_surrogates_fit(surrogates: Any, count: int) -> Surrogates:
    """The surrogates, if they are of so many clients and their arrays go together."""
    wanted = (
        "Surrogates, as stochgrad.federated.global_first_order(posterior, reference) makes them"
    )
    check_instance("surrogates", surrogates, Surrogates, wanted)
    origin, slope, precision = surrogates
    check_position(origin, "surrogates.origin")
    check_position(slope, "surrogates.slope")
    shapes = jax.tree.map(jnp.shape, origin)
    if jax.tree.structure(slope) != jax.tree.structure(origin):
        raise ValueError(
            "surrogates must have a slope of the structure of their origin, got "
            f"{jax.tree.structure(slope)} and {jax.tree.structure(origin)}."
        )
    counts = {jnp.shape(x)[:1] for x in jax.tree.leaves(slope)}
    if counts != {(count,)}:
        sizes = ", ".join(str(c[0]) if c else "none" for c in sorted(counts))
        raise ValueError(f"there are surrogates of {sizes} clients, and data of {count}.")
    with_clients = jax.tree.map(lambda x: (count, *jnp.shape(x)), origin)
    size = sum(int(np.prod(jnp.shape(x))) for x in jax.tree.leaves(origin))
    right = jax.tree.map(jnp.shape, slope) == with_clients
    if isinstance(precision, Diagonal):
        right = right and jax.tree.map(jnp.shape, precision.values) == with_clients
    elif isinstance(precision, Full):
        right = right and jnp.shape(precision.matrices) == (count, size, size)
    elif isinstance(precision, LowRank):
        right = right and jnp.shape(precision.diagonal) == (count, size)
        right = right and jnp.shape(precision.factors)[-1:] == (size,)
    elif precision is not None:
        raise TypeError(
            "surrogates must have a precision of stochgrad.federated.Diagonal, Full, LowRank or "
            f"None, got {describe(precision)}."
        )
    if not right:
        raise ValueError(
            f"surrogates of positions of shape {shapes} must have slopes and precisions of these "
            f"shapes with a leading axis of {count} clients (matrices over the raveled position)."
        )
    if precision is not None:
        check_position(precision, "surrogates.precision")
    return surrogates
