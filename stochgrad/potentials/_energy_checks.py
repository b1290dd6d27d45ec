"""Checks of an energy function on reference configurations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import PyTree

from stochgrad.core import hoisted_jit, remembered
from stochgrad.potentials._configurations import Configurations
from stochgrad.potentials._inputs import check_energy
from stochgrad.potentials._neighbors import Neighbors
from stochgrad.potentials._predict import predict_one


def check_species_known(energy_fn, params, dataset: Configurations) -> Any:
    """The energy's type; raise unless it is a scalar with parameters for every species."""
    each, shared = dataset.inputs()
    graph = {**jax.tree.map(lambda x: x[0], each), **shared}
    dtype = check_energy(energy_fn, params, jnp.asarray(dataset.positions[0]), graph)
    species = dataset.known_species()
    if species is None or species.max() == 0:
        return dtype
    last = int(species.max())
    row = int(np.argmax((species == last).any(-1))) if species.ndim == 2 else 0
    graph = {**jax.tree.map(lambda x: x[row], each), **shared}
    own = jnp.asarray(species[row] if species.ndim == 2 else species)
    positions = jnp.asarray(dataset.positions[row])

    def beyond(species):
        """What is read beyond the end of a table, None if nothing is."""
        return _indexed(energy_fn)(params, positions, {**graph, "species": species})[0].get()

    zero = jnp.zeros_like(own)
    try:
        missing = beyond(own)
        known = missing is None or beyond(zero) is not None
    except Exception:  # checkify cannot follow every function; a NaN for a species alone is a sign
        values = [energy_fn(params, positions, **{**graph, "species": s}) for s in (own, zero)]
        missing, known = "its energy is NaN", not np.isnan(values[0]) or bool(np.isnan(values[1]))
    if not known:
        raise ValueError(
            f"energy_fn has no parameters for species {last}, the largest that the data have: it "
            f"reads beyond the end of a table ({str(missing).strip().rstrip('.')})."
        )
    return dtype


def check_padding(energy_fn, params, dataset: Configurations) -> None:
    """Raise where the energy of a configuration depends on what pads its atoms or its pairs."""
    each, shared = dataset.inputs()
    row = 0 if dataset.mask is None else int(np.argmin(dataset.mask.sum(1)))
    graph = {**jax.tree.map(lambda x: jnp.asarray(x[row]), each), **shared}
    positions = jnp.asarray(dataset.positions[row])
    cases: dict[str, Any] = {}
    if dataset.mask is not None and not dataset.mask[row].all():
        there = jnp.asarray(dataset.mask[row])[:, None]
        spread = jnp.asarray(np.ptp(dataset.positions[row]) + 1, positions.dtype)
        away = positions + spread * jnp.arange(1, len(positions) + 1).astype(spread.dtype)[:, None]
        cases["atoms: take the mask"] = (jnp.where(there, positions, away), graph)
    if dataset.neighbors is not None:
        longer = [
            x if x.ndim == 0 else jnp.pad(x, [(0, 8), *[(0, 0)] * (x.ndim - 1)])
            for x in graph["neighbors"]
        ]
        more = {**graph, "neighbors": Neighbors(*longer)}
        cases["pairs: take neighbors.mask, or end at the cut-off"] = (positions, more)
    for padding, (at, given) in cases.items():
        energy, other = (
            np.asarray(energy_fn(params, r, **g), np.float64)
            for r, g in ((positions, graph), (at, given))
        )
        if np.isfinite(energy) and not np.isclose(other, energy, rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"energy_fn depends on the padding of {padding} (configuration {row} has "
                f"{energy:.6g}, and {other:.6g} with other padding)."
            )


@remembered
def _indexed(energy_fn):
    def energy(params, positions, graph):
        return energy_fn(params, positions, **graph)

    return jax.jit(checkify.checkify(energy, errors=checkify.index_checks))


_BLOCK = 64


def check_gradient(energy_fn, params, dataset: Configurations, batch_size: Any) -> None:
    """Raise unless forces and their gradient by the weights are finite in every configuration."""
    each, shared = dataset.inputs()
    unlabeled = np.zeros_like(dataset.positions)
    target = unlabeled if dataset.forces is None else np.nan_to_num(dataset.forces)
    rows = {**each, "positions": dataset.positions, "target": target}
    strain = None if dataset.virials is None else dataset.virials.shape[1:]
    most = batch_size if isinstance(batch_size, int) and batch_size > 0 else _BLOCK
    size = min(most, _BLOCK, len(dataset))  # memory for a minibatch is there
    of_block = _gradients(energy_fn, strain)
    for begin in range(0, len(dataset), size):
        chosen = np.minimum(np.arange(begin, begin + size), len(dataset) - 1)
        block = jax.tree.map(lambda x: jnp.asarray(x[chosen]), rows)
        forces, slopes = of_block(params, block, shared)
        good = [np.asarray(forces), *map(np.asarray, jax.tree.leaves(slopes))]
        if np.all(good):
            continue
        row = int(np.argmin(np.all(good, axis=0)))
        remedy = (
            "a norm of a zero distance does it (of padding, of an atom and itself), also behind a "
            "mask: take stochgrad.potentials.distances, or put 1 for the square under the root "
            "where it is zero."
        )
        if not good[0][row]:
            leaf = _leaf_at(slopes, row)
            also = f", nor is their gradient by {leaf}, of the weights" if leaf else ""
            raise ValueError(
                f"energy_fn gives forces that are not finite in configuration {begin + row}{also}: "
                f"{remedy}"
            )
        raise ValueError(
            f"energy_fn has forces whose gradient by {_leaf_at(slopes, row)}, of the weights, is "
            f"not finite in configuration {begin + row}: {remedy}"
        )


def _leaf_at(slopes: PyTree, row: int) -> str | None:
    """The first leaf of the weights whose gradient is not finite in a row, if there is one."""
    for path, finite in jax.tree_util.tree_leaves_with_path(slopes):
        if not finite[row]:
            return "params" + jax.tree_util.keystr(path)
    return None


@remembered
def _gradients(energy_fn, strain):
    """Whether each row's forces, and their misfit's gradient by each leaf, are finite."""

    @hoisted_jit
    def of_block(params, block, shared):
        def of_row(row):
            graph = {k: v for k, v in row.items() if k not in ("positions", "target")}
            there = graph.get("mask", shared.get("mask"))

            def misfit(params):
                found = predict_one(
                    energy_fn, params, row["positions"], {**graph, **shared}, strain
                )
                error = found.forces - row["target"].astype(found.forces.dtype)
                error = error if there is None else jnp.where(there[:, None], error, 0)
                total = jnp.sum(error**2) + found.energy.astype(error.dtype)
                if strain is not None:
                    total += jnp.sum(jnp.asarray(found.virial))
                return total.astype(float), jnp.all(jnp.isfinite(error))

            slopes, finite = jax.grad(misfit, has_aux=True)(params)
            return finite, jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), slopes)

        return jax.vmap(of_row)(block)

    return of_block
