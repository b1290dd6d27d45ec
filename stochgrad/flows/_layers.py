"""How scores go through flowjax's bijections: containers layer by layer, and those with a rule."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import (
    AbstractBijection,
    BlockAutoregressiveNetwork,
    Chain,
    Concatenate,
    Coupling,
    EmbedCondition,
    Indexed,
    Invert,
    MaskedAutoregressive,
    NumericalInverse,
    Reshape,
    Sandwich,
    Scan,
    Stack,
    Vmap,
)
from flowjax.bijections.block_autoregressive_network import logmatmulexp
from jax import lax
from paramax import unwrap

from stochgrad.gradients import (
    Pushed,
    by_inverse,
    dense,
    elementwise,
    freeze,
    push_score,
    triangular,
)


@push_score.register(AbstractBijection)
def _any(layer, x, score, condition=None) -> Pushed:
    """Scalar bijections elementwise, others by their inverse, without an inverse densely."""
    y, log_det = layer.transform_and_log_det(x, condition)
    frozen, given = freeze((layer, condition))
    forward = partial(_forward, frozen, given)
    if layer.shape == ():
        return Pushed(y, log_det, elementwise(forward, x, score))
    try:
        score_y = by_inverse(lambda y: frozen.inverse_and_log_det(y, given), y, score)
    except NotImplementedError:
        score_y = dense(forward, x, score, f"flowjax's {type(layer).__name__}")
    return Pushed(y, log_det, score_y)


def _forward(layer, condition, x):
    return layer.transform_and_log_det(x, condition)


def _one_by_one(layers, x, score, condition) -> Pushed:
    log_det = jnp.zeros((), x.dtype)
    for layer in layers:
        x, more, score = push_score(layer, x, score, condition)
        log_det = log_det + more
    return Pushed(x, log_det, score)


@push_score.register(Chain)
def _chain(layer, x, score, condition=None) -> Pushed:
    return _one_by_one(layer.bijections, x, score, condition)


@push_score.register(Sandwich)
def _sandwich(layer, x, score, condition=None) -> Pushed:
    parts = (layer.outer, layer.inner, Invert(layer.outer))
    return _one_by_one(parts, x, score, condition)


@push_score.register(Scan)
def _scan(layer, x, score, condition=None) -> Pushed:
    return _scanned(layer.bijection, x, score, condition, invert=False)


def _scanned(layers, x, score, condition, invert: bool) -> Pushed:
    arrays, rest = eqx.partition(layers, eqx.is_array)

    def step(carry, arrays):
        layer = eqx.combine(arrays, rest)
        layer = Invert(layer) if invert else layer
        value, more, score = push_score(layer, carry.value, carry.score, condition)
        return Pushed(value, carry.log_det + more.astype(carry.log_det.dtype), score), None

    first = Pushed(x, jnp.zeros((), x.dtype), score)
    return lax.scan(step, first, arrays, reverse=invert)[0]


@push_score.register(Invert)
def _invert(layer, x, score, condition=None) -> Pushed:
    """Containers inside out; else by the vector-Jacobian product of the inner forward map."""
    inner = layer.bijection
    if isinstance(inner, Invert):
        return push_score(inner.bijection, x, score, condition)
    if isinstance(inner, Chain):
        turned = [Invert(unwrap(part)) for part in reversed(inner.bijections)]
        return _one_by_one(turned, x, score, condition)
    if isinstance(inner, Scan):
        return _scanned(inner.bijection, x, score, condition, invert=True)
    if isinstance(inner, Sandwich):
        return push_score(Sandwich(Invert(inner.inner), inner.outer), x, score, condition)
    y, log_det = inner.inverse_and_log_det(x, condition)
    frozen, given = freeze((inner, condition))
    return Pushed(y, log_det, by_inverse(partial(_forward, frozen, given), y, score))


@push_score.register(NumericalInverse)
def _numerical(layer, x, score, condition=None) -> Pushed:
    return push_score(layer.bijection, x, score, condition)


@push_score.register(Vmap)
def _vmap(layer, x, score, condition=None) -> Pushed:
    axes = (layer.in_axes[0], 0, 0, layer.in_axes[2])
    push = eqx.filter_vmap(push_score, in_axes=axes, axis_size=layer.axis_size)
    y, log_det, score = push(layer.bijection, x, score, condition)
    return Pushed(y, jnp.sum(log_det), score)


@push_score.register(Reshape)
def _reshape(layer, x, score, condition=None) -> Pushed:
    inner = layer.bijection
    if layer.cond_shape is not None and condition is not None:
        condition = condition.reshape(inner.cond_shape)
    pushed = push_score(inner, x.reshape(inner.shape), score.reshape(inner.shape), condition)
    y, score = pushed.value.reshape(layer.shape), pushed.score.reshape(layer.shape)
    return Pushed(y, pushed.log_det, score)


@push_score.register(EmbedCondition)
def _embed(layer, x, score, condition=None) -> Pushed:
    return push_score(layer.bijection, x, score, layer.embedding_net(condition))


@push_score.register(Indexed)
def _indexed(layer, x, score, condition=None) -> Pushed:
    at = layer.idxs
    part = push_score(layer.bijection, x[at], score[at], condition)
    return Pushed(x.at[at].set(part.value), part.log_det, score.at[at].set(part.score))


@push_score.register(Concatenate)
@push_score.register(Stack)
def _side_by_side(layer, x, score, condition=None) -> Pushed:
    stacked = isinstance(layer, Stack)
    where = len(layer.bijections) if stacked else layer.split_idxs

    def split(array):
        parts = jnp.split(array, where, axis=layer.axis)
        return [part.squeeze(layer.axis) for part in parts] if stacked else parts

    pushed = [
        push_score(part, x, score, condition)
        for part, x, score in zip(layer.bijections, split(x), split(score), strict=True)
    ]
    values, log_dets, scores = zip(*pushed, strict=True)
    join = jnp.stack if stacked else jnp.concatenate
    return Pushed(join(values, layer.axis), jnp.sum(jnp.stack(log_dets)), join(scores, layer.axis))


@push_score.register(Coupling)
def _coupling(layer, x, score, condition=None) -> Pushed:
    r"""Coupling layers $y_a = a$, $y_b = f(b; h(a))$, forward only, whatever $f$ is.

    $$s_b' = (s_b - \partial_b\log f') / f', \qquad
      s_a' = s_a - h'(a)^\top
      \bigl[(\partial_h f)^\top s_b' + \partial_h\textstyle\sum\log f'\bigr].$$
    """
    y, log_det = layer.transform_and_log_det(x, condition)
    cut = layer.untransformed_dim
    frozen, given, still = freeze((layer, condition, x))

    def conditioner(a):
        return frozen.conditioner(a if layer.cond_shape is None else jnp.concatenate([a, given]))

    def transform(h, b):
        return frozen._flat_params_to_transformer(h).transform_and_log_det(b)

    h, pull_net = jax.vjp(conditioner, still[:cut])
    (yb, ld), pull = jax.vjp(transform, h, still[cut:])
    slope = pull((jnp.ones_like(yb), jnp.zeros_like(ld)))[1]
    curve = pull((jnp.zeros_like(yb), jnp.ones_like(ld)))[1]
    score_b = (score[cut:] - curve) / slope
    score_a = score[:cut] - pull_net(pull((score_b, jnp.ones_like(ld)))[0])[0]
    return Pushed(y, log_det, jnp.concatenate([score_a, score_b]))


@push_score.register(MaskedAutoregressive)
def _autoregressive(layer, x, score, condition=None) -> Pushed:
    y, log_det = layer.transform_and_log_det(x, condition)
    frozen, given, still = freeze((layer, condition, x))
    entered = still if layer.cond_shape is None else jnp.concatenate([still, given])
    one = frozen._flat_params_to_transformer(frozen.masked_autoregressive_mlp(entered))
    (fx, ld), pull = jax.vjp(one.transform_and_log_det, still)
    slope = pull((jnp.ones_like(fx), jnp.zeros_like(ld)))[0]
    return Pushed(y, log_det, triangular(partial(_forward, frozen, given), still, score, slope))


@push_score.register(BlockAutoregressiveNetwork)
def _block_autoregressive(layer, x, score, condition=None) -> Pushed:
    y, log_det = layer.transform_and_log_det(x, condition)
    frozen, given, still = freeze((layer, condition, x))
    slope = jnp.exp(_block_log_slopes(frozen, still, given))
    return Pushed(y, log_det, triangular(partial(_forward, frozen, given), still, score, slope))


def _block_log_slopes(layer, x, condition):
    """Logs of the diagonal of a block autoregressive network's Jacobian, of shape (dim,)."""
    (linear, log_jacobian), *rest = layer.layers
    x, log_slopes = linear(x), log_jacobian(linear)
    if condition is not None:
        x = x + layer.cond_linear(condition)
    for linear, log_jacobian in rest:
        x, more = layer._activation_and_log_jacobian_3d(x)
        log_slopes = logmatmulexp(log_jacobian(linear), logmatmulexp(more, log_slopes))
        x = linear(x)
    return log_slopes.reshape(-1)
