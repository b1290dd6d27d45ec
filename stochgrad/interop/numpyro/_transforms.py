"""How scores go through numpyro's transforms."""

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.distributions.flows import (
    BlockNeuralAutoregressiveTransform,
    InverseAutoregressiveTransform,
)
from numpyro.distributions.transforms import (
    ComposeTransform,
    IndependentTransform,
    Transform,
)
from numpyro.distributions.util import sum_rightmost

from stochgrad.gradients import Pushed, by_inverse, elementwise, freeze, push_score, triangular


@push_score.register(Transform)
def _any(layer, x, score, condition=None) -> Pushed:
    """Transforms of single numbers elementwise, all others by their inverse."""
    y, log_det = _forward(layer, x)
    if layer.domain.event_dim == 0 and layer.codomain.event_dim == 0:
        return Pushed(y, log_det, freeze(elementwise(lambda x: _forward(layer, x), x, score)))

    def inverse(y):
        x = layer.inv(y)
        return x, -layer.log_abs_det_jacobian(x, y)

    return Pushed(y, log_det, freeze(by_inverse(inverse, y, score)))


def _forward(layer, x):
    y, between = layer.call_with_intermediates(x)
    return y, layer.log_abs_det_jacobian(x, y, between)


@push_score.register(ComposeTransform)
def _compose(layer, x, score, condition=None) -> Pushed:
    log_det = layer.log_abs_det_jacobian(x, layer(x))
    for part in layer.parts:
        x, _, score = push_score(part, x, score)
    return Pushed(x, log_det, score)


@push_score.register(IndependentTransform)
def _independent(layer, x, score, condition=None) -> Pushed:
    y, log_det, score = push_score(layer.base_transform, x, score)
    return Pushed(y, sum_rightmost(log_det, layer.reinterpreted_batch_ndims), score)


@push_score.register(InverseAutoregressiveTransform)
@push_score.register(BlockNeuralAutoregressiveTransform)
def _autoregressive(layer, x, score, condition=None) -> Pushed:
    """Both give the logs of their Jacobian's diagonal, entry by entry, beside the output."""
    y, log_slope = layer.call_with_intermediates(x)
    still = lax.stop_gradient(x)

    def forward(x):
        y, log_slope = layer.call_with_intermediates(x)
        return y, jnp.sum(log_slope, axis=-1)

    slope = jnp.exp(lax.stop_gradient(log_slope))
    one_by_one = jnp.vectorize(
        lambda x, score, slope: triangular(forward, x, score, slope), signature="(n),(n),(n)->(n)"
    )
    score = freeze(one_by_one(still, score, slope))
    return Pushed(y, jnp.sum(log_slope, axis=-1), score)


def score_of_base(distribution, x):
    """The score of a base distribution at a point, constant itself."""
    return freeze(jax.grad(lambda x: jnp.sum(distribution.log_prob(x)))(lax.stop_gradient(x)))
