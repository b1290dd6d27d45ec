"""Mean square displacements of trajectories, and the diffusion that they show."""

from typing import Any

import numpy as np
from jaxtyping import Float

from stochgrad.core import check_array, check_count, check_number


def mean_square_displacement(
    positions: Any, num_lags: int, *, atoms: Any = None
) -> Float[np.ndarray, "*lead lags"]:
    r"""How far atoms go in a time, squared, along each trajectory.

    $$\mathrm{MSD}(k) = \Big\langle \big|r_a(t + k) - r_a(t) - \bar r(t + k) + \bar r(t)\big|^2
      \Big\rangle_{a,t},$$

    less the drift of all atoms' mean $\bar r$, which a Langevin thermostat does not hold.

    Args:
        positions: Frames that are not wrapped into the box, as ``Trajectories.positions``: shape
            (..., frames, atoms, dim).
        num_lags: Lags 0 to ``num_lags - 1``, in frames.
        atoms: Which atoms count, numbers or booleans; all if None.

    Returns:
        Shape (..., num_lags), in squares of the positions' unit.

    Raises:
        TypeError: these are no numbers.
        ValueError: they are not finite, a shape does not fit, or there are fewer frames than lags.

    Example:
        >>> import numpy as np, stochgrad
        >>> steps = np.random.default_rng(0).normal(size=(4000, 200, 3))
        >>> msd = stochgrad.potentials.mean_square_displacement(steps.cumsum(0), 4)
        >>> msd.round().tolist()
        [0.0, 3.0, 6.0, 9.0]
    """
    array = check_array("positions", positions).astype(np.float64)
    if array.ndim < 3 or 0 in array.shape:
        raise ValueError(f"positions must have shape (..., frames, atoms, dim), got {array.shape}.")
    num_lags = check_count("num_lags", num_lags)
    if num_lags > array.shape[-3]:
        raise ValueError(
            f"num_lags must be at most the number of frames, {array.shape[-3]}, got {num_lags}."
        )
    array = array - array.mean(-2, keepdims=True)
    if atoms is not None:
        numbers = np.arange(array.shape[-2])
        kind = "boolean" if np.asarray(atoms).dtype == bool else "integer"
        chosen = check_array("atoms", atoms, kind=kind)
        try:
            numbers = np.atleast_1d(numbers[chosen])
        except IndexError as error:
            raise ValueError(f"atoms must be some of {array.shape[-2]}, got {chosen}.") from error
        if not numbers.size:
            raise ValueError("atoms must choose some.")
        array = array[..., numbers, :]
    frames = array.shape[-3]
    lags = [
        ((array[..., k:, :, :] - array[..., : frames - k, :, :]) ** 2).sum(-1).mean((-1, -2))
        for k in range(num_lags)
    ]
    return np.stack(lags, -1)


def diffusion(
    msd: Any, time_between: float, *, dim: int = 3, first: int = 1
) -> Float[np.ndarray, "..."]:
    r"""Diffusion coefficients from mean square displacements, by least squares.

    $$\mathrm{MSD}(t) \approx c + 2\,\mathrm{dim}\,D\,t.$$

    In a Langevin thermostat it is that of the thermostat's friction too: compare at one friction,
    or take a small one. In a small box it lacks some $2.8\,k_BT/(6\pi\eta L)$.

    Args:
        msd: Shape (..., lags), from ``mean_square_displacement``.
        time_between: Time from one frame to the next.
        dim: Dimensions.
        first: The first lag that is fitted; earlier ones are ballistic.

    Raises:
        TypeError: these are no numbers.
        ValueError: there are fewer than two lags from ``first`` on, or a number is not positive.

    Example:
        >>> import stochgrad
        >>> float(stochgrad.potentials.diffusion([0.0, 3.0, 6.0, 9.0], 0.5))
        1.0
    """
    array = check_array("msd", msd).astype(np.float64)
    time_between = check_number("time_between", time_between)
    dim, first = check_count("dim", dim), check_count("first", first, least=0)
    if array.ndim == 0 or array.shape[-1] - first < 2:
        raise ValueError(f"msd must have two lags from first={first} on, got shape {array.shape}.")
    time = time_between * np.arange(first, array.shape[-1])
    centered = time - time.mean()
    return array[..., first:] @ centered / (centered**2).sum() / (2 * dim)
