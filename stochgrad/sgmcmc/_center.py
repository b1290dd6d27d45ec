"""Where to centre a control variate, and where to start."""

import jax
import numpy as np

from stochgrad.core import Position, Posterior, PRNGKey, check_count, check_number, sample
from stochgrad.kernels import ascend


def find_center(
    posterior: Posterior,
    key: PRNGKey,
    *,
    init: Position | None = None,
    num_steps: int = 3000,
    learning_rate: float = 0.05,
) -> Position:
    """A position near the posterior's mode: Adam with a cosine schedule, its last tenth averaged.

    Args:
        posterior: A posterior and its stream of minibatches.
        key: A typed PRNG key.
        init: Where to start; may be left out where the posterior knows (a numpyro model).
        num_steps: Minibatch gradients to spend.
        learning_rate: The largest step of any coordinate; it falls to zero in the end.

    Raises:
        ValueError: a number is out of range, or the search left the finite numbers.
    """
    import optax

    num_steps = check_count("num_steps", num_steps, least=10)
    schedule = optax.cosine_decay_schedule(check_number("learning_rate", learning_rate), num_steps)
    kernel = ascend(posterior, optax.adam(schedule))
    tail = num_steps // 10
    path = sample(
        key,
        kernel,
        init=init,
        num_samples=tail,
        num_warmup=num_steps - tail,
        progress=False,
    )
    if path.num_draws < tail or not path.finite.all():
        raise ValueError("find_center left the finite numbers: try a smaller learning_rate.")
    return jax.tree.map(
        lambda x: np.mean(x[0], axis=0, dtype=np.float64).astype(x.dtype), path.positions
    )
