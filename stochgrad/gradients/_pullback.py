"""A target seen through a function of another position: some of the weights, or wider ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import (
    Gradient,
    Observations,
    Posterior,
    Target,
    at_least_float32,
    by_name,
    check_callable,
    check_position,
    chosen_leaves,
    describe,
    initial_of,
    split_leaves,
)
from stochgrad.gradients._like import check_like
from stochgrad.gradients._minibatch import as_gradient


def trainable(target: Target, params: PyTree, where: Callable[[str], bool]) -> Target:
    r"""A posterior or a gradient of some of its weights, the others fixed.

    $$\pi(\theta_{\text{free}}) \propto \pi(\theta_{\text{free}}, \theta_{\text{fixed}}).$$

    Gradients, an optimizer's state and draws are of the free weights alone. The position is a dict
    of them by name. What is fixed may be of any type: integers, or bfloat16.

    Args:
        target: A posterior, or a gradient such as ``stochgrad.em.mcmc_em`` makes.
        params: All weights, a position of the target: where the free ones start, and what the
            others are.
        where: ``name -> bool``, whether a leaf is free; names are paths, ``readout.w``.

    Returns:
        A posterior of a posterior, a gradient of a gradient; what its ``model`` makes of a position
        is that of all weights.

    Raises:
        TypeError: the target is neither, or ``where`` no function of names to booleans.
        ValueError: ``where`` fails or chooses no weights, or all; free weights are no floating
            point numbers; the target has positions of another structure.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda p: -0.5 * (p["a"] ** 2 + p["b"] ** 2),
        ...     lambda p, x: -0.5 * (x - p["a"] - p["b"]) ** 2, jnp.ones(9), order="full")
        >>> free = stochgrad.trainable(
        ...     target, {"a": jnp.array(0.0), "b": jnp.array(1.0)}, lambda name: name == "a")
        >>> fit = stochgrad.fit(jax.random.key(0), free, 300, learning_rate=0.05)
        >>> {name: abs(round(float(x), 2)) for name, x in fit.position.items()}
        {'a': 0.0}
    """
    check_callable("where", where, "a function name -> bool")
    params = jax.tree.map(jnp.asarray, params)
    chosen = chosen_leaves("where", where, params)
    own, join = split_leaves(params, chosen)
    names = [name for name, yes in zip(by_name(params), chosen, strict=True) if yes]
    start = dict(zip(names, own, strict=True))
    check_position(start, "params")
    _check_params(target, params)
    return _through(target, lambda free: join([free[name] for name in names]), lambda key: start)


def mixed_precision(target: Target, dtype: Any = jnp.bfloat16) -> Target:
    """A posterior or a gradient that is worked out in a narrow type, at positions in float32.

    A weight in bfloat16 has eight leading bits: an update below a 256th of it is lost, so that an
    optimizer with a small step does not move it, and a sampler spreads wrongly. Positions, updates,
    an optimizer's state and the sum over gradients of steps stay in float32 here; floating-point
    leaves are rounded where the target is evaluated, and its gradient is widened again.

    Args:
        target: A posterior, or a gradient.
        dtype: The narrow type: ``bfloat16`` or ``float16``.

    Raises:
        TypeError: the target is neither a posterior nor a gradient, or ``dtype`` is no type.
        ValueError: ``dtype`` is no floating-point type narrower than float32.

    Example:
        >>> import jax, jax.numpy as jnp, optax, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda w: jnp.zeros(()), lambda w, x: -((x - w) ** 2),
        ...     3 * jnp.ones(8, jnp.bfloat16), order="full")
        >>> wide = stochgrad.mixed_precision(target)
        >>> fit = stochgrad.fit(
        ...     jax.random.key(0), wide, 200, optimizer=optax.adam(1e-3), init=jnp.float32(1))
        >>> round(float(fit.position), 1)  # in bfloat16 it would be 1.0 still
        1.2
    """
    try:
        narrow = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"dtype must be a type such as jnp.bfloat16, got {describe(dtype)}."
        ) from None
    if not jnp.issubdtype(narrow, jnp.floating) or narrow.itemsize >= 4:
        raise ValueError(f"dtype must be bfloat16 or float16, got {narrow}.")
    floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    to = lambda tree, dtype: jax.tree.map(
        lambda x: jnp.asarray(x).astype(dtype) if floating(x) else x, tree
    )
    initial = initial_of(target)
    start = None if initial is None else lambda key: to(initial(key), jnp.float32)
    return _through(target, lambda position: to(position, narrow), start)


def _check_params(target: Target, params: PyTree) -> None:
    initial = initial_of(target)
    if initial is not None:
        like = jax.eval_shape(initial, jax.random.key(0))
        check_like("params", params, like, "the target's position")


def _through(target: Target, function: Callable, initial: Callable | None) -> Target:
    """The target as a function of what ``function`` makes its positions of."""
    if isinstance(target, Posterior):
        return _posterior_through(target, function, initial)
    gradient = as_gradient(target)
    named = gradient.model or (lambda position: position)

    def init(key, position):
        return gradient.init(key, function(position))

    def next(key, position, state):
        score, state = gradient.next(key, function(position), state)

        def own_score(position):
            inner, pull = jax.vjp(function, position)
            value, slope = score(inner)
            slope = jax.tree.map(_cotangent, inner, slope)
            return _wide(value), pull(slope)[0]

        return own_score, state

    posterior = gradient.posterior
    return Gradient(
        init,
        next,
        None if posterior is None else _posterior_through(posterior, function, initial),
        initial,
        lambda position: named(function(position)),
    )


def _wide(value: Any) -> Any:
    return value.astype(at_least_float32(value.dtype))


def _cotangent(leaf: Any, slope: Any) -> Any:
    """A slope of the type that differentiation expects for a leaf."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return slope.astype(leaf.dtype)
    return np.zeros(leaf.shape, jax.dtypes.float0)


def _posterior_through(
    posterior: Posterior, function: Callable, initial: Callable | None
) -> Posterior:
    constrain, observations = posterior.constrain, posterior.observations
    return posterior._replace(
        log_density=lambda q, batch: _wide(posterior.log_density(function(q), batch)),
        initial=initial,
        constrain=constrain and (lambda q: constrain(function(q))),
        unconstrain=None,
        observations=observations and (lambda: _observed_through(observations(), function)),
        model=None,
    )


def _observed_through(observed: Observations, function: Callable) -> Observations:
    predict, given = observed.predict, observed.given

    def given_values(given, values):
        log_density = given(values)
        return lambda q, batch: log_density(function(q), batch)

    return observed._replace(
        log_likelihood=lambda q, batch: observed.log_likelihood(function(q), batch),
        log_prior=lambda q: observed.log_prior(function(q)),
        predict=predict and (lambda key, q, batch: predict(key, function(q), batch)),
        elsewhere=lambda args, kwargs: _observed_through(
            observed.elsewhere(args, kwargs), function
        ),
        given=given and partial(given_values, given),
    )
