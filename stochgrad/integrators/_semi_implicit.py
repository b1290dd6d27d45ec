"""Chen's semi-implicit scheme for underdamped Langevin dynamics."""

from stochgrad.integrators._protocol import Coefficients, Stage, axpy, scaled


def semi_implicit(position, momentum, score, noise, c: Coefficients) -> Stage:
    r"""One step of Algorithm 2 of Chen, Fox & Guestrin (ICML 2014): position first.

    $$q' = q + h M^{-1} p, \qquad
      p' = p + h \hat g(q') - h C M^{-1} p + \sqrt{2(CT - \hat B)h}\, \xi.$$

    On $U = kq^2/2$ with unit mass and independent gradient noise of variance V,
    $E q^2 = (2C + Vh)(2 - Ch) / (Ck(4 - 2Ch - h^2k))$: second order in h for the positions, first
    for the momenta. Stable for $4 - 2Ch - h^2 k > 0$.
    """
    velocity = c.velocity(momentum)
    position = axpy(c.step_size, velocity, position)
    value, gradient = score(position)
    momentum = axpy(c.step_size, gradient, momentum)
    momentum = axpy(-c.step_size, scaled(c.friction, velocity), momentum)
    momentum = axpy(1, scaled(c.noise_scale, noise(0)), momentum)
    return Stage(position, momentum, value, gradient)
