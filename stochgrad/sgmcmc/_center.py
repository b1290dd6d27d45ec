"""Where to center a control variate, and where to start."""

import warnings
from typing import Any, NamedTuple

import jax
import numpy as np

from stochgrad._deprecations import key_first
from stochgrad.core import (
    ConvergenceWarning,
    Draws,
    Position,
    Posterior,
    PRNGKey,
    Target,
    check_count,
    check_instance,
    check_key,
    check_number,
    sample,
    tree_size,
)
from stochgrad.gradients import why_no_mode
from stochgrad.kernels import ascend
from stochgrad.sgmcmc._mode import climb


class Center(NamedTuple):
    r"""A position near a mode, and how near.

    Attributes:
        position: $\theta_0$.
        log_density: $\log\pi(\theta_0)$ on all data.
        gradient_norm: $|\nabla\log\pi(\theta_0)|$ on all data.
        distance: How far the mode is, in posterior standard deviations:
            $\sqrt{g^\top H^{-1} g}$ with the gradient g and minus the Hessian H on all data (of
            streamed data, on one super-block), exact for up to 128 numbers and in a Krylov space
            of up to 64 directions beyond. In d dimensions draws lie at a distance of about
            $\sqrt d$, so that a center well within that is as good as the mode. NaN where the log
            density is not strictly concave: then there is no mode here.
        improvement: By how much the minibatch log density rose over the last steps of the
            optimizer; clearly above zero, they were too few.
    """

    position: Position
    log_density: float
    gradient_norm: float
    distance: float
    improvement: float


def center_at(posterior: Posterior, position: Position) -> Center:
    """A report on a position that is no result of a search: a posterior's mean, for instance."""
    mode = climb(posterior, position, 0)
    return Center(mode.position, mode.value, mode.gradient_norm, mode.distance, 0.0)


def last_tenth(
    key: PRNGKey, target: Target, optimizer: Any, init: Any, num_steps: int
) -> Draws | None:
    """The last tenth of an optimizer's way uphill, for averages; None where it diverged."""
    tail = num_steps // 10
    path = sample(
        key,
        ascend(target, optimizer),
        init=init,
        num_samples=tail,
        num_warmup=num_steps - tail,
        progress=False,
    )
    return path if path.num_draws == tail and path.finite.all() else None


@key_first
def find_center(
    key: PRNGKey,
    posterior: Posterior,
    *,
    init: Position | None = None,
    num_steps: int = 3000,
    learning_rate: float = 0.05,
    optimizer: Any = None,
    passes: int = 300,
) -> Center:
    r"""A position near the posterior's mode, and a report of how near.

    An optax optimizer on minibatch gradients (Adam, cosine schedule), its last tenth averaged;
    then, while the mode is more than $0.1\sqrt d$ standard deviations away, L-BFGS and Newton's
    method on all rows. ``stochgrad.control_variate`` and ``stochgrad.sample`` take the result.

    Args:
        key: A typed PRNG key.
        posterior: A posterior and its stream of minibatches.
        init: Where to start; optional where the posterior knows (a numpyro model).
        num_steps: Minibatch gradients to spend.
        learning_rate: The largest step of any coordinate; it falls to zero in the end.
        optimizer: An optax optimizer to use instead.
        passes: Passes over all rows to spend after that, at most; about 50 are usual for a
            regression on raw data, none for one that Adam has solved.

    Raises:
        ValueError: a number is out of range, or the search diverged.

    Warns:
        ConvergenceWarning: the position is no mode: the density is not concave there, or the mode
            is further than draws are. ``stochgrad.control_variate`` refuses such a center.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(99), batch_size=9
        ... )
        >>> center = stochgrad.find_center(jax.random.key(0), target, init=jnp.float32(0.0))
        >>> round(float(center.position), 2), center.distance < 0.1
        (0.99, True)
    """
    import optax

    check_instance("posterior", posterior, Posterior, "a Posterior")
    check_key(key)
    num_steps = check_count("num_steps", num_steps, least=10)
    passes = check_count("passes", passes, least=0)
    rate = check_number("learning_rate", learning_rate)
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))
    path = last_tenth(key, posterior, optimizer, init, num_steps)
    if path is None:
        raise ValueError("find_center diverged: try a smaller learning_rate.")
    average = jax.tree.map(
        lambda x: np.mean(x[0], axis=0, dtype=np.float64).astype(x.dtype), path.positions
    )
    values, tail = path.stats["log_density"][0], path.num_draws
    mode = climb(posterior, average, passes)
    center = Center(
        mode.position,
        mode.value,
        mode.gradient_norm,
        mode.distance,
        float(values[tail // 2 :].mean() - values[: tail // 2].mean()) if tail > 1 else 0.0,
    )
    reason = why_no_mode(center.distance, tree_size(center.position))
    if reason is not None:
        warnings.warn(f"find_center: {reason}", ConvergenceWarning, stacklevel=2)
    return center
