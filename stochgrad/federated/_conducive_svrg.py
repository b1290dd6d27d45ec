"""A conducive gradient whose slopes are taken anew where the chain is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from stochgrad.core import (
    Gradient,
    Position,
    Posterior,
    Shared,
    check_count,
    check_flag,
    check_number,
    hoisted_jit,
    tree_dot,
)
from stochgrad.federated._checks import check_federated, check_surrogates
from stochgrad.federated._client_sums import all_likelihoods, likelihood_sum, prior_only
from stochgrad.federated._clients import Clients, current_visit, require_clients
from stochgrad.federated._gaussians import Surrogates, conducive_parameters
from stochgrad.gradients import check_like


class ConduciveSVRGState(NamedTuple):
    """State of the gradient.

    Attributes:
        batch_state: The stream's state, with the visit.
        anchor: Where slopes were taken last.
        total: Value and slope there of the log likelihood of all clients.
        whole: Those of the log prior and the client's own log likelihood over its share.
        rest: ``total`` less the client's own over its share.
        count: Steps since the anchor was set; all chains move theirs at once.
    """

    batch_state: Any
    anchor: Position
    total: PyTree
    whole: PyTree
    rest: PyTree
    count: Shared


def conducive_svrg(
    posterior: Posterior,
    surrogates: Surrogates,
    *,
    period: int,
    strength: float = 1.0,
    control_variate: bool = True,
) -> Gradient:
    r"""A conducive gradient whose slopes are taken anew every ``period`` visits.

    $$\hat g(\theta) = \hat g_s(\theta) + \alpha\Big[\sum_t \big(g_t(\tilde\theta) -
      \Lambda_t(\theta - \tilde\theta)\big) - \frac{1}{f_s}\big(g_s(\tilde\theta) -
      \Lambda_s(\theta - \tilde\theta)\big)\Big]$$

    with the slopes $g_t$ of the clients' log likelihoods at an anchor $\tilde\theta$, to which the
    chain's position is copied at the beginning of every ``period``-th visit: SVRG (Johnson & Zhang,
    NeurIPS 2013), whose minibatches are clients. Unbiased given the anchor for any anchor
    and any curvature $\Lambda_t$, which stays that of the surrogates. The minibatch gradient
    $\hat g_s$ is centered at the anchor too.

    A renewal is a round over all clients for each chain: they are sent a position and answer with a
    slope. Each visit is sent the anchor and the sum of slopes, and its client goes over its own
    rows once, at its beginning. The state is four positions a chain, whatever the number of
    clients.

    Args:
        posterior: A posterior of data that clients own, with as many ``local_steps`` at each.
        surrogates: Their origin is the first anchor, their precision the curvature. Slopes are
            taken at the anchor.
        period: Visits between two renewals.
        strength: $\alpha$ of ``stochgrad.federated.conducive``.
        control_variate: Whether minibatch gradients are centered at the anchor.

    Raises:
        TypeError: the posterior's data are not federated; ``surrogates`` are none.
        ValueError: the period is not a positive integer; visits to some clients are longer than to
            others; the surrogates are of other clients or positions.

    Example:
        >>> import jax.numpy as jnp, stochgrad
        >>> from stochgrad import federated
        >>> target = federated.posterior(
        ...     lambda mean: -0.5 * mean**2,
        ...     lambda mean, x: -0.5 * (x - mean) ** 2,
        ...     [jnp.zeros(30), jnp.ones(70)],
        ...     batch_size=10,
        ... )
        >>> first = federated.global_first_order(target, jnp.float32(0.0))
        >>> gradient = federated.conducive_svrg(target, first, period=5)
    """
    check_federated(posterior)
    clients = require_clients(posterior)
    check_surrogates(posterior, surrogates)
    period = check_count("period", period)
    strength = check_number("strength", strength, zero=True)
    control_variate = check_flag("control_variate", control_variate)
    check_equal_visits(clients)
    steps = int(clients.steps[0])
    if period * steps >= 2**31:
        raise ValueError(
            f"period must be such that period * local_steps is less than 2**31, got {period} and "
            f"{steps}."
        )
    batches, shares = posterior.batches, clients.shares
    value_and_gradient = jax.value_and_grad(posterior.log_density)
    own = likelihood_sum(posterior, value_and_gradient)
    prior = prior_only(posterior, value_and_gradient)
    likelihoods = all_likelihoods(posterior, value_and_gradient)
    origin = jax.tree.map(jnp.asarray, surrogates.origin)
    precision = conducive_parameters(surrogates, shares)[1]
    first = hoisted_jit(likelihoods)(origin)

    def init(key, position: Position) -> ConduciveSVRGState:
        check_like("surrogates.origin", origin, position, "the chain's position")
        zeros = jax.tree.map(jnp.zeros_like, first)
        count = Shared(jnp.zeros((), jnp.int32))
        return ConduciveSVRGState(batches.init(key), origin, first, zeros, zeros, count)

    def parts(client, anchor, total):
        def over(x):
            return x / jnp.asarray(shares, x.dtype)[client]

        mine = jax.tree.map(over, own(client, anchor))
        whole = jax.tree.map(jnp.add, prior(anchor), mine)
        return whole, jax.tree.map(jnp.subtract, total, mine)

    def next(key, position: Position, state: ConduciveSVRGState):
        batch, batch_state = batches.next(state.batch_state)
        client, count = current_visit(batch_state).client, state.count.value
        anchor, total = lax.cond(
            count == period * steps,
            lambda position: (position, likelihoods(position)),
            lambda _: (state.anchor, state.total),
            position,
        )
        whole, rest = lax.cond(
            count % steps == 0,
            lambda: parts(client, anchor, total),
            lambda: (state.whole, state.rest),
        )

        def score(position):
            delta = jax.tree.map(jnp.subtract, position, anchor)
            value, slope = rest
            c = slope
            if precision is not None:
                c = jax.tree.map(jnp.subtract, slope, precision.times(client, delta))
            between = jax.tree.map(lambda a, c: (a + c) / 2, slope, c)
            conducive = value + tree_dot(between, delta), c
            here = value_and_gradient(position, batch)
            if control_variate:
                there = value_and_gradient(anchor, batch)
                here = jax.tree.map(lambda x, y, whole: x - y + whole, here, there, whole)
            return jax.tree.map(lambda x, c: x + strength * c, here, conducive)

        following = Shared(jnp.where(count == period * steps, 1, count + 1).astype(np.int32))
        return score, ConduciveSVRGState(batch_state, anchor, total, whole, rest, following)

    return Gradient(init, next, posterior)


def check_equal_visits(clients: Clients) -> None:
    """Raise a ValueError unless visits to all clients have as many steps."""
    if np.ptp(clients.steps) > 0:
        raise ValueError(
            "local_steps must be one number for all clients where slopes are taken anew every some "
            f"visits, got {clients.steps.min()} to {clients.steps.max()}: give one number, or "
            "leave the period out."
        )
