"""Arguments of a numpyro model whose first axis is that of the rows: a minibatch has some of them.

Where a model computes with its data outside of the plate, it is run on minibatches of its
arguments, and what it observes of them is scaled to all rows.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpyro.primitives import Messenger

from stochgrad.core import Rows
from stochgrad.interop.numpyro._arguments import Arguments, HostArray
from stochgrad.interop.numpyro._handler import LaidOut, Streamed, enclosing_plates, into_scan


class RowArguments(NamedTuple):
    """Which arguments of a model have rows, and where the rows lie in what it observes.

    Attributes:
        name: Name of the rows: that of their plate, if there is one.
        size: Number of rows, N.
        leaves: Numbers of the arguments among the leaves of all.
        plates: Names of the plates of the rows.
        sites: Observed sites outside of these plates, and their dimension of the rows.
    """

    name: str
    size: int
    leaves: tuple[int, ...]
    plates: frozenset[str]
    sites: Mapping[str, int] = {}

    def minibatch(
        self, arguments: Arguments, batch: Mapping[str, Rows], arrays: LaidOut | Streamed | None
    ) -> Arguments:
        """The arguments with the rows of a minibatch."""
        leaves, structure = jax.tree.flatten(arguments)
        for i in self.leaves:
            leaves[i] = self._rows_of(leaves[i], batch[self.name], arrays)
        return jax.tree.unflatten(structure, leaves)

    def _rows_of(self, leaf: Any, rows: Rows, arrays: LaidOut | Streamed | None) -> Any:
        index: Any = rows.index
        if isinstance(index, np.ndarray) and np.array_equal(index, np.arange(self.size)):
            return leaf
        axes = ((self.name, -np.ndim(leaf)),)
        value: Any = None if arrays is None else arrays.fetch(leaf, axes, {self.name: rows})
        if value is None:
            device = leaf.__jax_array__() if isinstance(leaf, HostArray) else leaf
            value = device.at[index].get(mode="promise_in_bounds")
        return reveal(value, leaf) if isinstance(leaf, HostArray) else value


class give_row_arguments(Messenger):
    """Run a model on minibatches of its arguments, its observations scaled to all rows.

    A plate of the rows has as many of them as the minibatch, whether the model takes its size from
    the arguments or from elsewhere; its indices are places in the minibatch.

    Args:
        fn: The model.
        rows: Rows of the minibatch.
        own: Which arguments have rows, and which plates and sites.
    """

    def __init__(self, fn: Callable, rows: Rows, own: RowArguments, in_scan: bool = False) -> None:
        self.rows, self.own, self.in_scan = rows, own, in_scan
        self.count = rows.index.shape[0]
        self.sizes: dict[str, int] = {}
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate" and msg["name"] in self.own.plates:
            size = msg["args"][0]
            if size not in (self.count, self.own.size):
                raise ValueError(
                    f"the plate {msg['name']!r}, of {self.own.size} rows, has size {size} on a "
                    f"minibatch of {self.count}: take its size from the arguments that have rows, "
                    f"or name those with rows=."
                )
            self.sizes[msg["name"]] = size
            msg["value"] = jnp.arange(self.count)
            msg["args"] = (size, self.count)
        elif msg["type"] == "control_flow":
            into_scan(msg, self._step)
        elif msg["type"] == "sample" and msg["is_observed"] and not self.in_scan:
            self._weigh(msg)

    def postprocess_message(self, msg: Any) -> None:
        """Leave rows of the arguments as they are, and take the same rows of anything else."""
        if msg["type"] != "subsample":
            return
        shape, event_dim = jnp.shape(msg["value"]), msg["kwargs"]["event_dim"]
        for plate in enclosing_plates():
            axis = plate.dim - event_dim
            if plate.name in self.sizes and len(shape) >= -axis:
                if shape[axis] == self.count:
                    msg["kwargs"]["event_dim"] = None
                elif shape[axis] == self.own.size:
                    msg["value"] = jnp.take(jnp.asarray(msg["value"]), self.rows.index, axis)
                    msg["kwargs"]["event_dim"] = None

    def _step(self, step: Callable) -> "give_row_arguments":
        inside = give_row_arguments(step, self.rows, self.own, in_scan=True)
        inside.sizes = self.sizes
        return inside

    def _weigh(self, msg: Any) -> None:
        """Scale what a plate has not scaled to all rows."""
        dims = {f.name: f.dim for f in msg["cond_indep_stack"] if f.name in self.sizes}
        if dims:
            ((plate, dim),) = dims.items()
            by_plate = self.sizes[plate] / self.count
        elif msg["name"] in self.own.sites:
            dim, by_plate = self.own.sites[msg["name"]], 1.0
        else:
            return
        weight: Any = self.rows.weight
        if jnp.ndim(weight) == 0:
            weight = self.own.size / self.count
            if weight == by_plate:
                return
        else:
            weight = weight.reshape(-1, *(1,) * (-dim - 1))
        scale = 1.0 if msg["scale"] is None else msg["scale"]
        msg["scale"] = scale * (weight / by_plate)


def reveal(value: Any, host: np.ndarray) -> Any:
    """Traced rows of an array that numpy knows all of.

    Whatever numpy computes of them (``np.unique(group)``, ``int(group.max())``) it computes of all
    rows, as the model does on all of its data; whatever jax computes of them is of the minibatch.
    """
    if not isinstance(value, Tracer):
        return value
    every = np.asarray(host)

    def array(self, dtype=None, copy=None):
        return every if dtype is None else every.astype(dtype)

    def reduction(name: str) -> Callable:
        def reduce(self, axis=None, *args, **kwargs):
            over = range(every.ndim) if axis is None else np.atleast_1d(axis) % every.ndim
            if 0 not in over:
                return getattr(jnp, name)(self, axis, *args, **kwargs)
            return getattr(every, name)(axis, *args, **kwargs)

        return reduce

    methods = {name: reduction(name) for name in ("max", "min", "sum", "mean", "std", "var")}
    methods |= {"__array__": array, "tolist": lambda self: every.tolist()}
    kind = type(value)
    value.__class__ = type(kind.__name__, (kind,), {"__slots__": (), **methods})
    return value
