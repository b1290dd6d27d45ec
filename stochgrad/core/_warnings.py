"""What a run says when something is not as it should be."""


class DivergenceWarning(UserWarning):
    """A chain diverged (non-finite positions), or left the support of its target."""


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
