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
    PRNGKey,
    check_array,
    check_count,
    check_flag,
    check_key,
    check_path,
    sample,
)
from stochgrad.potentials._cell_lists import ListPlan, make_lists, plan_lists
from stochgrad.potentials._inputs import (
    check_energy,
    check_graph,
    check_networks,
    warn_of_rounding,
    with_box,
)
from stochgrad.potentials._langevin import MDState, check_frames, checked_masses, langevin
from stochgrad.potentials._predict import energies_of


class Trajectories(NamedTuple):
    """Frames of many networks' replicas.

    Attributes:
        positions: Shape (draws, replicas, frames, atoms, dim). From where a replica exploded, its
            last sound frame is repeated.
        exploded: Step, of warm-up and all, at which a replica exploded, -1 where it did not; shape
            (draws, replicas).
        kinetic_temperature: Mean over the run, over the bath's, shape (draws,).
        seconds: What the run took, compilation included.
        overflowed: Step at which a replica's list of neighbors had no more room, likewise.
    """

    positions: Float[np.ndarray, "draws replicas frames atoms dim"]
    exploded: Int[np.ndarray, "draws replicas"]
    kinetic_temperature: Float[np.ndarray, " draws"]
    seconds: float
    overflowed: Int[np.ndarray, "draws replicas"]

    @property
    def sound(self) -> np.ndarray:
        """Which replicas went to the end, shape (draws, replicas)."""
        return (self.exploded < 0) & (self.overflowed < 0)


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
    cutoff: float | None = None,
    skin: float | None = None,
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
        cutoff: Where interactions end: ``energy_fn`` then gets lists of ``neighbors``, as
            ``Configurations.with_neighbors`` makes them, which follow the atoms. The cost of a step
            grows as the number of atoms then, and not as its square.
        skin: How much farther apart the pairs of a list may be; a fifth of the cut-off if None. A
            list is made again where an atom has moved by half of it.
        graph: What ``energy_fn`` takes beside the positions, the same for all frames: numbers of
            each atom, a box, parameters.

    Warns:
        RuntimeWarning: replicas exploded; how many, of which networks, and from which step. Lists
            of neighbors had no more room, or an atom outran them.
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
    graph = with_box(energy_fn, graph)
    plan = planned_lists(start.reshape(-1, *start.shape[-2:]), cutoff, skin, graph)
    if start.ndim == 3:
        start = jnp.broadcast_to(start[None], (draws, *start.shape))
    kernel = langevin(
        energy_fn,
        masses=masses,
        kT=kT,
        time_step=time_step,
        friction=friction,
        static=static,
        lists=plan,
        **graph,
    )
    graph = check_graph(graph)
    atoms, dim = start.shape[2:]
    check_frames(checked_masses(masses), graph, static, atoms, dim)
    one = jax.tree.map(lambda x: x[0], (params, start[:, 0]))
    own = {} if plan is None else {"neighbors": make_lists(plan, one[1]).neighbors}
    dtype = check_energy(energy_fn, one[0], one[1], {**graph, **own})
    first = jax.tree.map(lambda x: x[:1], params)
    energies = energies_of(energy_fn, plan)(first, start[:1, :1], graph)
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
    overflowed = np.asarray(run.state.overflowed).reshape(draws, -1)
    if plan is not None:
        _report_lists(overflowed, np.asarray(run.stats["outran"]), plan)
    heat = np.asarray(run.stats["kinetic_temperature"], np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a network whose replicas all exploded
        heat = np.nanmean(heat, 1)
    return Trajectories(
        np.swapaxes(np.asarray(run.positions), 1, 2),
        exploded,
        heat,
        run.timings["total"],
        overflowed,
    )


def planned_lists(positions: Any, cutoff: Any, skin: Any, graph: dict) -> ListPlan | None:
    """A plan for lists of neighbors at positions (frames, atoms, dim), None without a cut-off."""
    if cutoff is None:
        if skin is not None:
            raise ValueError("skin is of lists of neighbors: give their cutoff too.")
        return None
    if "neighbors" in graph:
        raise ValueError("neighbors are made of cutoff, or given, and not both.")
    return plan_lists(positions, cutoff, skin, box=graph.get("box"))


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


def _report_lists(overflowed: np.ndarray, outran: np.ndarray, plan: ListPlan) -> None:
    full = overflowed >= 0
    if full.any():
        warnings.warn(
            f"lists of neighbors of {full.sum()} of {full.size} trajectories had no more room, the "
            f"first at step {overflowed[full].min()}: {plan.pairs} pairs, a quarter more than at "
            "the start. They are marked in 'overflowed' and left out of averages: start from "
            "positions as dense as they become, or with other networks if atoms fall together.",
            RuntimeWarning,
            stacklevel=3,
        )
    if outran.sum():
        warnings.warn(
            f"atoms outran their lists of neighbors in {int(outran.sum())} steps, where pairs may "
            f"have been missed: take a skin above {plan.skin:g}.",
            RuntimeWarning,
            stacklevel=3,
        )
