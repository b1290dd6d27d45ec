"""Llamas and Qwens from, and to, directories of safetensors as Hugging Face's tools have them."""

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import check_instance, check_path, describe, first_line
from stochgrad.interop.llm._gguf import imported
from stochgrad.interop.llm._llama import (
    Config,
    Llama,
    RopeScaling,
    check_config,
    check_dtype,
    check_params,
)

_NAMES = {  # of a block's weights, here and in the files
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
}
_ROTATED = ("query", "key")
_KINDS = ("llama", "qwen2", "qwen3")


def from_pretrained(path: str | Path, dtype: Any = jnp.float32) -> Llama:
    """A Llama, Qwen2 or Qwen3 from a directory of safetensors, with its tokenizer.

    The directory is what ``save_pretrained`` of transformers writes, and what a hub's snapshot is:
    ``config.json``, ``model.safetensors`` (or its parts and their index), ``tokenizer.json``, and a
    chat template if there is one. Needs safetensors and tokenizers, of the extra ``[llm]``.

    Args:
        path: The directory.
        dtype: Type of the weights, of what is computed, and of the cache.

    Raises:
        ImportError: safetensors or tokenizers is not installed.
        TypeError: the path is none, or the dtype is not one of floating-point numbers.
        FileNotFoundError: there is no such directory, or a file of it is missing.
        ValueError: a file cannot be read, the model is of another kind than these, or tensors are
            missing or left over.

    Example:
        ::

            from stochgrad import llm

            model = llm.from_pretrained("Qwen2.5-0.5B-Instruct")
            prompt = model.chat([{"role": "user", "content": "What is 3 + 4?"}])
            policy = model.policy(length=200)
    """
    path, dtype = check_path("path", path), check_dtype(dtype)
    if not path.is_dir():
        raise FileNotFoundError(f"path must be a directory with a config.json, got {path}.")
    settings = _settings(path)
    tensors = _tensors(path)

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name}.")
        values = np.asarray(tensors.pop(name)().astype(np.float32))
        with np.errstate(over="ignore"):
            values = values.astype(dtype)
        if not np.all(np.isfinite(values)):
            raise ValueError(f"{path} has a tensor {name} that is not finite in {values.dtype}.")
        return values

    config = _config(path, settings)
    blocks: dict[str, list[np.ndarray]] = {}
    for number in range(config.layers):
        for name, its in _NAMES.items():
            full = f"model.layers.{number}.{its}"
            if full in tensors or not name.endswith(("_bias", "query_norm", "key_norm")):
                blocks.setdefault(name, []).append(_inward(name, read(full), config.head_width))
    uneven = [name for name, parts in blocks.items() if len(parts) != config.layers]
    if uneven:
        raise ValueError(f"{path} has {uneven[0]} in some of its layers only.")
    params: dict[str, Any] = {
        "embedding": jnp.asarray(read("model.embed_tokens.weight")),
        "norm": jnp.asarray(read("model.norm.weight")),
        "layers": {name: jnp.asarray(np.stack(parts)) for name, parts in blocks.items()},
    }
    if settings.get("tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    else:
        params["logits"] = jnp.asarray(read("lm_head.weight"))
    if tensors:
        raise ValueError(
            f"{path} has {len(tensors)} tensors more than a {settings['model_type']} that "
            f"from_pretrained knows: {min(tensors)}."
        )
    try:
        check_config(config)
        check_params(params, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit its config.json: {first_line(error)}.") from error
    tokenizer = _tokenizer(path)
    end = _end(path, settings, tokenizer)
    return Llama(params, config, tokenizer, end, _template(path), _token(path, "bos_token") or "")


def save_pretrained(model: Llama, path: str | Path) -> Path:
    """Write a model as a directory of safetensors that Hugging Face's tools read.

    Args:
        model: What ``from_pretrained`` or ``read_gguf`` returned, with other weights for example:
            ``model._replace(params=fit.model)``.
        path: A directory that is not there yet.

    Returns:
        The directory.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: the model is no ``Llama``, or the path is none.
        FileExistsError: there is something of that name.
        ValueError: weights do not fit the model's config.
    """
    model, path = check_instance("model", model, Llama, "a Llama"), check_path("path", path)
    check_params(model.params, model.config)
    if path.exists():
        raise FileExistsError(f"path must not be there yet, but there is {path}.")
    save_file = imported("safetensors.flax").save_file
    layers, size = model.params["layers"], model.config.head_width
    kind = "qwen3" if "query_norm" in layers else "qwen2" if "query_bias" in layers else "llama"
    tensors = {
        "model.embed_tokens.weight": model.params["embedding"],
        "model.norm.weight": model.params["norm"],
        **({"lm_head.weight": model.params["logits"]} if "logits" in model.params else {}),
        **{
            f"model.layers.{number}.{_NAMES[name]}": _outward(name, block, size)
            for name, stack in layers.items()
            for number, block in enumerate(np.asarray(stack))
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}") as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        arrays = {name: jnp.asarray(x) for name, x in tensors.items()}
        save_file(arrays, whole / "model.safetensors", metadata={"format": "pt"})
        (whole / "config.json").write_text(json.dumps(_written(model, kind), indent=2))
        if model.tokenizer is not None:
            model.tokenizer.save(str(whole / "tokenizer.json"))
            end = model.tokenizer.id_to_token(model.end)
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
            about |= {"bos_token": model.bos_token} if model.bos_token else {}
            (whole / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
        if model.chat_template is not None:
            (whole / "chat_template.jinja").write_text(model.chat_template)
        os.replace(whole, path)
    return path


def _inward(name: str, values: np.ndarray, size: int) -> np.ndarray:
    """A weight of the files as the network has it: inputs first, rotated pairs side by side."""
    if name.split("_")[0] in _ROTATED:
        heads = values.reshape(-1, 2, size // 2, *values.shape[1:])
        values = np.swapaxes(heads, 1, 2).reshape(values.shape)
    return values.T


def _outward(name: str, values: np.ndarray, size: int) -> np.ndarray:
    values = np.ascontiguousarray(values.T)
    if name.split("_")[0] in _ROTATED:
        heads = values.reshape(-1, size // 2, 2, *values.shape[1:])
        values = np.swapaxes(heads, 1, 2).reshape(values.shape)
    return values


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {first_line(error)}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, got {describe(found)}.")
    return found


def _settings(path: Path) -> dict[str, Any]:
    settings = _json(path / "config.json")
    kind = settings.get("model_type")
    if kind not in _KINDS:
        raise ValueError(f"{path} holds a {kind!r} where from_pretrained reads {list(_KINDS)}.")
    if (activation := settings.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"{path} has the activation {activation!r} where these models have silu.")
    if settings.get("use_sliding_window", False):
        raise ValueError(f"{path} attends within a sliding window, which is not supported.")
    if settings.get("quantization_config"):
        raise ValueError(f"{path} is quantized: from_pretrained reads plain weights.")
    return settings


def _tensors(path: Path) -> dict[str, Callable[[], Any]]:
    """What reads each tensor, by its name."""
    safe_open = imported("safetensors").safe_open
    index = path / "model.safetensors.index.json"
    names = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else []
    found: dict[str, Callable[[], Any]] = {}
    for name in names or ["model.safetensors"]:
        part = path / name
        if not part.is_file():
            raise FileNotFoundError(f"{path} has no {name}.")
        try:
            opened = safe_open(part, framework="flax")
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                found[key] = partial(opened.get_tensor, key)
        except Exception as error:
            raise ValueError(f"{part} cannot be read: {first_line(error)}.") from error
    return found


def _config(path: Path, settings: dict[str, Any]) -> Config:
    def get(name: str, *default: Any) -> Any:
        value = settings.get(name)
        if value is None and not default:
            raise ValueError(f"{path}/config.json has no {name}.")
        return default[0] if value is None else value

    heads, width = get("num_attention_heads"), get("hidden_size")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    return Config(
        layers=get("num_hidden_layers"),
        width=width,
        hidden=get("intermediate_size"),
        heads=heads,
        kv_heads=get("num_key_value_heads", heads),
        head_width=get("head_dim", width // heads),
        vocabulary=get("vocab_size"),
        context=get("max_position_embeddings"),
        rope_base=float(rope.get("rope_theta") or get("rope_theta", 10_000.0)),
        eps=get("rms_norm_eps"),
        rope_scaling=_rope_scaling(path, rope),
    )


def _rope_scaling(path: Path, rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"{path} scales its positions by {kind!r} where from_pretrained knows 'llama3'."
        )
    try:
        return RopeScaling(
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a rope scaling that lacks {first_line(error)}.") from error


def _tokenizer(path: Path) -> Any:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no tokenizer.json.")
    try:
        return imported("tokenizers").Tokenizer.from_file(str(file))
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{file} is no tokenizer: {first_line(error)}.") from error


def _end(path: Path, settings: dict[str, Any], tokenizer: Any) -> int:
    """The token that ends a turn: the tokenizer's, or the first of the config's."""
    token = _token(path, "eos_token")
    number = None if token is None else tokenizer.token_to_id(token)
    if number is None:
        number = settings.get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
    if not isinstance(number, int) or not 0 <= number < settings["vocab_size"]:
        raise ValueError(f"{path} names no token that ends a turn, got {describe(number)}.")
    return number


def _token(path: Path, name: str) -> str | None:
    about = path / "tokenizer_config.json"
    token = _json(about).get(name) if about.is_file() else None
    return token.get("content") if isinstance(token, dict) else token


def _template(path: Path) -> str | None:
    file, about = path / "chat_template.jinja", path / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = _json(about).get("chat_template") if about.is_file() else None
    if isinstance(found, list):  # several by name
        found = next((x.get("template") for x in found if x.get("name") == "default"), None)
    return found


def _written(model: Llama, kind: str) -> dict[str, Any]:
    config, scaling = model.config, model.config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.context,
        }
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    return {
        "architectures": [f"{names[kind]}ForCausalLM"],
        "model_type": kind,
        "hidden_act": "silu",
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_theta": config.rope_base, **rope},
        "rms_norm_eps": config.eps,
        "tie_word_embeddings": "logits" not in model.params,
        "eos_token_id": model.end,
        "dtype": jax.tree.leaves(model.params)[0].dtype.name,
    }
