"""The law of a kernel before it runs, and the longest step that it allows."""

import jax
import numpy as np

from stochgrad._deprecations import key_first
from stochgrad.core import Kernel, PRNGKey
from stochgrad.diagnostics._law import Law, predict_law
from stochgrad.sgmcmc import DENSE_DIMENSION, WarmUp, sghmc

_MOST_BIAS = 0.02
_TRIALS = 6


@key_first
def with_law(key: PRNGKey, tuned: WarmUp) -> tuple[Kernel, Law | None]:
    """The kernel of a warm-up with the longest step whose spreads are right to 2%, and its law.

    ``find_step_size`` looks at the noise of all coordinates together and reckons that little of it
    cancels over an epoch; the law knows the worst direction and how much the noise of a sweep
    cancels. Above 256 dimensions, or where no law can be predicted, the kernel is as it is.
    """
    kernel, report = tuned.kernel, tuned.step_size
    if kernel.method != "SGHMC" or report is None or tuned.precision.scale.size > DENSE_DIMENSION:
        return kernel, None
    step = own = _step_of(kernel)
    best: tuple[Kernel, Law] | None = None
    last: tuple[Kernel, Law] | None = None
    for _ in range(_TRIALS):
        candidate = kernel if step == own else with_step(kernel, step)
        law = _law(candidate, key, tuned)
        bias = np.inf if law is None else worst_bias(law)
        if law is not None:
            last = candidate, law
            if bias <= _MOST_BIAS and (best is None or step > _step_of(best[0])):
                best = last
        if _MOST_BIAS / 2 < bias <= _MOST_BIAS or (best is not None and bias > _MOST_BIAS):
            break
        following = min(
            step * float(np.clip(np.sqrt(0.75 * _MOST_BIAS / bias), 0.2, 3.0)), report.limit / 3
        )
        if abs(following / step - 1) < 0.1:
            break
        step = following
    return best or last or (kernel, None)


def _law(kernel: Kernel, key: PRNGKey, tuned: WarmUp) -> Law | None:
    try:
        return predict_law(key, kernel, tuned.center, covariance=tuned.precision.covariance)
    except ValueError:  # unstable at this step, or of a kind that has no law
        return None


def _step_of(kernel: Kernel) -> float:
    return dict(kernel.settings)["step_size"]


def worst_bias(law: Law) -> float:
    """The largest relative error of a standard deviation."""
    return float(max(np.max(np.abs(x)) for x in jax.tree.leaves(law.sd_bias)))


def with_step(kernel: Kernel, step_size: float) -> Kernel:
    """The same kernel of ``stochgrad.sghmc`` with another step size."""
    settings = dict(kernel.settings)
    names = ("mass", "noise_estimate", "temperature", "integrator", "noise")
    options = {name: settings[name] for name in names}
    assert kernel.gradient is not None  # a kernel of ours keeps it
    return sghmc(kernel.gradient, step_size, settings["friction"], **options)
