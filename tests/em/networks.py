"""A small network of tokens, by hand."""

import jax
import jax.numpy as jnp
from jax import lax

WIDTH, HEADS, LAYERS = 16, 2, 2


def parameters(key, vocabulary, scale=0.5):
    embed, layers = jax.random.split(key)
    return {
        "embed": jax.random.normal(embed, (vocabulary, WIDTH)),
        "layers": [
            {
                "qkv": scale * jax.random.normal(a, (WIDTH, 3 * WIDTH)),
                "out": scale * jax.random.normal(b, (WIDTH, WIDTH)),
            }
            for a, b in jax.random.split(layers, (LAYERS, 2))
        ],
    }


def cache(batch, slots):
    shape = (batch, slots, HEADS, WIDTH // HEADS)
    return [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(LAYERS)]


def network(params, inputs, cache, keep):
    rates = 0.5 ** jnp.arange(WIDTH, dtype=float)
    place = jnp.einsum("bt,w->btw", inputs.positions.astype(float), rates)
    x = params["embed"][inputs.tokens] + jnp.sin(place)
    kept = []
    for layer, (keys, values) in zip(params["layers"], cache, strict=True):
        q, k, v = (
            part.reshape(*part.shape[:2], HEADS, -1)
            for part in jnp.split(x @ layer["qkv"], 3, axis=-1)
        )
        keys = lax.dynamic_update_slice_in_dim(keys, k, inputs.offset, axis=1)
        values = lax.dynamic_update_slice_in_dim(values, v, inputs.offset, axis=1)
        weight = jnp.einsum("bqhd,bshd->bhqs", q, keys) / 3.0
        weight = jax.nn.softmax(jnp.where(inputs.mask[:, None], weight, -1e30), axis=-1)
        x = x + jnp.einsum("bhqs,bshd->bqhd", weight, values).reshape(x.shape) @ layer["out"]
        x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        kept.append((keys, values))
    return x[:, -keep:] @ params["embed"].T, kept
