r"""The score of a flow's density, carried along the forward pass.

A flow maps $x_0$ to $x_L$ by layers $x_{l+1} = T_l(x_l)$ with Jacobians $J_l$. The score
$s_l = \nabla_{x_l}\log q_l(x_l)$ of the density of $x_l$ obeys one rule for every layer,

$$s_{l+1} = J_l^{-\top}\bigl[s_l - \nabla_{x_l}\log|\det J_l(x_l)|\bigr],$$

so that one pass gives the draw, its log density and its score, and with the score the path
gradient of any divergence [Vaitl et al. 2024, section 3]. ``push_score`` is that rule; how a layer
solves with its Jacobian is the layer's own affair, registered by its type.
"""

from collections.abc import Callable
from functools import singledispatch
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

DENSE_LIMIT = 64
"""The most dimensions for which a layer without inverse and rule is solved with densely."""

_RULES = {"flowjax": "stochgrad.flows", "numpyro": "stochgrad.interop"}
"""Where rules for the layers of a library are registered, imported when first needed."""


class Pushed(NamedTuple):
    """What comes out of a layer.

    Attributes:
        value: Its output.
        log_det: Log of the absolute determinant of its Jacobian.
        score: Score of the density of the output. It is a constant for differentiation.
    """

    value: Float[Array, "..."]
    log_det: Float[Array, "..."]
    score: Float[Array, "..."]


@singledispatch
def push_score(layer: Any, x: Any, score: Any, condition: Any = None) -> Pushed:
    r"""Push a point and the score of its density through a layer of a flow.

    $$y = T(x), \qquad s_y = J^{-\top}\bigl[s_x - \nabla_x\log|\det J(x)|\bigr].$$

    Value and log-determinant can be differentiated in the layer's parameters and in ``x``; the
    score cannot. It works on layers of flowjax and of numpyro as they are. For a layer of your own,
    register a rule for its type; ``by_inverse``, ``triangular`` and ``dense`` are what most need.

    Args:
        layer: A flowjax bijection or a numpyro transform.
        x: Its input.
        score: Score of the density of the input, of the shape of ``x``.
        condition: What a conditional layer is given beside the input.

    Raises:
        TypeError: there is no rule for the layer.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro.distributions.transforms import AffineTransform
        >>> from stochgrad.gradients import push_score
        >>> x = jnp.array([1.0, -2.0])
        >>> pushed = push_score(AffineTransform(0.0, 2.0), x, -x)  # from N(0, 1) to N(0, 4)
        >>> pushed.score + pushed.value / 4
        Array([0., 0.], dtype=float32)
    """
    for kind in type(layer).__mro__:
        rules = _RULES.get(kind.__module__.split(".")[0])
        before = push_score.dispatch(type(layer))
        if rules is not None:
            import_module(rules)
            if push_score.dispatch(type(layer)) is not before:
                return push_score(layer, x, score, condition)
    raise TypeError(
        f"there is no rule for the score behind a layer of type {type(layer).__name__}: register "
        "one with stochgrad.gradients.push_score.register."
    )


def freeze(tree: Any) -> Any:
    """The same with its arrays constant for differentiation."""
    return jax.tree.map(
        lambda leaf: lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree
    )


def by_inverse(inverse: Callable[[Array], tuple[Array, Array]], y: Array, score: Array) -> Array:
    r"""The score behind a layer by one vector-Jacobian product of its inverse.

    With $R = T^{-1}$ and $\log|\det R'(y)| = -\log|\det J(x)|$,

    $$s_y = R'(y)^\top s_x + \nabla_y\log|\det R'(y)|.$$

    Args:
        inverse: ``y -> (x, log_det)``, of frozen parameters.
        y: The layer's output.
        score: Score of the density of the layer's input.
    """
    (_, log_det), pull = jax.vjp(inverse, lax.stop_gradient(y))
    return pull((score, jnp.ones_like(log_det)))[0]


def elementwise(forward: Callable[[Array], tuple[Array, Array]], x: Array, score: Array) -> Array:
    r"""The score behind a layer that acts on each number by itself, without its inverse.

    $$s_y = \bigl(s_x - \partial_x\log|f'(x)|\bigr) / f'(x).$$

    Args:
        forward: ``x -> (y, log_det)``, of frozen parameters; ``log_det`` may be summed.
        x: The layer's input.
        score: Score of the density of the input.
    """
    (y, log_det), pull = jax.vjp(forward, lax.stop_gradient(x))
    slope = pull((jnp.ones_like(y), jnp.zeros_like(log_det)))[0]
    return (score - pull((jnp.zeros_like(y), jnp.ones_like(log_det)))[0]) / slope


def triangular(
    forward: Callable[[Array], tuple[Array, Array]],
    x: Array,
    score: Array,
    slope: Array,
    tolerance: float | None = None,
) -> Array:
    r"""The score behind an autoregressive layer, by Jacobi's iteration.

    $J$ is triangular, so that with $D = \mathrm{diag}\,J$ and $r = s_x - \nabla\log|\det J|$

    $$u \leftarrow D^{-1}\bigl(r - (J^\top - D)u\bigr)$$

    is exact after as many sweeps as there are dimensions, and in practice after a few; a sweep is
    one vector-Jacobian product.

    Args:
        forward: ``x -> (y, log_det)``, of frozen parameters, triangular along the last axis.
        x: The layer's input.
        score: Score of the density of the input.
        slope: The diagonal of the Jacobian, of the shape of ``x``.
        tolerance: Largest change of a sweep, relative to the largest entry, at which to stop; by
            default ten times the precision of the numbers.
    """
    x, slope = lax.stop_gradient((x, slope))
    (y, log_det), pull = jax.vjp(forward, x)
    right = score - pull((jnp.zeros_like(y), jnp.ones_like(log_det)))[0]
    first = right / slope
    limit = 10 * float(jnp.finfo(x.dtype).eps) if tolerance is None else tolerance

    def sweep(state):
        u, _, count = state
        new = (right - pull((u, jnp.zeros_like(log_det)))[0] + slope * u) / slope
        change, size = jnp.max(jnp.abs(new - u)), jnp.max(jnp.abs(new))
        return new, change > limit * size, count + 1

    def more(state):
        return state[1] & (state[2] < x.shape[-1])

    return lax.while_loop(more, sweep, (first, jnp.array(x.shape[-1] > 1), 0))[0]


def dense(
    forward: Callable[[Array], tuple[Array, Array]], x: Array, score: Array, name: str
) -> Array:
    """The score behind any layer, by its whole Jacobian: for few dimensions.

    Args:
        forward: ``x -> (y, log_det)`` for one point, of frozen parameters.
        x: The layer's input.
        score: Score of the density of the input.
        name: What to call the layer where it is refused.

    Raises:
        ValueError: there are more than 64 dimensions.
    """
    if x.size > DENSE_LIMIT:
        raise ValueError(
            f"{name} has no inverse and no rule of its own, and with {x.size} dimensions its "
            f"Jacobian is too large to solve with (at most {DENSE_LIMIT}): register a rule with "
            "stochgrad.gradients.push_score.register."
        )
    x = lax.stop_gradient(x)
    flat, unravel = ravel_pytree(x)
    jacobian = jax.jacrev(lambda v: forward(unravel(v))[0].ravel())(flat)
    right = score - jax.grad(lambda x: forward(x)[1])(x)
    return jnp.linalg.solve(jacobian.T, right.ravel()).reshape(x.shape)


def path_log_density(
    value: Array, log_density: Array, score: Array, score_coef: Any = 0.0
) -> Array:
    r"""A log density whose gradient runs along the sample path.

    It has the value $\log q_\theta(x)$ and, with $x = T_\theta(z)$, the gradient

    $$(\partial_\theta T_\theta(z))^\top s(x) + c\,\partial_\theta\log q_\theta(x)\big|_x,$$

    the first term being the path, the second, of mean zero, the score: $c = 1$ is the ordinary
    reparameterised gradient, $c = 0$ the path gradient.

    Args:
        value: Draws, with a gradient in the parameters, of shape (n, ...).
        log_density: Their log densities as the forward pass gives them, of shape (n,).
        score: Scores, constant.
        score_coef: c.
    """
    if isinstance(score_coef, float) and score_coef == 1.0:
        return log_density
    moved = score * (value - lax.stop_gradient(value))
    along = lax.stop_gradient(log_density) + moved.reshape(*log_density.shape, -1).sum(-1)
    return score_coef * log_density + (1.0 - score_coef) * along
