"""A kernel whose draws have the sandwich for covariance, where the warm-up found the bulk."""

from collections.abc import Callable

import jax

from stochgrad.core import Kernel, PRNGKey
from stochgrad.diagnostics import Law, predict_law, sandwich
from stochgrad.sgmcmc import DENSE_DIMENSION, WarmUp, find_center, sghmc


def robust_kernel(
    tuned: WarmUp, key: PRNGKey
) -> tuple[Kernel, Law, Callable[[Kernel, float], Kernel]]:
    """The kernel of ``stochgrad.diagnostics.sandwich`` at the mode, its law, and finer ones.

    A finer step needs other noise for the same covariance: the function takes a kernel and its new
    step size.
    """
    gradient = tuned.kernel.gradient
    size = tuned.precision.scale.size
    if size > DENSE_DIMENSION:
        raise ValueError(
            f"target='sandwich' takes matrices of all {size} numbers of a position, where "
            f"{DENSE_DIMENSION} are the most; take target='posterior'."
        )
    assert gradient is not None  # a kernel of the warm-up keeps it
    assert gradient.posterior is not None
    center_key, key = jax.random.split(key)
    center = find_center(center_key, gradient.posterior, init=tuned.center).position
    robust = sandwich(key, gradient, center)
    hessian = robust.settings["mass"]
    known = {"hessian": hessian, "score_covariance": hessian @ robust.covariance @ hessian}

    def finer(_: Kernel, step_size: float) -> Kernel:
        return sghmc(
            gradient, **sandwich(key, gradient, center, step_size=step_size, **known).settings
        )

    kernel = sghmc(gradient, **robust.settings)
    law = predict_law(key, kernel, center, hessian=hessian, covariance=robust.covariance)
    return kernel, law, finer
