"""A flow of numpyro's as one of flowjax's, for all that takes such a one."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpyro.distributions as dist
from flowjax.bijections import AbstractBijection
from flowjax.distributions import AbstractDistribution, AbstractTransformed

from stochgrad.core import check_callable, check_instance, describe, first_line
from stochgrad.gradients import Pushed, push_score
from stochgrad.interop.numpyro._guide_strata import start_of, transforms_of


def as_flow(
    distribution: dist.Distribution | Callable[[Any], dist.Distribution], params: Any = None
) -> AbstractDistribution:
    """A numpyro distribution, transformed or not, as a flowjax distribution.

    It goes wherever a flow goes: ``reverse_kl``, ``forward_kl``, ``stochgrad.fit``,
    ``flows.sample``, ``flows.metropolis``, ``AutoFlow``. Scores go through numpyro's transforms by
    their own rules.

    Args:
        distribution: A distribution of one event, or ``params -> distribution``. A distribution
            itself has nothing to train.
        params: What is trained, any pytree of arrays; no constraints are put on it.

    Raises:
        TypeError: ``distribution`` is, or returns, something else.
        ValueError: it fails, is a batch of distributions, or ``params`` come without a function.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, stochgrad
        >>> from numpyro.distributions.flows import InverseAutoregressiveTransform
        >>> from numpyro.nn import AutoregressiveNN
        >>> from stochgrad.numpyro import as_flow
        >>> init, network = AutoregressiveNN(2, [8])
        >>> def make(weights):
        ...     layer = InverseAutoregressiveTransform(lambda x: network(weights, x))
        ...     start = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
        ...     return dist.TransformedDistribution(start, layer)
        >>> flow = as_flow(make, init(jax.random.key(0), (2,))[1])
        >>> objective = stochgrad.flows.reverse_kl(flow, lambda x: -0.5 * jnp.sum((x - 1.0) ** 2))
        >>> fit = stochgrad.fit(jax.random.key(1), objective, 500, learning_rate=0.02)
        >>> bool(abs(fit.value - jnp.log(2 * jnp.pi)) < 0.01)  # the log evidence
        True
    """
    if isinstance(distribution, dist.Distribution):
        if params is not None:
            raise ValueError(
                "params must be None for a distribution, which has nothing to train: give a "
                "function params -> distribution."
            )
        make = _Constant(distribution)
    else:
        wanted = "a numpyro distribution or a function params -> distribution"
        if isinstance(distribution, type):
            raise TypeError(f"distribution must be {wanted}, got {describe(distribution)}.")
        make = check_callable("distribution", distribution, wanted)
    try:
        made = make(params)
    except Exception as error:
        raise ValueError(f"distribution fails on params: {first_line(error)}.") from error
    check_instance("what distribution returns", made, dist.Distribution, "a numpyro distribution")
    if made.batch_shape != ():
        raise ValueError(
            f"distribution must be of one event, got a batch of shape {made.batch_shape}: put "
            f".to_event({len(made.batch_shape)}) behind it."
        )
    start = tuple(start_of(made).shape())
    if start != tuple(made.event_shape):
        raise ValueError(
            f"distribution must keep the shape {start} of its start, got {made.event_shape}."
        )
    if not transforms_of(made):
        return NumpyroBase(params=params, make=make, shape=start)
    return NumpyroFlow(params=params, make=make, event_shape=start)  # pyright: ignore[reportCallIssue]


class _Constant:
    """A function that returns one thing."""

    def __init__(self, value: Any):
        self.value = value

    def __call__(self, params: Any) -> Any:
        return self.value


class NumpyroBase(AbstractDistribution):
    """What a numpyro distribution's draws start from."""

    params: Any
    make: Callable[[Any], dist.Distribution] = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = None

    def _start(self):
        start = start_of(self.make(self.params))
        return start.to_event(len(start.batch_shape))

    def _sample(self, key, condition=None):
        return self._start().sample(key)

    def _log_prob(self, x, condition=None):
        return self._start().log_prob(x)


class NumpyroLayers(AbstractBijection):
    """All transforms of a numpyro distribution, one after the other."""

    params: Any
    make: Callable[[Any], dist.Distribution] = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = None

    def transforms(self):
        return transforms_of(self.make(self.params))

    def transform_and_log_det(self, x, condition=None):
        x = jnp.asarray(x)
        log_det = jnp.zeros((), x.dtype)
        for transform in self.transforms():
            y, between = transform.call_with_intermediates(x)
            log_det = log_det + jnp.sum(transform.log_abs_det_jacobian(x, y, between))
            x = y
        return x, log_det

    def inverse_and_log_det(self, y, condition=None):
        y = jnp.asarray(y)
        log_det = jnp.zeros((), y.dtype)
        for transform in reversed(self.transforms()):
            x = transform.inv(y)
            log_det = log_det - jnp.sum(transform.log_abs_det_jacobian(x, y, None))
            y = x
        return y, log_det


class NumpyroFlow(AbstractTransformed):
    """A transformed distribution of numpyro's."""

    params: Any
    make: Callable[[Any], dist.Distribution] = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def base_dist(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return NumpyroBase(params=self.params, make=self.make, shape=self.event_shape)

    @property
    def bijection(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return NumpyroLayers(params=self.params, make=self.make, shape=self.event_shape)


@push_score.register(NumpyroLayers)
def _layers(layer, x, score, condition=None) -> Pushed:
    log_det = jnp.zeros((), x.dtype)
    for transform in layer.transforms():
        x, more, score = push_score(transform, x, score)
        log_det = log_det + jnp.sum(more)
    return Pushed(x, log_det, score)
