"""A kernel traced once, before anything is compiled."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
from jax.core import eval_jaxpr
from jax.extend.core import jaxprs_in_params
from jaxtyping import PyTree

from stochgrad.core._jit import remember
from stochgrad.core._stream import Stream
from stochgrad.core._trees import insert_resident, remove_resident, tree_bytes


class Traced(NamedTuple):
    """A kernel traced once, for one chain.

    Attributes:
        init: ``(position, key, resident) -> state``.
        step: ``(resident, key, state) -> (state, info)``, replaying the trace.
        state: Shapes of the state, without what is constant.
        info: Shapes of the info.
        largest: Bytes of the largest array that a step makes.
        operations: How many operations a step is written in, those of inner programs included.
        jaxpr: The trace.
        constants: What it closes over: the data, mostly.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Any]]
    state: PyTree
    info: PyTree
    largest: int
    operations: int
    jaxpr: Any
    constants: list


def trace(
    init: Callable, step: Callable, example: tuple[Any, tuple, Any], stream: Stream | None = None
) -> Traced:
    """A kernel's trace, which the kernel remembers; see ``Traced``."""
    return remember(
        step, ("trace", init, example, stream), lambda: _trace(init, step, example, stream)
    )


def _trace(init: Callable, step: Callable, example: tuple[Any, tuple, Any], stream) -> Traced:
    """Trace a kernel at a position given by its structure and its leaves' (shape, dtype) pairs.

    The third entry of ``example`` is the type of the keys, of whichever generator.

    Tracing a model is slow, and the loop needs a step several times over; it also shows whether the
    position fits the model before anything is compiled.
    """
    structure, leaves, key_type = example
    position = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    key = jax.ShapeDtypeStruct((), key_type)
    resident = None if stream is None else stream.shapes()

    def start(position, key, resident):
        with nullcontext() if stream is None else stream.supplying(resident):
            return remove_resident(init(position, key))

    def advance(resident, key, state):
        state, info = step(key, insert_resident(state, resident))
        return remove_resident(state), info

    state = jax.eval_shape(start, position, key, resident)
    if not hasattr(state, "position"):
        raise TypeError(
            "the kernel's state must have a field 'position', "
            f"got a {type(state).__name__} without one."
        )
    closed, (following, info) = jax.make_jaxpr(advance, return_shape=True)(resident, key, state)
    if form_of(following) != form_of(state):
        raise ValueError(
            "kernel.step must return a state of the structure, shapes and types of the one that it "
            f"takes, {state}, got {following}."
        )
    out_structure = jax.tree.structure((state, info))

    def replay(resident, key, state):
        flat = eval_jaxpr(closed.jaxpr, closed.consts, *jax.tree.leaves((resident, key, state)))
        return jax.tree.unflatten(out_structure, flat)

    made = (out.aval for equation in closed.jaxpr.eqns for out in equation.outvars)
    largest = max(map(tree_bytes, made), default=0)
    operations = _count(closed.jaxpr)
    return Traced(start, replay, state, info, largest, operations, closed.jaxpr, closed.consts)


def _count(jaxpr: Any) -> int:
    inner = (x for equation in jaxpr.eqns for x in jaxprs_in_params(equation.params))
    return len(jaxpr.eqns) + sum(map(_count, inner))


def form_of(tree: PyTree) -> Any:
    """Structure, shapes and types of a tree."""
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
