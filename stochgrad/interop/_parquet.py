"""Columns of a Parquet file as an array that is not in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class ParquetColumns:
    """Columns of a Parquet file, with the rows of whichever slice is asked for.

    A source for ``order="streamed"``. Only the row groups that a slice touches are read, and the
    last one read is kept, so that files with row groups of some 10,000 to 100,000 rows do well.
    Needs pyarrow, of the extra ``[store]``.

    Args:
        path: The file.
        columns: A name, for an array of shape (rows,), or names, for one of shape
            (rows, columns).
        dtype: Type of the array.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: a column is not in the file.

    Example:
        >>> import tempfile, numpy as np, pyarrow, pyarrow.parquet, stochgrad
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = pyarrow.table({"x": np.arange(10.0), "y": np.ones(10)})
        ...     pyarrow.parquet.write_table(table, f"{folder}/data.parquet", row_group_size=4)
        ...     rows = stochgrad.ParquetColumns(f"{folder}/data.parquet", ["x", "y"])
        ...     print(rows.shape, rows[3:5].tolist())
        (10, 2) [[3.0, 1.0], [4.0, 1.0]]
    """

    def __init__(self, path: str | Path, columns: str | Sequence[str], dtype: Any = np.float32):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(
                "ParquetColumns needs pyarrow: pip install 'stochgrad[store]'."
            ) from error
        self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        self._names = [columns] if isinstance(columns, str) else list(columns)
        missing = set(self._names) - set(self._file.schema_arrow.names)
        if missing:
            raise ValueError(f"{path} has no column {sorted(missing)}.")
        metadata = self._file.metadata
        lengths = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._group, self._rows = -1, np.empty(0)
        self.dtype = np.dtype(dtype)
        width = () if isinstance(columns, str) else (len(self._names),)
        self.shape = (metadata.num_rows, *width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = index[0] if isinstance(index, tuple) else index
        if not isinstance(rows, slice) or (rows.step or 1) != 1:
            raise TypeError(f"ParquetColumns gives the rows of a slice, got {index!r}.")
        first, last, _ = rows.indices(len(self))
        parts = []
        while first < last:
            group = int(np.searchsorted(self._ends, first, side="right"))
            end = int(self._ends[group])
            begin = end - self._file.metadata.row_group(group).num_rows
            parts.append(self._read(group)[first - begin : last - begin])
            first = min(last, end)
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def _read(self, group: int) -> np.ndarray:
        if group != self._group:
            table = self._file.read_row_group(group, columns=self._names)
            columns = [table[name].to_numpy().astype(self.dtype) for name in self._names]
            self._rows = columns[0] if len(self.shape) == 1 else np.stack(columns, axis=1)
            self._group = group
        return self._rows
