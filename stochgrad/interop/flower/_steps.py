"""The steps of a visit, compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree

from stochgrad.core import Kernel, Posterior, Shared, hoisted_jit
from stochgrad.federated import current_visit
from stochgrad.interop.flower._protocol import without_gradient_state


def uses_last_gradient(kernel: Kernel, position: PyTree) -> bool:
    """Whether where a chain goes depends on the ``gradient`` in its state.

    Where it does not, as with SGLD and SGHMC by default, that gradient only serves reports.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(kernel.init, position, key)
    if "gradient" not in getattr(state, "_fields", ()):
        return True

    def following(gradient, key, state):
        after, _ = kernel.step(key, state._replace(gradient=gradient))
        return after._replace(gradient=None)

    program = jax.make_jaxpr(following)(state.gradient, key, state).jaxpr
    used = dce_jaxpr(program, [True] * len(program.outvars))[1]
    return any(used[: len(jax.tree.leaves(state.gradient))])


def without_last_gradient(state: Any) -> Any:
    """A state with zeros for the last gradient, to which no noise was added."""
    return state._replace(gradient=jax.tree.map(jnp.zeros_like, state.gradient))


def visit_program(
    kernel: Kernel,
    target: Posterior,
    steps: int,
    thin: int,
    bind: Callable[..., None] = lambda: None,
) -> Callable:
    """``(first, key, order, start, minibatches, *parameters) -> (state, draws, minibatches)``.

    Of a visit; ``bind`` hands the parameters to the kernel's gradient while it is traced.
    """

    @hoisted_jit
    def init(key, position, *parameters):
        bind(*parameters)
        return without_gradient_state(kernel.init(position, jax.random.fold_in(key, 2**31)))

    @hoisted_jit
    def advance(key, order, state, minibatches, *parameters):
        bind(*parameters)
        stream = target.batches.init(order)
        stream = Shared(stream.value._replace(handed_out=minibatches), optional=True)
        state = state._replace(gradient_state=stream)

        def draw(state, number):
            keys = jax.random.split(jax.random.fold_in(key, number), thin)
            state, _ = jax.lax.scan(lambda s, k: (kernel.step(k, s)[0], None), state, keys)
            return state, state.position

        state, draws = jax.lax.scan(draw, state, jnp.arange(steps // thin))
        return without_gradient_state(state), draws, current_visit(state).handed_out

    def run(first: bool, key, order, start, minibatches, *parameters):
        state = init(key, start, *parameters) if first else start
        return advance(key, order, state, minibatches, *parameters)

    return run
