"""The compiled part of the loop: scan over draws, scan over thinning, vmap over chains."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from stochgrad.core._chains import map_chains, prefer_sequential
from stochgrad.core._checks import describe, first_line, is_ours
from stochgrad.core._jit import hoisted_jit, remember
from stochgrad.core._noise import fold_in
from stochgrad.core._protocols import Online
from stochgrad.core._stream import Stream
from stochgrad.core._trace import Traced, form_of, trace
from stochgrad.core._trees import (
    is_shared,
    share_first,
    shared_axes,
    tree_bytes,
    tree_isfinite,
)

_BUFFER_BYTES = 2**25
_MOST_DRAWS = 1024
_GROUP, _GROUP_BYTES, _GROUP_OPERATIONS = 4, 2**28, 1250


class Carry(NamedTuple):
    """What goes from chunk to chunk.

    Attributes:
        state: The kernel's states, with a leading chain axis if there are several chains.
        first_bad: The last step of each chain's first draw that is not finite, -1 without one.
        summary: What an ``Online`` has learnt.
    """

    state: PyTree
    first_bad: Int[Array, "*chain"]
    summary: PyTree = ()


class Plan(NamedTuple):
    """Numbers of a run that its program takes as arguments.

    Attributes:
        thin: Steps per draw.
        num_warmup: Draws that are not summed up.
    """

    thin: np.int32
    num_warmup: np.int32


class Program(NamedTuple):
    """A kernel's compiled functions.

    Attributes:
        start: ``(positions, keys, resident) -> Carry``, as it was written.
        init: The same, compiled.
        chunk: ``(carry, keys, resident, plan, start, count) -> (carry, kept, stats)``: draws number
            ``start`` to ``start + count``, in arrays of ``capacity`` draws. It consumes the carry.
        part: ``(carry, keys, resident, plan, draw, first, last) -> (carry, kept, stats)``: the
            steps from ``first`` to ``last`` of one draw, and the state after them as a draw. It
            consumes the carry.
        capacity: The most draws of one chunk.
        traced: The kernel.
        shapes: Shapes of the arrays of one draw.
        done: ``summary -> bool``, whether an ``Online`` has learnt enough of every chain, or None.
        density: ``(positions, keys, resident) -> values``, the log density on a first minibatch, or
            None for a kernel that knows no posterior.
    """

    start: Callable[..., Carry]
    init: Callable[..., Carry]
    chunk: Callable[..., tuple[Carry, PyTree, dict[str, Array]]]
    part: Callable[..., tuple[Carry, PyTree, dict[str, Array]]]
    capacity: int
    traced: Traced
    shapes: PyTree
    done: Callable[[PyTree], Array] | None = None
    density: Callable[..., Array] | None = None


def position_of(state: Any) -> PyTree:
    """What is kept of a state unless the caller says otherwise."""
    return state.position


_NOTHING = Online(lambda position: (), lambda summary, position: summary)


def _whether_finite(state: Any) -> PyTree:
    """What is kept of a state where an ``Online`` sums up the positions."""
    return {"finite": tree_isfinite(state.position)}


def build(init: Callable, step: Callable, *options: Any) -> Program:
    """A kernel's program for some number of chains, which the kernel remembers; see ``_build``."""
    return remember(step, ("build", init, *options), lambda: _build(init, step, *options))


def _build(
    init: Callable,
    step: Callable,
    collect: Callable | Online,
    thin: int | None,
    num_chains: int,
    share: bool,
    mesh: Mesh | None,
    example: tuple[Any, tuple, Any],
    stream: Stream | None = None,
    density: tuple[Callable, Callable, Callable] | None = None,
) -> Program:
    """Compile a kernel for some number of chains, and of steps a draw unless the plan has it."""
    traced = trace(init, step, example, stream)
    axes = shared_axes(traced.state, share) if num_chains > 1 else None
    several = num_chains > 1
    if isinstance(collect, Online):
        online, keep_of_one = collect, _whether_finite
    else:
        online, keep_of_one = _NOTHING, collect

    def start(positions, keys, resident):
        begin = partial(traced.init, resident=resident)
        states = jax.vmap(begin)(positions, keys) if several else begin(positions, keys)
        states = share_first(states, share) if several else states
        summary = (jax.vmap(online.init) if several else online.init)(states.position)
        return Carry(states, jnp.full(keys.shape, -1, jnp.int32), summary)

    sequential = several and mesh is None and prefer_sequential(traced.state, share, traced.largest)

    def advance(resident, keys, state):
        one = partial(traced.step, resident)
        return (map_chains(one, traced.state, share, sequential) if several else one)(keys, state)

    keep = jax.vmap(keep_of_one, in_axes=(axes,)) if several else keep_of_one

    def learn(carry, plan, index):
        """Update the summary, unless warming up or lost."""

        def update(summary, position, bad):
            new = online.update(summary, position)
            return jax.tree.map(lambda x, y: jnp.where(bad, x, y), summary, new)

        bad = (carry.first_bad >= 0) | (index < plan.num_warmup)
        update = jax.vmap(update) if several else update
        return carry._replace(summary=update(carry.summary, carry.state.position, bad))

    healthy = jax.vmap(tree_isfinite) if several else tree_isfinite

    fold = jax.vmap(fold_in, in_axes=(0, None)) if several else fold_in

    def checked(carry, state, number):
        bad = (carry.first_bad < 0) & ~healthy(state.position)
        return carry._replace(state=state, first_bad=jnp.where(bad, number, carry.first_bad))

    # Keys of a step go through the carry of a loop: a hash that is computed where it is needed is
    # merged into what needs it, and computed once a number.
    def keys_of_draw(keys, index):
        of_draw = fold(keys, index)
        return of_draw, fold(of_draw, np.int32(0))

    def steps_before_last(resident, state, of_draw, key, last):
        """The steps of a draw but its last, and the key of that."""

        def body(i, both):
            state, key = both
            following = fold(of_draw, i + 1)
            return advance(resident, key, state)[0], following

        return lax.fori_loop(np.int32(0), last, body, (state, key))

    def groups_before_last(resident, state, of_draw, last):
        """The same for a number that is known, where operations cost their launch.

        What steps of a group do not need of each other, their keys and minibatches, is computed
        for all of them at once. Steps that are long to compile, or to run, gain nothing.
        """
        bytes_of_group = _GROUP * traced.largest * (1 if share else num_chains)
        short = bytes_of_group <= _GROUP_BYTES and traced.operations <= _GROUP_OPERATIONS
        size = _GROUP if short else 1

        def keys_of(first, count):
            numbers = first + lax.iota(np.int32, count)
            of_steps = jax.vmap(fold, in_axes=(None, 0))(of_draw, numbers)
            kept_apart = lax.optimization_barrier(jax.random.key_data(of_steps))
            return jax.random.wrap_key_data(kept_apart, impl=jax.random.key_impl(of_draw))

        def body(j, state):
            for key in keys_of(np.int32(size) * j, size):
                state, _ = advance(resident, key, state)
            return state

        groups, rest = divmod(last, size)
        state = lax.fori_loop(0, groups, body, state)
        *before, key = keys_of(np.int32(groups * size), rest + 1)
        for each in before:
            state, _ = advance(resident, each, state)
        return state, key

    def one_draw(resident, carry, draw_keys, plan, index):
        (of_draw, key), state = draw_keys, carry.state
        if thin is None:
            last = plan.thin - np.int32(1)
            state, key = steps_before_last(resident, state, of_draw, key, last)
        elif thin > 1:
            state, key = groups_before_last(resident, state, of_draw, thin - 1)
        state, info = advance(resident, key, state)
        carry = checked(carry, state, (index + 1) * plan.thin - np.int32(1))
        carry = learn(carry, plan, index)
        return carry, (keep(carry.state), scalars(info, key.shape))

    lead = (num_chains,) if several else ()
    if isinstance(collect, Online):
        _try_online(collect, traced.state.position)
    try:
        of_one = jax.eval_shape(keep_of_one, traced.state)
    except Exception as error:
        raise ValueError(
            "collect must be a function state -> arrays, and fails on a state with fields "
            f"{list(getattr(traced.state, '_fields', ()))}: {first_line(error)}."
        ) from error
    if not jax.tree.leaves(of_one):
        raise ValueError("collect must return at least one array, got none.")
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((*lead, *s.shape), s.dtype),
        (of_one, scalars(traced.info, ())),
    )
    capacity = int(np.clip(_BUFFER_BYTES // max(tree_bytes(shapes), 1), 1, _MOST_DRAWS))

    def chunk(carry, keys, resident, plan, first, count):
        def body(i, everything):
            carry, draw_keys, buffers = everything
            carry, kept = one_draw(resident, carry, draw_keys, plan, first + i)
            write = partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
            following = keys_of_draw(keys, first + i + 1)
            return carry, following, jax.tree.map(write, buffers, kept)

        buffers = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), shapes)
        begin = carry, keys_of_draw(keys, first), buffers
        carry, _, (kept, stats) = lax.fori_loop(0, count, body, begin)
        return carry, kept, stats

    def part(carry, keys, resident, plan, index, first, last):
        of_draw = fold(keys, index)

        def body(i, everything):
            state, key, _ = everything
            state, info = advance(resident, key, state)
            return state, fold(of_draw, i + 1), info

        blank = jax.tree.map(lambda s: jnp.zeros((*lead, *s.shape), s.dtype), traced.info)
        begin = carry.state, fold(of_draw, first), blank
        state, _, info = lax.fori_loop(first, last, body, begin)
        carry = checked(carry, state, index * plan.thin + last - np.int32(1))
        learnt, before = learn(carry, plan, index).summary, carry.summary
        summary = jax.tree.map(lambda x, y: jnp.where(last == plan.thin, x, y), learnt, before)
        carry = carry._replace(summary=summary)
        kept = keep(carry.state), scalars(info, keys.shape)
        return carry, *jax.tree.map(lambda leaf: leaf[None], kept)

    done = None
    if online.done is not None:
        enough = jax.vmap(online.done) if several else online.done
        done = hoisted_jit(lambda summary: jnp.all(enough(summary)))

    start_density = None
    if density is not None:
        log_density, begin_batches, next_batch = density

        def at_start(position, key, resident):
            with nullcontext() if stream is None else stream.supplying(resident):
                batch, _ = next_batch(begin_batches(key))
            return log_density(position, batch)

        start_density = jax.vmap(at_start, in_axes=(0, 0, None)) if several else at_start
        start_density = hoisted_jit(start_density, mesh)

    return Program(
        start,
        hoisted_jit(start, mesh),
        hoisted_jit(chunk, mesh, donate=True),
        hoisted_jit(part, mesh, donate=True),
        capacity,
        traced,
        shapes,
        done,
        start_density,
    )


def _try_online(online: Online, position: PyTree) -> None:
    """Raise unless a summary can begin at a position, and take it, without changing its shapes."""
    for name in ("init", "update", "done"):
        function = getattr(online, name)
        if not (callable(function) or (name == "done" and function is None)):
            raise TypeError(f"collect.{name} must be a function, got {describe(function)}.")
    name = "init"
    try:
        summary = jax.eval_shape(online.init, position)
        name = "update"
        following = jax.eval_shape(online.update, summary, position)
        name = "done"
        done = None if online.done is None else jax.eval_shape(online.done, summary)
    except Exception as error:
        if is_ours(error):
            raise
        raise ValueError(f"collect.{name} fails on a position: {first_line(error)}.") from error
    if form_of(summary) != form_of(following):
        raise ValueError(
            "collect.update must return a summary of the structure, shapes and types of "
            f"collect.init's, {summary}, got {following}."
        )
    if online.done is not None and getattr(done, "shape", None) != ():
        raise ValueError(f"collect.done must return one truth value, got {done}.")


def scalars(info: Any, shape: tuple[int, ...]) -> dict[str, Array]:
    """The fields of a step's info, and of infos within it, that are one number per chain."""
    found: dict[str, Array] = {}
    fields = info._asdict() if hasattr(info, "_asdict") else info
    for name, value in fields.items() if isinstance(fields, Mapping) else ():
        if hasattr(value, "_asdict") or isinstance(value, Mapping):
            found |= scalars(value, shape)
        elif getattr(value, "shape", None) == shape:
            found[name] = value
    return found


def chain_sharding(carry: PyTree, share: bool, mesh: Mesh) -> PyTree:
    """Shardings that spread the chain axis of a carry over the devices."""
    axes = Carry(shared_axes(carry.state, share), 0, 0)  # pyright: ignore[reportArgumentType]

    def sharding(axis, part):
        spec = PartitionSpec() if axis is None else chain_axis(mesh)
        return jax.tree.map(lambda leaf: NamedSharding(mesh, spec), part)

    return jax.tree.map(sharding, axes, carry, is_leaf=lambda x: x is None or is_shared(x))


def chain_axis(mesh: Mesh) -> PartitionSpec:
    """How a leading chain axis is spread: over the mesh's axis of that name, if it has one."""
    return PartitionSpec("chain") if "chain" in mesh.axis_names else PartitionSpec()
