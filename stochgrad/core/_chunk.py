"""The compiled part of the loop: scan over draws, scan over thinning, vmap over chains."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import eval_jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key, PyTree

from stochgrad.core._chains import best_in_turn, over_chains
from stochgrad.core._trees import (
    is_shared,
    share_first,
    shared_axes,
    tree_bytes,
    tree_isfinite,
    tree_probe,
)

_BUFFER_BYTES = 2**25
_MOST_DRAWS = 1024


class Carry(NamedTuple):
    """What goes from chunk to chunk.

    Attributes:
        state: The kernel's states, with a leading chain axis if there are several chains.
        first_bad: Step at which each chain first left the finite numbers, -1 while it has not. A
            few numbers of every leaf are looked at after each step, all of them after each draw.
    """

    state: PyTree
    first_bad: Int[Array, "*chain"]


class Program(NamedTuple):
    """A kernel's compiled functions.

    Attributes:
        init: ``(positions, keys) -> Carry``.
        chunk: ``(carry, keys, start, count) -> (carry, kept, stats)``: draws number ``start`` to
            ``start + count``, in arrays of ``capacity`` draws. It consumes the carry.
        capacity: The most draws of one chunk.
    """

    init: Callable[..., Carry]
    chunk: Callable[..., tuple[Carry, PyTree, dict[str, Array]]]
    capacity: int


def position_of(state: Any) -> PyTree:
    """What is kept of a state unless the caller says otherwise."""
    return state.position


class Traced(NamedTuple):
    """A kernel traced once, for one chain.

    Attributes:
        step: ``(key, state) -> (state, info)``, replaying the trace.
        state: Shapes of the state.
        info: Shapes of the info.
        largest: Bytes of the largest array that a step makes.
    """

    step: Callable[[Any, Any], tuple[Any, Any]]
    state: PyTree
    info: PyTree
    largest: int


@lru_cache(maxsize=16)
def trace(init: Callable, step: Callable, example: tuple[Any, tuple]) -> Traced:
    """Trace a kernel at a position given by its structure and its leaves' (shape, dtype) pairs.

    Tracing a model is slow, and the loop needs a step several times over; it also shows whether the
    position fits the model before anything is compiled.
    """
    structure, leaves = example
    position = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(init, position, key)
    if not hasattr(state, "position"):
        raise TypeError(
            "the kernel's state must have a field 'position', "
            f"got a {type(state).__name__} without one."
        )
    closed, (_, info) = jax.make_jaxpr(step, return_shape=True)(key, state)
    out_structure = jax.tree.structure((state, info))

    def replay(key, state):
        flat = eval_jaxpr(closed.jaxpr, closed.consts, key, *jax.tree.leaves(state))
        return jax.tree.unflatten(out_structure, flat)

    made = (out.aval for equation in closed.jaxpr.eqns for out in equation.outvars)
    return Traced(replay, state, info, max(map(tree_bytes, made), default=0))


@lru_cache(maxsize=16)
def build(
    init: Callable,
    step: Callable,
    collect: Callable,
    thin: int,
    num_chains: int,
    share: bool,
    mesh: Mesh | None,
    example: tuple[Any, tuple],
) -> Program:
    """Compile a kernel for some number of chains. Cached: a second run compiles nothing."""
    traced = trace(init, step, example)
    axes = shared_axes(traced.state, share) if num_chains > 1 else None
    several = num_chains > 1

    def start(positions, keys):
        states = jax.vmap(init)(positions, keys) if several else init(positions, keys)
        states = share_first(states, share) if several else states
        return Carry(states, jnp.full(keys.shape, -1, jnp.int32))

    advance = traced.step
    if several:
        in_turn = mesh is None and best_in_turn(traced.state, share, traced.largest)
        advance = over_chains(traced.step, traced.state, share, in_turn)
    keep = jax.vmap(collect, in_axes=(axes,)) if several else collect

    def some_finite(position):
        return tree_isfinite(tree_probe(position))

    probe = jax.vmap(some_finite) if several else some_finite
    healthy = jax.vmap(tree_isfinite) if several else tree_isfinite
    keys_of_draw = jax.vmap(_draw_keys, in_axes=(0, None, None)) if several else _draw_keys

    def checked_step(carry, key, number, check):
        state, info = advance(key, carry.state)
        bad = (carry.first_bad < 0) & ~check(state.position)
        return Carry(state, jnp.where(bad, number, carry.first_bad)), info

    def one_draw(carry, keys, index):
        step_keys = keys_of_draw(keys, index, thin)
        if several:
            step_keys = jnp.swapaxes(step_keys, 0, 1)
        first = index * thin
        if thin > 1:
            carry, _ = lax.scan(
                lambda carry, x: (checked_step(carry, x[0], first + x[1], probe)[0], None),
                carry,
                (step_keys[:-1], lax.iota(np.int32, thin - 1)),
            )
        carry, info = checked_step(carry, step_keys[-1], first + (thin - 1), healthy)
        return carry, (keep(carry.state), scalars(info, keys.shape))

    lead = (num_chains,) if several else ()
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((*lead, *s.shape), s.dtype),
        (jax.eval_shape(collect, traced.state), scalars(traced.info, ())),
    )
    capacity = int(np.clip(_BUFFER_BYTES // max(tree_bytes(shapes), 1), 1, _MOST_DRAWS))

    def chunk(carry, keys, first, count):
        def body(i, both):
            carry, buffers = both
            carry, kept = one_draw(carry, keys, first + i)
            write = partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
            return carry, jax.tree.map(write, buffers, kept)

        buffers = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), shapes)
        carry, (kept, stats) = lax.fori_loop(0, count, body, (carry, buffers))
        return carry, kept, stats

    return Program(compiled(start, mesh), compiled(chunk, mesh, donate=True), capacity)


def scalars(info: Any, shape: tuple[int, ...]) -> dict[str, Array]:
    """The fields of a step's info that are one number per chain."""
    fields = info._asdict() if hasattr(info, "_asdict") else {}
    return {name: value for name, value in fields.items() if getattr(value, "shape", None) == shape}


def chain_sharding(carry: PyTree, share: bool, mesh: Mesh) -> PyTree:
    """Shardings that spread the chain axis of a carry over the devices."""
    axes = Carry(shared_axes(carry.state, share), 0)  # pyright: ignore[reportArgumentType]

    def sharding(axis, part):
        spec = PartitionSpec() if axis is None else PartitionSpec("chain")
        return jax.tree.map(lambda leaf: NamedSharding(mesh, spec), part)

    return jax.tree.map(sharding, axes, carry, is_leaf=lambda x: x is None or is_shared(x))


class compiled:
    """``jax.jit``, with the arrays that a function closes over passed as arguments.

    Closed-over arrays become constants of the program: a data set of 100 MB is then printed into
    it, held twice and folded over. As arguments they cost nothing.
    """

    def __init__(self, function: Callable, mesh: Mesh | None = None, donate: bool = False):
        self._function = function
        self._mesh = mesh
        self._donate = donate
        self._compiled: Callable | None = None
        self._constants: Any = None

    def __call__(self, *args):
        if self._compiled is None:
            closed, out = jax.make_jaxpr(self._function, return_shape=True)(*args)
            structure = jax.tree.structure(out)

            def program(constants, *args):
                flat = eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(args))
                return jax.tree.unflatten(structure, flat)

            self._constants = closed.consts
            if self._mesh is not None:
                replicated = NamedSharding(self._mesh, PartitionSpec())
                self._constants = jax.device_put(closed.consts, replicated)
            self._compiled = jax.jit(program, donate_argnums=(1,) if self._donate else ())
        return self._compiled(self._constants, *args)


def _draw_keys(key: Key[Array, ""], index: Array, thin: int) -> Key[Array, " thin"]:
    return jax.random.split(jax.random.fold_in(key, index), thin)
