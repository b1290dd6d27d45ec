"""Which parameters the gradient along a draw's path cannot reach."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, PyTree


def beyond_the_path(draw: Callable[[PyTree], tuple[PyTree, Array]], parameters: PyTree) -> set[str]:
    """Names of the arrays that move the log density of a draw but never the draw itself.

    The weights of a mixture are such: they decide which component is drawn, and a decision has no
    derivative. A path gradient leaves them where they are, and the reparameterized gradient gives
    them noise of mean zero. Nothing is computed; the derivative's program is looked at.

    Args:
        draw: ``parameters -> (draw, log density of that draw)``.
        parameters: A tree of arrays, or of their shapes.
    """
    paths, leaves, structure = _floating(parameters)

    def pulled(leaves, draw_bar, density_bar):
        _, pull = jax.vjp(lambda *leaves: draw(structure(leaves)), *leaves)
        return pull((draw_bar, density_bar))

    value, density = jax.eval_shape(lambda leaves: draw(structure(leaves)), leaves)
    reached = _reached(pulled, leaves, (value, density))
    return {path for path, (by_draw, by_density) in zip(paths, reached, strict=True)
            if by_density and not by_draw}  # fmt: skip


def depends(function: Callable[[PyTree], PyTree], parameters: PyTree) -> bool:
    """Whether a function has a derivative in its parameters at all."""
    _, leaves, structure = _floating(parameters)

    def pulled(leaves, bar):
        _, pull = jax.vjp(lambda *leaves: function(structure(leaves)), *leaves)
        return pull(bar)

    value = jax.eval_shape(lambda leaves: function(structure(leaves)), leaves)
    return any(any(row) for row in _reached(pulled, leaves, (value,)))


def _reached(pulled, leaves, outputs) -> list[list[bool]]:
    """For each leaf, whether each output has a derivative in it, by the program of the pull."""
    if not leaves:
        return []
    program = jax.make_jaxpr(pulled)(leaves, *outputs).jaxpr
    sizes = [len(jax.tree.leaves(output)) for output in outputs]
    found = []
    for n in range(len(leaves)):
        wanted = [m == n for m in range(len(leaves))]
        used = dce_jaxpr(program, wanted)[1][len(leaves) :]
        row = []
        for size in sizes:
            row.append(any(used[:size]))
            used = used[size:]
        found.append(row)
    return found


def _floating(tree):
    """Paths and shapes of the floating-point leaves, and how to put leaves back."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    moves = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for _, leaf in flat]
    paths = [
        jax.tree_util.keystr(path) for (path, _), flag in zip(flat, moves, strict=True) if flag
    ]
    shapes = [
        jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
        for (_, leaf), flag in zip(flat, moves, strict=True)
        if flag
    ]

    def whole(leaves):
        rest = iter(leaves)
        filled = [next(rest) if flag else leaf for (_, leaf), flag in zip(flat, moves, strict=True)]
        return jax.tree.unflatten(structure, filled)

    return paths, shapes, whole
