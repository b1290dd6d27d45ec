"""One latent for each example, and what is known of each."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from stochgrad.core import PRNGKey, describe
from stochgrad.em._latent_store import LatentStore
from stochgrad.em._model import Guide, LatentModel, Questions, Rationales, take


class Memory(NamedTuple):
    """One latent for each example, and what is known of each.

    Attributes:
        tokens: The latents; with ``memory_path``, their places in the file.
        mask: Their masks; empty with ``memory_path``.
        log_likelihood: Of the answer given the latent; minus infinity where none was right yet.
        tries: Proposals so far, decayed as the allocator says.
        successes: Those of them that had a likelihood, likewise.
        age: Visits since the latent last changed.
    """

    tokens: PyTree
    mask: Bool[Array, "examples length"]
    log_likelihood: Float[Array, " examples"]
    tries: Float[Array, " examples"]
    successes: Float[Array, " examples"]
    age: Int[Array, " examples"]


def latent_shapes(model: LatentModel, params: Any, questions: Questions) -> Rationales:
    """Shapes and dtypes of one example's latent, with a leading axis of one."""
    one = take(questions.prompts, jnp.zeros(1, jnp.int32))
    return jax.eval_shape(model.policy.sample, params, jax.random.key(0), one)


def empty_memory(store: LatentStore, key: PRNGKey, one: Rationales, count: int) -> Memory:
    """A memory of ``count`` latents that are all wrong."""
    zeros = jnp.zeros(count)
    return Memory(
        *store.init(key, (one.tokens, one.mask), count),
        jnp.full(count, -jnp.inf, one.log_prob.dtype),
        zeros,
        zeros,
        jnp.zeros(count, jnp.int32),
    )


def guided_memory(
    key: PRNGKey,
    guide: Guide,
    model: LatentModel,
    theta: Any,
    questions: Questions,
    store: LatentStore,
    memory: Memory,
    batch_size: int,
) -> Memory:
    """The memory with a draw of a guide for each example, a minibatch at a time."""
    size = memory.age.shape[0]
    blocks = -(-size // batch_size)
    index = jnp.arange(blocks * batch_size, dtype=jnp.int32).reshape(blocks, batch_size)

    def block(memory: Memory, key_and_index):
        key, index = key_and_index
        rows = take(questions, index % size)
        latents = guide.policy.sample(theta, key, rows.hints)
        log_likelihood = model.log_likelihood(
            theta, rows.prompts, latents.tokens, latents.mask, rows.answers
        )
        zeros = jnp.zeros(batch_size)
        start = Memory(
            latents.tokens, latents.mask, log_likelihood, zeros, zeros, jnp.zeros_like(index)
        )
        return write(store, memory, index, start, index < size), None

    return lax.scan(block, memory, (jax.random.split(key, blocks), index))[0]


def read(store: LatentStore, memory: Memory, index: Int[Array, " n"]) -> Memory:
    """Rows of the memory."""
    tokens, mask = store.read((memory.tokens, memory.mask), index)
    return Memory(tokens, mask, *take(memory[2:], index))


def write(
    store: LatentStore,
    memory: Memory,
    index: Int[Array, " n"],
    rows: Memory,
    changed: Bool[Array, " n"],
) -> Memory:
    """The memory with other rows, of which those ``changed`` have new latents."""
    tokens, mask = store.write((memory.tokens, memory.mask), index, rows[:2], changed)
    rest = jax.tree.map(
        lambda all, rows: all.at[index].set(rows, mode="drop"), memory[2:], rows[2:]
    )
    return Memory(tokens, mask, *rest)


def unsolved(state: Any) -> Int[Array, " examples"]:
    """Numbers of the examples for which no latent was ever right.

    They are masked, and take no part in means.

    Args:
        state: The kernel's state, the gradient's, or a memory.

    Raises:
        TypeError: it is none of these.
    """
    memory = state
    while not isinstance(memory, Memory):
        memory = getattr(memory, "gradient_state", None) or getattr(memory, "memory", None)
        if memory is None:
            raise TypeError(
                "state must be a state of a kernel with mcmc_em, of the gradient, or a memory, got "
                f"{describe(state)}."
            )
    return jnp.flatnonzero(jnp.isneginf(memory.log_likelihood))
