"""What a client may answer, as far as a server without its data can tell."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from stochgrad.core import Kernel, check_count, describe
from stochgrad.federated import Diagonal, Full, step_time
from stochgrad.interop.flower._wire import Refused

_WIDER = 1.5
"""How much wider than by the law draws may be in many dimensions."""
_ROUNDING = 1e-5
_KICK = 10.0
"""Momenta that a step may add, in units of what a momentum may be: above it no step is stable."""


class Answer(NamedTuple):
    """A client's log likelihood at a position: its value and slope there, raveled."""

    position: np.ndarray
    value: float
    slope: np.ndarray


class Reach(NamedTuple):
    r"""How far from the reference a visit may end.

    An honest visit diffuses about the reference, towards which its drift leads. With curvature
    $\Lambda$ of all surrogates the distance is $\sqrt{\delta^\top\Lambda\delta}$, and at most
    $\frac32\sqrt d + z$; without, in the units of the position, it is at most that many times
    $\sqrt{2 h T}$ more than it was before the visit.

    Attributes:
        origin: The reference, raveled.
        precision: The sum of the surrogates' precisions, a matrix or a diagonal, if there are any.
        diffusion: $\sqrt{2 h T}$; None if it is not known.
        most: $z$.
        unit_mass: Whether momenta have a variance of one.
        step_size: h, if it is a number.
        newton: How many standard deviations the mode is from the reference, by one Newton step: a
            search that ended early leaves chains that way to go.
    """

    origin: np.ndarray
    precision: np.ndarray | None
    diffusion: float | None
    most: float
    unit_mass: bool
    step_size: float | None
    newton: float

    def check(self, start: PyTree, state: Any, draws: PyTree) -> None:
        """Raise ``Refused`` if the end of a visit, or one of its draws, is too far away."""
        inside = jax.vmap(lambda x: ravel_pytree(x)[0])(draws)
        end = ravel_pytree(state.position)[0]
        after = np.concatenate([np.asarray(inside), np.asarray(end)[None]]).astype(np.float64)
        before = np.asarray(ravel_pytree(start)[0], np.float64)
        allowed = _WIDER * np.sqrt(before.size) + self.most
        scale, least = self._units(before)
        with np.errstate(over="ignore", invalid="ignore"):
            distance = self._distances(after).max() - least
        if not distance <= allowed * scale:
            raise Refused(
                f"a position {distance / scale:.3g} standard deviations away is not one that a "
                f"visit leads to, {allowed:.3g} are the most (most_move={self.most:g})"
            )
        momentum = getattr(state, "momentum", None)
        if momentum is not None and self.unit_mass:
            size = float(np.linalg.norm(np.asarray(ravel_pytree(momentum)[0], np.float64)))
            if not size <= allowed:
                raise Refused(f"a momentum of {size:.3g} standard deviations")
            self._check_kick(state, allowed)

    def _check_kick(self, state: Any, allowed: float) -> None:
        """A step's change of momentum by the gradient that travels with the state."""
        gradient = getattr(state, "gradient", None)
        if gradient is None or self.step_size is None:
            return
        with np.errstate(over="ignore"):
            kick = self.step_size * float(
                np.linalg.norm(np.asarray(ravel_pytree(gradient)[0], np.float64))
            )
        if not kick <= _KICK * allowed:
            raise Refused(f"a gradient that changes the momentum by {kick:.3g} in a step")

    def _units(self, before: np.ndarray) -> tuple[float, float]:
        if self.precision is not None:
            return 1.0, self.newton
        if self.diffusion is None:
            return np.inf, 0.0
        return self.diffusion, float(np.linalg.norm(before - self.origin))

    def _distances(self, positions: np.ndarray) -> np.ndarray:
        delta = positions - self.origin
        if self.precision is None:
            return np.linalg.norm(delta, axis=1)
        product = delta * self.precision if self.precision.ndim == 1 else delta @ self.precision
        return np.sqrt(np.maximum(np.sum(delta * product, axis=1), 0))


def reach_of_visits(
    origin: PyTree, precision: Any, slope: PyTree, kernel: Kernel, steps: int, most: float
) -> Reach:
    """The reach of visits of so many steps, by sums over clients and the kernel's settings."""
    mass = dict(kernel.settings).get("mass", 1.0)
    plain = isinstance(mass, float | int) and mass == 1
    time = step_time(kernel) if plain else None
    matrix = None
    if isinstance(precision, Full):
        matrix = np.asarray(precision.matrices, np.float64)
    elif isinstance(precision, Diagonal):
        matrix = np.asarray(ravel_pytree(precision.values)[0], np.float64)
    diffusion = None if time is None else float(np.sqrt(2 * time * steps))
    origin = np.asarray(ravel_pytree(origin)[0], np.float64)
    h = dict(kernel.settings).get("step_size")
    step_size = float(h) if isinstance(h, float | int) else None
    slope = np.asarray(ravel_pytree(slope)[0], np.float64)
    newton = 0.0 if matrix is None else _newton_distance(matrix, slope)
    return Reach(origin, matrix, diffusion, most, plain, step_size, newton)


def _newton_distance(precision: np.ndarray, slope: np.ndarray) -> float:
    r"""$\sqrt{g^\top \Lambda^{-1} g}$, along directions of positive curvature."""
    if precision.ndim == 1:
        along, values = slope, precision
    else:
        values, axes = np.linalg.eigh((precision + precision.T) / 2)
        along = axes.T @ slope
    held = values > 1e-9 * max(float(np.max(values)), 0.0)
    return float(np.sqrt(np.sum(along[held] ** 2 / values[held])))


def slope_reason(answers: list[Answer]) -> str | None:
    """Why a client's slopes are not those of its log likelihood; None where they may be.

    Between two positions of the search the log likelihood changes by something between what the
    slopes at either say, or near it, as far as rounding lets it be seen.
    """
    wrong = total = 0
    for a, b in pairwise(answers):
        move = b.position - a.position
        ends = sorted((float(a.slope @ move), float(b.slope @ move)))
        rounding = _ROUNDING * (abs(a.value) + abs(b.value) + 1)
        if max(map(abs, ends)) < 10 * rounding:
            continue
        slack = ends[1] - ends[0] + rounding
        total += 1
        wrong += not ends[0] - slack <= b.value - a.value <= ends[1] + slack
    if total >= 2 and 2 * wrong > total:
        return (
            f"its log likelihood changes otherwise than its slopes say, in {wrong} of {total} steps"
        )
    return None


def check_most_rows(value: Any, clients: list[str]) -> dict[str, int]:
    """The most rows that each client may declare; nothing where there is no limit."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return dict.fromkeys(clients, check_count("most_rows", value))
    unknown = [name for name in value if name not in clients]
    if unknown:
        raise ValueError(f"most_rows must be of the clients {clients}, got {describe(unknown)}.")
    return {name: check_count(f"most_rows of {name}", rows) for name, rows in value.items()}


def check_rows(rows: Mapping[str, int], most: Mapping[str, int]) -> None:
    """Raise a ValueError that names the clients that declare too many rows."""
    over = [f"{c!r} ({rows[c]:,}, at most {n:,})" for c, n in most.items() if rows[c] > n]
    if over:
        raise ValueError(
            f"clients {', '.join(over)} declare more rows than most_rows allows: rows set how "
            "often a client is visited. Find out why, leave them out of clients, or raise "
            "most_rows."
        )


def rows_reason(clients: list[str], shares: np.ndarray, visits: int) -> str | None:
    """What is wrong where some clients will hardly be visited, and others mostly."""
    few = [clients[int(s)] for s in np.flatnonzero(visits * shares < 1)]
    if not few or visits < 2 * len(clients):
        return None
    most = int(np.argmax(shares))
    return (
        f"{', '.join(few[:5])}{' and others' if len(few) > 5 else ''} will hardly be visited: of "
        f"{visits} visits a share of {shares[most]:.4g} goes to {clients[most]}, as rows are "
        "declared. Give probabilities, or most_rows if a number of rows cannot be right."
    )
