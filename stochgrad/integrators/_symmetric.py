"""The symmetric splitting integrator of Chen, Ding & Carin."""

from stochgrad.integrators._flows import drift
from stochgrad.integrators._protocol import Coefficients, Integrator, Stage, add, axpy, scaled


def _step(position, momentum, gradient, score, noise, c: Coefficients) -> Stage:
    h = c.step_size
    half = c.each(lambda m, f, t, xp: xp.exp(-f / m * h / 2))
    spread = c.each(lambda m, f, t, xp: xp.sqrt(2 * f * t * h))
    position = drift(h / 2, position, momentum, c)
    value, gradient = score(position)
    momentum = axpy(h, gradient, scaled(half, momentum))
    momentum = scaled(half, add(momentum, scaled(spread, noise(0))))
    return Stage(drift(h / 2, position, momentum, c), momentum, value, gradient)


symmetric_splitting = Integrator(_step, symmetric=True)
r"""SSI (Chen, Ding & Carin, NeurIPS 2015): drift, friction, kick with noise, and back.

$$q \leftarrow q + \tfrac h2 M^{-1}p, \quad
  p \leftarrow e^{-Ch/2M}\left[e^{-Ch/2M} p + h\hat g(q) + \sqrt{2C\Theta h}\,\xi\right], \quad
  q \leftarrow q + \tfrac h2 M^{-1}p.$$

Second order. On $U = kq^2/2$ with unit mass, $E q^2 = h(2C + Vh) / (4k\sinh(Ch/2))$: the noise is
not the exact one of that friction, unlike in the word AOBOA.
"""
