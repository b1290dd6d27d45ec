"""Make the models beside this file by transformers and torch: ``python make.py FOLDER``.

Needs torch and transformers 5, which tests do not.
"""

import json
import string
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 27,
    "bos_token_id": 26,
}
STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['system','user','assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}\n"
    "    {{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]])
TALK = [
    {"role": "user", "content": "ab c"},
    {"role": "assistant", "content": "d"},
    {"role": "user", "content": "e"},
]


def tokenizer():
    words = [*string.ascii_lowercase, "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>", " "]
    numbers = {word: number for number, word in enumerate(words)}
    whole = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    whole.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=whole,
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = TEMPLATE
    return fast


def main(folder: Path):
    torch.manual_seed(0)
    cases = {
        "llama": LlamaForCausalLM(
            LlamaConfig(
                **SIZES, tie_word_embeddings=True, rope_theta=500000.0, rope_scaling=STRETCHED
            )
        ),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=6, tie_word_embeddings=True)),
    }
    for name, model in cases.items():
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.4)
        if name == "qwen3":
            model = model.to(torch.bfloat16)
        in_parts = {"max_shard_size": "6KB"} if name == "qwen2" else {}
        model.save_pretrained(folder / name, **in_parts)
        with torch.no_grad():
            logits = model.float()(TOKENS).logits[0].tolist()
        own = tokenizer()
        own.save_pretrained(folder / name)
        known = {
            "tokens": TOKENS[0].tolist(),
            "logits": [[float(f"{value:.6g}") for value in row] for row in logits],
            "prompt": own.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True),
        }
        (folder / name / "expected.json").write_text(json.dumps(known))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
