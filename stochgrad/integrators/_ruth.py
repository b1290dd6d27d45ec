"""A scheme of weak order three for additive noise."""

from typing import Any

from stochgrad.integrators._flows import noise_factor, phi1
from stochgrad.integrators._protocol import Coefficients, Integrator, Stage, add, axpy, scaled

_RUTH = ((7 / 24, 2 / 3), (3 / 4, -2 / 3), (-1 / 24, 1.0))


def _step(position, momentum, gradient, score, noise, c: Coefficients) -> Stage:
    h = c.step_size
    xi = [noise(i) for i in range(3)]

    def integral(row):
        """The noise of the momentum (0), its integral (1), and its double integral over h (2)."""

        def entry(column):
            def value(m, f, t, xp):
                factor = noise_factor(f / m * h, 3, xp)[row][column]
                return factor * (h * xp.sqrt(t / m) if row else xp.sqrt(m * t))

            return c.each(value)

        return add(*(scaled(entry(column), xi[column]) for column in range(row + 1)))

    mean_shift = integral(2)
    value: Any = None
    for kick, drift in _RUTH:
        value, gradient = score(add(position, mean_shift))
        keep = c.each(lambda m, f, t, xp: xp.exp(-f / m * kick * h))
        reach = c.each(lambda m, f, t, xp: kick * h * phi1(f / m * kick * h, xp))
        momentum = add(scaled(keep, momentum), scaled(reach, gradient))
        position = axpy(drift * h, c.velocity(momentum), position)
    return Stage(add(position, integral(1)), add(momentum, integral(0)), value, gradient)


third_order = Integrator(_step)
r"""MT3: Ruth's third-order map with friction, at positions shifted by the mean of the noise.

With $S = \int_0^h e^{-\gamma(h-u)}\sqrt{2C\Theta}\,dW_u$, $R = \int_0^h M^{-1}S$ and
$I = \int_0^h R$, three jointly normal numbers a coordinate, and $(c_i, d_i) = (\tfrac7{24},
\tfrac23), (\tfrac34, -\tfrac23), (-\tfrac1{24}, 1)$,

$$p \leftarrow e^{-\gamma c_i h}p + \tfrac{1 - e^{-\gamma c_i h}}{\gamma}\hat g(q + I/h), \quad
  q \leftarrow q + d_i h M^{-1} p, \qquad i = 1, 2, 3,$$

then $q \leftarrow q + R$, $p \leftarrow p + S$. Third order, three gradients a step, all of one
minibatch; after the quasi-symplectic schemes of Milstein & Tretyakov (IMA J. Numer. Anal. 2003).
"""
