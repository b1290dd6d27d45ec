"""Which of the draws of a run are meant."""

from typing import Any

import numpy as np

from stochgrad.core._checks import describe, first_line


def draw_index(draws: Any, size: int) -> slice | np.ndarray:
    """Rows that numpy and zarr both know how to take, without losing the axis."""
    wanted = "draws can be indexed by a range, a number, numbers, or one boolean per draw"
    if isinstance(draws, slice):
        try:
            numbers = range(size)[draws]
        except (TypeError, ValueError) as error:
            raise TypeError(f"{wanted}, got {draws} ({first_line(error)}).") from error
        if numbers.step > 0:
            return slice(numbers.start, max(numbers.stop, numbers.start), numbers.step)
        return np.array(numbers, int)
    if isinstance(draws, list | range) and not len(draws):
        return np.zeros(0, int)
    if draws is None or isinstance(draws, bool | np.bool_ | str | bytes | tuple | dict | set):
        raise TypeError(f"{wanted}, got {describe(draws)}.")
    try:
        array = np.asarray(draws)
    except Exception as error:
        raise TypeError(f"{wanted}, got {describe(draws)} ({first_line(error)}).") from error
    if np.ma.is_masked(draws) or array.dtype.kind not in "biu" or array.ndim > 1:
        raise TypeError(f"{wanted}, got {describe(draws)}.")
    if array.dtype.kind == "b":
        if array.shape != (size,):
            raise ValueError(f"{wanted}, got {array.size} booleans for {size} draws.")
        return np.flatnonzero(array)
    outside = (array >= size) | (array < -size)
    if outside.any():
        number = int(np.atleast_1d(array)[np.atleast_1d(outside)][0])
        raise IndexError(f"{wanted}, got the number {number} for {size} draws.")
    numbers = np.atleast_1d(array).astype(int)
    return np.where(numbers < 0, numbers + size, numbers)
