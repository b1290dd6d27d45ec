"""A normal approximation with independent coordinates, from minibatches alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Gradient,
    Position,
    Posterior,
    PRNGKey,
    check_count,
    check_instance,
    check_key,
    check_number,
    noise_like,
)
from stochgrad.sgmcmc._center import last_tenth
from stochgrad.sgmcmc._normal import Normal, NormalApproximation
from stochgrad.sgmcmc._pathfinder import starts_of
from stochgrad.sgmcmc._precision import Precision

_LOG_SD = -3.0


@key_first
def mean_field(
    key: PRNGKey,
    posterior: Posterior,
    *,
    init: Position | Callable[[PRNGKey], Position] | None = None,
    num_steps: int = 4000,
    num_draws: int = 8,
    learning_rate: float = 0.05,
) -> NormalApproximation:
    r"""The normal with independent coordinates that is nearest to a posterior, by minibatches.

    Adam climbs the evidence lower bound of $\theta = \mu + \sigma \odot \xi$ with path gradients,

    $$\nabla_\mu = E[\hat g(\theta) + \xi / \sigma], \qquad
      \nabla_{\log\sigma} = E[(\hat g(\theta) + \xi / \sigma) \odot \sigma \odot \xi],$$

    whose noise from the draws dies out where the posterior is such a normal (Roeder, Wu & Duvenaud,
    NeurIPS 2017), and the last tenth of the steps is averaged. It needs no pass over all rows.
    Spreads are those of coordinates given the others, too narrow along ties; the windows of
    ``stochgrad.warm_up`` widen them.

    Args:
        key: A typed PRNG key.
        posterior: A posterior.
        init: Where to start; optional where the posterior knows.
        num_steps: Steps.
        num_draws: Draws of a step, on one minibatch.
        learning_rate: The largest step of any coordinate; it falls to zero in the end.

    Raises:
        ValueError: the search diverged; ``init`` is needed.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(99), batch_size=9
        ... )
        >>> found = stochgrad.mean_field(jax.random.key(0), target, init=jnp.float32(0.0))
        >>> round(float(found.position), 2), found.precision.variances.round(3).tolist()
        (0.99, [0.01])
    """
    import optax

    check_instance("posterior", posterior, Posterior, "a Posterior")
    check_key(key)
    num_steps = check_count("num_steps", num_steps, least=10)
    num_draws = check_count("num_draws", num_draws)
    rate = check_number("learning_rate", learning_rate)
    start = next(iter(starts_of(posterior, key, init, 1)))
    flat, unravel = ravel_pytree(start)
    bound = _evidence_bound(posterior, unravel, num_draws)
    run = last_tenth(
        jax.random.fold_in(key, 2),
        bound,
        optax.adam(optax.cosine_decay_schedule(rate, num_steps)),
        (flat, jnp.full_like(flat, _LOG_SD)),
        num_steps,
    )
    if run is None:
        raise ValueError("mean_field diverged: try a smaller learning_rate, or another init.")
    mean, log_sd = (np.atleast_1d(x[0].mean(0, dtype=np.float64)) for x in run.positions)
    precision = Precision(np.exp(log_sd), np.zeros((mean.size, 0)), np.zeros(0))
    elbo = float(np.mean(run.stats["log_density"][0]))
    at = lambda x: unravel(jnp.asarray(x, flat.dtype))
    return NormalApproximation(
        position=jax.tree.map(np.asarray, at(mean)),
        precision=precision,
        elbo=elbo,
        paths=(Normal(mean, precision, elbo),),
        passes=0,
        unravel=at,
    )


def _evidence_bound(posterior: Posterior, unravel: Callable, num_draws: int) -> Gradient:
    """Path gradients of the evidence lower bound, over means and logarithms of spreads."""
    batches = posterior.batches
    normal = noise_like("normal")

    def next(key, position, state):
        batch, state = batches.next(state)

        def score(position):
            mean, log_sd = position
            sd = jnp.exp(log_sd)

            def one(key):
                xi = normal(key, mean)
                density = lambda x: posterior.log_density(unravel(x), batch)
                value, g = jax.value_and_grad(density)(mean + sd * xi)
                path = g + xi / sd
                return value + jnp.sum(log_sd + 0.5 * xi**2), (path, path * sd * xi)

            values, slopes = jax.lax.map(one, jax.random.split(key, num_draws))
            constant = 0.5 * np.log(2 * np.pi) * mean.size
            return jnp.mean(values) + constant, jax.tree.map(lambda x: jnp.mean(x, axis=0), slopes)

        return score, state

    return Gradient(lambda key, position: batches.init(key), next, _at_means(posterior, unravel))


def _at_means(posterior: Posterior, unravel: Callable) -> Posterior:
    """The posterior over the normal's parameters: that of their means, without names."""
    at_mean = lambda position, batch: posterior.log_density(unravel(position[0]), batch)
    return Posterior(at_mean, posterior.batches)
