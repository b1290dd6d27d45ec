"""From draws of networks to averages: one trajectory reweighted where it can be, new ones else."""

from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, PyTree

from stochgrad.core import PRNGKey, check_number
from stochgrad.potentials._dynamics import Trajectories, simulate
from stochgrad.potentials._observables import Observable, average


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


@lru_cache(maxsize=16)
def mean_energy(energy_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The mean of the energies of many networks, whose weights have a leading axis.

    Args:
        energy_fn: ``(params, positions, **graph) -> scalar``.
    """

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
            or that potential, ``positions -> scalar``.
        kT: $k_BT$.
        sound: Which replicas count, shape (replicas,); frames of others weigh nothing.
        graph: What ``energy_fn`` takes beside the positions.
    """
    kT = check_number("kT", kT)
    frames = jnp.asarray(positions)
    energies = _energies(energy_fn)(jax.tree.map(jnp.asarray, params), frames, graph)
    if callable(reference):
        reference = jax.jit(lambda x: lax.map(jax.vmap(reference), x))(frames)
    log_weights = -(np.asarray(energies, np.float64) - np.asarray(reference, np.float64)) / kT
    counted = np.ones(len(frames), bool) if sound is None else np.asarray(sound, bool)
    log_weights[:, ~counted] = -np.inf
    log_weights -= log_weights.max((1, 2), keepdims=True)
    weights = np.exp(log_weights)
    total = weights.sum((1, 2), keepdims=True)
    ess = total[:, 0, 0] ** 2 / (weights**2).sum((1, 2)) / (counted.sum() * frames.shape[1])
    return Reweighted(log_weights - np.log(total), ess)


@lru_cache(maxsize=16)
def _energies(energy_fn):
    @jax.jit
    def of_all(params, frames, graph):
        def of_draw(p):
            return lax.map(jax.vmap(lambda r: energy_fn(p, r, **graph)), frames)

        return lax.map(of_draw, params)

    return of_all


_SETTINGS = frozenset(signature(simulate).parameters)


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
            num_frames, steps_per_frame, num_warmup, and what ``energy_fn`` takes by name.

    Raises:
        ValueError: a number is out of range, or a shape does not fit.
    """
    min_ess = check_number("min_ess", min_ess, zero=True)
    if min_ess > 1:
        raise ValueError(f"min_ess must be between 0 and 1, got {min_ess:g}.")
    params = jax.tree.map(jnp.asarray, params)
    reference_key, fresh_key = jax.random.split(key)
    together = mean_energy(energy_fn)
    as_one = jax.tree.map(lambda x: x[None], params)
    given = dynamics.pop("checkpoint", None)
    checkpoint = None if given is None else Path(given)

    def saved(part: str) -> dict[str, Any]:
        return dynamics if checkpoint is None else {**dynamics, "checkpoint": checkpoint / part}

    reference = simulate(reference_key, together, as_one, positions, **saved("reference"))
    frames, counted = reference.positions[0], reference.sound[0]
    graph = {k: v for k, v in dynamics.items() if k not in _SETTINGS}
    found = reweight(
        energy_fn,
        params,
        frames,
        lambda r: together(params, r, **graph),
        kT=dynamics["kT"],
        sound=counted,
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
