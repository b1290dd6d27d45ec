"""Energies, forces and virials of an energy function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from stochgrad.core import check_count, hoisted_jit, remembered
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
) -> Predicted:
    """Energies and forces of configurations by each of many networks.

    Args:
        energy_fn: ``(params, positions, **graph) -> scalar``.
        params: Weights of D networks, with a leading axis of D, as ``Networks.members`` gives.
        data: Configurations.
        batch_size: Configurations at once.

    Returns:
        Energies of shape (D, N), forces of shape (D, N, atoms, dim), zero for padding, as numpy
        arrays.

    Raises:
        TypeError: the data are no configurations, or the weights no arrays.
        ValueError: the weights have no leading axis in common; ``energy_fn`` fails on them, or
            returns no scalar.
    """
    data = check_configurations("data", data)
    params = check_networks(params)
    batch_size = min(check_count("batch_size", batch_size), data.count)
    each, shared = data.inputs()
    first = {**{name: value[0] for name, value in each.items()}, **shared}
    one = jax.tree.map(lambda x: jnp.asarray(x[0]), params)
    check_energy(energy_fn, one, jnp.asarray(data.positions[0]), first)
    rows = {"positions": data.positions, **each}
    blocks = -(-data.count // batch_size)
    order = np.resize(np.arange(data.count), blocks * batch_size)
    batched = {
        k: jnp.asarray(v)[order].reshape(blocks, batch_size, *v.shape[1:]) for k, v in rows.items()
    }
    shared = {name: jnp.asarray(value) for name, value in shared.items()}
    found = _many(energy_fn)(jax.tree.map(jnp.asarray, params), batched, shared)
    found = jax.tree.map(
        lambda x: np.asarray(x).reshape(len(x), -1, *x.shape[3:])[:, : data.count], found
    )
    if data.mask is None:
        return found
    there = data.mask[None, :, :, None]
    return found._replace(forces=np.where(there, found.forces, found.forces.dtype.type(0)))


@remembered
def energies_of(energy_fn: Callable):
    """``(params, frames, graph) -> energies`` of every network on frames, (replicas, frames)."""

    @hoisted_jit
    def of_all(params, frames, graph):
        def of_draw(p):
            return lax.map(jax.vmap(lambda r: energy_fn(p, r, **graph)), frames)

        return lax.map(of_draw, params)

    return of_all


@remembered
def _many(energy_fn: Callable):
    @hoisted_jit
    def over_draws(params, batched, shared):
        def of_block(params, rows):
            def of_row(row):
                graph = {k: v for k, v in row.items() if k != "positions"}
                return predict_one(energy_fn, params, row["positions"], {**graph, **shared})

            return jax.vmap(of_row)(rows)

        def of_draw(params):
            return lax.map(lambda rows: of_block(params, rows), batched)

        return lax.map(of_draw, params)

    return over_draws
