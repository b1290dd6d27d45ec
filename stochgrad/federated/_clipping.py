"""Gradients of rows, each clipped to a norm, so that what one row can change is bounded."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from stochgrad.core import (
    Gradient,
    Position,
    Posterior,
    PRNGKey,
    check_choice,
    check_key,
    check_number,
    hoisted_jit,
)
from stochgrad.federated._accounting import (
    Adjacency,
    check_adjacency,
    fisher_sensitivity,
    sensitivity,
)
from stochgrad.federated._checks import as_reference, check_federated
from stochgrad.federated._client_sums import for_each_client
from stochgrad.federated._clients import require_clients
from stochgrad.federated._gaussians import Diagonal, Full, Surrogates
from stochgrad.federated._rows import row_scores, row_weights, with_weights

FORMS = ("none", "diagonal", "full")


def clipped_minibatch(posterior: Posterior, norm: float) -> Gradient:
    r"""The minibatch gradient of clients' data with the gradient of each row clipped.

    $$\hat g(\theta) = \nabla\log p(\theta) + \frac{K_s}{f_s} \sum_{i \in b} g_i
      \min\Bigl(1, \frac{C}{|g_i|}\Bigr), \qquad g_i = \nabla\log p(x_{si} \mid \theta).$$

    One row changes the sum by at most C if it is left out, by 2C if it is another. The prior is not
    clipped. A row whose gradient is not finite counts as zero. Where rows are clipped the draws are
    of another posterior: ``clipped_share`` says how many are.

    Args:
        posterior: A posterior of data that clients own, whose log density is a sum over rows.
        norm: C, in units of the log density over the (unconstrained, raveled) position.

    Raises:
        TypeError: the posterior's data are not federated.
        ValueError: the norm is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.federated.posterior(
        ...     lambda mean: -0.5 * mean**2,
        ...     lambda mean, x: -0.5 * (x - mean) ** 2,
        ...     [jnp.array([0.5, 7.0])],
        ...     batch_size=2,
        ... )
        >>> gradient = stochgrad.federated.clipped_minibatch(target, 1.0)
        >>> state = gradient.init(jax.random.key(0), jnp.float32(0.0))
        >>> score, state = gradient.next(jax.random.key(1), jnp.float32(0.0), state)
        >>> float(score(jnp.float32(0.0))[1])
        1.5
    """
    check_federated(posterior)
    norm = check_number("norm", norm)
    batches, scores = posterior.batches, _clipped_scores(posterior, norm)
    prior = jax.grad(posterior.log_density)

    def init(key, position):
        return batches.init(key)

    def next(key, position, state):
        batch, state = batches.next(state)

        def score(position):
            flat, unravel = ravel_pytree(position)
            weight = row_weights(batch).astype(flat.dtype)
            total = jnp.sum(weight[:, None] * scores(position, batch), axis=0)
            own = prior(position, _without_data(batch))
            value = posterior.log_density(position, batch)
            return value, jax.tree.map(jnp.add, own, unravel(total))

        return score, state

    return Gradient(init, next, posterior)


def private_surrogates(
    key: PRNGKey,
    posterior: Posterior,
    reference: Any,
    *,
    norm: float,
    noise_multiplier: float,
    form: str = "none",
    adjacency: Adjacency = "replace",
) -> Surrogates:
    r"""Slopes and curvatures of clients, of clipped rows and with noise: each a Gaussian mechanism.

    $$\tilde g_s = \sum_i \bar g_i + z \Delta \xi, \qquad
      \tilde\Lambda_s = \Bigl[\sum_i \bar g_i \bar g_i^\top + z \Delta' E\Bigr]_+, \qquad
      \bar g_i = g_i \min(1, C / |g_i|),$$

    with standard normal $\xi$, a symmetric E that is standard normal in the Frobenius norm, and the
    largest change by one row, $\Delta = 2C$ and $\Delta' = \sqrt2 C^2$ (C and C² where a row may
    be left out instead). Negative eigenvalues are set to zero, which costs no privacy. Conducive
    gradients average to zero whatever surrogates are, so that their noise does not shift a
    posterior of short visits.

    Args:
        key: A typed PRNG key, which must remain unknown to whoever sees the surrogates.
        posterior: A posterior of data that clients own.
        reference: $\theta_*$. It is taken as public: a mode that was found from the data is not.
        norm: C.
        noise_multiplier: z. A slope or a curvature costs $1/z^2$ of what
            ``stochgrad.federated.privacy_of_steps`` adds up.
        form: ``"none"``, slopes alone; ``"diagonal"`` or ``"full"``, and curvature.
        adjacency: ``"replace"`` or ``"zero_out"``, as in ``privacy_of_steps``.

    Raises:
        TypeError: the posterior's data are not federated; the key is not a typed PRNG key.
        ValueError: a number is not positive, the form or the adjacency unknown.
    """
    check_federated(posterior)
    position = as_reference(posterior, reference)
    check_key(key)
    check_choice("form", form, FORMS)
    check_adjacency(adjacency)
    norm = check_number("norm", norm)
    z = check_number("noise_multiplier", noise_multiplier)
    _, unravel = ravel_pytree(position)
    sums = clipped_sums(posterior, norm, form != "none")
    flat, fisher, _ = for_each_client(posterior, sums, position)
    keys = jax.random.split(key, 2 * len(flat)).reshape(len(flat), 2)
    slope = jnp.stack(
        [noisy_slope(k[0], g, norm, z, adjacency) for k, g in zip(keys, flat, strict=True)]
    )
    precision = None
    if form != "none":
        noisy = partial(noisy_fisher, norm=norm, z=z, form=form, adjacency=adjacency)
        made = jnp.stack([noisy(k[1], f) for k, f in zip(keys, fisher, strict=True)])
        precision = Full(made) if form == "full" else Diagonal(jax.vmap(unravel)(made))
    return Surrogates(position, jax.vmap(unravel)(slope), precision)


def clipped_share(posterior: Posterior, position: Any, norm: float) -> np.ndarray:
    """The share of each client's rows whose gradient at a position is longer than a norm.

    Of the data, and not private: for the owner's eyes.

    Args:
        posterior: A posterior of data that clients own.
        position: Where.
        norm: C.

    Raises:
        TypeError: the posterior's data are not federated.
        ValueError: the norm is not positive.
    """
    check_federated(posterior)
    norm = check_number("norm", norm)
    position = as_reference(posterior, position, "position")
    counts = for_each_client(posterior, clipped_sums(posterior, norm, False), position)[2]
    return np.asarray(counts) / require_clients(posterior).sizes


def clipped_sums(posterior: Posterior, norm: float, fisher: bool) -> Callable[..., tuple]:
    """``(client, position) -> (slope, fisher, clipped)``, sums over a client's clipped rows.

    The slope is raveled; the Fisher matrix is 0 where it is not wanted; ``clipped`` counts rows.
    """
    clients = require_clients(posterior)
    scores = _clipped_scores(posterior, norm)
    plain = _separate_scores(posterior)

    def run(client, position):
        flat, _ = ravel_pytree(position)
        size, dtype = flat.size, flat.dtype

        def add(block, total):
            batch = clients.at(client, block, jnp.float32(1))
            weight = row_weights(batch).astype(dtype)
            rows = scores(position, batch) * weight[:, None]
            longer = ~(_norms(plain(position, batch)) <= jnp.asarray(norm, dtype))
            clipped = jnp.sum(weight * longer.astype(dtype))
            own = jnp.zeros((), dtype)
            if fisher:  # in full precision on accelerators, too: a row must not count for more
                own = jnp.matmul(rows.T, rows, precision=lax.Precision.HIGHEST)
            return jax.tree.map(jnp.add, total, (jnp.sum(rows, axis=0), own, clipped))

        zeros = jnp.zeros((size, size) if fisher else (), dtype)
        start = (jnp.zeros(size, dtype), zeros, jnp.zeros((), dtype))
        return lax.fori_loop(0, jnp.asarray(clients.blocks)[client], add, start)

    return run


def client_sums(posterior: Posterior, norm: float, fisher: bool) -> Callable[[Position], tuple]:
    """The same of the only client there is, compiled."""
    run = clipped_sums(posterior, norm, fisher)
    return hoisted_jit(lambda position: run(jnp.int32(0), position))


def noisy_slope(
    key: PRNGKey, slope: Float[Array, " d"], norm: float, z: float, adjacency: str
) -> Float[Array, " d"]:
    """A slope of clipped rows by the Gaussian mechanism of noise multiplier z."""
    noise = jax.random.normal(key, slope.shape, slope.dtype)
    return slope + jnp.asarray(z * sensitivity(norm, adjacency), slope.dtype) * noise


def noisy_fisher(
    key: PRNGKey, fisher: Float[Array, "d d"], norm: float, z: float, form: str, adjacency: str
) -> Array:
    """Likewise a Fisher matrix, or its diagonal, without what is negative afterwards."""
    sd = jnp.asarray(z * fisher_sensitivity(norm, adjacency), fisher.dtype)
    if form == "diagonal":
        values = jnp.diagonal(fisher)
        return jnp.maximum(values + sd * jax.random.normal(key, values.shape, values.dtype), 0)
    noise = jax.random.normal(key, fisher.shape, fisher.dtype)
    noisy = (fisher + fisher.T) / 2 + sd * (noise + noise.T) / 2
    values, vectors = jnp.linalg.eigh(noisy)
    return (vectors * jnp.maximum(values, 0)[None]) @ vectors.T


def _clipped_scores(posterior: Posterior, norm: float) -> Callable[[Position, Any], Array]:
    """``(position, batch) -> (rows, d)``, without weights."""
    scores = _separate_scores(posterior)

    def clipped(position, batch):
        g = scores(position, batch)
        length = _norms(g)
        most = jnp.asarray(norm, g.dtype)
        by = jnp.where(length > most, most / jnp.where(length > 0, length, 1), 1)
        return jnp.where(jnp.isfinite(length)[:, None], g * by[:, None], 0)

    return clipped


def _separate_scores(posterior: Posterior) -> Callable[[Position, Any], Array]:
    """Rows' scores none of which can spoil another's, as 0 times what is not finite would.

    Rows of arrays are taken one by one; in a numpyro model, which has them all at once, forward
    derivatives keep them apart.
    """

    def scores(position, batch):
        if not hasattr(batch, "data"):
            flat, unravel = ravel_pytree(position)
            of_rows = jax.grad(
                lambda w, x: posterior.log_density(unravel(x), with_weights(batch, w))
            )
            ones = jnp.ones_like(row_weights(batch))
            return jax.jacfwd(lambda x: of_rows(ones, x))(flat)
        ones = jnp.ones_like(row_weights(batch))

        def of_row(row, weight):
            one = batch._replace(data=jax.tree.map(lambda x: x[None], row), weight=weight[None])
            return row_scores(posterior)(position, one)[0]

        return jax.vmap(of_row)(batch.data, ones)

    return scores


def _norms(rows: Array) -> Array:
    return jnp.sqrt(jnp.sum(rows**2, axis=1))


def _without_data(batch: Any) -> Any:
    """A batch whose rows count for nothing, and are zeros where it holds them itself."""
    empty = with_weights(batch, jnp.zeros_like(row_weights(batch)))
    if hasattr(empty, "data"):
        return empty._replace(data=jax.tree.map(jnp.zeros_like, empty.data))
    return empty
