"""The explicit Euler-Maruyama scheme for underdamped Langevin dynamics."""

from stochgrad.integrators._protocol import Coefficients, Stage, axpy, scaled


def euler_maruyama(position, momentum, score, noise, c: Coefficients) -> Stage:
    r"""One explicit step, the gradient taken at the old position.

    $$q' = q + h M^{-1} p, \qquad
      p' = p + h \hat g(q) - h C M^{-1} p + \sqrt{2(CT - \hat B)h}\, \xi.$$

    On $U = kq^2/2$ with unit mass and independent gradient noise of variance V,
    $E q^2 = (2C + Vh)(2 - Ch + h^2k) / (k(C - hk)(4 - 2Ch + h^2k))$: first order, and unstable for
    $h \ge C/k$. It is here for comparison: it costs what the semi-implicit scheme costs.
    """
    velocity = c.velocity(momentum)
    value, gradient = score(position)
    position = axpy(c.step_size, velocity, position)
    momentum = axpy(c.step_size, gradient, momentum)
    momentum = axpy(-c.step_size, scaled(c.friction, velocity), momentum)
    momentum = axpy(1, scaled(c.noise_scale, noise(0)), momentum)
    return Stage(position, momentum, value, gradient)
