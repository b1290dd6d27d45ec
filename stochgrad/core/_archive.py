"""Trees of arrays in files that are written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from stochgrad.core._checks import first_line


def save_tree(path: Path, tree: PyTree, notes: Mapping[str, Any]) -> None:
    """Write the leaves of a tree, and notes that JSON can hold, to an ``.npz`` file.

    The file appears under its name complete or, if the process dies or the disk is full, not at
    all; what it replaces stays until then.

    Raises:
        OSError: it cannot be written.
    """
    leaves: dict[str, Any] = {
        f"leaf{i}": _plain(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))
    }
    notes_bytes = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, notes=notes_bytes, **leaves)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def load_notes(path: Path) -> dict[str, Any]:
    """The notes of a file that ``save_tree`` wrote.

    Raises:
        ValueError: it is missing or damaged.
    """
    with _told(path), open(path, "rb") as raw, np.load(raw) as file:
        notes = json.loads(file["notes"].tobytes())
        return dict(notes)


def load_tree(path: Path, like: PyTree) -> PyTree:
    """The tree that ``save_tree`` wrote, in the structure and the types of ``like``.

    Raises:
        ValueError: the file is missing or damaged, or holds another number of arrays.
    """
    leaves, structure = jax.tree.flatten(like)
    with _told(path), open(path, "rb") as raw, np.load(raw) as file:
        if len(file.files) != len(leaves) + 1:
            raise ValueError(f"{len(file.files) - 1} arrays in it, and not {len(leaves)}")
        saved = [file[f"leaf{i}"] for i in range(len(leaves))]
        return jax.tree.unflatten(structure, list(map(_as_before, saved, leaves)))


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say in one sentence that a file cannot be read, and why."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(damaged(path, "is missing")) from error
    except PermissionError as error:
        raise ValueError(damaged(path, f"cannot be read ({error.strerror})")) from error
    except Exception as error:  # of zip, zlib, json, numpy: whatever broken bytes bring about
        raise ValueError(damaged(path, f"is damaged ({first_line(error)})")) from error


def damaged(path: Path, what: str) -> str:
    """The sentence on a file that is of no use."""
    return f"{path} {what}: put back a copy of the checkpoint, or remove it to begin anew."


def _plain(leaf: Any) -> np.ndarray:
    """A leaf as an array of a type that numpy itself knows: keys and bfloat16 by their bits."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _as_before(array: np.ndarray, like: Any) -> Any:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=_implementation(like.dtype))
    return array.view(like.dtype) if array.dtype != like.dtype else array


def _implementation(dtype: Any) -> str:
    """Name of the generator that keys of a type belong to."""
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(partial(jax.random.key, impl=name), 0).dtype == dtype:
            return name
    raise TypeError(f"keys of type {dtype} cannot be saved.")


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
