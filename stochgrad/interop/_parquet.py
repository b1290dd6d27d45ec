"""Columns of a Parquet file as an array that is not in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stochgrad.core import check_path, describe, first_line


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
        TypeError: the path is none; the columns are no names; the dtype is not one of numbers.
        OSError: there is no such file, or it cannot be read.
        ValueError: a column is not in the file, or not one of numbers. On reading: it has nulls, or
            values that the dtype does not hold.

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
        self._path = check_path("path", path)
        if not self._path.is_file():
            raise FileNotFoundError(f"path must be a Parquet file, and {self._path} is no file.")
        self._names = _check_names(columns)
        self.dtype = _check_dtype(dtype)
        try:
            self._file = pyarrow.parquet.ParquetFile(self._path, memory_map=True)
        except Exception as error:
            raise OSError(
                f"path must be a Parquet file, and {self._path} is none: {first_line(error)}."
            ) from error
        schema = self._file.schema_arrow
        missing = set(self._names) - set(schema.names)
        if missing:
            raise ValueError(f"columns: {path} has no column {sorted(missing)}.")
        for name in self._names:
            if schema.names.count(name) > 1:
                raise ValueError(f"columns: {path} has two columns {name!r}.")
            kind = schema.field(name).type
            types = pyarrow.types
            if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
                raise ValueError(
                    f"columns must be of numbers, and {name!r} in {path} is of type {kind}: "
                    "write it as a column of numbers."
                )
        metadata = self._file.metadata
        lengths = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._group, self._rows = -1, np.empty(0)
        width = () if isinstance(columns, str) else (len(self._names),)
        self.shape = (metadata.num_rows, *width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, *others = index if isinstance(index, tuple) and index else (index,)
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"ParquetColumns gives the rows of a slice, got {index!r}.")
        first, last, _ = rows.indices(len(self))
        parts = []
        while first < last:
            group = int(np.searchsorted(self._ends, first, side="right"))
            end = int(self._ends[group])
            begin = end - self._file.metadata.row_group(group).num_rows
            parts.append(self._read(group)[first - begin : last - begin])
            first = min(last, end)
        whole = np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)
        return whole[(slice(None), *others)] if others else whole

    def _read(self, group: int) -> np.ndarray:
        if group != self._group:
            try:
                table = self._file.read_row_group(group, columns=self._names)
            except Exception as error:
                raise OSError(f"{self._path} cannot be read: {first_line(error)}.") from error
            columns = [self._column(name, table[name]) for name in self._names]
            self._rows = columns[0] if len(self.shape) == 1 else np.stack(columns, axis=1)
            self._group = group
        return self._rows

    def _column(self, name: str, column: Any) -> np.ndarray:
        if column.null_count:
            raise ValueError(
                f"column {name!r} of {self._path} has {column.null_count} nulls in one row group: "
                "fill or drop them."
            )
        values = column.to_numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            cast = values.astype(self.dtype)
        exact = cast == values
        fits = exact if self.dtype.kind in "biu" else ~(np.isinf(cast) & ~np.isinf(values))
        if not np.all(fits):
            worst = values[np.argmin(fits)]
            raise ValueError(
                f"column {name!r} of {self._path} holds {worst}, which dtype={self.dtype} does not."
            )
        return cast


def _check_names(columns: Any) -> list[str]:
    names = [columns] if isinstance(columns, str) else columns
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"columns must be a name or a list of names, got {describe(columns)}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"columns must be different names, at least one, got {describe(columns)}.")
    return list(names)


def _check_dtype(dtype: Any) -> np.dtype:
    try:
        result = np.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"dtype must be a type of numbers, got {describe(dtype)}.") from error
    if dtype is None or result.kind not in "biuf":
        raise TypeError(f"dtype must be a type of numbers, got {describe(dtype)}.")
    return result
