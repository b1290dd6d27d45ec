"""What networks disagree about: convergence of chains, and configurations unlike the data."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

from stochgrad.core import Draws, check_number
from stochgrad.diagnostics import rhat
from stochgrad.potentials._configurations import Configurations
from stochgrad.potentials._predict import predict


def force_rhat(
    energy_fn: Callable[..., Any], params: PyTree, probe: Configurations
) -> Float[np.ndarray, "N atoms dim"]:
    """R-hat of the forces that chains of networks predict.

    Weights have no R-hat that means anything: two networks that permute their hidden units are far
    apart, and the same function. How far the chains' forces agree on a few configurations does. It
    cannot see chains that all start from nearly one function and have far to go.

    Args:
        energy_fn: ``(params, positions, **graph) -> scalar``.
        params: Weights, with axes of chains and draws before their own; two chains and four draws
            at least.
        probe: Configurations to compare on.

    Returns:
        R-hat of every force component, as ``stochgrad.diagnostics.rhat`` has it.

    Raises:
        ValueError: there are too few chains or draws.
    """
    chains, draws = jax.tree.leaves(params)[0].shape[:2]
    if chains < 2 or draws < 4:
        raise ValueError(f"R-hat needs two chains of four draws at least, got {chains} of {draws}.")
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), params)
    forces = np.asarray(predict(energy_fn, flat, probe).forces)
    forces = forces.reshape(chains, draws, *forces.shape[1:])
    return rhat(_as_draws(forces))


def novelty(forces: Any, noise: float | Any = 1.0, *, known: Any = None) -> Float[np.ndarray, " N"]:
    r"""How unlike the data each configuration is: the networks' disagreement over the noise.

    $$s_i = \sqrt{\tfrac{1}{3n}\sum_k \operatorname{Var}_d F_{dik} / \sigma_k^2},$$

    or, where ``known`` configurations are given to compare with, the share of them with a lower
    score: 0.99 is stranger than 99 of 100.

    Args:
        forces: Predictions of D networks, shape (D, N, atoms, dim).
        noise: $\sigma$, a number or what broadcasts to (N, atoms, dim).
        known: Predictions on held-out configurations like the data, shape (D, M, atoms, dim).

    Raises:
        ValueError: there are fewer than two networks.
    """
    if np.ndim(noise) == 0:
        check_number("noise", noise)

    def score(forces):
        forces = np.asarray(forces, np.float64)
        if forces.ndim != 4 or len(forces) < 2:
            raise ValueError(
                "forces must be of two networks at least, shape (D, N, atoms, dim), got "
                f"{forces.shape}."
            )
        return np.sqrt((forces.var(0, ddof=1) / np.square(noise)).mean((1, 2)))

    scores = score(forces)
    if known is None:
        return scores
    return np.searchsorted(np.sort(score(known)), scores) / np.shape(known)[1]


def _as_draws(values: np.ndarray) -> Draws:
    shape = values.shape[:2]
    return Draws(values, {}, np.ones(shape, bool), np.full(shape[0], -1))
