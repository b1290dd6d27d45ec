"""Schemes in which a kick carries Euler's friction and noise, from the crudest to Chen's."""

from stochgrad.integrators._flows import drift
from stochgrad.integrators._protocol import Coefficients, Integrator, Stage, add, axpy, scaled


def _kick(momentum, velocity, gradient, xi, c: Coefficients):
    r"""$p + h\hat g - hCM^{-1}p + \sqrt{2C\Theta h}\,\xi$."""
    damping = c.each(lambda m, f, t, xp: -c.step_size * f)
    spread = c.each(lambda m, f, t, xp: xp.sqrt(2 * f * t * c.step_size))
    momentum = axpy(c.step_size, gradient, momentum)
    return add(momentum, scaled(damping, velocity), scaled(spread, xi))


def _euler_maruyama(position, momentum, gradient, score, noise, c: Coefficients) -> Stage:
    velocity = c.velocity(momentum)
    value, gradient = score(position)
    position = axpy(c.step_size, velocity, position)
    return Stage(position, _kick(momentum, velocity, gradient, noise(0), c), value, gradient)


def _semi_implicit(position, momentum, gradient, score, noise, c: Coefficients) -> Stage:
    velocity = c.velocity(momentum)
    position = axpy(c.step_size, velocity, position)
    value, gradient = score(position)
    return Stage(position, _kick(momentum, velocity, gradient, noise(0), c), value, gradient)


def _leapfrog(position, momentum, gradient, score, noise, c: Coefficients) -> Stage:
    position = drift(c.step_size / 2, position, momentum, c)
    value, gradient = score(position)
    momentum = _kick(momentum, c.velocity(momentum), gradient, noise(0), c)
    position = drift(c.step_size / 2, position, momentum, c)
    return Stage(position, momentum, value, gradient)


euler_maruyama = Integrator(_euler_maruyama, damping_limit=2.0)
r"""Explicit: the gradient at the old position.

$$q' = q + h M^{-1} p, \qquad p' = p + h \hat g(q) - h C M^{-1} p + \sqrt{2C\Theta h}\, \xi.$$

On $U = kq^2/2$ with unit mass and independent gradient noise of variance V,
$E q^2 = (2C + Vh)(2 - Ch + h^2k) / (k(C - hk)(4 - 2Ch + h^2k))$: first order, and unstable for
$h \ge C/k$. It is here for comparison: it costs what the semi-implicit scheme costs.
"""

semi_implicit = Integrator(_semi_implicit, damping_limit=2.0)
r"""Algorithm 2 of Chen, Fox & Guestrin (ICML 2014): position first, the gradient at the new one.

$$q' = q + h M^{-1} p, \qquad p' = p + h \hat g(q') - h C M^{-1} p + \sqrt{2C\Theta h}\, \xi.$$

In the same setting $E q^2 = (2C + Vh)(2 - Ch) / (Ck(4 - 2Ch - h^2k))$: second order in h for the
positions, first for the momenta. Stable for $4 - 2Ch - h^2 k > 0$.
"""

leapfrog = Integrator(_leapfrog, damping_limit=2.0)
r"""The same kick between two half drifts.

In the same setting $E q^2 = (1 + Vh/2C)/k$ exactly; second order for positions, first for momenta.
"""
