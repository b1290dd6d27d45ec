"""What a server and its clients agree on without data: settings, shapes, digests."""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from stochgrad.core import Gradient, Kernel, Posterior, describe, first_line
from stochgrad.federated import Diagonal, Full, LowRank

MakeKernel = Callable[[Gradient], Kernel]

SETTINGS = {
    "form": str,
    "curvature": str,
    "share": float,
    "scale": float,
    "steps": int,
    "thin": int,
    "centered": bool,
    "strength": float,
    "seed": int,
}
"""What a client receives before the first visit, with the sums over all clients, and its types."""

OTHER_KERNEL = "other kernel"
"""The status of a client whose kernel is not the server's."""


def position_shapes(init: Any, posterior: Posterior | None = None) -> PyTree:
    """Shapes of a position, from one or from a posterior that defines a starting point."""
    if init is None:
        if posterior is None or posterior.initial is None:
            raise ValueError("init is needed: a position of the model's shape.")
        init = posterior.initial(jax.random.key(0))
    init = jax.tree.map(jnp.asarray, getattr(init, "position", init))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), init)


def kernel_without_data(make_kernel: MakeKernel, position: PyTree) -> Kernel:
    """The kernel of a gradient that is zero, which server and clients make alike."""

    def next(key, at, state):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), position)
        return (lambda at: (jnp.zeros(()), zeros)), state

    try:
        kernel = make_kernel(Gradient(lambda key, at: None, next))
    except Exception as error:
        raise ValueError(f"kernel fails on a gradient: {first_line(error)}.") from error
    if not isinstance(kernel, Kernel):
        raise TypeError(
            "kernel must be a function gradient -> kernel, as lambda gradient: "
            f"stochgrad.sgld(gradient, 1e-3), and returned {describe(kernel)}."
        )
    return kernel


def kernel_settings(kernel: Kernel) -> dict[str, str]:
    """A kernel's method and settings in words, the same in every process."""
    settings = {name: re.sub(r" at 0x[0-9a-f]+", "", repr(v)) for name, v in kernel.settings}
    return {"method": kernel.method, **settings}


def state_shapes(kernel: Kernel, position: PyTree) -> PyTree:
    """Shapes of the part of a kernel's state that travels."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return without_gradient_state(jax.eval_shape(kernel.init, position, key))


def without_gradient_state(state: Any) -> Any:
    """The part of a kernel's state that travels."""
    return state._replace(gradient_state=None)


def visit_settings(prepared: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values of ``SETTINGS``, of their types."""
    for name, kind in SETTINGS.items():
        if not isinstance(prepared[name], kind):
            raise TypeError(f"{name} should be of type {kind.__name__}")
    return tuple(prepared[name] for name in SETTINGS)


def sum_shapes(position: PyTree, form: str) -> dict[str, Any]:
    """Shapes of the sums over all clients."""
    (size,), dtype = flat_shape(position)
    matrix: Any = jax.ShapeDtypeStruct((size, size), dtype)
    precision = {"none": None, "diagonal": Diagonal(position), "full": Full(matrix)}
    kind, _ = form_and_rank(form)
    return {"slope": position, "precision": precision["full" if kind == "low_rank" else kind]}


def answer_shapes(position: PyTree, form: str) -> dict[str, Any]:
    """Shapes of one client's slope and curvature; the latter with a leading axis of one."""
    kind, rank = form_and_rank(form)
    if kind != "low_rank":
        told = sum_shapes(position, form)
        whole = lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype)
        return {**told, "precision": jax.tree.map(whole, told["precision"])}
    (size,), dtype = flat_shape(position)
    numbers: Any = lambda *shape: jax.ShapeDtypeStruct((1, *shape), dtype)
    low = LowRank(numbers(rank, size), numbers(rank), numbers(size))
    return {"slope": position, "precision": low}


def flat_shape(position: PyTree) -> tuple[tuple[int, ...], Any]:
    """Shape and type of a raveled position."""
    flat = jax.eval_shape(lambda tree: ravel_pytree(tree)[0], position)
    return flat.shape, flat.dtype


def form_and_rank(form: str) -> tuple[str, int]:
    """A form of curvature as messages name it, ``"low_rank 4"`` with its rank."""
    kind, _, rank = form.partition(" ")
    return kind, int(rank or 1)


def digest_of(value: Any) -> str:
    """A short digest of a value whose representation is the same in every process."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def program_digest(kernel: Kernel, position: PyTree) -> str:
    """A digest of a kernel's step, and of the arrays it holds."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(kernel.init, position, key)
    program = jax.make_jaxpr(kernel.step)(key, state)
    text = re.sub(r"0x[0-9a-f]+|<function [^>]*>", "", str(program.jaxpr))
    return digest_of((text, [np.asarray(c).tobytes() for c in program.consts]))
