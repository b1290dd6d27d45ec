"""Jeffreys' divergence: forward and reverse Kullback-Leibler divergence together."""

from typing import Any, Literal

import jax
from flowjax.distributions import AbstractDistribution
from jaxtyping import Array, Float

from stochgrad.core import Gradient, check_choice
from stochgrad.flows._forward import forward_kl
from stochgrad.flows._objective import LogDensity
from stochgrad.flows._reverse import reverse_kl


def jeffreys(
    flow: AbstractDistribution,
    log_density: LogDensity,
    samples: Float[Array, "n ..."],
    forward: Literal["path", "ml"] = "path",
    reverse: Literal["path", "total", "score", "auto"] = "path",
    *,
    batch_size: int | None = None,
    num_samples: int = 64,
    order: Any = "reshuffled",
    condition: Any = None,
) -> Gradient:
    r"""Jeffreys' divergence of a flow from a density, from samples of both.

    $$J = \mathrm{KL}(p\|q_\theta) + \mathrm{KL}(q_\theta\|p).$$

    The first, from samples of the density, sees the modes that the flow misses; the second, from
    draws of the flow, the places that it has too much of. The value that is climbed is $-J$ but for
    a constant, the mean log likelihood of the samples plus the evidence lower bound.

    Args:
        flow: A flowjax distribution.
        log_density: ``x -> scalar``, unnormalized.
        samples: Samples of the density, of shape (n, \*shape).
        forward: Estimator of ``forward_kl``. ``"path"``, which evaluates the density's gradient
            once at each sample, has no noise where the flow fits; far from there, between steep
            modes above all, ``"ml"`` gets further.
        reverse: Estimator of ``reverse_kl``.
        batch_size: Samples of a minibatch; all of them by default.
        num_samples: Draws of the flow in a step.
        order: Of the minibatches, as in ``forward_kl``.
        condition: The condition of a conditional flow.

    Raises:
        TypeError: as ``reverse_kl``.
        ValueError: as ``reverse_kl`` and ``forward_kl``.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> from flowjax.distributions import Normal
        >>> x = 1.0 + jax.random.normal(jax.random.key(1), (20, 2))
        >>> objective = stochgrad.flows.jeffreys(
        ...     Normal(jnp.zeros(2)), lambda x: -0.5 * jnp.sum((x - 1.0) ** 2), x
        ... )
        >>> fit = stochgrad.fit(jax.random.key(0), objective, 1000, learning_rate=0.05)
        >>> fit.model.loc.round()
        Array([1., 1.], dtype=float32)
    """
    check_choice("forward", forward, ("path", "ml"))
    check_choice("reverse", reverse, ("path", "total", "score", "auto"))
    below = reverse_kl(flow, log_density, reverse, num_samples=num_samples, condition=condition)
    above = forward_kl(
        flow,
        samples,
        jax.grad(log_density) if forward == "path" else None,
        forward,
        batch_size=batch_size,
        order=order,
        condition=condition,
    )

    def next(key, position, state):
        down, _ = below.next(key, position, ())
        up, state = above.next(key, position, state)

        def score(position):
            one, other = up(position), down(position)
            return jax.tree.map(lambda a, b: a + b, one, other)

        return score, state

    return above._replace(next=next, posterior=None)
