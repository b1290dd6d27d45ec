"""Draws of a flow with weights to a density, and what is made of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from stochgrad.core import (
    LEAST_EFFECTIVE_DRAWS,
    Draws,
    Posterior,
    PRNGKey,
    check_callable,
    check_count,
    check_finite,
    describe,
    first_line,
)
from stochgrad.kernels import systematic


class WeightsWarning(UserWarning):
    """The weights of a flow's draws have too heavy a tail to be trusted."""


class WeightedDraws(NamedTuple):
    r"""Draws of a flow, weighted to a density $p$.

    Attributes:
        value: The draws, of shape (n, \*shape).
        log_weight: $\log p - \log q$ at each, unnormalized.
        smoothed: Log weights that sum to one, the largest smoothed by a Pareto tail.
        khat: Shape of that tail. Below ``good_khat`` the weights can be trusted, above they cannot,
            however high the effective sample size [Vehtari et al. 2024]. Weights that are all
            the same have no tail, minus infinity; that of fewer than 25 is unknown, infinity.
        log_z: Log of the normalizer of p from the raw weights, $\log\frac1n\sum_i w_i$, whose
            exponential is unbiased.
        log_z_error: Its standard error, by the delta method.
        key: What ``resample`` draws with.
        posterior: The density as a posterior, for the checks and names of ``to_draws``.
    """

    value: Float[Array, "n ..."]
    log_weight: Float[Array, " n"]
    smoothed: Float[Array, " n"]
    khat: float
    log_z: float
    log_z_error: float
    key: PRNGKey
    posterior: Posterior | None = None

    @property
    def good_khat(self) -> float:
        r"""The largest k-hat to be trusted with n draws, $\min(0.7, 1 - 1/\log_{10}n)$."""
        return good_khat(len(self.log_weight))

    @property
    def ess(self) -> float:
        r"""Relative effective sample size under q, $(\sum w)^2 / (n\sum w^2)$, between 0 and 1."""
        return float(_ess(self.log_weight))

    def expectation(self, function: Callable[[Array], Array]) -> Array:
        """The weighted mean of a function of one draw, with the smoothed weights.

        Args:
            function: ``x -> array``; of a function that says yes or no it is the probability.

        Raises:
            ValueError: the function fails, or is not finite where there is weight.
        """
        check_callable("function", function, "a function of one draw")
        values = mapped("function", function, self.value, "draw")
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            values = values.astype(self.smoothed.dtype)
        weights = jnp.exp(self.smoothed).astype(values.dtype)
        check_finite("function of the draws that have weight", values[weights > 0])
        return jnp.tensordot(weights, values, 1)

    def resample(self, num_samples: int | None = None) -> Float[Array, "n ..."]:
        """Draws of the density, equally weighted: systematic resampling, in random order.

        Args:
            num_samples: How many; by default as many as there are.
        """
        return self.value[self._chosen(num_samples)]

    def _chosen(self, num_samples: int | None) -> Array:
        count = len(self.value) if num_samples is None else check_count("num_samples", num_samples)
        start_key, order_key = jax.random.split(self.key)
        chosen = systematic(start_key, jnp.exp(self.smoothed), count)
        return jax.random.permutation(order_key, chosen)

    def to_draws(self, num_samples: int | None = None) -> Draws:
        """Resampled draws as one chain, as ``stochgrad.sample`` returns draws.

        With ``.verdict``, which knows of k-hat and of the effective sample size, and with
        ``.to_datatree()``, ``.report()`` and the rest. ``stats`` has the log weight of each;
        ``attrs`` the relative effective sample size, k-hat and log Z. Draws of large weight come
        several times, which the effective draws of the verdict's table do not see.

        Args:
            num_samples: How many; by default as many as there are.
        """
        chosen = self._chosen(num_samples)
        positions = np.asarray(self.value[chosen])[None]
        log_weight = np.asarray(self.log_weight[chosen])[None]
        attrs = {
            "method": "importance resampling",
            "ess_q": self.ess,
            "pareto_khat": self.khat,
            "good_khat": self.good_khat,
            "log_z": self.log_z,
            "log_z_error": self.log_z_error,
        }
        return Draws(
            positions,
            {"log_weight": log_weight},
            np.ones(positions.shape[:2], bool),
            np.array([-1]),
            attrs=attrs,
            posterior=self.posterior,
            settings={"order": "full"},
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        notes = [] if self.khat <= self.good_khat else [heavy_tail(self.khat, len(self.log_weight))]
        effective = self.ess * len(self.log_weight)
        if effective < LEAST_EFFECTIVE_DRAWS:
            notes.append(
                f"the {len(self.log_weight)} weighted draws are worth {effective:.0f} of the "
                f"density, fewer than {LEAST_EFFECTIVE_DRAWS}: draw more."
            )
        return tuple(notes)

    @property
    def verdict(self) -> Any:
        """Whether the weighted draws can be used: that of ``to_draws()``."""
        return self.to_draws().verdict

    def to_arviz(self, num_samples: int | None = None) -> Any:
        """Resampled draws in what the installed ArviZ takes: ``to_draws(...).to_arviz()``.

        Args:
            num_samples: How many draws.
        """
        return self.to_draws(num_samples).to_arviz()


def good_khat(count: int) -> float:
    """The largest k-hat to be trusted with so many draws."""
    return min(0.7, 1.0 - 1.0 / np.log10(count)) if count > 1 else -np.inf


def heavy_tail(khat: float, count: int) -> str:
    """What a k-hat that is too large means, in a sentence."""
    return (
        f"k-hat of the weights is {khat:.2f}, above {good_khat(count):.2f}, the limit for {count} "
        f"draws: {'their tail is too heavy' if np.isfinite(khat) else 'those are too few'} for "
        "log_z and its error, for expectations and resampled draws. Train the flow further, draw "
        "more, or take stochgrad.flows.metropolis."
    )


def _ess(log_weight):
    twice = 2 * logsumexp(log_weight) - logsumexp(2 * log_weight)
    return jnp.exp(twice) / log_weight.size


def mapped(name: str, function: Callable[[Array], Any], points: Array, what: str) -> Array:
    """A caller's function at each of many points, if it takes one and returns an array."""
    try:
        values = jax.vmap(function)(points)
    except Exception as error:
        raise ValueError(
            f"{name} fails on a {what} of shape {points.shape[1:]}: {first_line(error)}."
        ) from error
    if not isinstance(values, jax.Array):
        raise TypeError(f"{name} must return one array, got {describe(values)}.")
    return values
