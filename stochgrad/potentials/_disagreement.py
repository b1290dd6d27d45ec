"""What networks disagree about: convergence of chains, and configurations unlike the data."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

from stochgrad.core import Draws, check_array, check_number
from stochgrad.diagnostics import rhat
from stochgrad.potentials._configurations import Configurations
from stochgrad.potentials._inputs import check_configurations, check_networks
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
        R-hat of every force component, as ``stochgrad.diagnostics.rhat`` has it; NaN for padding
        and for forces that never change, which ``numpy.nanmedian`` and the like leave out.

    Raises:
        TypeError: the weights are no arrays, the probe no configurations.
        ValueError: there are too few chains or draws.
    """
    probe = check_configurations("probe", probe)
    params = check_networks(params, axes=2)
    chains, draws = jax.tree.leaves(params)[0].shape[:2]
    if chains < 2 or draws < 4:
        raise ValueError(
            "R-hat needs two chains of four draws at least, got params with axes of "
            f"{chains} of {draws}."
        )
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), params)
    forces = np.asarray(predict(energy_fn, flat, probe).forces)
    if not np.isfinite(forces).all():
        row = int(np.argwhere(~np.isfinite(forces).all((0, 2, 3)))[0, 0])
        raise ValueError(f"energy_fn gives forces that are not finite in configuration {row}.")
    forces = forces.reshape(chains, draws, *forces.shape[1:])
    return rhat(_as_draws(forces))


def novelty(
    forces: Any,
    noise: float | Any = 1.0,
    *,
    mask: Any = None,
    known: Any = None,
    known_mask: Any = None,
) -> Float[np.ndarray, " N"]:
    r"""How unlike the data each configuration is: the networks' disagreement over the noise.

    $$s_i = \sqrt{\tfrac{1}{3n_i}\sum_k \operatorname{Var}_d F_{dik} / \sigma_k^2},$$

    over the $n_i$ atoms that there are; or, where ``known`` configurations are given to compare
    with, the share of them with a lower score: 0.99 is stranger than 99 of 100.

    Args:
        forces: Predictions of D networks, shape (D, N, atoms, dim).
        noise: $\sigma$, a number or what broadcasts to (N, atoms, dim).
        mask: Which atoms there are, shape (N, atoms), as ``Configurations.mask``.
        known: Predictions on held-out configurations like the data, shape (D, M, atoms, dim).
        known_mask: Which atoms they have, shape (M, atoms).

    Raises:
        TypeError: these are no arrays of numbers, a mask none of booleans.
        ValueError: there are fewer than two networks; a number is not finite, the noise not
            positive; or, without a mask, an atom's forces are exactly zero in all networks, as
            those of padding are.

    Example:
        >>> import numpy as np, stochgrad
        >>> forces = np.random.default_rng(0).normal(size=(500, 2, 4, 3))
        >>> forces[:, 1, 2:] = 0  # two atoms of padding
        >>> mask = np.array([[True] * 4, [True, True, False, False]])
        >>> stochgrad.potentials.novelty(forces, mask=mask).round(1)
        array([1., 1.])
    """
    sigma = check_array("noise", noise).astype(np.float64)
    if sigma.ndim == 0:
        check_number("noise", noise)
    if np.any(sigma <= 0):
        raise ValueError(f"noise must be positive, got {sigma.min():g}.")
    scores = _scores("forces", forces, sigma, "mask", mask)
    if known is None:
        if known_mask is not None:
            raise ValueError("known_mask is of known configurations: pass them as known.")
        return scores
    others = _scores("known", known, sigma, "known_mask", known_mask)
    if np.shape(known)[0] != np.shape(forces)[0]:
        raise ValueError(
            f"known must be of the same {np.shape(forces)[0]} networks, got {np.shape(known)[0]}."
        )
    return np.searchsorted(np.sort(others), scores) / np.shape(known)[1]


def _scores(name, forces, sigma, mask_name, mask) -> np.ndarray:
    forces = check_array(name, forces, finite=False).astype(np.float64)
    if forces.ndim != 4 or len(forces) < 2 or 0 in forces.shape:
        raise ValueError(
            f"{name} must be of two networks at least, shape (D, N, atoms, dim), got "
            f"{forces.shape}."
        )
    try:
        sigma = np.broadcast_to(sigma, forces.shape[1:])
    except ValueError:
        raise ValueError(
            f"noise must broadcast to {name}, {forces.shape[1:]}, got {sigma.shape}."
        ) from None
    if mask is None:
        there = np.ones(forces.shape[1:3], bool)
        absent = np.argwhere((forces == 0).all((0, 3)))
        if len(absent):
            n, atom = absent[0]
            raise ValueError(
                f"{name} of atom {atom} in configuration {n} are exactly zero in all networks, as "
                f"padding is: pass {mask_name}=data.mask to leave padding out (of ones to count "
                "all)."
            )
    else:
        there = check_array(mask_name, mask, kind="boolean")
        if there.shape != forces.shape[1:3] or not there.any(1).all():
            raise ValueError(
                f"{mask_name} must have shape {forces.shape[1:3]} and leave an atom in each "
                f"configuration, got {there.shape}."
            )
    bad = there & ~np.isfinite(forces).all((0, 3))
    if bad.any():
        n, atom = np.argwhere(bad)[0]
        raise ValueError(f"{name} must be finite, but atom {atom} of configuration {n} is not.")
    with np.errstate(invalid="ignore"):  # padding may hold anything
        spread = np.where(there[..., None], forces.var(0, ddof=1) / sigma**2, 0)
    return np.sqrt(spread.sum((1, 2)) / there.sum(1) / forces.shape[-1])


def _as_draws(values: np.ndarray) -> Draws:
    shape = values.shape[:2]
    return Draws(values, {}, np.ones(shape, bool), np.full(shape[0], -1))
