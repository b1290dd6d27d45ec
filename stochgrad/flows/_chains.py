"""Chains of a density of many modes: where they start, and that they stay finite."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from stochgrad.core import (
    ConvergenceWarning,
    Draws,
    Kernel,
    PRNGKey,
    check_array,
    check_finite,
    first_line,
    sample,
)


def starts(
    init: Any, num_chains: int, shape: tuple[int, ...] | None, key: PRNGKey
) -> Float[Array, "n ..."]:
    """Where the chains start; of the flow's shape, if there is one yet."""
    if callable(init):
        keys = jax.random.split(key, num_chains)
        try:
            init = jnp.stack([jnp.asarray(init(k)) for k in keys])
        except Exception as error:
            raise ValueError(
                f"init must be a function key -> position, one array, and fails on a key: "
                f"{first_line(error)}."
            ) from error
    places = jnp.asarray(check_array("init", init))
    wanted = (num_chains, *(places.shape[1:] if shape is None else shape))
    if not jnp.issubdtype(places.dtype, jnp.floating) or places.shape != wanted:
        raise ValueError(
            f"init must be floating-point positions of shape (num_chains, ...), here {wanted}, or "
            f"a function key -> position, got {places.dtype} of shape {places.shape}."
        )
    check_finite("init", places)
    return places


def run_chains(key: PRNGKey, kernel: Kernel, places: Float[Array, "n ..."], **options) -> Draws:
    """Chains that start there, all of them finite to the end."""
    each = iter(places)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the rounds' own checks are sharper
        draws = sample(key, kernel, init=lambda key: next(each), **options)
    if draws.num_draws < options["num_samples"]:
        raise KeyboardInterrupt
    if np.any(draws.first_bad >= 0):
        raise ValueError(
            f"chains: {int(np.sum(draws.first_bad >= 0))} of {len(places)} diverged (left the "
            "finite numbers): take smaller steps, or stochgrad.mala, which refuses such moves."
        )
    return draws
