"""What a run says when something is not as it should be."""

import warnings

import numpy as np


class DivergenceWarning(UserWarning):
    """A chain has left the finite numbers, or the support of its target."""


class InterruptWarning(UserWarning):
    """A run was interrupted, and returned what it had."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written."""


class ConvergenceWarning(UserWarning):
    """Chains have not mixed, or a search has not arrived."""


class PrecisionWarning(UserWarning):
    """Rounding is not small against what is computed."""


class GradientNoiseWarning(UserWarning):
    """Minibatch noise is larger than the noise that the dynamics injects."""


def warn_of_noise(noise_ratio: np.ndarray | None, stacklevel: int) -> None:
    """Warn if minibatch noise dominates: its ratio to the injected noise is above one."""
    if noise_ratio is None:
        return
    ratios = noise_ratio[np.isfinite(noise_ratio)]
    if ratios.size == 0 or (ratio := float(ratios.mean())) <= 1:
        return
    warnings.warn(
        f"minibatch noise is {ratio:.2g} times the noise that the dynamics injects, so it, and not "
        "the posterior, sets the spread of the draws: with independent minibatches standard "
        f"deviations come out about {np.sqrt(1 + ratio):.2g} times too large (less with "
        "order='reshuffled' when an epoch is short against the chain's memory). Take a smaller "
        "step_size or a larger batch_size (the ratio is proportional to step_size / batch_size), "
        "more friction (sghmc), or a control variate.",
        GradientNoiseWarning,
        stacklevel=stacklevel,
    )
