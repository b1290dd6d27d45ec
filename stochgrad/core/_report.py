"""What a run says at its end."""

import warnings
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core._draws import Draws
from stochgrad.core._verdict import warn_of_divergence, warn_of_draws
from stochgrad.core._warnings import DivergenceWarning

_MOST_BYTES = 2**28


def report(
    draws: Draws,
    kernel: Any,
    positions: PyTree,
    thin: int,
    num_warmup: int,
    num_samples: int,
    exact: bool,
) -> None:
    """Say once what went wrong, and how far the draws can be trusted, in words.

    Args:
        draws: What the run gave.
        kernel: The kernel.
        positions: Where the first chain started.
        thin: Steps of a draw.
        num_warmup: Draws that were discarded.
        num_samples: Draws that were wanted.
        exact: Whether the draws are as the sampler had them, and not rounded by a store.
    """
    settings = dict(getattr(kernel, "settings", ()))
    level = 4  # the caller of sample
    where = {
        chain: f"{'at' if thin == 1 else 'by'} step {step} ("
        + (f"draw {step // thin - num_warmup}" if step >= num_warmup * thin else "warm-up")
        + ")"
        for chain, step in enumerate(draws.first_bad)
        if step >= 0
    }
    leaf = (
        _bad_gradient(kernel, positions)
        if where and min(draws.first_bad[[*where]]) < max(2, thin)
        else None
    )
    if leaf is not None:
        warnings.warn(
            f"{len(where)} of {len(draws.first_bad)} chains diverged at the first step: the "
            f"gradient at {leaf} is not finite where the log density is. The usual cause is a "
            "function without a derivative there, such as a root or a norm at zero, also behind "
            "jnp.where: choose its argument, and not its value, by jnp.where.",
            DivergenceWarning,
            stacklevel=level - 1,
        )
    else:
        warn_of_divergence(
            where,
            len(draws.first_bad),
            settings.get("step_size"),
            int(np.sum(draws.finite)),
            num_samples * len(draws.first_bad),
            level,
        )
    healthy = draws.first_bad < 0
    # with all rows gradients differ since positions do
    ratios = None if settings.get("order") == "full" else draws.stats.get("noise_ratio")
    values = draws.stats.get("log_density", draws.stats.get("logdensity"))
    law = bool(getattr(kernel, "samples", True))
    samples = law and bool(healthy.any()) and draws.num_draws > 0
    warn_of_draws(
        last_draws(draws, healthy) if samples else {},
        noise_ratio=None if ratios is None else ratios[healthy],
        log_density=None if values is None else values[healthy],
        steps=thin if exact and not draws.collected else None,
        samples=samples,
        level=level,
    )


def last_draws(draws: Draws, healthy: np.ndarray) -> dict[str, np.ndarray]:
    """Draws of the healthy chains by name; of those in a store the last 256 MiB."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "x": _last_draws(x, healthy)
        for path, x in jax.tree_util.tree_leaves_with_path(draws.positions)
    }


def _last_draws(x: Any, healthy: np.ndarray) -> np.ndarray:
    if not isinstance(x, np.ndarray):
        each = max(x.size // max(x.shape[1], 1) * x.dtype.itemsize, 1)
        x = np.asarray(x[:, max(x.shape[1] - max(_MOST_BYTES // each, 1), 0) :])
    return x if healthy.all() else x[healthy]


def _bad_gradient(kernel, positions) -> str | None:
    """The leaf of a position at which the first gradient is not finite, if there is one."""
    posterior = getattr(kernel, "posterior", None)
    if posterior is None or posterior.batches.stream is not None or posterior.batches.mesh:
        return None
    batch, _ = posterior.batches.next(posterior.batches.init(jax.random.key(0)))
    gradient = jax.grad(posterior.log_density)(positions, batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        if not np.all(np.isfinite(leaf)):
            return "init" + jax.tree_util.keystr(path)
    return None
