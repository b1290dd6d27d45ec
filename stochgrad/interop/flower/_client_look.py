"""What a client answers where a server looks at curvatures before a run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import RecordDict
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from stochgrad.core import Posterior
from stochgrad.federated import (
    Curvatures,
    Surrogates,
    as_matrices,
    curvature_matrices,
    prior_curvature,
    visit_margins,
)
from stochgrad.interop.flower._protocol import flat_shape, sum_shapes
from stochgrad.interop.flower._secret import secret_digest
from stochgrad.interop.flower._wire import metadata, pack, unpack

_MOST_POINTS = 12
"""Points besides the reference at which visits are looked at."""


class MarginRequest:
    """A server's question how visits are drawn back, with so much of the surrogates' curvature."""

    def __init__(self, content: RecordDict, position: PyTree):
        wanted = {"form": str, "curvature": str, "share": float, "scale": float, "points": int}
        self.request = {name: metadata(content, **wanted)[name] for name in wanted}
        form, count = self.request["form"], min(self.request["points"], _MOST_POINTS)
        (size,), dtype = flat_shape(position)
        self.origin = unpack(content, "position", position)
        shape = jax.ShapeDtypeStruct((count, size), dtype)
        self.points = unpack(content, "points", shape)
        self.total = unpack(content, "total", sum_shapes(position, form)["precision"])

    def name(self, secret: bytes) -> str:
        """A digest of the question, under which it counts once."""
        arrays = (self.origin, self.points, self.total)
        told = secret_digest(secret, "margin", tuple(self.request.values()), arrays)
        return "answer" + told.hex()[:32]

    def answer(self, found: Curvatures, own: np.ndarray) -> RecordDict:
        """Three numbers, by curvatures and the client's own surrogate's, a matrix."""
        share, scale = self.request["share"], self.request["scale"]
        added = np.asarray(self.total.matrices, np.float64) - scale * own / share
        report = visit_margins(found, np.array([share]), added)
        return pack({}, {"status": "done", **{n: float(x[0]) for n, x in report._asdict().items()}})


def prior_answer(posterior: Posterior, content: RecordDict, position: PyTree) -> RecordDict:
    """The prior's curvature at a position, which no data are in."""
    form = metadata(content, form=str)["form"]
    at = jax.tree.map(jnp.asarray, unpack(content, "position", position))
    return pack({"precision": prior_curvature(posterior, at, form)}, {"status": "done"})


def curvatures_at(
    posterior: Posterior,
    own_of: Callable[[PyTree, str, str], Surrogates],
    form: str,
    curvature: str,
    where: "HashableTree",
) -> tuple[Curvatures, np.ndarray]:
    """A client's curvatures at an origin and at other points, and its surrogate's, a matrix."""
    at, points = jax.tree.map(jnp.asarray, where.tree[0]), where.tree[1]
    flat = np.asarray(ravel_pytree(at)[0])
    own: Any = as_matrices(own_of(at, form, curvature).precision)
    found = curvature_matrices(posterior, at, np.concatenate([flat[None], points]))
    return found, np.asarray(own.matrices, np.float64)


class HashableTree:
    """A tree of arrays that is equal to another by its values."""

    def __init__(self, tree: PyTree):
        self.tree = tree
        leaves, structure = jax.tree.flatten(tree)
        self._key = (structure, tuple((x.shape, str(x.dtype), x.tobytes()) for x in leaves))

    def __hash__(self):
        return hash(self._key)

    def __eq__(self, other):
        return isinstance(other, HashableTree) and self._key == other._key
