"""Where to centre a control variate, and where to start."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import (
    Position,
    Posterior,
    PRNGKey,
    check_count,
    check_number,
    compiled,
    in_one_block,
    on_all_data,
    sample,
    tree_dot,
)
from stochgrad.kernels import ascend

_NEWTON_STEPS = 20


class Center(NamedTuple):
    r"""A position near a mode, and how near.

    Attributes:
        position: $\theta_0$.
        log_density: $\log\pi(\theta_0)$ on all data.
        gradient_norm: $|\nabla\log\pi(\theta_0)|$ on all data.
        distance: How far the mode is, in posterior standard deviations:
            $\sqrt{g^\top H^{-1} g}$ with the gradient g and minus the Hessian H on all data (of
            streamed data, on one super-block), by a few steps of conjugate gradients. In d
            dimensions draws lie at a distance of about $\sqrt d$, so that a centre well within that
            is as good as the mode. NaN where the log density is not concave.
        improvement: By how much the minibatch log density rose over the steps that were averaged;
            clearly above zero, the search was too short.
    """

    position: Position
    log_density: float
    gradient_norm: float
    distance: float
    improvement: float


def find_center(
    posterior: Posterior,
    key: PRNGKey,
    *,
    init: Position | None = None,
    num_steps: int = 3000,
    learning_rate: float = 0.05,
    optimizer: Any = None,
) -> Center:
    """A position near the posterior's mode, and a report of how near.

    An optax optimiser on minibatch gradients (Adam, cosine schedule), its last tenth averaged.
    ``stochgrad.control_variate`` and ``stochgrad.sample`` take the result as it is.

    Args:
        posterior: A posterior and its stream of minibatches.
        key: A typed PRNG key.
        init: Where to start; may be left out where the posterior knows (a numpyro model).
        num_steps: Minibatch gradients to spend.
        learning_rate: The largest step of any coordinate; it falls to zero in the end.
        optimizer: An optax optimiser to use instead.

    Raises:
        ValueError: a number is out of range, or the search left the finite numbers.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(99), batch_size=9
        ... )
        >>> center = stochgrad.find_center(target, jax.random.key(0), init=jnp.float32(0.0))
        >>> round(float(center.position), 2), center.distance < 0.1
        (0.99, True)
    """
    import optax

    num_steps = check_count("num_steps", num_steps, least=10)
    rate = check_number("learning_rate", learning_rate)
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))
    tail = num_steps // 10
    path = sample(
        key,
        ascend(posterior, optimizer),
        init=init,
        num_samples=tail,
        num_warmup=num_steps - tail,
        progress=False,
    )
    if path.num_draws < tail or not path.finite.all():
        raise ValueError("find_center left the finite numbers: try a smaller learning_rate.")
    position = jax.tree.map(
        lambda x: np.mean(x[0], axis=0, dtype=np.float64).astype(x.dtype), path.positions
    )
    values = path.stats["log_density"][0]
    value, g = on_all_data(posterior, jax.value_and_grad(posterior.log_density))(
        jax.tree.map(jnp.asarray, position)
    )
    norm = float(jnp.sqrt(tree_dot(g, g)))
    decrement = float(compiled(_decrement(posterior))(position, g))
    return Center(
        position,
        float(value),
        norm,
        decrement**0.5 if decrement >= 0 else float("nan"),
        float(values[tail // 2 :].mean() - values[: tail // 2].mean()) if tail > 1 else 0.0,
    )


def _decrement(posterior: Posterior):
    """A function that gives the Newton decrement from a position and the gradient there."""
    score = in_one_block(posterior, jax.grad(posterior.log_density))

    def decrement(position, g):
        position = jax.tree.map(jnp.asarray, position)

        def curvature(v):
            bent = jax.jvp(score, (position,), (v,))[1]
            return jax.tree.map(jnp.negative, bent)

        step, _ = jax.scipy.sparse.linalg.cg(curvature, g, tol=1e-3, maxiter=_NEWTON_STEPS)
        return tree_dot(g, step)

    return decrement
