"""What a posterior says of its data row by row: densities, predictions, observed values."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from stochgrad.core._arrays import as_data, data_rows
from stochgrad.core._checks import first_line
from stochgrad.core._datatree import by_name
from stochgrad.core._partition import Batch
from stochgrad.core._protocols import Batches

ROW = "row"
"""Name of the dimension of the rows of a plain posterior."""

Sites = dict[str, Array]


class Observations(NamedTuple):
    r"""What a posterior says of its data, row by row and unscaled.

    Everything is by site, and has the rows along the dimension that ``dims`` calls ``rows``. A
    batch is whatever ``take`` gives, on the host, for numbers of rows.

    Attributes:
        size: Number of rows, N; one where they cannot be told apart, and a batch is all of them.
        take: ``numbers -> batch``.
        log_likelihood: ``(position, batch) -> {site: array}``, $\log p(y_i \mid \theta)$.
        log_prior: ``position -> {site: array}``, in the model's own space.
        predict: ``(key, position, batch) -> {site: array}``, draws of $y_i$ given $\theta$ and what
            the model computes for each row; None where nobody said how.
        values: ``batch -> {site: array}``, what was observed.
        dims: Names of the dimensions of each site's densities; those of an event come after them.
            A site that is not there has the rows along its first dimension.
        rows: Which of them is that of the rows; None where they cannot be told apart.
        observed: Names of the observed sites: what ``predict`` draws and does not compute; empty
            where all of it is drawn.
        elsewhere: ``(args, kwargs) -> Observations``, of other data.
        constants: ``{name: (dims, array)}``, data that are given, as covariates are.
        simulate: ``key -> {site: array}``, everything drawn from the prior.
        given: ``{site: array} -> log_density``, the posterior's log density had these been observed
            on all rows.
    """

    size: int
    take: Callable[[Int[np.ndarray, " rows"]], Any]
    log_likelihood: Callable[[PyTree, Any], Sites]
    log_prior: Callable[[PyTree], Sites]
    predict: Callable[[Key[Array, ""], PyTree, Any], Sites] | None
    values: Callable[[Any], Sites]
    dims: Mapping[str, tuple[str, ...]]
    rows: str | None
    observed: tuple[str, ...]
    elsewhere: Callable[[tuple, Mapping[str, Any]], "Observations"]
    constants: Callable[[], Mapping[str, tuple[tuple[str, ...], Any]]] | None = None
    simulate: Callable[[Key[Array, ""]], Sites] | None = None
    given: Callable[[Mapping[str, Array]], Callable[[PyTree, Any], Array]] | None = None

    def dims_of(self, site: str) -> tuple[str, ...]:
        """Names of the dimensions of a site's densities."""
        return self.dims.get(site, () if self.rows is None else (self.rows,))

    def axis(self, site: str) -> int | None:
        """The dimension of the rows in the values and densities of a site, if it has one."""
        dims = self.dims_of(site)
        return dims.index(self.rows) if self.rows in dims else None


def plain_observations(
    log_prior: Callable,
    log_likelihood: Callable,
    predict: Callable | None,
    batches: Batches,
) -> Observations:
    """The observations of a posterior of plain functions, over batches with ``data``."""
    assert batches.take is not None
    return _plain(log_prior, log_likelihood, predict, batches.size, batches.take)


def _plain(
    log_prior: Callable,
    log_likelihood: Callable,
    predict: Callable | None,
    size: int,
    take: Callable,
) -> Observations:

    def of_rows(position, batch):
        rows = jax.tree.leaves(batch.data)[0].shape[0]
        try:
            found = jnp.asarray(log_likelihood(position, batch.data))
        except Exception as error:
            raise ValueError(
                f"log_likelihood fails on {rows} rows ({first_line(error)})."
            ) from error
        if found.shape != (rows,):
            raise ValueError(
                f"log_likelihood must return one value per row, shape ({rows},), got shape "
                f"{found.shape}."
            )
        return {"log_likelihood": found}

    def prior(position):
        return {"log_prior": jnp.asarray(log_prior(position))}

    def values(batch):
        return by_name(batch.data)

    def predictions(key, position, batch):
        assert predict is not None
        rows = jax.tree.leaves(batch.data)[0].shape[0]
        try:
            result = predict(key, position, batch.data)
            drawn = by_name(result)
        except Exception as error:
            raise ValueError(f"predict fails on {rows} rows ({first_line(error)}).") from error
        for name, value in drawn.items():
            if jnp.shape(value)[:1] != (rows,):
                raise ValueError(
                    f"predict must return one value per row, shape ({rows}, ...), got shape "
                    f"{jnp.shape(value)} for {name!r}."
                )
        data = by_name(batch.data)
        if result is drawn.get("x") and batch.data is not data.get("x", batch.data):
            raise ValueError(
                "predict returns an array without a name, which would be taken for the data's "
                "'x': let it return a dict by the names of the data."
            )
        return drawn

    def elsewhere(args, kwargs):
        if len(args) != 1 or kwargs:
            raise TypeError(
                "other rows of a plain posterior are one argument, of the structure of its data, "
                f"got {len(args)} and the keywords {sorted(kwargs)}."
            )
        data = as_data(args[0])

        def take(index):
            return Batch(jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), data), jnp.float32(1))

        return _plain(log_prior, log_likelihood, predict, data_rows(data), take)

    return Observations(
        size,
        take,
        of_rows,
        prior,
        None if predict is None else predictions,
        values,
        {},
        ROW,
        (),
        elsewhere,
    )
