"""What a federated run sends, in bytes."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from stochgrad.core import Draws, Kernel, Position, Posterior, tree_bytes
from stochgrad.federated._clients import require_clients
from stochgrad.federated._matrices import MOST_CLIENTS, fits_matrices
from stochgrad.federated._spread import MOST_SAMPLED
from stochgrad.integrators import integrator_of

CLIENT_DATA = "data of client"
"""The name of the settings that hold digests of clients' data, which draws do not show."""


def carried_bytes(kernel: Kernel, position: Position) -> int:
    """Bytes of what a chain carries from client to client."""
    state = jax.eval_shape(kernel.init, position, jax.random.key(0))
    integrator = dict(kernel.settings).get("integrator")
    keeps = integrator is not None and integrator_of(integrator).keeps_gradient
    return tree_bytes(position) * (1 + hasattr(state, "momentum") + keeps)


def look_bytes(posterior: Posterior, origin: Position, chosen: str) -> int:
    """What clients send for the look at their curvatures by which ``surrogate="auto"`` chooses.

    A matrix each up to a hundred dimensions, and a diagonal beyond; a full matrix that is then
    taken for the surrogate is counted there.
    """
    count, flat = require_clients(posterior).count, ravel_pytree(origin)[0]
    if count == 1:
        return 0
    matrices = fits_matrices(posterior, origin) or (
        count > MOST_CLIENTS and flat.size <= MOST_SAMPLED
    )
    if not matrices:
        return count * flat.nbytes
    return 0 if chosen == "global_quadratic" else count * flat.size * flat.nbytes


def with_communication(draws: Draws, costs: dict, draw_bytes: int, setup: np.ndarray) -> Draws:
    """The draws, with what was sent until each of them.

    A draw within a visit is sent as well; one at its end is what the visit sends anyway.
    """
    sent: dict[str, Any] = {"bytes_up": 0, "bytes_down": 0}
    for name, (up, down) in costs.items():
        count = draws.stats[name].astype(np.int64)
        sent["bytes_up"] = sent["bytes_up"] + up * count
        sent["bytes_down"] = sent["bytes_down"] + down * count
    if "left" in draws.stats:
        inside = np.cumsum(draws.stats["left"] > 0, axis=1)
        sent["bytes_up"] = sent["bytes_up"] + draw_bytes * inside
    attrs = {"setup_bytes_up": int(setup[0]), "setup_bytes_down": int(setup[1])}
    known = {name: value for name, value in draws.attrs.items() if not name.startswith(CLIENT_DATA)}
    return replace(draws, stats={**draws.stats, **sent}, attrs={**known, **attrs})
