"""The effect handler that hands a numpyro model its minibatch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpyro.primitives import _PYRO_STACK, Messenger, plate

from stochgrad.core import Partition, Rows, Source, block_of


class give_rows(Messenger):
    """Run a model on given rows of its subsampled plates.

    A plate is told its indices, so that it never draws them, and rescales its sites by what it was
    given. ``numpyro.subsample`` is answered here where it can be: an array that came to the model
    as it is (an argument, a constant) has been laid out in the order of the blocks, and the
    minibatch is a contiguous slice of it. Anything else falls to the plate, which gathers the same
    rows by their numbers. Padding rows get weight zero.

    Args:
        fn: The model.
        rows: Rows for each subsampled plate.
        laid_out: Arrays laid out before, as ``LaidOut`` keeps them, or streamed.
    """

    def __init__(
        self, fn: Callable, rows: Mapping[str, Rows], laid_out: "LaidOut | Streamed | None" = None
    ) -> None:
        self.rows = rows
        self.laid_out = laid_out
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate" and msg["name"] in self.rows:
            rows = self.rows[msg["name"]]
            msg["value"] = jnp.asarray(rows.index)
            msg["args"] = (msg["args"][0], rows.index.shape[0])  # else numpyro warns of the size
        elif msg["type"] == "sample":
            for frame in msg["cond_indep_stack"]:
                rows = self.rows.get(frame.name)
                if rows is not None and jnp.ndim(rows.weight) == 1:
                    self._weigh(msg, frame, rows)

    def _weigh(self, msg: Any, frame: Any, rows: Rows) -> None:
        """Replace the plate's N/B, which ``msg`` carries already, by each row's own weight."""
        size = self.plate_size(frame.name)
        relative = rows.weight * (rows.index.shape[0] / size)
        scale = 1.0 if msg["scale"] is None else msg["scale"]
        msg["scale"] = scale * relative.reshape(-1, *(1,) * (-frame.dim - 1))

    def plate_size(self, name: str) -> int:
        return next(p.size for p in _plates() if p.name == name)

    def postprocess_message(self, msg: Any) -> None:
        if self.laid_out is not None:
            answer_subsample(msg, self.laid_out, self.rows)


def answer_subsample(msg: Any, laid_out: "LaidOut | Streamed", rows: Mapping[str, Rows]) -> None:
    """Answer a model's ``numpyro.subsample``, where it can be."""
    if msg["type"] != "subsample":
        return
    event_dim = msg["kwargs"]["event_dim"]
    axes = tuple(
        (p.name, p.dim - event_dim)
        for p in _plates()
        if p.name in rows and _spans(msg["value"], p.dim - event_dim, p.size)
    )
    value = laid_out.fetch(msg["value"], axes, rows)
    if value is not None:
        msg["value"] = value
        msg["kwargs"]["event_dim"] = None  # which tells the plates that all is done


class Streamed:
    """Arrays of a model that are not in memory, by identity.

    While it is open it takes note of what the model subsamples, and answers with zeros; it does so
    too where there are no rows at hand, as for a model's constraints.
    """

    def __init__(self):
        self.sources: list[Source] = []
        self._number: dict[int, int] = {}
        self.open = True

    def fetch(self, value: Any, axes: tuple, rows: Mapping[str, Rows]) -> Any:
        """The rows of an array."""
        if not axes or isinstance(value, Tracer):
            return None
        ((name, axis),) = axes
        axis += len(value.shape)
        chosen = rows[name]
        number = self._number.get(id(value))
        if number is None:
            if not self.open:
                raise ValueError(
                    f"the model subsamples an array of shape {value.shape} that it makes anew each "
                    "time: streamed data must reach numpyro.subsample as they are passed."
                )
            number = self._number[id(value)] = len(self.sources)
            self.sources.append(Source(value, axis, f"data of shape {value.shape}"))
        count = chosen.index.shape[0]
        if chosen.resident is None:
            shape = (*value.shape[:axis], count, *value.shape[axis + 1 :])
            return jnp.zeros(shape, jax.dtypes.canonicalize_dtype(value.dtype))
        return block_of(chosen.resident[number], chosen.block, count, axis)


class LaidOut:
    """Arrays of a model laid out in the order of its plates' blocks, by identity.

    Args:
        partitions: The partition of each plate; plates without one are left alone.
    """

    def __init__(self, partitions: Mapping[str, Partition]):
        self.partitions = partitions
        self._kept: dict[tuple, tuple[Any, jax.Array]] = {}
        self.open = True

    def fetch(self, value: Any, axes: tuple, rows: Mapping[str, Rows]) -> jax.Array | None:
        """The rows of an array, or None where it has not been laid out."""
        if not axes or any(rows[name].block is None for name, _ in axes):
            return None
        if isinstance(value, Tracer) or not isinstance(value, jax.Array | np.ndarray):
            return None
        where = (id(value), axes)
        if where not in self._kept:
            if not self.open:
                return None
            laid_out: Any = value
            for name, axis in axes:
                laid_out = self.partitions[name].lay_out(laid_out, axis)
            self._kept[where] = (value, laid_out)  # holding on to the value keeps its id its own
        result = self._kept[where][1]
        for name, axis in axes:
            block: Any = rows[name].block
            result = self.partitions[name].fetch(result, block, axis)
        return result


def _plates() -> list[plate]:
    return [handler for handler in _PYRO_STACK if isinstance(handler, plate)]


def _spans(value: Any, axis: int, size: int) -> bool:
    shape = value.shape if hasattr(value, "shape") else jnp.shape(value)
    return len(shape) >= -axis and shape[axis] == size and size > 1
