"""Two runs at two step sizes, extrapolated to none."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import Draws, check_callable, check_instance, check_number, first_line
from stochgrad.diagnostics._errors import error_of_mean
from stochgrad.diagnostics._inputs import arrays_of


class Extrapolated(NamedTuple):
    """A posterior mean without the leading bias of the step size.

    Attributes:
        value: The estimate, in the structure of the positions.
        error: Its Monte Carlo standard error.
        bias: The leading bias that was taken out of the finer run.
    """

    value: PyTree
    error: PyTree
    bias: PyTree


def richardson(
    coarse: Draws,
    fine: Draws,
    *,
    order: float = 2.0,
    function: Callable[[Any], Any] | None = None,
) -> Extrapolated:
    r"""Richardson extrapolation of a posterior mean over two step sizes.

    With a bias of $Ah^p + o(h^p)$, runs at $h_1 = rh$ and $h_2 = h$ give

    $$E f \approx \frac{r^p\, \overline{f}_{h} - \overline{f}_{rh}}{r^p - 1}.$$

    Args:
        coarse: A run at the larger step size.
        fine: A run at the smaller one, otherwise alike.
        order: p: 2 for a second-order integrator with the full gradient or with reshuffled or
            symmetric minibatches, 1 for independent ones and for ``sgld``.
        function: f, of each array of positions of shape (chain, draw, ...); the identity if left
            out, and ``numpy.square`` for second moments.

    Raises:
        TypeError: these are no draws, or ``function`` no function.
        ValueError: the step sizes are not on record, or the first is not the larger; a draw is not
            finite.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, stochgrad
        >>> from stochgrad.diagnostics import richardson
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(9), order="full"
        ... )
        >>> runs = [
        ...     stochgrad.sample(
        ...         jax.random.key(0),
        ...         stochgrad.sghmc(target, h, 5.0),
        ...         init=jnp.float32(0.9),
        ...         num_samples=1000,
        ...         thin=round(5 / h),
        ...     )
        ...     for h in (0.2, 0.1)
        ... ]
        >>> round(float(richardson(*runs).value), 1)
        0.9
    """
    for name, draws in (("coarse", coarse), ("fine", fine)):
        check_instance(name, draws, Draws, "draws, as stochgrad.sample returns them")
    order = check_number("order", order)
    if function is not None:
        check_callable("function", function, "a function of an array (chain, draw, ...)")
    large, small = (draws.attrs.get("step_size") for draws in (coarse, fine))
    if not (isinstance(large, float) and isinstance(small, float)):
        raise ValueError(
            f"coarse and fine must be runs at constant step sizes, got {large}, {small}."
        )
    if large <= small:
        raise ValueError(f"coarse must have the larger step size, got {large}, fine {small}.")
    factor = (large / small) ** order

    def of(x):
        try:
            value = np.asarray(x if function is None else function(x), np.float64)
        except Exception as error:
            raise ValueError(
                f"function fails on draws of shape {x.shape}: {first_line(error)}."
            ) from error
        if value.shape[:2] != x.shape[:2] or not np.isfinite(value).all():
            raise ValueError(
                f"function must keep the axes of chains and draws, {x.shape[:2]}, and be finite, "
                f"got shape {value.shape}."
            )
        return value

    values = [
        jax.tree.map(lambda x: of(np.asarray(x, np.float64)), arrays_of(draws))
        for draws in (coarse, fine)
    ]
    shapes = [jax.tree.map(lambda x: x.shape[2:], value) for value in values]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"coarse and fine must be runs of one model, got {shapes[0]}, {shapes[1]}."
        )
    means = [jax.tree.map(lambda x: x.mean(axis=(0, 1)), value) for value in values]
    errors = [jax.tree.map(error_of_mean, value) for value in values]
    bias = jax.tree.map(lambda a, b: (a - b) / (factor - 1), *means)
    return Extrapolated(
        jax.tree.map(lambda b, off: b - off, means[1], bias),
        jax.tree.map(lambda a, b: np.hypot(a, factor * b) / (factor - 1), *errors),
        bias,
    )
