r"""The score of a flow's density, carried along the forward pass.

A flow maps $x_0$ to $x_L$ by layers $x_{l+1} = T_l(x_l)$ with Jacobians $J_l$. The score
$s_l = \nabla_{x_l}\log q_l(x_l)$ of the density of $x_l$ obeys one rule for every layer,

$$s_{l+1} = J_l^{-\top}\bigl[s_l - \nabla_{x_l}\log|\det J_l(x_l)|\bigr],$$

so that one pass gives the draw, its log density and its score, and with the score the path
gradient of any divergence [Vaitl et al. 2024, section 3]. ``push_score`` is that rule; how a layer
solves with its Jacobian is the layer's own affair, registered by its type.
"""

from collections.abc import Callable
from functools import singledispatch, wraps
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from stochgrad.core import check_callable, check_number, describe, first_line

DENSE_LIMIT = 64
"""The most dimensions for which a layer without inverse and rule is solved with densely."""

_FEW = 8
"""Dimensions up to which a triangular Jacobian is cheaper whole than sweep by sweep."""

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


def _checked(rules: Any) -> Any:
    """Rules by type, with a look at point and score before; ``register`` is still there."""

    @wraps(rules)
    def checked(layer, x, score, condition=None):
        x, score = _alike(x=x, score=score)
        if rules.dispatch(type(layer)) is not rules.dispatch(object):
            shape, given = getattr(layer, "shape", x.shape), getattr(layer, "cond_shape", None)
            if x.shape != shape:
                raise ValueError(f"x must have the layer's shape {shape}, got {x.shape}.")
            got = None if condition is None else jnp.shape(condition)
            if given is not None and got != given:
                raise ValueError(f"condition must have the layer's shape {given}, got {got}.")
        return rules(layer, x, score, condition)

    return checked


@_checked
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
        ValueError: ``score`` has not the shape of ``x``.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro.distributions.transforms import AffineTransform
        >>> from stochgrad.gradients import push_score
        >>> x = jnp.array([1.0, -2.0])
        >>> pushed = push_score(AffineTransform(0.0, 2.0), x, -x)  # from N(0, 1) to N(0, 4)
        >>> pushed.score + pushed.value / 4
        Array([0., 0.], dtype=float32)
    """
    if isinstance(layer, type):
        raise TypeError(f"layer must be a layer of a flow, got {describe(layer)}.")
    for kind in type(layer).__mro__:
        rules = _RULES.get(kind.__module__.split(".")[0])
        before = push_score.dispatch(type(layer))
        if rules is not None:
            import_module(rules)
            if push_score.dispatch(type(layer)) is not before:
                return push_score(layer, x, score, condition)
    raise TypeError(
        "layer: there is no rule for the score behind a layer of type "
        f"{type(layer).__name__}: register one with stochgrad.gradients.push_score.register."
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

    Raises:
        TypeError: an array is none, or ``inverse`` is no such function.
        ValueError: ``inverse`` fails at y, or shapes differ.
    """
    y, score = _points(y=y, score=score)
    (_, log_det), pull = _pulled("inverse", inverse, y, score.shape)
    return pull((score, jnp.ones_like(log_det)))[0]


def elementwise(forward: Callable[[Array], tuple[Array, Array]], x: Array, score: Array) -> Array:
    r"""The score behind a layer that acts on each number by itself, without its inverse.

    $$s_y = \bigl(s_x - \partial_x\log|f'(x)|\bigr) / f'(x).$$

    Args:
        forward: ``x -> (y, log_det)``, of frozen parameters; ``log_det`` may be summed.
        x: The layer's input.
        score: Score of the density of the input.

    Raises:
        TypeError: an array is none, or ``forward`` is no such function.
        ValueError: ``forward`` fails at x, or shapes differ.
    """
    x, score = _alike(x=x, score=score)
    (y, log_det), pull = _pulled("forward", forward, x, x.shape)
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
    one vector-Jacobian product. Up to eight dimensions all products are taken at once, and their
    series is summed by squaring.

    Args:
        forward: ``x -> (y, log_det)``, of frozen parameters, triangular along the last axis.
        x: The layer's input.
        score: Score of the density of the input.
        slope: The diagonal of the Jacobian, of the shape of ``x``.
        tolerance: Largest change of a sweep, relative to the largest entry, at which to stop; by
            default ten times the precision of the numbers.

    Raises:
        TypeError: an array is none, or ``forward`` is no such function.
        ValueError: ``forward`` fails at x, shapes differ, or the tolerance is not positive.
    """
    if tolerance is not None:
        tolerance = check_number("tolerance", tolerance)
    x, score, slope = _alike(x=x, score=score, slope=slope)
    if x.ndim == 0:
        raise ValueError("x must have an axis along which the layer is triangular, got a scalar.")
    x, slope = lax.stop_gradient((x, slope))
    (y, log_det), pull = _pulled("forward", forward, x, x.shape)
    right = score - pull((jnp.zeros_like(y), jnp.ones_like(log_det)))[0]
    first = right / slope
    if x.ndim == 1 and x.size <= _FEW:
        rows = jax.vmap(lambda row: pull((row, jnp.zeros_like(log_det)))[0])(
            jnp.eye(x.size, dtype=y.dtype)
        )
        return _nilpotent_series(jnp.diag(slope) - rows.T, slope, first)
    limit = 10 * float(jnp.finfo(x.dtype).eps) if tolerance is None else tolerance

    def sweep(state):
        u, _, count = state
        new = (right - pull((u, jnp.zeros_like(log_det)))[0] + slope * u) / slope
        change, size = jnp.max(jnp.abs(new - u)), jnp.max(jnp.abs(new))
        return new, change > limit * size, count + 1

    def more(state):
        return state[1] & (state[2] < x.shape[-1])

    return lax.while_loop(more, sweep, (first, jnp.array(x.shape[-1] > 1), 0))[0]


def _nilpotent_series(below: Array, slope: Array, first: Array) -> Array:
    r"""$\sum_k N^k u$ of the triangular $N = D^{-1}(D - J^\top)$, as $\prod_k(I + N^{2^k})\,u$."""
    n, u = below / slope[:, None], first
    for _ in range((first.size - 1).bit_length()):
        u = u + jnp.matmul(n, u, precision="highest")
        n = jnp.matmul(n, n, precision="highest")
    return u


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
        TypeError: an array is none, or ``forward`` is no such function.
        ValueError: there are more than 64 dimensions, ``forward`` fails at x, or shapes differ.
    """
    x, score = _alike(x=x, score=score)
    if x.size > DENSE_LIMIT:
        raise ValueError(
            f"{name} has no inverse and no rule of its own, and with {x.size} dimensions its "
            f"Jacobian is too large to solve with (at most {DENSE_LIMIT}): register a rule with "
            "stochgrad.gradients.push_score.register."
        )
    x = lax.stop_gradient(x)
    _pulled("forward", forward, x, x.shape)
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
    reparameterized gradient, $c = 0$ the path gradient.

    Args:
        value: Draws, with a gradient in the parameters, of shape (n, ...).
        log_density: Their log densities as the forward pass gives them, of shape (n,).
        score: Scores, constant.
        score_coef: c, a number, or one a draw.

    Raises:
        TypeError: an array is none.
        ValueError: ``score`` has not the shape of ``value``, or ``log_density`` not that of its
            first axes.
    """
    value, score = _alike(value=value, score=score)
    (log_density,) = _points(log_density=log_density)
    if value.shape[: log_density.ndim] != log_density.shape:
        raise ValueError(
            f"log_density must have one entry a draw of shape {value.shape}, got shape "
            f"{log_density.shape}."
        )
    if isinstance(score_coef, float) and score_coef == 1.0:
        return log_density
    _points(score_coef=score_coef)
    if jnp.shape(score_coef) not in ((), log_density.shape):
        raise ValueError(
            f"score_coef must be a number or one a draw, got shape {jnp.shape(score_coef)} for "
            f"log densities of shape {log_density.shape}."
        )
    moved = score * (value - lax.stop_gradient(value))
    along = lax.stop_gradient(log_density) + moved.reshape(*log_density.shape, -1).sum(-1)
    return score_coef * log_density + (1.0 - score_coef) * along


def _points(**arrays: Any) -> list[Array]:
    """The arrays, if they hold floating-point numbers; integers become such."""
    checked = []
    for name, value in arrays.items():
        if not isinstance(value, jax.Array | np.ndarray | np.generic | float | int):
            raise TypeError(f"{name} must be an array of numbers, got {describe(value)}.")
        array = jnp.asarray(value)
        if jnp.issubdtype(array.dtype, jnp.integer):
            array = array.astype(float)
        if isinstance(value, bool) or not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be an array of numbers, got {describe(value)}.")
        checked.append(array)
    return checked


def _alike(**arrays: Any) -> list[Array]:
    """The same, if all have the shape of the first."""
    first, *rest = checked = _points(**arrays)
    names = list(arrays)
    for name, array in zip(names[1:], rest, strict=True):
        if array.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape {first.shape} of {names[0]}, got {array.shape}."
            )
    return checked


def _pulled(name: str, function: Any, point: Array, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """``jax.vjp`` of a layer's map ``point -> (point, log_det)``, at a constant point."""
    check_callable(name, function, "a function that returns a point and a log-determinant")
    point = lax.stop_gradient(point)
    try:
        out, pull = jax.vjp(function, point)
    except NotImplementedError:
        raise
    except Exception as error:
        raise ValueError(
            f"{name} fails on a point of shape {point.shape}: {first_line(error)}."
        ) from error
    if not (isinstance(out, tuple) and len(out) == 2 and hasattr(out[0], "shape")):
        raise TypeError(f"{name} must return a point and a log-determinant, got {describe(out)}.")
    if out[0].shape != shape:
        raise ValueError(f"{name} must return a point of shape {shape}, got {out[0].shape}.")
    return out, pull
