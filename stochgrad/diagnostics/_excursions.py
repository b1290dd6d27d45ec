"""Draws that a step too large threw out of the posterior."""

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import Draws, Posterior, last_draws, log_densities, some_series, tree_bytes

_SUSPECTS = 16
_EXCURSION, _LEAST_EXCURSION = 12.0, 40.0
_FEW, _SHARE = 5e-4, 0.25
_MOST_SERIES, _MOST_BYTES = 256, 2**28
_EXACT = ("NUTS", "MALA")


def excursion_reasons(draws: Draws) -> list[str]:
    """Draws, few enough that no mean shows them, that a step too large threw far out."""
    healthy = draws.first_bad < 0
    if draws.collected or draws.num_draws < 20 or not healthy.any():
        return []
    return _far_below(draws, healthy) or _few_make_the_spread(draws, healthy)


def _few_make_the_spread(draws: Draws, healthy: np.ndarray) -> list[str]:
    """Numbers of the model a quarter of whose variance comes from one draw in two thousand.

    In the model's own space, where a scale that was thrown to exp(3) is far from the others. The
    share is below 0.02 for a normal, about 0.1 for a log-normal of scale 1, and larger for tails so
    heavy that there is hardly a variance.
    """
    if draws.attrs.get("method") in _EXACT:
        return []
    if tree_bytes(draws.positions) > _MOST_BYTES:
        values = last_draws(draws, healthy)
    else:
        values = {name: x[healthy] for name, x in draws.constrained().items()}
    names, series, _ = some_series(values, _MOST_SERIES)
    squares = np.sort(
        (series - np.median(series, axis=(0, 1))).reshape(-1, len(names)) ** 2, axis=0
    )
    few = max(round(_FEW * len(squares)), 1)
    share = squares[-few:].sum(0) / np.maximum(squares.sum(0), 1e-300)
    if not len(names) or len(squares) < 100 or np.max(share) < _SHARE:
        return []
    i = int(np.argmax(share))
    which = "one draw makes" if few == 1 else f"{few} draws make"
    return [
        f"{which} up {share[i]:.0%} of the variance of {names[i]!r}, of {len(squares)}: in a "
        "narrow place the step was too large and threw the chain out, or the tail is so heavy that "
        "there is hardly a variance. Its mean and standard deviation rest on them. Take a smaller "
        "step, or reparameterize (a hierarchy non-centered); or report quantiles."
    ]


def _far_below(draws: Draws, healthy: np.ndarray) -> list[str]:
    """Draws that lie where the posterior is next to nothing, thrown there by a step too large.

    The draws furthest from the others in some coordinate, and
    those of the lowest log density by their minibatch, are compared with a sample of all, by the
    log density on all rows.
    """
    posterior = draws.posterior
    if not isinstance(posterior, Posterior):
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
