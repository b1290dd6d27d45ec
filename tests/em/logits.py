"""What a Llama says at every token of a text."""

import jax.numpy as jnp
import numpy as np

from stochgrad import em, llm


def logits_of(model, tokens):
    """Logits at every token."""
    n = len(tokens)
    inputs = em.Inputs(
        jnp.asarray(tokens, jnp.int32)[None],
        jnp.arange(n)[None],
        jnp.asarray(np.tri(n, dtype=bool))[None],
        jnp.int32(0),
    )
    cache = llm.llama_cache(model.config)(1, n)
    return np.asarray(llm.llama(model.config)(model.params, inputs, cache, n)[0][0])
