r"""The exact flows that splitting schemes are made of.

| | flow over time t | |
| --- | --- | --- |
| A | $q \leftarrow q + t M^{-1} p$ | drift |
| B | $p \leftarrow p + t\, \hat g(q)$ | kick |
| O | $p \leftarrow e^{-\gamma t} p + \sqrt{M\Theta(1 - e^{-2\gamma t})}\, \xi$ | friction, noise |
| U | A and O at once, $(q, p)$ jointly normal | |

with $\gamma = C/M$. The covariances of U, and of the integrals of the same noise that a third-order
scheme needs, are integrals of smooth positive functions; a Gauss-Legendre rule keeps all their
digits however small $\gamma t$ is, where the closed forms, differences of exponentials, lose them.
"""

from types import ModuleType
from typing import Any

import numpy as np

from stochgrad.core import Position
from stochgrad.integrators._protocol import Coefficients, add, axpy, scaled

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2
_SERIES = [1 / float(np.prod(np.arange(1.0, n + 3))) * (-1) ** n for n in range(14)]


def drift(time: Any, position: Position, momentum: Position, c: Coefficients) -> Position:
    """A: the position after ``time``."""
    return axpy(time, c.velocity(momentum), position)


def kick(time: Any, momentum: Position, gradient: Position) -> Position:
    """B: the momentum after ``time``."""
    return axpy(time, gradient, momentum)


def friction_and_noise(time: Any, momentum: Position, xi: Position, c: Coefficients) -> Position:
    """O: the momentum after ``time``."""
    keep = c.each(lambda m, f, _, xp: xp.exp(-f / m * time))
    spread = c.each(lambda m, f, t, xp: xp.sqrt(m * t * -xp.expm1(-2 * f / m * time)))
    return add(scaled(keep, momentum), scaled(spread, xi))


def drift_and_friction(
    time: Any,
    position: Position,
    momentum: Position,
    xi: tuple[Position, Position],
    c: Coefficients,
) -> tuple[Position, Position]:
    r"""U: position and momentum after ``time``.

    $$q \leftarrow q + \tfrac{1 - e^{-\gamma t}}{\gamma} M^{-1}p + \xi_q, \qquad
      p \leftarrow e^{-\gamma t}p + \xi_p.$$
    """
    reach = c.each(lambda m, f, _, xp: time * phi1(f / m * time, xp) / m)
    keep = c.each(lambda m, f, _, xp: xp.exp(-f / m * time))

    def entry(row, column):
        def value(m, f, t, xp):
            factor = noise_factor(f / m * time, 2, xp)[row][column]
            return factor * (time * xp.sqrt(t / m) if row else xp.sqrt(m * t))

        return c.each(value)

    moved = add(
        position,
        scaled(reach, momentum),
        scaled(entry(1, 0), xi[0]),
        scaled(entry(1, 1), xi[1]),
    )
    return moved, add(scaled(keep, momentum), scaled(entry(0, 0), xi[0]))


def phi1(x: Any, xp: ModuleType) -> Any:
    r"""$(1 - e^{-x})/x$."""
    return -xp.expm1(-x) / x


def phi2(x: Any, xp: ModuleType) -> Any:
    r"""$(e^{-x} - 1 + x)/x^2$, by its series where the difference would lose digits."""
    series = _SERIES[-1]
    for coefficient in reversed(_SERIES[:-1]):
        series = coefficient + x * series
    small = xp.abs(x) < 0.5
    safe = xp.where(small, 1.0, x)
    return xp.where(small, series, (1 - phi1(safe, xp)) / safe)


def noise_factor(x: Any, count: int, xp: ModuleType) -> list[list[Any]]:
    r"""Cholesky factor of the covariance of the noise of one flow and of its integrals.

    With $x = \gamma t$, the noise $S = \int_0^t e^{-\gamma(t-u)} \sqrt{2\gamma}\,dW_u$ and its
    integrals $\int S$ and $\iint S$, in units of $1$, $t$ and $t^2$, have the covariances

    $$2x \int_0^1 f_a(v) f_b(v)\,dv, \qquad
      f = \left(e^{-xv},\; v\,\varphi_1(xv),\; v^2 \varphi_2(xv)\right).$$

    Args:
        x: A positive number, or an array.
        count: How many of the three are wanted.
        xp: ``numpy``, or ``jax.numpy`` for a traced ``x``.
    """
    x = xp.asarray(x, float)
    lead = (1,) * x.ndim
    v, w = (xp.asarray(a.reshape(*lead, -1), x.dtype) for a in (_NODES, _WEIGHTS))
    y = xp.expand_dims(x, -1) * v
    f = [xp.exp(-y), v * phi1(y, xp), v * v * phi2(y, xp)][:count]
    factor: list[list[Any]] = []
    for a in range(count):
        row: list[Any] = []
        for b in range(a + 1):
            rest = 2 * x * xp.sum(w * f[a] * f[b], axis=-1)
            rest = rest - sum(row[k] * factor[b][k] for k in range(b)) if b < a else rest
            if b == a:
                rest = rest - sum(r * r for r in row)
                row.append(xp.sqrt(xp.maximum(rest, 0.0)))
            else:
                row.append(rest / factor[b][b])
        factor.append(row)
    return factor
