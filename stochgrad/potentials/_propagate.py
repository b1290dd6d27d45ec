"""From draws of networks to averages: one trajectory reweighted where it can be, new ones else."""

import warnings
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, PyTree

from stochgrad.core import (
    PrecisionWarning,
    PRNGKey,
    check_array,
    check_callable,
    check_key,
    check_number,
    check_path,
    describe,
    first_line,
    remembered,
)
from stochgrad.potentials._cell_lists import ListPlan, make_lists, with_room
from stochgrad.potentials._dynamics import Trajectories, planned_lists, simulate
from stochgrad.potentials._inputs import (
    check_energy,
    check_frame_inputs,
    check_graph,
    check_networks,
    check_static,
    warn_of_rounding,
    with_box,
)
from stochgrad.potentials._observables import Observable, average, check_observable
from stochgrad.potentials._predict import energies_of


class Reweighted(NamedTuple):
    """Weights of a reference trajectory's frames under other networks.

    Attributes:
        log_weights: Shape (D, replicas, frames); a network's weights add up to one.
        ess: Kish's effective share of the frames, 0 to 1, shape (D,).
    """

    log_weights: Float[np.ndarray, "D replicas frames"]
    ess: Float[np.ndarray, " D"]

    @property
    def weights(self) -> Float[np.ndarray, "D replicas frames"]:
        """Their exponentials."""
        return np.exp(self.log_weights)


def mean_energy(energy_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The mean of the energies of many networks, whose weights have a leading axis.

    Args:
        energy_fn: ``(params, positions, **graph) -> scalar``.

    Raises:
        TypeError: it is no function.
    """
    check_callable("energy_fn", energy_fn, "a function (params, positions, **graph) -> scalar")
    return _mean_energy(energy_fn)


@remembered
def _mean_energy(energy_fn):
    def of_all(params, positions, **graph):
        return jnp.mean(jax.vmap(lambda p: energy_fn(p, positions, **graph))(params))

    return of_all


def reweight(
    energy_fn: Callable[..., Any],
    params: PyTree,
    positions: Any,
    reference: Any,
    *,
    kT: float,
    sound: Any = None,
    static: Sequence[str] = (),
    cutoff: float | None = None,
    **graph: Any,
) -> Reweighted:
    r"""Weights that turn frames of a reference potential into frames of each network.

    $$w_{dt} \propto \exp\!\big(-[U_d(R_t) - U_{ref}(R_t)]/k_BT\big), \qquad
      \mathrm{ess}_d = \frac{(\sum_t w_{dt})^2}{n\sum_t w_{dt}^2}.$$

    Args:
        energy_fn: ``(params, positions, **graph) -> scalar``.
        params: Weights of D networks, with a leading axis of D.
        positions: Frames, shape (replicas, frames, atoms, dim).
        reference: Their energies in the potential that they come from, shape (replicas, frames);
            or that potential, ``positions -> scalar`` (``positions, neighbors -> scalar`` with a
            cut-off).
        kT: $k_BT$.
        sound: Which replicas count, shape (replicas,); frames of others weigh nothing.
        static: As in ``stochgrad.potentials.simulate``.
        cutoff: Likewise: ``energy_fn`` gets ``neighbors``, of each frame its own.
        graph: What ``energy_fn`` takes beside the positions, the same for all frames.

    Warns:
        PrecisionWarning: total energies are so large that their type cannot tell a tenth of kT.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a number is out of range or not finite, a shape does not fit, ``energy_fn``
            fails, or an array looks like a list of neighbors.
    """
    kT = check_number("kT", kT)
    frames = check_array("positions", positions)
    if frames.ndim != 4 or 0 in frames.shape:
        raise ValueError(
            f"positions must have shape (replicas, frames, atoms, dim), got {frames.shape}."
        )
    counted = np.ones(len(frames), bool)
    if sound is not None:
        counted = check_array("sound", sound, kind="boolean", shape=(len(frames),))
    if not counted.any():
        raise ValueError("sound must leave a replica, got False for all.")
    graph = check_graph(with_box(energy_fn, graph))
    check_static(static, graph, frames.shape[2])
    check_frame_inputs(graph, *frames.shape[2:])
    params = jax.tree.map(jnp.asarray, check_networks(params))
    every = frames.reshape(-1, *frames.shape[2:])
    plan = planned_lists(every[:: max(1, len(every) // 16)], cutoff, None, graph)
    frames = _as_float(frames)
    own = {} if plan is None else {"neighbors": make_lists(plan, frames[0, 0]).neighbors}
    one = jax.tree.map(lambda x: x[0], params)
    dtype = check_energy(energy_fn, one, frames[0, 0], {**graph, **own})
    plan = None if plan is None else with_room(plan, frames)
    energies = np.asarray(energies_of(energy_fn, plan)(params, frames, graph), np.float64)
    origin = _reference_energies(reference, frames, plan)
    for name, values in (("energy_fn", energies), ("reference", origin[None])):
        bad = ~(values > -np.inf) & counted[:, None]  # an infinite energy weighs nothing
        if bad.any():
            d, replica, frame = np.argwhere(bad)[0]
            raise ValueError(
                f"{name} must give energies, but that of frame {frame} of replica {replica} is "
                f"{values[d, replica, frame]}" + (f" in network {d}." if len(values) > 1 else ".")
            )
        nowhere = np.flatnonzero(np.all((values == np.inf) | ~counted[:, None], axis=(1, 2)))
        if len(nowhere) or (name == "reference" and np.isinf(origin[counted]).any()):
            raise ValueError(f"{name} gives infinite energies to the frames: they weigh nothing.")
    remedy = "leave out of the energy what is the same for all frames"
    warn_of_rounding(energies[:, counted], dtype, kT, "kT", remedy, stacklevel=2)
    log_weights = -(energies - origin) / kT
    log_weights[:, ~counted] = -np.inf
    log_weights -= log_weights.max((1, 2), keepdims=True)
    weights = np.exp(log_weights)
    total = weights.sum((1, 2), keepdims=True)
    ess = total[:, 0, 0] ** 2 / (weights**2).sum((1, 2)) / (counted.sum() * frames.shape[1])
    return Reweighted(log_weights - np.log(total), ess)


def _reference_energies(reference: Any, frames: Any, plan: ListPlan | None) -> np.ndarray:
    """The energies that frames have in the potential that they come from."""
    if not callable(reference):
        return check_array("reference", reference, shape=frames.shape[:2], finite=False).astype(
            np.float64
        )

    def of_frame(r):
        return reference(r) if plan is None else reference(r, make_lists(plan, r).neighbors)

    try:
        energies = jax.jit(lambda x: lax.map(jax.vmap(of_frame), x))(frames)
    except Exception as error:
        raise ValueError(
            f"reference fails on positions of shape {frames.shape[2:]}: {first_line(error)}."
        ) from error
    if getattr(energies, "shape", None) != frames.shape[:2]:
        raise ValueError("reference must return a scalar, the energy of positions.")
    return np.asarray(energies, np.float64)


_PARAMETERS = signature(simulate).parameters
_SETTINGS = frozenset(_PARAMETERS)
_NEEDED = [
    name
    for name, p in _PARAMETERS.items()
    if p.kind == Parameter.KEYWORD_ONLY and p.default is Parameter.empty
]


class Propagated(NamedTuple):
    """Averages of observables under each network.

    Attributes:
        averages: One array of shape (D, replicas, ...) for each observable.
        ess: Effective share of the reference's frames, shape (D,).
        fresh: Which networks got molecular dynamics of their own, shape (D,).
        sound: Which trajectories count, shape (D, replicas).
        reference: The reference trajectories.
    """

    averages: list[np.ndarray]
    ess: Float[np.ndarray, " D"]
    fresh: Bool[np.ndarray, " D"]
    sound: Bool[np.ndarray, "D replicas"]
    reference: Trajectories

    @property
    def common(self) -> Bool[np.ndarray, " D"]:
        """Which networks' averages are of the reference's frames, for ``intervals``."""
        return ~self.fresh


def propagate(
    key: PRNGKey,
    energy_fn: Callable[..., Any],
    params: PyTree,
    positions: Any,
    observables: list[Observable],
    *,
    min_ess: float = 0.2,
    **dynamics: Any,
) -> Propagated:
    """Averages of observables under many networks from one reference run, where that will do.

    Molecular dynamics in the mean of the networks' energies is reweighted to each. A network whose
    effective share of the frames is below ``min_ess`` gets dynamics of its own. Each replica's
    average is weighted within that replica, so that replicas tell the error.

    Args:
        key: A typed PRNG key.
        energy_fn: ``(params, positions, **graph) -> scalar``.
        params: Weights of D networks, with a leading axis of D.
        positions: Where replicas start, shape (replicas, atoms, dim).
        observables: What to average.
        min_ess: Between 0 (always reweight) and 1 (never).
        dynamics: What ``stochgrad.potentials.simulate`` takes: masses, kT, time_step, friction,
            num_frames, steps_per_frame, num_warmup, static, and what ``energy_fn`` takes by name.

    Warns:
        RuntimeWarning, PrecisionWarning: as ``simulate`` and ``reweight`` do.

    Raises:
        TypeError: an argument is of another kind, or missing.
        ValueError: a number is out of range, a shape does not fit, all replicas of the reference
            exploded; and what ``simulate`` raises.
    """
    check_key(key)
    min_ess = check_number("min_ess", min_ess, zero=True, most=1.0)
    check_callable("energy_fn", energy_fn, "a function (params, positions, **graph) -> scalar")
    if not isinstance(observables, list | tuple) or isinstance(observables, Observable):
        raise TypeError(f"observables must be a list of them, got {describe(observables)}.")
    missing = [name for name in _NEEDED if name not in dynamics]
    if missing:
        raise TypeError(f"propagate needs {', '.join(missing)}, as simulate does.")
    params = jax.tree.map(jnp.asarray, check_networks(params))
    starts = check_array("positions", positions)
    if starts.ndim != 3 or 0 in starts.shape:
        raise ValueError(f"positions must have shape (replicas, atoms, dim), got {starts.shape}.")
    for n, observable in enumerate(observables):
        check_observable(f"observables[{n}]", observable, starts[0])
    reference_key, fresh_key = jax.random.split(key)
    together = mean_energy(energy_fn)
    as_one = jax.tree.map(lambda x: x[None], params)
    given = dynamics.pop("checkpoint", None)
    checkpoint = None if given is None else check_path("checkpoint", given)

    def saved(part: str) -> dict[str, Any]:
        return dynamics if checkpoint is None else {**dynamics, "checkpoint": checkpoint / part}

    graph = {k: v for k, v in dynamics.items() if k not in _SETTINGS}
    known = with_box(energy_fn, graph)
    if dynamics.get("cutoff") is None:
        one = jax.tree.map(lambda x: x[0], params)
        check_energy(energy_fn, one, _as_float(starts[0]), check_graph(known))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)  # reweighting says it
        reference = simulate(reference_key, together, as_one, positions, **saved("reference"))
    frames, counted = reference.positions[0], reference.sound[0]
    if not counted.any():
        raise ValueError(
            f"all {len(counted)} replicas exploded in the mean of the networks' energies: take a "
            "smaller time_step, or other networks."
        )
    found = reweight(
        energy_fn,
        params,
        frames,
        lambda r, *own: together(params, r, **graph, **({"neighbors": own[0]} if own else {})),
        kT=dynamics["kT"],
        sound=counted,
        static=dynamics.get("static", ()),
        cutoff=dynamics.get("cutoff"),
        **graph,
    )
    fresh = found.ess < min_ess
    sound = np.repeat(reference.sound, len(found.ess), 0)
    within = np.where(counted[:, None], found.log_weights, 0)  # each replica's add up to one
    within = np.exp(within - within.max(-1, keepdims=True))
    averages = [
        np.stack([average(observable, frames, w) for w in within]) for observable in observables
    ]
    if fresh.any():
        own = jax.tree.map(lambda x: x[fresh], params)
        run = simulate(fresh_key, energy_fn, own, positions, **saved("fresh"))
        sound[fresh] = run.sound
        for n, observable in enumerate(observables):
            averages[n][fresh] = average(observable, run.positions)
    return Propagated(averages, found.ess, fresh, sound, reference)


def _as_float(positions):
    array = jnp.asarray(positions)
    return array if array.dtype.kind == "f" else array.astype(jnp.result_type(float))
