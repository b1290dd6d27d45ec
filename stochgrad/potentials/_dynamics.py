"""Molecular dynamics of many networks at once."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from stochgrad.core import (
    ConvergenceWarning,
    Gradient,
    Kernel,
    PRNGKey,
    check_array,
    check_callable,
    check_count,
    check_flag,
    check_key,
    check_number,
    check_path,
    remembered,
    sample,
)
from stochgrad.potentials._inputs import (
    check_energy,
    check_frame_inputs,
    check_graph,
    check_networks,
    check_static,
    warn_of_rounding,
)
from stochgrad.potentials._predict import energies_of
from stochgrad.sgmcmc import sghmc


class MDState(NamedTuple):
    """State of the replicas of one network.

    Attributes:
        position: Positions of all replicas, shape (replicas, atoms, dim).
        inner: State of the Langevin integrator.
        params: The network's weights.
        exploded: Step at which each replica exploded, -1 where none has.
        count: Steps taken.
    """

    position: Float[Array, "replicas atoms dim"]
    inner: Any
    params: PyTree
    exploded: Int[Array, " replicas"]
    count: Int[Array, ""]


class MDInfo(NamedTuple):
    """What a step reports.

    Attributes:
        kinetic_temperature: Of the replicas that have not exploded, over the bath's; NaN if none.
        exploded: How many replicas have exploded.
    """

    kinetic_temperature: Float[Array, ""]
    exploded: Int[Array, ""]


class Trajectories(NamedTuple):
    """Frames of many networks' replicas.

    Attributes:
        positions: Shape (draws, replicas, frames, atoms, dim). From where a replica exploded, its
            last sound frame is repeated.
        exploded: Step, of warm-up and all, at which a replica exploded, -1 where it did not; shape
            (draws, replicas).
        kinetic_temperature: Mean over the run, over the bath's, shape (draws,).
        seconds: What the run took, compilation included.
    """

    positions: Float[np.ndarray, "draws replicas frames atoms dim"]
    exploded: Int[np.ndarray, "draws replicas"]
    kinetic_temperature: Float[np.ndarray, " draws"]
    seconds: float

    @property
    def sound(self) -> np.ndarray:
        """Which replicas have not exploded, shape (draws, replicas)."""
        return self.exploded < 0


def langevin(
    energy_fn: Callable[..., Any],
    *,
    masses: float | Float[Array, " atoms"],
    kT: float,
    time_step: float,
    friction: float,
    static: Sequence[str] = (),
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
        graph: What ``energy_fn`` takes beside the positions: box, species, and so on.

    Raises:
        TypeError: an array is none of numbers or booleans.
        ValueError: a number is not positive. On first use: an array of ``graph`` looks like a list
            of neighbors, which would stay the first frame's.
    """
    check_callable("energy_fn", energy_fn, "a function (params, positions, **graph) -> scalar")
    kT, h = check_number("kT", kT), check_number("time_step", time_step)
    friction = check_number("friction", friction)
    m = _checked_masses(masses)
    graph = check_graph(graph)
    check_static(static, graph, None)
    frozen = tuple((k, _Frozen(v)) for k, v in sorted(graph.items()))
    return _langevin(energy_fn, _Frozen(m), kT, h, friction, frozen, tuple(static))


def _checked_masses(masses: Any) -> np.ndarray:
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
def _langevin(energy_fn, masses: _Frozen, kT, h, friction, frozen, static) -> Kernel:
    m, graph = masses.array, {name: value.array for name, value in frozen}

    def inner_of(params, shape) -> Kernel:
        """The Langevin kernel of one network; made while tracing, of the weights at hand."""

        def log_density(positions):
            given = {name: jnp.asarray(value) for name, value in graph.items()}
            energies = jax.vmap(lambda r: energy_fn(params, r, **given))(positions)
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
        _check_frames(m, graph, static, start.shape[1], start.shape[2])
        inner = inner_of(params, start.shape).init(start, rng_key)
        none = jnp.full(start.shape[:1], -1, jnp.int32)
        return MDState(start, inner, params, none, jnp.zeros((), jnp.int32))

    def step(rng_key, state: MDState) -> tuple[MDState, MDInfo]:
        kernel = inner_of(state.params, state.position.shape)
        new, _ = kernel.step(rng_key, state.inner)
        farthest = jnp.asarray(20 * h * np.sqrt(kT / m), state.position.dtype)
        moved = jnp.max(jnp.abs(new.position - state.position), axis=-1)
        limit = jnp.broadcast_to(farthest, moved.shape[1:])[None]
        finite = jnp.isfinite(new.gradient).all((1, 2)) & jnp.isfinite(new.momentum).all((1, 2))
        sound = (state.exploded < 0) & finite & (moved < limit).all(1)

        def keep(new, old):
            return jnp.where(sound[:, None, None], new, old)

        inner = new._replace(
            position=keep(new.position, state.inner.position),
            momentum=keep(new.momentum, state.inner.momentum),
            gradient=keep(new.gradient, state.inner.gradient),
        )
        first = (state.exploded < 0) & ~sound
        exploded = jnp.where(first, state.count, state.exploded)
        mass = jnp.broadcast_to(jnp.asarray(m / kT, new.momentum.dtype), moved.shape[1:])
        squares = jnp.sum(inner.momentum**2, -1) / mass[None]
        share = jnp.mean(squares, 1) / new.position.shape[-1]
        alive = jnp.sum(sound).astype(share.dtype)
        heat = jnp.sum(jnp.where(sound, share, 0)) / jnp.where(alive > 0, alive, jnp.nan)
        info = MDInfo(heat, jnp.sum(~sound).astype(jnp.int32))
        return MDState(inner.position, inner, state.params, exploded, state.count + 1), info

    settings = (("kT", kT), ("step_size", h), ("friction", friction))
    return Kernel(init, step, "Langevin BAOAB", settings)


def _check_frames(masses, graph, static, atoms: int, dim: int) -> None:
    """Raise unless masses and further arrays are those of frames of so many atoms."""
    if masses.ndim and len(masses) != atoms:
        raise ValueError(
            f"masses must have one entry for each atom, got {masses.shape} for {atoms} atoms."
        )
    check_static(static, graph, atoms)
    check_frame_inputs(graph, atoms, dim)


def simulate(
    key: PRNGKey,
    energy_fn: Callable[..., Any],
    params: PyTree,
    positions: Any,
    *,
    masses: float | Any,
    kT: float,
    time_step: float,
    friction: float,
    num_frames: int,
    steps_per_frame: int,
    num_warmup: int = 0,
    progress: bool = False,
    checkpoint: Any = None,
    resume: bool = False,
    static: Sequence[str] = (),
    **graph: Any,
) -> Trajectories:
    """Molecular dynamics of many networks, each with many replicas, in one compiled program.

    Networks are spread over all devices there are.

    Args:
        key: A typed PRNG key.
        energy_fn: ``(params, positions, **graph) -> scalar``.
        params: Weights of D networks, with a leading axis of D.
        positions: Where replicas start: (replicas, atoms, dim) for all networks alike, or
            (D, replicas, atoms, dim).
        masses: As in ``stochgrad.potentials.langevin``.
        kT: Likewise.
        time_step: Likewise.
        friction: Likewise.
        num_frames: Frames to keep.
        steps_per_frame: Steps from one to the next.
        num_warmup: Frames to discard before them.
        progress: Whether to show a progress bar.
        checkpoint: A directory for the state of the run, saved as it goes.
        resume: Whether to go on from there.
        static: Names of arrays in ``graph`` that hold for every frame: ``("bonds",)``. Without it
            integers and booleans whose shape is not ``(atoms,)``, and what is named like a
            list of neighbors (vectors too), are refused, for they would stay those of the first
            frame.
        graph: What ``energy_fn`` takes beside the positions, the same for all frames: numbers of
            each atom, a box, parameters.

    Warns:
        RuntimeWarning: replicas exploded; how many, of which networks, and from which step.
        PrecisionWarning: total energies are so large that their type cannot tell a tenth of kT.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a number is out of range, a shape does not fit, ``energy_fn`` fails, or an array
            looks like a list of neighbors.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> springs = jnp.array([1.0, 5.0])
        >>> run = stochgrad.potentials.simulate(
        ...     jax.random.key(0), lambda k, r: 0.5 * k * jnp.sum(r**2), springs,
        ...     jnp.zeros((64, 1, 3)), masses=1.0, kT=1.0, time_step=0.2, friction=2.0,
        ...     num_frames=500, steps_per_frame=5, num_warmup=20,
        ... )
        >>> [round(float(x), 1) for x in run.positions.var((1, 2, 3, 4))], int(run.sound.sum())
        ([1.0, 0.2], 128)
    """
    check_key(key)
    frames = check_count("num_frames", num_frames)
    steps = check_count("steps_per_frame", steps_per_frame)
    num_warmup = check_count("num_warmup", num_warmup, least=0)
    progress, resume = check_flag("progress", progress), check_flag("resume", resume)
    if checkpoint is not None:
        checkpoint = check_path("checkpoint", checkpoint)
    elif resume:
        raise ValueError("resume=True needs checkpoint, the directory to resume from.")
    params = jax.tree.map(jnp.asarray, check_networks(params))
    draws = jax.tree.leaves(params)[0].shape[0]
    start = jnp.asarray(_checked_start(positions, draws))
    start = start.astype(jnp.result_type(float)) if start.dtype.kind != "f" else start
    if start.ndim == 3:
        start = jnp.broadcast_to(start[None], (draws, *start.shape))
    kernel = langevin(
        energy_fn,
        masses=masses,
        kT=kT,
        time_step=time_step,
        friction=friction,
        static=static,
        **graph,
    )
    graph = check_graph(graph)
    atoms, dim = start.shape[2:]
    _check_frames(_checked_masses(masses), graph, static, atoms, dim)
    one = jax.tree.map(lambda x: x[0], (params, start[:, 0]))
    dtype = check_energy(energy_fn, one[0], one[1], graph)
    first = jax.tree.map(lambda x: x[:1], params)
    energies = energies_of(energy_fn)(first, start[:1, :1], graph)
    remedy = "leave out of the energy what is the same for all frames"
    warn_of_rounding(energies, dtype, kT, "kT", remedy, stacklevel=2)
    begin = {"positions": start, "params": params}
    if draws == 1:
        begin = jax.tree.map(lambda x: x[0], begin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # frames are not judged by coordinates
        run = sample(
            key,
            kernel,
            init=begin,
            num_samples=frames,
            num_warmup=num_warmup,
            thin=steps,
            num_chains=draws,
            collect=_frame_of,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
        )
    exploded = np.asarray(run.state.exploded).reshape(draws, -1)
    _report(exploded)
    heat = np.asarray(run.stats["kinetic_temperature"], np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a network whose replicas all exploded
        heat = np.nanmean(heat, 1)
    return Trajectories(
        np.swapaxes(np.asarray(run.positions), 1, 2), exploded, heat, run.timings["total"]
    )


def _checked_start(positions: Any, draws: int) -> np.ndarray:
    start = check_array("positions", positions)
    if start.ndim not in (3, 4) or 0 in start.shape or (start.ndim == 4 and len(start) != draws):
        raise ValueError(
            f"positions must have shape (replicas, atoms, dim) or ({draws}, replicas, atoms, dim), "
            f"got {start.shape}."
        )
    return start


def _frame_of(state: MDState) -> Array:
    return state.position


def _report(exploded: np.ndarray) -> None:
    bad = (exploded >= 0).sum(1)
    if not bad.any():
        return
    named = ", ".join(f"{bad[n]} of network {n}" for n in np.flatnonzero(bad)[:8])
    more = " and others" if (bad > 0).sum() > 8 else ""
    first = exploded[exploded >= 0].min()
    warnings.warn(
        f"{bad.sum()} of {exploded.size} trajectories exploded, the first at step {first}: {named}"
        f"{more}. They are marked in 'exploded' and left out of averages; a smaller time_step may "
        "help, or the network is unphysical where it went.",
        RuntimeWarning,
        stacklevel=3,
    )
