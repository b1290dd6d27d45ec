"""A flow of bijx as one of flowjax's, for all that takes such a one."""

from importlib import import_module
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from flowjax.bijections import AbstractBijection, Chain, Invert
from flowjax.distributions import AbstractDistribution, Transformed

from stochgrad.core import check_instance, first_line


def from_bijx(distribution: Any, shape: tuple[int, ...] | None = None) -> AbstractDistribution:
    """A bijx distribution, transformed or not, as a flowjax distribution.

    It goes wherever a flow goes: ``reverse_kl``, ``forward_kl``, ``stochgrad.fit``, ``sample``,
    ``metropolis``, ``stochgrad.numpyro.AutoFlow``. What is trained are its ``nnx.Param``; all other
    variables, ``bijx.Const`` for example, are held fixed, which bijx's own ``to_flowjax`` does not
    do. Scores go through bijx's chains layer by layer, through each layer by its inverse, which
    should be in closed form.

    Args:
        distribution: A bijx distribution.
        shape: Shape of a point; by default the distribution's or its prior's ``event_shape``.

    Raises:
        ImportError: bijx is not installed.
        TypeError: ``distribution`` is something else.
        ValueError: the shape is not known, or the distribution does not draw points of it.
    """
    try:
        bijx, nnx = import_module("bijx"), import_module("flax.nnx")
    except ModuleNotFoundError as error:
        raise ImportError("from_bijx needs bijx: pip install bijx.") from error
    check_instance("distribution", distribution, bijx.Distribution, "a bijx distribution")
    start, layers = distribution, []
    while isinstance(start, bijx.Transformed):
        layers = [start.bijection, *layers]
        start = start.prior
    shape = getattr(start, "event_shape", None) if shape is None else tuple(shape)
    if shape is None:
        raise ValueError(
            f"shape must be given for a {type(start).__name__}, which has no event_shape."
        )

    def parts(value) -> dict[str, Any]:
        graph, params, rest = nnx.split(value, nnx.Param, ...)
        return {"params": params, "rest": paramax.NonTrainable(rest), "graph": graph}

    def converted(layer) -> AbstractBijection:
        if isinstance(layer, bijx.Chain):
            return Chain([converted(part) for part in layer.bijections])
        if isinstance(layer, bijx.Inverse):
            return Invert(converted(layer.bijection))
        return BijxLayer(**parts(layer), shape=shape)

    base = BijxBase(**parts(start), shape=shape)
    flow = Transformed(base, Chain([converted(layer) for layer in layers])) if layers else base
    try:
        point = eqx.filter_eval_shape(lambda key: flow.sample(key), jax.random.key(0))
    except Exception as error:
        raise ValueError(
            f"distribution cannot be drawn from at shape {shape}: {first_line(error)}."
        ) from error
    if point.shape != shape:
        raise ValueError(f"distribution must draw points of shape {shape}, got {point.shape}.")
    return flow


class BijxBase(AbstractDistribution):
    """A bijx distribution."""

    params: Any
    rest: Any
    graph: Any = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = None

    def _sample(self, key, condition=None):
        return self._sample_and_log_prob(key)[0]

    def _log_prob(self, x, condition=None):
        return _merged(self).log_density(x)

    def _sample_and_log_prob(self, key, condition=None):
        return _merged(self).sample((), rng=key)


class BijxLayer(AbstractBijection):
    """A bijx bijection."""

    params: Any
    rest: Any
    graph: Any = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = None

    def transform_and_log_det(self, x, condition=None):
        x = jnp.asarray(x)
        y, falling = _merged(self).forward(x, jnp.zeros((), x.dtype))
        return y, -falling

    def inverse_and_log_det(self, y, condition=None):
        y = jnp.asarray(y)
        x, falling = _merged(self).reverse(y, jnp.zeros((), y.dtype))
        return x, -falling


def _merged(part: BijxBase | BijxLayer) -> Any:
    return import_module("flax.nnx").merge(part.graph, part.params, part.rest)
