"""What an E-step costs beyond decoding, and a whole step of MCMC-EM.

    python benchmarks/em_step.py [--model small|smollm2] [--rounds 30]

Medians of alternating calls of three compiled functions: decoding a minibatch; the E-step (decoding,
verification, Metropolis-Hastings, memory); the whole step, with the gradient's M-step.
"""

import argparse
import importlib.util
import time
from pathlib import Path

import jax
import numpy as np

from stochgrad import em


def example(name):
    path = Path(__file__).parent.parent / f"examples/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small():
    """The transformer of examples/chain_of_thought.py, 64 rationales of at most 7 tokens."""
    from flax import nnx

    cot = example("chain_of_thought")
    policy, params = cot.policy_of(cot.Transformer(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params, _ = cot.trained_base(policy, params, 200, rng)
    digits = rng.integers(0, 5, (512, cot.DIGITS))
    questions = cot.questions_of(rng.integers(0, cot.TYPES, 512), digits)
    return em.verified(policy, cot.verify, end=cot.END), params, questions, 64


def smollm2():
    """SmolLM2-135M, 8 rationales of at most 40 tokens, a verifier in Python."""
    from stochgrad import llm

    task = example("smollm2")
    model = llm.read_gguf(llm.smollm2_path())
    encode = lambda text: model.tokenizer.encode(text).ids
    questions = task.questions_of(task.sums(32, 0), encode)
    policy = model.policy(length=40, end=task.newline(model), remat=True)
    verify = em.host_verifier(task.right, lambda tokens: model.tokenizer.decode(tokens.tolist()))
    return em.verified(policy, verify, end=task.newline(model)), model.params, questions, 8


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("small", "smollm2"), default="small")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    model, params, questions, batch = {"small": small, "smollm2": smollm2}[options.model]()
    gradient = em.mcmc_em(model, questions, batch_size=batch)
    state = jax.jit(gradient.init)(jax.random.key(0), params)
    rows = em.Questions(*jax.tree.map(lambda leaf: leaf[:batch], questions))

    def whole(params, key, state):
        score, state = gradient.next(key, params, state)
        return score(params), state

    runs = {
        "decoding": jax.jit(
            lambda params, key, state: model.policy.sample(params, key, rows.prompts)
        ),
        "E-step": jax.jit(lambda params, key, state: gradient.next(key, params, state)[1]),
        "whole step": jax.jit(whole),
    }
    seconds = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(params, jax.random.key(number), state))
            seconds[name].append(time.perf_counter() - began)
    middle = {name: np.median(values[1:]) for name, values in seconds.items()}
    print("| | ms | over decoding |\n| --- | --- | --- |")
    for name, value in middle.items():
        print(f"| {name} | {1e3 * value:.2f} | {value / middle['decoding']:.3f} |")


if __name__ == "__main__":
    main()
