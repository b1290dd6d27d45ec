"""The effect handler that hands a numpyro model its minibatch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpyro.primitives import _PYRO_STACK, Messenger, plate

from stochgrad.core import (
    Partition,
    Rows,
    Source,
    block_of,
    check_array,
    check_callable,
    check_finite,
)
from stochgrad.interop.numpyro._arguments import HostArray


class give_rows(Messenger):
    """Run a model on chosen rows of its subsampled plates.

    A plate receives its indices and does not draw them; it scales its sites to all rows.
    ``numpyro.subsample`` is answered here where it can be: an array that reaches the model
    unchanged (an argument, a constant) has been laid out in the order of the blocks, and the
    minibatch is a contiguous slice of it. For anything else the plate gathers the same rows by
    their numbers. Padding rows have weight zero.

    Args:
        fn: The model.
        rows: Rows for each subsampled plate.
        laid_out: Arrays laid out before, as ``LaidOut`` keeps them, or streamed.
    """

    def __init__(
        self,
        fn: Callable,
        rows: Mapping[str, Rows],
        laid_out: "LaidOut | Streamed | None" = None,
        in_scan: bool = False,
    ) -> None:
        self.rows = rows
        self.laid_out = laid_out
        self.in_scan = in_scan
        self.sizes: dict[str, int] = {}
        self.indices: dict[str, Any] = {}
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate" and msg["name"] in self.rows:
            name, rows = msg["name"], self.rows[msg["name"]]
            self.sizes[name] = msg["args"][0]
            self.indices[name] = msg["value"] = jnp.asarray(rows.index)
            msg["args"] = (msg["args"][0], rows.index.shape[0])  # else numpyro warns of the size
        elif msg["type"] == "control_flow":
            into_scan(msg, self._step)
        elif msg["type"] == "sample" and not self.in_scan:  # a scan's sites come out of it again
            for frame in msg["cond_indep_stack"]:
                rows = self.rows.get(frame.name)
                if rows is not None and jnp.ndim(rows.weight) == 1:
                    self._weigh(msg, frame, rows)

    def _step(self, step: Callable) -> "give_rows":
        inside = give_rows(step, self.rows, None, in_scan=True)
        inside.sizes, inside.indices = self.sizes, self.indices
        return inside

    def _weigh(self, msg: Any, frame: Any, rows: Rows) -> None:
        """Replace the plate's N/B, which ``msg`` carries already, by each row's own weight."""
        relative = rows.weight * (rows.index.shape[0] / self.sizes[frame.name])
        scale = 1.0 if msg["scale"] is None else msg["scale"]
        msg["scale"] = scale * relative.reshape(-1, *(1,) * (-frame.dim - 1))

    def postprocess_message(self, msg: Any) -> None:
        answer_subsample(msg, self.laid_out, self.rows, self.indices)


class all_rows(Messenger):
    """Run a model on all rows of its subsampled plates, in the order of the data.

    A model whose plates are subsampled draws rows of its own whenever numpyro runs it, so that
    ``Predictive(model, ...)``, ``log_likelihood(model, ...)`` and ``az.from_numpyro`` would see
    some rows, in a random order. ``Predictive(all_rows(model), draws)(key, x)`` and
    ``log_likelihood(all_rows(model), draws, x, y)`` have one column for each row of the data.

    Args:
        fn: A numpyro model.

    Raises:
        TypeError: it is none.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import log_likelihood
        >>> import stochgrad.numpyro
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("rows", len(x), subsample_size=10):
        ...         numpyro.sample("x", dist.Normal(mean, 1.0), obs=numpyro.subsample(x, 0))
        >>> whole = stochgrad.numpyro.all_rows(model)
        >>> log_likelihood(whole, {"mean": jnp.zeros(3)}, jnp.ones(100))["x"].shape
        (3, 100)
    """

    def __init__(self, fn: Callable) -> None:
        super().__init__(check_callable("fn", fn, "a numpyro model"))

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate":
            size, _ = msg["args"]
            with jax.ensure_compile_time_eval():
                msg["value"] = jnp.arange(size)
            msg["args"] = (size, size)
        elif msg["type"] == "control_flow":
            into_scan(msg, all_rows)


def into_scan(msg: Any, handler: Callable[[Callable], Callable]) -> None:
    """Put a handler around the steps of numpyro's scan, whose sites others do not see."""
    if "scan" in getattr(msg["fn"], "__name__", ""):
        step, *rest = msg["args"]
        msg["args"] = (handler(step), *rest)


def answer_subsample(
    msg: Any,
    laid_out: "LaidOut | Streamed | None",
    rows: Mapping[str, Rows],
    indices: Mapping[str, Any] | None = None,
) -> None:
    """Answer a model's ``numpyro.subsample``, where it can be.

    Plates are recognized by their indices, as a scope around them changes their names.
    """
    if msg["type"] != "subsample":
        return
    known = isinstance(msg["value"], jax.Array | np.ndarray)
    if not known and not (isinstance(laid_out, Streamed) and hasattr(msg["value"], "shape")):
        msg["value"] = jnp.asarray(check_array("what numpyro.subsample is to read", msg["value"]))
    event_dim = msg["kwargs"]["event_dim"]
    names = {id(index): name for name, index in (indices or {}).items()}
    axes = tuple(
        (name, p.dim - event_dim)
        for p in enclosing_plates()
        if (name := names.get(id(p._indices), p.name)) in rows
        and _spans(msg["value"], p.dim - event_dim, p.size)
    )
    value = None if laid_out is None else laid_out.fetch(msg["value"], axes, rows)
    if value is not None:
        msg["value"] = value
        msg["kwargs"]["event_dim"] = None  # the plates then leave it as it is
    elif isinstance(msg["value"], HostArray):
        msg["value"] = msg["value"].__jax_array__()


class Streamed:
    """Arrays of a model that are not in memory, by identity.

    While it is open it records what the model subsamples, and answers with zeros, as it does later
    where no rows are resident, as for a model's constraints.
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
        batch = rows[name]
        number = self._number.get(id(value))
        if number is None:
            if not self.open:
                raise ValueError(
                    f"the model subsamples an array of shape {value.shape} that it makes anew each "
                    "time: streamed data must reach numpyro.subsample as they are passed."
                )
            number = self._number[id(value)] = len(self.sources)
            self.sources.append(Source(value, axis, f"data of shape {value.shape}"))
        count = batch.index.shape[0]
        if batch.resident is None:
            shape = (*value.shape[:axis], count, *value.shape[axis + 1 :])
            return jnp.zeros(shape, jax.dtypes.canonicalize_dtype(value.dtype))
        return block_of(batch.resident[number], batch.block, count, axis)


class LaidOut:
    """Arrays of a model laid out in the order of its plates' blocks, by identity.

    Args:
        partitions: The partition of each plate; plates without one are left alone.
    """

    def __init__(self, partitions: Mapping[str, Partition]):
        self.partitions = partitions
        self._arrays: dict[tuple, tuple[Any, jax.Array]] = {}
        self.open = True

    def fetch(self, value: Any, axes: tuple, rows: Mapping[str, Rows]) -> jax.Array | None:
        """The rows of an array, or None where it has not been laid out."""
        if not axes or any(rows[name].block is None for name, _ in axes):
            return None
        if isinstance(value, Tracer) or not isinstance(value, jax.Array | np.ndarray):
            return None
        key = (id(value), axes)
        if key not in self._arrays:
            if not self.open:
                return None
            check_finite(f"what numpyro.subsample reads, of shape {value.shape},", value)
            laid_out: Any = value
            for name, axis in axes:
                laid_out = self.partitions[name].lay_out(laid_out, axis)
            self._arrays[key] = (value, laid_out)  # the value is held, so that its id stays its own
        result = self._arrays[key][1]
        for name, axis in axes:
            block: Any = rows[name].block
            result = self.partitions[name].fetch(result, block, axis)
        return result


def enclosing_plates() -> list[plate]:
    """The plates that a model is in the block of."""
    return [handler for handler in _PYRO_STACK if isinstance(handler, plate)]


def _spans(value: Any, axis: int, size: int) -> bool:
    shape = value.shape if hasattr(value, "shape") else jnp.shape(value)
    return len(shape) >= -axis and shape[axis] == size and size > 1
