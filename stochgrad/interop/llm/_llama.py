"""Llamas: run with a cache of keys and values, used as policies."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from stochgrad.core import (
    at_least_float32,
    check_count,
    check_flag,
    check_instance,
    check_number,
    describe,
)
from stochgrad.em import Inputs, Network, Policy, decoder
from stochgrad.interop.llm._chat import rendered


class RopeScaling(NamedTuple):
    """How rotary positions of Llama 3.1 and later reach further than they were trained for.

    Wavelengths longer than ``context / low`` are stretched by the factor, those shorter than
    ``context / high`` are kept, and in between the rate is interpolated.

    Attributes:
        factor: How much further.
        low: Least wavelengths in the old context of a rate that is not wholly stretched.
        high: Wavelengths in it from which on a rate is kept.
        context: The old context.
    """

    factor: float
    low: float
    high: float
    context: int


class Config(NamedTuple):
    """Sizes of a Llama.

    Attributes:
        layers: Transformer blocks.
        width: Of what passes from block to block.
        hidden: Width inside the feed-forward networks.
        heads: Heads of queries.
        kv_heads: Heads of keys and values, each for ``heads // kv_heads`` of the queries.
        head_width: Width of a head.
        vocabulary: Token numbers.
        context: The most tokens that it was trained for.
        rope_base: Base of the wavelengths of the rotary positions.
        eps: Added to the mean square in the norms.
        rope_scaling: How positions are stretched, if they are.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    context: int
    rope_base: float
    eps: float
    rope_scaling: RopeScaling | None = None


class Llama(NamedTuple):
    """A language model.

    Attributes:
        params: ``embedding`` (vocabulary, width), ``norm`` (width,), ``logits`` of the embedding's
            shape unless that serves for it, and ``layers``, arrays with a leading axis of layers.
        config: Sizes.
        tokenizer: A ``tokenizers.Tokenizer``.
        end: The token that ends a turn.
        chat_template: How a conversation becomes a prompt, a Jinja template, if the file has one.
        bos_token: What a text begins with, empty if nothing.
    """

    params: PyTree
    config: Config
    tokenizer: Any
    end: int
    chat_template: str | None = None
    bos_token: str = ""

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, begin_answer: bool = True, **names: Any
    ) -> str:
        """A conversation as the prompt that the model was trained on, by its chat template.

        The template writes special tokens itself: encode with ``add_special_tokens=False``.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, the roles ``"system"``, ``"user"`` and
                ``"assistant"``.
            begin_answer: Whether the prompt ends where the model's answer begins.
            names: What else the template knows, ``enable_thinking`` for example.

        Raises:
            ImportError: jinja2, of the extra ``[llm]``, is not installed.
            ValueError: the model has no chat template, or it refuses the messages.
        """
        return rendered(self, messages, begin_answer, names)

    def policy(
        self,
        *,
        length: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        context: int | None = None,
        end: int | None = None,
        remat: bool = False,
    ) -> Policy:
        """The model as a policy of ``em.Prompts``; its params are arguments, not closed over.

        Args:
            length: The most tokens of a rationale, end token included.
            temperature: As in ``em.decoder``.
            top_p: As in ``em.decoder``.
            context: The most tokens of prompt and rationale; by default what the file says.
            end: The end token; by default the one that ends a turn.
            remat: As in ``llama``.

        Raises:
            TypeError: the model's config is no ``Config``, or its params are no Llama's.
            ValueError: a setting is out of range.
        """
        network = llama(self.config, remat=remat)
        if context is not None and check_count("context", context) > self.config.context:
            raise ValueError(
                f"context is {context} where the model was trained for {self.config.context}."
            )
        check_params(self.params, config=self.config)
        return decoder(
            network,
            llama_cache(self.config, self.params["embedding"].dtype),
            length=length,
            end=self.end if end is None else end,
            temperature=temperature,
            top_p=top_p,
            context=self.config.context if context is None else context,
        )


def llama_cache(config: Config, dtype: Any = jnp.float32) -> Callable[[int, int], PyTree]:
    """Empty caches of keys and values.

    Returns:
        ``(batch, slots) -> (keys, values)``, each of shape (layers, batch, kv_heads, slots,
        head_width), so that a head's slots lie side by side.

    Raises:
        TypeError: the config is no ``Config``, or the dtype none of floating-point numbers.
        ValueError: sizes of the config do not fit each other.
    """
    check_config(config)
    dtype = check_dtype(dtype)

    def cache(batch: int, slots: int) -> tuple[Array, Array]:
        batch, slots = check_count("batch", batch), check_count("slots", slots)
        shape = (config.layers, batch, config.kv_heads, slots, config.head_width)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    return cache


def _dense(x, weight, bias=None):
    product = jnp.einsum("bti,io->bto", x, weight)
    return product if bias is None else product + bias[None, None, :]


def _norm(x, scale, eps: float):
    """Root-mean-square norm, in float32 at least."""
    wide = x.astype(at_least_float32(x.dtype))
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.reshape(*[1] * (x.ndim - 1), -1)


def _rotate(x, cos, sin):
    """Rotate the pairs (2i, 2i + 1) of each head: GGUF's order, not that of two halves."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def _rates(config: Config) -> np.ndarray:
    """Angles by which positions turn each pair."""
    rates = config.rope_base ** (-np.arange(0, config.head_width, 2) / config.head_width)
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.context * rates / (2 * np.pi)
        kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        rates = rates * (kept + (1 - kept) / scaling.factor)
    return rates.astype(np.float32)


def llama(config: Config, *, remat: bool = False) -> Network:
    r"""The network of a Llama, for ``em.decoder``.

    Each block adds to x, with $r$ the root-mean-square norm,

    $$x \leftarrow x + W_o\,\mathrm{attention}(r(x)),\qquad
      x \leftarrow x + W_d\,\bigl(\mathrm{silu}(W_g r(x)) \odot W_u r(x)\bigr),$$

    where ``heads // kv_heads`` heads of queries share one of keys and values, and queries and keys
    are rotated by the angles $t\,b^{-2i/d}$ of their position t [Su et al. 2021]. Layers that hold
    ``query_bias``, ``key_bias`` and ``value_bias`` (Qwen2) or ``query_norm`` and ``key_norm``, of
    each head (Qwen3), use them.

    Args:
        config: Sizes.
        remat: Recompute each block in the backward pass instead of keeping its insides: for
            gradients of long sequences.

    Returns:
        ``(params, inputs, cache, keep) -> (logits, cache)``, with the logits at the last ``keep``
        inputs, shape (batch, keep, vocabulary), in float32 at least.

    Raises:
        TypeError: the config is no ``Config``; in use, params are no Llama's.
        ValueError: sizes of the config do not fit each other.
    """
    check_config(config)
    check_flag("remat", remat)
    heads, shared, size = config.heads, config.kv_heads, config.head_width
    rates = _rates(config)

    def network(params, inputs: Inputs, cache, keep: int):
        check_params(params, config)
        check_instance("inputs", inputs, Inputs, "Inputs, as stochgrad.em.decoder makes them")
        batch, length = inputs.tokens.shape
        check_count("keep", keep, most=length)
        _check_cache(cache, (config.layers, batch, shared, inputs.mask.shape[-1], size))
        x = params["embedding"][inputs.tokens]
        wide = at_least_float32(x.dtype)
        angles = inputs.positions[:, :, None].astype(jnp.float32) * rates[None, None, :]
        cos, sin = (f(angles)[:, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
        unseen = ~inputs.mask[:, None, None]

        def attention(x, weights, number, cache):
            """Keys and values of the inputs enter the cache; then queries see all of it."""
            query, key, value = (
                _dense(x, weights[n], weights.get(f"{n}_bias")).reshape(batch, length, -1, size)
                for n in ("query", "key", "value")
            )
            if "query_norm" in weights:
                query = _norm(query, weights["query_norm"], config.eps)
                key = _norm(key, weights["key_norm"], config.eps)
            cache = tuple(
                lax.dynamic_update_slice(
                    held, jnp.swapaxes(new, 1, 2)[None], (number, 0, 0, inputs.offset, 0)
                )
                for held, new in zip(cache, (_rotate(key, cos, sin), value), strict=True)
            )
            keys, values = (
                lax.dynamic_index_in_dim(held, number, keepdims=False) for held in cache
            )
            query = _rotate(query, cos, sin).reshape(batch, length, shared, heads // shared, size)
            scores = jnp.einsum("btkgd,bksd->bkgts", query, keys, preferred_element_type=wide)
            scores = jnp.where(unseen, -jnp.inf, scores / size**0.5)
            shares = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
            seen = jnp.einsum("bkgts,bksd->btkgd", shares, values)
            return _dense(seen.reshape(batch, length, heads * size), weights["output"]), cache

        def block(x, cache, weights, number):
            normed = _norm(x, weights["attention_norm"], config.eps)
            added, cache = attention(normed, weights, number, cache)
            x = x + added
            normed = _norm(x, weights["mlp_norm"], config.eps)
            gated = jax.nn.silu(_dense(normed, weights["gate"])) * _dense(normed, weights["up"])
            return x + _dense(gated, weights["down"]), cache

        body = jax.checkpoint(block, prevent_cse=False) if remat else block
        if length == 1:  # the cache is written in place
            numbers = jnp.arange(config.layers, dtype=jnp.int32)
            (x, cache), _ = lax.scan(
                lambda carry, layer: (body(*carry, *layer), None),
                (x, cache),
                (params["layers"], numbers),
            )
        else:  # each layer's cache by itself, which the backward pass then keeps
            layered = jax.tree.map(lambda held: held[:, None], cache)
            x, layered = lax.scan(
                lambda x, layer: body(x, layer[1], layer[0], 0), x, (params["layers"], layered)
            )
            cache = jax.tree.map(lambda held: held[:, 0], layered)
        x = _norm(x[:, length - keep :], params["norm"], config.eps)
        output = params.get("logits", params["embedding"])
        return jnp.einsum("btd,vd->btv", x, output, preferred_element_type=wide), cache

    return network


def check_config(config: Any) -> None:
    check_instance("config", config, Config, "a Config, as read_gguf(...).config is")
    for name, value in config._asdict().items():
        if name == "rope_scaling":
            if value is not None:
                check_instance("config.rope_scaling", value, RopeScaling, "a RopeScaling or None")
        elif name in ("rope_base", "eps"):
            check_number(f"config.{name}", value)
        else:
            check_count(f"config.{name}", value)
    if config.heads % config.kv_heads or config.head_width % 2:
        raise ValueError(
            "config must have heads that are a multiple of kv_heads and an even head_width, got "
            f"{config.heads} heads for {config.kv_heads} of width {config.head_width}."
        )


def check_params(params: Any, config: Config) -> None:
    wanted = {"embedding", "norm", "layers"}
    if not isinstance(params, Mapping) or not wanted <= params.keys():
        raise TypeError(f"params must be a dict with {sorted(wanted)}, got {describe(params)}.")
    layers, layer_shapes = params["layers"], _shapes(config)
    if not isinstance(layers, Mapping) or not layers.keys() >= layer_shapes.keys():
        raise TypeError(
            f"params['layers'] must be a dict with {sorted(layer_shapes)}, got {describe(layers)}."
        )
    table = (config.vocabulary, config.width)
    shapes = {"embedding": table, "norm": (config.width,), "logits": table}
    leaves = {f"params[{n!r}]": (params[n], shapes[n]) for n in shapes if n in params}
    optional = {name: shape for name, shape in _optional(config).items() if name in layers}
    for name, shape in (layer_shapes | optional).items():
        leaves[f"params['layers'][{name!r}]"] = layers[name], (config.layers, *shape)
    for name, (leaf, shape) in leaves.items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or leaf.shape != shape or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{name} must be a floating-point array of the config's shape {shape}, got "
                f"{describe(leaf)}."
            )


def _check_cache(cache: Any, shape: tuple[int, ...]) -> None:
    pair = isinstance(cache, tuple) and len(cache) == 2
    if not pair or any(getattr(part, "shape", None) != shape for part in cache):
        raise ValueError(
            f"cache must be a pair of arrays of shape {shape}, as llama_cache(config) makes it, "
            f"got {describe(cache)}."
        )


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of a block's weights."""
    width, hidden = config.width, config.hidden
    wide, narrow = config.heads * config.head_width, config.kv_heads * config.head_width
    return {
        "attention_norm": (width,),
        "query": (width, wide),
        "key": (width, narrow),
        "value": (width, narrow),
        "output": (wide, width),
        "mlp_norm": (width,),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }


def _optional(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of what a block may have beside."""
    shapes = _shapes(config)
    biases = {f"{name}_bias": shapes[name][-1:] for name in ("query", "key", "value")}
    return {**biases, "query_norm": (config.head_width,), "key_norm": (config.head_width,)}


def check_dtype(dtype: Any) -> Any:
    """The dtype, if it is one of real floating-point numbers."""
    try:
        known = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise TypeError(f"dtype must be one of floating-point numbers, got {describe(dtype)}.")
    return dtype
