"""A client's stochastic gradient, mended by what is known of the other clients' likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import Gradient, Target, check_number, clients_of, visit_in
from stochgrad.gradients._minibatch import as_gradient
from stochgrad.gradients._surrogates import Surrogates, mended, quadratic


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

    Raises:
        TypeError: the target's data belong to no clients.
        ValueError: the surrogates are those of another number of clients, or the strength is
            negative.
    """
    inner = as_gradient(target)
    clients = clients_of(inner.posterior)
    strength = check_number("strength", strength, zero=True)
    if surrogates.count != clients.count:
        raise ValueError(
            f"there are surrogates of {surrogates.count} clients, and data of {clients.count}."
        )
    return with_conducive(inner, surrogates, clients.shares, strength)


def with_conducive(
    inner: Gradient, surrogates: Surrogates, shares: np.ndarray, strength: float
) -> Gradient:
    """A gradient and the conducive gradient of the client that is visited.

    There may be more surrogates than clients at hand: a client that holds its own data only has
    its own surrogate first, and the product of all others' second.
    """
    slope, precision = mended(surrogates, shares)
    origin = jax.tree.map(jnp.asarray, surrogates.origin)

    def next(key, position, state):
        score, state = inner.next(key, position, state)
        client = visit_in(state).client

        def mended_score(position):
            delta = jax.tree.map(jnp.subtract, position, origin)
            c = quadratic(slope, precision, client, delta)
            return jax.tree.map(lambda x, c: x + strength * c, score(position), c)

        return mended_score, state

    return Gradient(inner.init, next, inner.posterior)
