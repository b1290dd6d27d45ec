"""The steps of a visit, compiled."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from stochgrad.core import Kernel, Posterior, Shared, hoisted_jit
from stochgrad.federated import current_visit
from stochgrad.interop.flower._protocol import without_gradient_state


def visit_program(kernel: Kernel, target: Posterior, steps: int, thin: int) -> Callable:
    """``(first, key, order, start, minibatches) -> (state, draws, minibatches)`` of a visit."""

    @hoisted_jit
    def init(key, position):
        return without_gradient_state(kernel.init(position, jax.random.fold_in(key, 2**31)))

    @hoisted_jit
    def advance(key, order, state, minibatches):
        stream = target.batches.init(order)
        stream = Shared(stream.value._replace(handed_out=minibatches), optional=True)
        state = state._replace(gradient_state=stream)

        def draw(state, number):
            keys = jax.random.split(jax.random.fold_in(key, number), thin)
            state, _ = jax.lax.scan(lambda s, k: (kernel.step(k, s)[0], None), state, keys)
            return state, state.position

        state, draws = jax.lax.scan(draw, state, jnp.arange(steps // thin))
        return without_gradient_state(state), draws, current_visit(state).handed_out

    def run(first: bool, key, order, start, minibatches):
        return advance(key, order, init(key, start) if first else start, minibatches)

    return run
