"""Energies, forces and virials of an energy function."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from stochgrad.core import check_count, check_flag, hoisted_jit, remembered
from stochgrad.potentials._cell_lists import ListPlan, make_lists
from stochgrad.potentials._configurations import Configurations
from stochgrad.potentials._inputs import check_configurations, check_energy, check_networks


class Predicted(NamedTuple):
    """What a network says of configurations.

    Attributes:
        energy: Total energies.
        forces: Forces on the atoms.
        virial: Virials, of the shape asked for; None where none were.
    """

    energy: Float[Array, "..."]
    forces: Float[Array, "... atoms dim"]
    virial: Float[Array, "..."] | None = None


def predict_one(
    energy_fn: Callable,
    params: PyTree,
    positions: Float[Array, "atoms dim"],
    graph: dict[str, Any],
    strain: tuple[int, ...] | None = None,
) -> Predicted:
    r"""Energy, forces and, for a strain's shape, the virial of one configuration.

    $$F = -\nabla_r U, \qquad W = -\partial U/\partial\varepsilon.$$
    """
    if strain is None:
        energy, slope = jax.value_and_grad(energy_fn, argnums=1)(params, positions, **graph)
        return Predicted(energy, -slope)

    def strained(positions, epsilon):
        if epsilon.ndim == 1:
            stretch = 1 + epsilon
            moved = positions * stretch[None]
            by = stretch.astype

            def box(b):
                return b * (by(b.dtype) if b.ndim == 1 else by(b.dtype)[:, None])

        else:
            deform = jnp.eye(len(epsilon), dtype=epsilon.dtype) + epsilon
            moved = positions @ deform.T

            def box(b):
                return deform.astype(b.dtype) @ b

        bent = {k: box(v) if k == "box" else v for k, v in graph.items()}
        return energy_fn(params, moved, **bent)

    zero = jnp.zeros(strain, positions.dtype)
    energy, (slope, virial) = jax.value_and_grad(strained, argnums=(0, 1))(positions, zero)
    return Predicted(energy, -slope, -virial)


def predict(
    energy_fn: Callable,
    params: PyTree,
    data: Configurations,
    *,
    batch_size: int = 256,
    virial: bool = False,
) -> Predicted:
    r"""Energies, forces and virials of configurations by each of many networks.

    Args:
        energy_fn: ``(params, positions, **graph) -> scalar``.
        params: Weights of D networks, with a leading axis of D, as ``Networks.members`` gives.
        data: Configurations.
        batch_size: Configurations at once.
        virial: Whether to give virials too, $W = -\partial U/\partial\varepsilon$. ASE's stress
            is $-W/V$.

    Returns:
        Energies of shape (D, N), forces of shape (D, N, atoms, dim), zero for padding, and virials
        of shape (D, N, dim, dim), or (D, N, dim) in a box of edge lengths, as numpy arrays.

    Raises:
        TypeError: the data are no configurations, or the weights no arrays.
        ValueError: the weights have no leading axis in common; ``energy_fn`` fails on them, or
            returns no scalar.
    """
    data = check_configurations("data", data)
    params = check_networks(params)
    batch_size = min(check_count("batch_size", batch_size), len(data))
    dim = data.positions.shape[-1]
    sheared = data.box is None or data.box.ndim == 3
    strain = ((dim, dim) if sheared else (dim,)) if check_flag("virial", virial) else None
    each, shared = data.inputs()
    first = {**jax.tree.map(lambda x: x[0], each), **shared}
    one = jax.tree.map(lambda x: jnp.asarray(x[0]), params)
    check_energy(energy_fn, one, jnp.asarray(data.positions[0]), first)
    blocks = -(-len(data) // batch_size)
    order = np.resize(np.arange(len(data)), blocks * batch_size)

    def in_blocks(x):
        return jnp.asarray(x)[order].reshape(blocks, batch_size, *x.shape[1:])

    batched = jax.tree.map(in_blocks, {"positions": data.positions, **each})
    params, shared = jax.tree.map(jnp.asarray, (params, shared))
    found = _many(energy_fn, strain)(params, batched, shared)
    found = jax.tree.map(
        lambda x: np.asarray(x).reshape(len(x), -1, *x.shape[3:])[:, : len(data)], found
    )
    if data.mask is None:
        return found
    there = data.mask[None, :, :, None]
    return found._replace(forces=np.where(there, found.forces, found.forces.dtype.type(0)))


@remembered
def energies_of(energy_fn: Callable, plan: ListPlan | None = None):
    """``(params, frames, graph) -> energies`` of every network on frames, (replicas, frames)."""

    @hoisted_jit
    def of_all(params, frames, graph):
        def of_draw(p):
            def of_frame(r):
                if plan is None:
                    return energy_fn(p, r, **graph)
                lists = make_lists(plan, r)
                energy = energy_fn(p, r, **graph, neighbors=lists.neighbors)
                return jnp.where(lists.overflow, jnp.nan, energy)

            of_replica = jax.vmap(of_frame) if plan is None else partial(lax.map, of_frame)
            return lax.map(of_replica, frames)

        return lax.map(of_draw, params)

    return of_all


@remembered
def _many(energy_fn: Callable, strain: tuple[int, ...] | None):
    @hoisted_jit
    def over_draws(params, batched, shared):
        def of_block(params, rows):
            def of_row(row):
                graph = {k: v for k, v in row.items() if k != "positions"}
                graph = {**graph, **shared}
                return predict_one(energy_fn, params, row["positions"], graph, strain)

            return jax.vmap(of_row)(rows)

        def of_draw(params):
            return lax.map(lambda rows: of_block(params, rows), batched)

        return lax.map(of_draw, params)

    return over_draws
