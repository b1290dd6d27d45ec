"""A posterior of data that several clients own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Array, Float, PyTree, Scalar

from stochgrad.core import Order, Position, Posterior, joint_density, plain_observations
from stochgrad.federated._clients import client_batches
from stochgrad.federated._schedule import visiting


def posterior(
    log_prior: Callable[[Position], Scalar],
    log_likelihood: Callable[[Position, Any], Float[Array, " batch"]],
    clients: Sequence[PyTree],
    *,
    batch_size: int | None = None,
    order: Order = "reshuffled",
) -> Posterior:
    r"""A posterior density, and minibatches of one client's data at a time.

    $$\log \pi(\theta) = \log p(\theta) + \sum_s \log p(x_s \mid \theta), \qquad
      \log\hat\pi(\theta) = \log p(\theta) +
      \frac{K_s}{f_s} \sum_{i \in b} \log p(x_{si} \mid \theta)$$

    with one of the $K_s = \lceil N_s / B \rceil$ minibatches of the client s that is visited, for
    the share $f_s$ of the steps. Under a kernel as it is, this is distributed SGLD (Ahn, Shahbaba &
    Welling, ICML 2014); ``stochgrad.federated.visiting`` sets who is visited when.

    Args:
        log_prior: As in ``stochgrad.posterior``.
        log_likelihood: As in ``stochgrad.posterior``.
        clients: The data of each client: pytrees of one structure, arrays with one leading axis of
            that client's rows. One may have ten rows and another a million; a client's rows are
            padded to whole minibatches only.
        batch_size: Rows of a minibatch, B.
        order: As in ``stochgrad.posterior``, within each client; ``"full"`` takes all of a client's
            rows at each step (padded to those of the largest).

    Raises:
        ValueError: there is no client, or one without rows, or with rows that are not finite;
            the clients' data differ in structure; the batch size does not fit.

    Example:
        >>> import jax.numpy as jnp, stochgrad
        >>> target = stochgrad.federated.posterior(
        ...     lambda mean: -0.5 * mean**2,
        ...     lambda mean, x: -0.5 * (x - mean) ** 2,
        ...     [jnp.zeros(30), jnp.ones(70)],
        ...     batch_size=10,
        ... )
        >>> target.batches.owners.shares.tolist()
        [0.3, 0.7]
    """
    log_density = joint_density(log_prior, log_likelihood)
    batches = client_batches(clients, batch_size, order)
    about = partial(plain_observations, log_prior, log_likelihood, None, batches)
    return visiting(Posterior(log_density, batches, observations=about))
