"""Directories of safetensors: logits and prompts of transformers, there and back, bad files.

The models are random and tiny; ``pretrained/make.py`` made them and what they answer, by
transformers.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from stochgrad import em, llm
from tests.em.logits import logits_of

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

MODELS = Path(__file__).with_name("pretrained")
KINDS = ["llama", "qwen2", "qwen3"]
TALK = [
    {"role": "user", "content": "ab c"},
    {"role": "assistant", "content": "d"},
    {"role": "user", "content": "e"},
]


def expected(kind):
    return json.loads((MODELS / kind / "expected.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_prompts_are_those_of_transformers(kind):
    """Stretched positions, parts with an index, biases, norms of heads, bfloat16 files."""
    model, known = llm.from_pretrained(MODELS / kind), expected(kind)
    found, logits = logits_of(model, known["tokens"]), np.array(known["logits"])
    np.testing.assert_allclose(found, logits, rtol=0, atol=2e-5 * np.abs(logits).max())
    assert model.chat(TALK) == known["prompt"]
    assert model.tokenizer.id_to_token(model.end) == "<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back(kind, tmp_path):
    model = llm.from_pretrained(MODELS / kind)
    again = llm.from_pretrained(llm.save_pretrained(model, tmp_path / "deep" / "saved"))
    assert again.config == model.config
    assert (again.end, again.bos_token, again.chat_template) == (
        model.end,
        model.bos_token,
        model.chat_template,
    )
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.tokenizer.encode("a b").ids == model.tokenizer.encode("a b").ids
    names = {file.name for file in (tmp_path / "deep").iterdir()}
    assert names == {"saved"}
    with pytest.raises(FileExistsError, match="path must not be there yet"):
        llm.save_pretrained(model, tmp_path / "deep" / "saved")


def test_a_policy_decodes_what_the_logits_say(key):
    model = llm.from_pretrained(MODELS / "qwen2")
    policy = model.policy(length=5)
    prompt = expected("qwen2")["tokens"][:6]
    tokens = np.asarray(policy.greedy(model.params, em.left_padded([prompt])).tokens[0])
    for n in range(5):
        assert tokens[n] == logits_of(model, [*prompt, *tokens[:n]])[-1].argmax()


def spoiled(tmp_path, kind="llama", **settings):
    """A copy, with settings of its config changed, or taken out where they are None."""
    path = tmp_path / "spoiled"
    shutil.copytree(MODELS / kind, path)
    config = json.loads((path / "config.json").read_text()) | settings
    config = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model_type": "gemma"}, "holds a 'gemma' where"),
        ({"num_hidden_layers": 3}, r"has no tensor model\.layers\.2"),
        ({"num_hidden_layers": 1}, "tensors more than a llama"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "by 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "lacks"),
        ({"tie_word_embeddings": False}, r"has no tensor lm_head\.weight"),
        ({"vocab_size": 40}, r"does not fit its config\.json"),
        ({"hidden_size": None}, r"config\.json has no hidden_size"),
        ({"num_attention_heads": 3, "head_dim": None}, "does not fit"),
    ],
)
def test_other_models_are_refused(settings, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        llm.from_pretrained(spoiled(tmp_path, **settings))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_or_broken_file_is_named(name, tmp_path):
    path = spoiled(tmp_path)
    (path / name).write_text("no")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        llm.from_pretrained(path)
    (path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}".replace(".", r"\.")):
        llm.from_pretrained(path)


def test_messages_that_do_not_fit_are_refused():
    model = llm.from_pretrained(MODELS / "llama")
    with pytest.raises(ValueError, match="no such role"):
        model.chat([{"role": "doctor", "content": "a"}])
    with pytest.raises(ValueError, match="messages must be a list"):
        model.chat("hello")
    with pytest.raises(ValueError, match="has no chat template"):
        model._replace(chat_template=None).chat(TALK)
    with pytest.raises(FileNotFoundError, match="path must be a directory"):
        llm.from_pretrained("no/such/model")
