"""Langevin dynamics of atoms, as a kernel."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from stochgrad.core import (
    Gradient,
    Kernel,
    check_array,
    check_callable,
    check_instance,
    check_number,
    remembered,
)
from stochgrad.potentials._cell_lists import ListPlan, Lists, make_lists, refresh
from stochgrad.potentials._inputs import check_frame_inputs, check_graph, check_static
from stochgrad.sgmcmc import sghmc


class MDState(NamedTuple):
    """State of the replicas of one network.

    Attributes:
        position: Positions of all replicas, shape (replicas, atoms, dim).
        inner: State of the Langevin integrator.
        params: The network's weights.
        exploded: Step at which each replica exploded, -1 where none has.
        count: Steps taken.
        overflowed: Step at which each replica's list of neighbors had no room, -1 where none has.
        lists: Lists of neighbors, or None.
    """

    position: Float[Array, "replicas atoms dim"]
    inner: Any
    params: PyTree
    exploded: Int[Array, " replicas"]
    count: Int[Array, ""]
    overflowed: Int[Array, " replicas"]
    lists: Lists | None = None


class MDInfo(NamedTuple):
    """What a step reports.

    Attributes:
        kinetic_temperature: Of the replicas that have not exploded, over the bath's; NaN if none.
        exploded: How many replicas have exploded.
        outran: How many replicas moved farther in the step than their lists of neighbors hold.
    """

    kinetic_temperature: Float[Array, ""]
    exploded: Int[Array, ""]
    outran: Int[Array, ""]


def langevin(
    energy_fn: Callable[..., Any],
    *,
    masses: float | Float[Array, " atoms"],
    kT: float,
    time_step: float,
    friction: float,
    static: Sequence[str] = (),
    lists: ListPlan | None = None,
    **graph: Any,
) -> Kernel:
    r"""Langevin dynamics of the atoms, by BAOAB, for any number of replicas of one network.

    $$dr = m^{-1}p\,dt, \qquad dp = -\nabla U\,dt - \gamma p\,dt + \sqrt{2\gamma m k_BT}\,dW.$$

    It is ``stochgrad.sghmc`` on the density $e^{-U/k_BT}$ with mass $m/k_BT$ and friction
    $\gamma m/k_BT$, so that a unit of the integrator's time is one of physical time. It starts from
    a position ``{"positions": (replicas, atoms, dim), "params": weights}``; the chains of
    ``stochgrad.sample`` are networks.

    A replica has exploded where it is not finite, or where an atom moves in one step by twenty
    times its thermal velocity times the step; it is frozen from that step on.

    Args:
        energy_fn: ``(params, positions, **graph) -> scalar``.
        masses: m, of each atom or of all.
        kT: $k_BT$, in the energy's units.
        time_step: h, in the unit that mass, length and energy make ($\sqrt{m l^2/e}$: picoseconds
            for amu, nanometres and kJ/mol).
        friction: $\gamma$, an inverse time.
        static: Names of arrays in ``graph`` that hold for every frame although they look like a
            list of neighbors, as in ``stochgrad.potentials.simulate``.
        lists: From ``stochgrad.potentials.plan_lists``: ``energy_fn`` then gets ``neighbors``, made
            again where an atom has left half the skin. A replica whose list has no more room is
            frozen too, and marked in ``overflowed``.
        graph: What ``energy_fn`` takes beside the positions: box, species, and so on.

    Raises:
        TypeError: an array is none of numbers or booleans, or ``lists`` is no plan.
        ValueError: a number is not positive. On first use: an array of ``graph`` looks like a list
            of neighbors, which would stay the first frame's.
    """
    check_callable("energy_fn", energy_fn, "a function (params, positions, **graph) -> scalar")
    kT, h = check_number("kT", kT), check_number("time_step", time_step)
    friction = check_number("friction", friction)
    m = checked_masses(masses)
    graph = check_graph(graph)
    check_static(static, graph, None)
    if lists is not None:
        check_instance("lists", lists, ListPlan, "a plan, as stochgrad.potentials.plan_lists makes")
        if "neighbors" in graph:
            raise ValueError("neighbors come from lists, or in the graph, and not from both.")
    frozen = tuple((k, _Frozen(v)) for k, v in sorted(graph.items()))
    return _langevin(energy_fn, _Frozen(m), kT, h, friction, frozen, tuple(static), lists)


def checked_masses(masses: Any) -> np.ndarray:
    m = check_array("masses", masses, finite=False).astype(np.float64)
    if m.ndim > 1 or m.size == 0 or not np.all((m > 0) & np.isfinite(m)):
        raise ValueError(
            f"masses must be positive, one for all atoms or one each, got {m.tolist()}."
        )
    return m


class _Frozen:
    """An array as a key of a cache: equal arrays are one key, so that nothing compiles twice."""

    def __init__(self, array: Any):
        self.array = np.asarray(array)
        self.key = (self.array.shape, str(self.array.dtype), self.array.tobytes())

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self.key == other.key


@remembered
def _langevin(energy_fn, masses: _Frozen, kT, h, friction, frozen, static, plan) -> Kernel:
    m, graph = masses.array, {name: value.array for name, value in frozen}

    def inner_of(params, shape, lists) -> Kernel:
        """The Langevin kernel of one network; made while tracing, of its weights and lists."""

        def log_density(positions):
            given = {name: jnp.asarray(value) for name, value in graph.items()}
            own = {} if lists is None else {"neighbors": lists.neighbors}
            energies = jax.vmap(lambda r, own: energy_fn(params, r, **given, **own))(positions, own)
            return -jnp.sum(energies) / kT, energies

        def score(positions):
            (value, energies), g = jax.value_and_grad(log_density, has_aux=True)(positions)
            # an energy that is no number may have a force of zero
            return value, jnp.where(jnp.isfinite(energies)[:, None, None], g, jnp.nan)

        def next(key, position, state):
            return score, state

        per_atom = np.broadcast_to(m[..., None], shape[1:]) if m.ndim else m
        mass = np.broadcast_to(per_atom / kT, shape)
        gradient = Gradient(lambda key, position: (), next)
        return sghmc(gradient, h, friction * mass, mass=mass, integrator="BAOAB")

    def init(position, rng_key) -> MDState:
        start, params = position["positions"], position["params"]
        if start.ndim != 3:
            raise ValueError(
                f"positions must have shape (replicas, atoms, dim), got {start.shape}."
            )
        check_frames(m, graph, static, start.shape[1], start.shape[2])
        lists = None if plan is None else make_lists(plan, start)
        inner = inner_of(params, start.shape, lists).init(start, rng_key)
        none = jnp.full(start.shape[:1], -1, jnp.int32)
        full = none if lists is None else jnp.where(lists.overflow, 0, none)
        return MDState(start, inner, params, none, jnp.zeros((), jnp.int32), full, lists)

    def with_lists(state: MDState) -> MDState:
        """The state with lists that hold for a step of the fastest atom, and of noise beside it."""
        if plan is None or state.lists is None:
            return state
        speed = jnp.sqrt(jnp.max(jnp.sum((state.inner.momentum * inverse(state)) ** 2, -1), -1))
        thermal = jnp.asarray(6 * np.sqrt(kT / m.min()), speed.dtype)
        alive = (state.exploded < 0) & (state.overflowed < 0)
        travel = jnp.where(alive, h * (speed + thermal), 0)
        lists = refresh(plan, state.position, state.lists, travel)
        first = (state.overflowed < 0) & lists.overflow
        full = jnp.where(first, state.count, state.overflowed)
        return state._replace(lists=lists, overflowed=full)

    def inverse(state: MDState):
        """Inverse masses of the integrator, of each atom."""
        per_atom = jnp.asarray(kT / m, state.position.dtype)
        return jnp.broadcast_to(per_atom, state.position.shape[1:2])[None, :, None]

    def step(rng_key, state: MDState) -> tuple[MDState, MDInfo]:
        state = with_lists(state)
        kernel = inner_of(state.params, state.position.shape, state.lists)
        new, _ = kernel.step(rng_key, state.inner)
        farthest = jnp.asarray(20 * h * np.sqrt(kT / m), state.position.dtype)
        moved = jnp.max(jnp.abs(new.position - state.position), axis=-1)
        limit = jnp.broadcast_to(farthest, moved.shape[1:])[None]
        finite = jnp.isfinite(new.gradient).all((1, 2)) & jnp.isfinite(new.momentum).all((1, 2))
        calm = finite & (moved < limit).all(1)
        going = (state.exploded < 0) & (state.overflowed < 0)
        sound = going & calm
        outran = jnp.zeros((), jnp.int32)
        if state.lists is not None:
            left = jnp.sqrt(jnp.max(jnp.sum((new.position - state.lists.origin) ** 2, -1), -1))
            outran = jnp.sum(sound & (2 * left > plan.skin)).astype(jnp.int32)

        def keep(new, old):
            return jnp.where(sound[:, None, None], new, old)

        inner = new._replace(
            position=keep(new.position, state.inner.position),
            momentum=keep(new.momentum, state.inner.momentum),
            gradient=keep(new.gradient, state.inner.gradient),
        )
        exploded = jnp.where(going & ~calm, state.count, state.exploded)
        mass = jnp.broadcast_to(jnp.asarray(m / kT, new.momentum.dtype), moved.shape[1:])
        squares = jnp.sum(inner.momentum**2, -1) / mass[None]
        share = jnp.mean(squares, 1) / new.position.shape[-1]
        alive = jnp.sum(sound).astype(share.dtype)
        heat = jnp.sum(jnp.where(sound, share, 0)) / jnp.where(alive > 0, alive, jnp.nan)
        info = MDInfo(heat, jnp.sum(exploded >= 0).astype(jnp.int32), outran)
        new_state = state._replace(
            position=inner.position, inner=inner, exploded=exploded, count=state.count + 1
        )
        return new_state, info

    settings = [("kT", kT), ("step_size", h), ("friction", friction)]
    if plan is not None:
        settings += [("cutoff", plan.cutoff), ("skin", plan.skin)]
    return Kernel(init, step, "Langevin BAOAB", tuple(settings))


def check_frames(masses, graph, static, atoms: int, dim: int) -> None:
    """Raise unless masses and further arrays are those of frames of so many atoms."""
    if masses.ndim and len(masses) != atoms:
        raise ValueError(
            f"masses must have one entry for each atom, got {masses.shape} for {atoms} atoms."
        )
    check_static(static, graph, atoms)
    check_frame_inputs(graph, atoms, dim)
