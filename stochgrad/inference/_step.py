"""The law of a kernel before it runs, and the longest step that it allows."""

from typing import Any

import jax
import numpy as np

from stochgrad.core import Kernel, PRNGKey
from stochgrad.diagnostics import Law, predict_law
from stochgrad.sgmcmc import WarmUp, sghmc

_MOST_DIMENSION = 256
_MOST_BIAS = 0.02
_FACTORS = (4.0, 2.5, 1.6)


def with_law(tuned: WarmUp, key: PRNGKey) -> tuple[Kernel, Law | None]:
    """The kernel of a warm-up with the longest step whose spreads are right to 2%, and its law.

    ``find_step_size`` reckons with independent minibatches, or nearly; the law knows how much the
    noise of a sweep cancels, and often allows a longer step. Above 256 dimensions, or where no law
    can be predicted, the kernel is as it is.
    """
    kernel, report = tuned.kernel, tuned.step_size
    if kernel.method != "SGHMC" or report is None or tuned.precision.scale.size > _MOST_DIMENSION:
        return kernel, None
    settings = dict(kernel.settings)
    step = settings["step_size"]
    for factor in (*_FACTORS, 1.0):
        if factor > 1 and factor * step > report.limit / 3:
            continue
        candidate = kernel if factor == 1 else _with_step(kernel, settings, factor * step)
        try:
            law = predict_law(candidate, key, tuned.center, covariance=tuned.precision.covariance)
        except ValueError:  # no law: unstable at this step, or of a kind that has none
            continue
        if factor == 1 or worst_bias(law) <= _MOST_BIAS:
            return candidate, law
    return kernel, None


def worst_bias(law: Law) -> float:
    """The largest relative error of a standard deviation."""
    return float(max(np.max(np.abs(x)) for x in jax.tree.leaves(law.sd_bias)))


def _with_step(kernel: Kernel, settings: dict[str, Any], step_size: float) -> Kernel:
    names = ("mass", "noise_estimate", "temperature", "integrator", "noise")
    options = {name: settings[name] for name in names}
    assert kernel.gradient is not None  # a kernel of ours keeps it
    return sghmc(kernel.gradient, step_size, settings["friction"], **options)
