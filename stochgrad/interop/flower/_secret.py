"""A client's secret, and keys that are functions of it and of what the server asks."""

import hmac
import secrets

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import ConfigRecord, Context
from jaxtyping import PyTree

IMPLEMENTATION = "threefry2x32"


def secret_of(context: Context) -> bytes:
    """The node's own secret: made at its first message, kept in its state, never sent."""
    record = context.state.get("secret")
    if not isinstance(record, ConfigRecord):
        record = context.state["secret"] = ConfigRecord({"secret": secrets.token_bytes(32)})
    return bytes(record["secret"])  # pyright: ignore[reportArgumentType]


def secret_digest(secret: bytes, purpose: str, numbers: tuple, arrays: PyTree) -> bytes:
    """HMAC-SHA256 of all that a request holds, under the client's secret."""
    digest = hmac.new(secret, repr((purpose, *numbers)).encode(), "sha256")
    for array in map(np.asarray, jax.tree.leaves(arrays)):
        digest.update(repr((array.dtype.str, array.shape)).encode() + array.tobytes())
    return digest.digest()


def secret_key(secret: bytes, purpose: str, numbers: tuple, arrays: PyTree) -> jax.Array:
    """A key from the first bytes of that digest."""
    words = np.frombuffer(secret_digest(secret, purpose, numbers, arrays)[:8], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=IMPLEMENTATION)
