"""The pressure of trajectories under each network."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, PyTree

from stochgrad.core import check_array, check_number, hoisted_jit, remembered
from stochgrad.potentials._cell_lists import ListPlan, make_lists, plan_lists, with_room
from stochgrad.potentials._inputs import (
    check_energy,
    check_frame_inputs,
    check_graph,
    check_networks,
    check_static,
)
from stochgrad.potentials._predict import predict_one


def pressure(
    energy_fn: Callable[..., Any],
    params: PyTree,
    positions: Any,
    *,
    kT: float,
    box: Any,
    cutoff: float | None = None,
    static: Sequence[str] = (),
    **graph: Any,
) -> Float[np.ndarray, "D replicas"]:
    r"""The pressure of each network's own trajectories, from its virial.

    $$P = \frac{Nk_BT}{V} + \frac{\langle\operatorname{tr} W\rangle}{\mathrm{dim}\,V}, \qquad
      W = -\frac{\partial U}{\partial\varepsilon}.$$

    Args:
        energy_fn: ``(params, positions, **graph) -> scalar``.
        params: Weights of D networks, with a leading axis of D.
        positions: Shape (D, replicas, frames, atoms, dim), as ``Trajectories.positions``.
        kT: $k_BT$.
        box: Edge lengths, or a matrix of lattice vectors in columns.
        cutoff: As in ``stochgrad.potentials.simulate``.
        static: Likewise.
        graph: Likewise.

    Returns:
        Shape (D, replicas), in energies over volumes: 1 eV/Å³ is 160.2 GPa. For ``intervals``.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a number is out of range, a shape does not fit, or ``energy_fn`` fails.

    Example:
        >>> import jax.numpy as jnp, numpy as np, stochgrad
        >>> gas = np.random.default_rng(0).uniform(size=(1, 2, 3, 10, 3))
        >>> free = lambda p, r, box: jnp.sum(0 * r)
        >>> stochgrad.potentials.pressure(free, jnp.ones(1), gas, kT=2.0, box=np.ones(3)).tolist()
        [[20.0, 20.0]]
    """
    kT = check_number("kT", kT)
    params = jax.tree.map(jnp.asarray, check_networks(params))
    draws = jax.tree.leaves(params)[0].shape[0]
    frames = check_array("positions", positions)
    if frames.ndim != 5 or 0 in frames.shape or len(frames) != draws:
        raise ValueError(
            f"positions must have shape ({draws}, replicas, frames, atoms, dim), got "
            f"{frames.shape}."
        )
    atoms, dim = frames.shape[3:]
    graph = check_graph({**graph, "box": box})
    check_static(static, graph, atoms)
    check_frame_inputs(graph, atoms, dim)
    lattice = np.asarray(graph["box"], np.float64)
    volume = np.prod(lattice) if lattice.ndim == 1 else abs(np.linalg.det(lattice))
    frames = jnp.asarray(frames)
    frames = frames if frames.dtype.kind == "f" else frames.astype(jnp.result_type(float))
    plan, own = None, {}
    if cutoff is not None:
        every = np.asarray(frames).reshape(-1, atoms, dim)
        start = plan_lists(every[:: max(1, len(every) // 16)], cutoff, 0.0, box=graph["box"])
        plan = with_room(start, frames)
        own = {"neighbors": make_lists(plan, frames[0, 0, 0]).neighbors}
    one = jax.tree.map(lambda x: x[0], params)
    check_energy(energy_fn, one, frames[0, 0, 0], {**graph, **own})
    traces = np.asarray(_traces(energy_fn, plan)(params, frames, graph), np.float64)
    return atoms * kT / volume + traces.mean(-1) / (dim * volume)


@remembered
def _traces(energy_fn: Callable, plan: ListPlan | None):
    """Traces of virials, (D, replicas, frames)."""

    @hoisted_jit
    def of_all(params, frames, graph):
        dim = frames.shape[-1]

        def of_frame(p, r):
            own = {} if plan is None else {"neighbors": make_lists(plan, r).neighbors}
            virial = predict_one(energy_fn, p, r, {**graph, **own}, (dim,)).virial
            return jnp.sum(jnp.asarray(virial))

        def of_draw(x):
            p, replicas = x
            return lax.map(lambda rs: lax.map(lambda r: of_frame(p, r), rs), replicas)

        return lax.map(of_draw, (params, frames))

    return of_all
