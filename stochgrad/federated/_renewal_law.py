"""The spread of draws where slopes are taken anew every some visits."""

from typing import Any

import numpy as np

_POINTS = 16
"""Intervals of Simpson's rule over a visit."""
_SMALL = 1e-3
_MOST_WORK = 4e9
"""Multiplications in one turn of the equations, beyond which the law is not computed."""


def renewed_covariance(
    visits: np.ndarray, exact: np.ndarray, p: np.ndarray, time: float, period: int
) -> np.ndarray | None:
    r"""The covariance, averaged over time, of visits with an anchor that moves along.

    During a visit to client s

    $$d\theta = -\big[V_s(\theta - \tilde\theta) + X(\tilde\theta - m)\big]\,dt + \sqrt 2\,dW,$$

    and every ``period`` visits the anchor $\tilde\theta$ becomes $\theta$. Clients are drawn at
    random.

    Args:
        visits: $V_s$, the curvature of a visit to each client (clients, d, d).
        exact: X, the curvature of the posterior about its mode m.
        p: Probabilities of clients.
        time: Of a visit.
        period: Visits between two renewals.

    Returns:
        The covariance; infinite where visits drive positions apart; None where it is not found, or
        would take long.
    """
    from scipy.sparse.linalg import LinearOperator, gmres

    count, d = visits.shape[:2]
    if period * count * (2 * d) ** 3 > _MOST_WORK:
        return None
    infinite = np.full((d, d), np.inf)
    if time * np.linalg.eigvalsh((visits + np.swapaxes(visits, 1, 2)) / 2).min() < -25:
        return infinite
    turns, heats = _propagators(visits, exact, time / _POINTS)
    whole = [x[-1] for x in (turns, heats)]

    def visit(z):
        return np.einsum("s,sij->ij", p, whole[0] @ z @ np.swapaxes(whole[0], 1, 2) + whole[1])

    def from_anchor(m):
        """At the beginning of each visit of a period, and at the end of the last."""
        z = [np.block([[m, m], [m, m]])]
        for _ in range(period):
            z.append(visit(z[-1]))
        return z

    with np.errstate(all="ignore"):
        constant = from_anchor(np.zeros((d, d)))[-1][:d, :d]
        if not np.isfinite(constant).all():
            return infinite

        def rest(flat):
            m = flat.reshape(d, d)
            return (m - (from_anchor(m)[-1][:d, :d] - constant)).ravel()

        operator: Any = LinearOperator((d * d, d * d), matvec=rest, dtype=np.float64)  # pyright: ignore
        start, failed = gmres(operator, constant.ravel(), rtol=1e-6, restart=60, maxiter=5)
    if failed or not np.isfinite(start).all():
        return None
    start = start.reshape(d, d)
    start = (start + start.T) / 2
    if np.linalg.eigvalsh(start)[0] < 0:
        return infinite
    before = np.mean(from_anchor(start)[:-1], axis=0)
    inside = turns @ before @ np.swapaxes(turns, 2, 3) + heats
    simpson = np.array([1, *[4, 2] * (_POINTS // 2 - 1), 4, 1]) / (3 * _POINTS)
    return np.einsum("t,s,tsij->ij", simpson, p, inside)[:d, :d]


def _propagators(visits: np.ndarray, exact: np.ndarray, step: float):
    r"""$e^{Au}$ and the covariance of the noise at u = 0, 1, ..., times the step."""
    count, d = visits.shape[:2]
    a = np.zeros((count, 2 * d, 2 * d))
    a[:, :d, :d], a[:, :d, d:] = -visits, visits - exact
    size = np.abs(a).sum(axis=2).max() * step
    doublings = max(0, int(np.ceil(np.log2(max(size, 1e-300) / _SMALL))))
    u = step / 2**doublings
    eye = np.eye(2 * d)
    turn = eye + u * a @ (eye + u / 2 * a @ (eye + u / 3 * a))
    heat = np.zeros_like(eye)
    heat[:d, :d] = 2 * u * np.eye(d)
    first = a @ heat
    second = a @ first
    both = lambda x: x + np.swapaxes(x, 1, 2)
    heat = heat + u / 2 * both(first) + u**2 / 6 * (both(second) + 2 * first @ np.swapaxes(a, 1, 2))
    for _ in range(doublings):
        heat = heat + turn @ heat @ np.swapaxes(turn, 1, 2)
        turn = turn @ turn
    turns, heats = [np.broadcast_to(eye, turn.shape)], [np.zeros_like(heat)]
    for _ in range(_POINTS):
        heats.append(turn @ heats[-1] @ np.swapaxes(turn, 1, 2) + heat)
        turns.append(turn @ turns[-1])
    return np.stack(turns), np.stack(heats)
