"""A posterior from two plain JAX functions and the data."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, Scalar

from stochgrad.core._batches import (
    Batch,
    Layout,
    Order,
    check_no_mesh,
    check_order,
    data_batches,
    streamed_batches,
)
from stochgrad.core._checks import check_callable, check_count, first_line
from stochgrad.core._observations import plain_observations
from stochgrad.core._protocols import Position, Posterior, PRNGKey


def posterior(
    log_prior: Callable[[Position], Scalar],
    log_likelihood: Callable[[Position, Any], Float[Array, " batch"]],
    data: PyTree,
    *,
    batch_size: int | None = None,
    order: Order = "reshuffled",
    layout: Layout = "blocks",
    resident_bytes: int = 2**28,
    mesh: Mesh | None = None,
    predict: Callable[[PRNGKey, Position, Any], PyTree] | None = None,
) -> Posterior:
    r"""A posterior density and a stream of minibatches of its data.

    $$\log \pi(\theta) = \log p(\theta) + \sum_{i=1}^N \log p(x_i \mid \theta), \qquad
      \log\hat\pi(\theta) = \log p(\theta) + K \sum_{i \in b} \log p(x_i \mid \theta),$$

    where $b$ is one of the $K = \lceil N/B \rceil$ minibatches of an epoch. The estimate is
    unbiased at every step, and its average over an epoch is exact, a partial last minibatch
    included.

    Args:
        log_prior: ``position -> scalar``, the log density of the prior, up to a constant.
        log_likelihood: ``(position, batch) -> (rows,)``, one value per row of the batch, which has
            the structure of ``data``.
        data: Any pytree of arrays with one leading axis of N rows; a list of numbers and a column
            of a data frame are arrays, too. It is copied to the device.
        batch_size: Rows of a minibatch, B; optional with ``order="full"``.
        order: ``"reshuffled"`` (each minibatch once an epoch, in new random order), ``"symmetric"``
            (a sweep in random order and the same sweep backwards), ``"iid"`` (a fresh draw each
            step), ``"full"`` (all rows at every step) or ``"streamed"`` (data larger than memory).
        layout: ``"blocks"`` partitions the rows at random once and lays them out so that a
            minibatch is a contiguous slice; ``"rows"`` makes a fresh partition each epoch and
            gathers row by row, several times slower for a small model on CPU.
        resident_bytes: With ``order="streamed"``, memory for a super-block of rows. ``data`` are
            then memory-mapped numpy arrays, zarr arrays, HDF5 data sets,
            ``stochgrad.ParquetColumns`` or whatever has ``shape`` and ``dtype`` and gives rows for
            a slice. Two super-blocks are held: the device works on one while the next is read in
            the background. Each epoch cuts the data into super-blocks anew, and mixes their rows.
        mesh: Devices to spread the data over, for data or gradients too large for one: a
            ``jax.sharding.Mesh`` with an axis ``"data"``, over which the rows of every minibatch
            are spread, and possibly an axis ``"chain"`` for the chains. The batch size must be a
            multiple of the devices along ``"data"``.
        predict: ``(key, position, batch) -> rows``, a draw of what is observed for each row of the
            batch: an array or a tree of arrays with a leading axis of rows, for ``draws.predict``.

    Raises:
        ValueError: the data have no rows, differ in their leading axes or are not finite; the batch
            size does not fit them; the order or layout is unknown. On first use: a function fails
            on the position, ``log_prior`` does not return a scalar, or ``log_likelihood`` not one
            value per row.

    Example:
        >>> import jax.numpy as jnp, stochgrad
        >>> x = jnp.linspace(-1.0, 1.0, 100)
        >>> target = stochgrad.posterior(
        ...     lambda mean: -0.5 * mean**2,
        ...     lambda mean, batch: -0.5 * (batch - mean) ** 2,
        ...     x,
        ...     batch_size=10,
        ... )
        >>> float(target.log_density(jnp.float32(0.0), target.batches.full).round(2))
        -17.0
    """
    log_density = joint_density(log_prior, log_likelihood)
    check_order(order, layout)
    if predict is not None:
        check_callable("predict", predict)
    if order == "streamed":
        check_no_mesh(mesh)
        resident_bytes = check_count("resident_bytes", resident_bytes)
        batches = streamed_batches(data, batch_size, resident_bytes)
    else:
        batches = data_batches(data, batch_size, order, layout, mesh)
    about = partial(plain_observations, log_prior, log_likelihood, predict, batches)
    return Posterior(log_density, batches, observations=about)


def joint_density(
    log_prior: Callable[[Position], Scalar],
    log_likelihood: Callable[[Position, Any], Float[Array, " batch"]],
) -> Callable[[Position, Batch], Scalar]:
    """The log density of a prior and of the weighted rows of a batch."""
    check_callable("log_prior", log_prior)
    check_callable("log_likelihood", log_likelihood)

    def log_density(position: Position, batch: Batch) -> Scalar:
        prior = _evaluate("log_prior", log_prior, position)
        values = _evaluate("log_likelihood", log_likelihood, position, batch.data)
        rows = jax.tree.leaves(batch.data)[0].shape[0]
        if prior.shape != ():
            raise ValueError(f"log_prior must return a scalar, got shape {prior.shape}.")
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(
                f"log_likelihood must return floating-point numbers, got dtype {values.dtype}."
            )
        if values.shape != (rows,):
            raise ValueError(
                f"log_likelihood must return one value per row, shape ({rows},), "
                f"got shape {values.shape}."
            )
        return prior + jnp.sum(batch.weight.astype(values.dtype) * values)

    return jax.jit(log_density, inline=True)  # traced once for all that is computed of it


def _evaluate(name: str, function: Callable, position: Position, *args: Any) -> Array:
    """Call a function of the user's; where it fails, the position is most likely at fault."""
    try:
        value = jnp.asarray(function(position, *args))
    except Exception as error:
        shapes = jax.tree.map(jnp.shape, position)
        raise ValueError(
            f"{name} fails on a position of shape {shapes}: does init match the model? "
            f"({first_line(error)})"
        ) from error
    if value.dtype == bool or jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise ValueError(f"{name} must return real numbers, got dtype {value.dtype}.")
    return value
