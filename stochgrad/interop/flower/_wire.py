"""What crosses the wire between a server of chains and clients with data, and its inspection."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from jaxtyping import PyTree

_HEADER = 1024
METADATA = "metadata"

DECLINED = "policy: "
"""How the status of a request begins that a client's policy does not allow."""

TREES = {
    "query.hello": (),
    "train.expand": ("slope", "precision"),
    "train.prior": ("precision",),
    "train.margin": (),
    "train.slopes": ("slopes",),
    "train.visit": ("state", "draws"),
}
"""The trees of arrays that a reply may hold."""


class Refused(Exception):
    """A message that is not what it should be; says why."""


class Lost(Refused):
    """No reply, or one that says no more than that the client failed."""


class Refusal(Lost):
    """The client's policy does not allow what was asked; says in words what it would."""


def pack(trees: Mapping[str, PyTree], metadata: Mapping[str, Any]) -> RecordDict:
    """Trees of arrays, leaf by leaf, and a record of numbers and words."""
    content: dict[str, Any] = {METADATA: ConfigRecord({**metadata})}
    for name, tree in trees.items():
        leaves = [np.asarray(leaf, order="C") for leaf in jax.tree.leaves(tree)]
        content[name] = ArrayRecord({str(i): Array(leaf) for i, leaf in enumerate(leaves)})
    return RecordDict(content)


def unpack(content: RecordDict, name: str, like: PyTree) -> PyTree:
    """A tree of a message in the structure, shapes and types of ``like``.

    Raises:
        Refused: it is missing, too large, of other shapes or types, or not finite.
    """
    leaves, structure = jax.tree.flatten(like)
    record = content.get(name)
    if not isinstance(record, ArrayRecord) or set(record) != {str(i) for i in range(len(leaves))}:
        raise Refused(f"{name} should be {len(leaves)} arrays")
    return jax.tree.unflatten(
        structure, [_array(record[str(i)], leaf, name) for i, leaf in enumerate(leaves)]
    )


def metadata(content: RecordDict, **wanted: type) -> dict[str, Any]:
    """The numbers and words of a message.

    Raises:
        Refused: one is missing or of another type.
    """
    record = content.get(METADATA)
    if not isinstance(record, ConfigRecord):
        raise Refused("the reply has no metadata record")
    values = dict(record)
    for name, kind in wanted.items():
        if not isinstance(values.get(name), kind):
            raise Refused(f"{name} should be of type {kind.__name__}")
    return values


def check_reply(reply: Message | None, action: str, limit: int) -> RecordDict:
    """The content of a reply.

    Raises:
        Refused: there is no reply, the client failed, or it holds unknown records or too much.
    """
    if reply is None:
        raise Lost("no reply")
    if reply.has_error():
        raise Lost(f"error {reply.error.code}")
    content = reply.content
    unknown = set(content) - {METADATA, *TREES[action]}
    if unknown:
        raise Refused(f"it holds {len(unknown)} unknown records")
    size = sum(
        len(array.data)
        for record in content.values()
        if isinstance(record, ArrayRecord)
        for array in record.values()
    )
    if size > limit:
        raise Refused(f"it has {size:,} bytes where {limit:,} are the most")
    status = metadata(content, status=str)["status"]
    if status.startswith(DECLINED):
        raise Refusal(status[len(DECLINED) : len(DECLINED) + 40])
    if status != "done":
        raise Lost(f"the client says {status[:40]!r}")
    return content


def _array(array: Array, like: Any, name: str) -> np.ndarray:
    shape, dtype = tuple(like.shape), np.dtype(like.dtype)
    if len(array.data) > shape_bytes(like) + _HEADER:
        raise Refused(f"an array of {name} is larger than it should be")
    try:
        values = array.numpy()
    except Exception as error:
        raise Refused(f"an array of {name} cannot be read") from error
    if values.shape != shape or values.dtype != dtype:
        raise Refused(
            f"an array of {name} is {values.dtype}{list(values.shape)}, not {dtype}{list(shape)}"
        )
    if dtype.kind == "f" and not np.isfinite(values).all():
        raise Refused(f"an array of {name} is not finite")
    return values


def shape_bytes(like: Any) -> int:
    """Bytes of an array of a shape and a type."""
    return int(np.prod(like.shape, dtype=np.int64)) * np.dtype(like.dtype).itemsize


def tree_limit(*trees: PyTree) -> int:
    """The most bytes that trees of such shapes take on the wire."""
    return sum(shape_bytes(leaf) + _HEADER for leaf in jax.tree.leaves(trees))
