"""Draws that a step too large threw out of the posterior."""

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import Draws, Posterior, last_draws, log_densities

_SUSPECTS = 16
_EXCURSION, _LEAST_EXCURSION = 12.0, 40.0


def excursion_reasons(draws: Draws) -> list[str]:
    """Draws that lie where the posterior is next to nothing, thrown there by a step too large.

    Few enough that no mean shows them. The draws furthest from the others in some coordinate, and
    those of the lowest log density by their minibatch, are compared with a sample of all, by the
    log density on all rows.
    """
    posterior = draws.posterior
    healthy = draws.first_bad < 0
    if not isinstance(posterior, Posterior) or draws.collected or draws.num_draws < 20:
        return []
    if not healthy.any():
        return []
    positions = last_draws(draws, healthy)
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in positions.items()}
    total = len(next(iter(flat.values())))
    distance = np.zeros(total)
    for x in flat.values():
        x = x.reshape(total, -1).astype(np.float64)
        middle = np.median(x, axis=0)
        spread = np.maximum(np.median(np.abs(x - middle), axis=0), 1e-300)
        distance = np.maximum(distance, np.max(np.abs(x - middle) / spread, axis=1))
    far = np.argsort(-distance)[:_SUSPECTS]
    values = np.asarray(draws.stats.get("log_density", np.zeros((0, 0))))
    if values.size and values[healthy].size == total:
        far = np.union1d(far, np.argsort(values[healthy].ravel())[:_SUSPECTS])
    sample = np.linspace(0, total - 1, 8 * _SUSPECTS).astype(int)
    chosen = np.concatenate([np.resize(far, 2 * _SUSPECTS), sample])
    leaves = [jnp.asarray(x[chosen]) for x in flat.values()]
    points = jax.tree.unflatten(jax.tree.structure(draws.positions), leaves)
    densities = np.asarray(log_densities(posterior)(points), np.float64)
    suspects, usual = densities[: 2 * _SUSPECTS], densities[2 * _SUSPECTS :]
    middle = np.median(usual)
    spread = 1.5 * np.median(np.abs(usual - middle))
    low = suspects < middle - max(_EXCURSION * spread, _LEAST_EXCURSION)
    count = len(np.unique(np.resize(far, 2 * _SUSPECTS)[low]))
    if not count:
        return []
    return [
        f"at least {count} of {total} draws lie where the log density is up to "
        f"{middle - np.min(suspects):.0f} below that of the others, with a spread of {spread:.2g}: "
        "in a narrow place the step was too large and threw the chain out. Means and standard "
        "deviations may rest on them. Take a smaller step, or reparameterize (a hierarchy "
        "non-centered)."
    ]
