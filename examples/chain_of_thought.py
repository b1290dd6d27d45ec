"""Learn to reason from right answers alone: TRICE and its rivals on a small transformer.

A question names one of eight types and five digits. A rationale names one of eight methods, goes on
with five running values r' = (a r + b d + c) mod 5 of that method, and ends; the last four values
are the answer. Each type is answered by its own method alone, and the base model, which is trained
from scratch to compute by every method, names the right one with probability 0.5 for the first type
down to 0.002 for the last. Only answers are given: which method is right must be found out.

    python examples/chain_of_thought.py --output chain_of_thought.png
    python examples/chain_of_thought.py --task many --seeds 8 --methods TRICE

With ``--task many`` the last value alone is the answer: a chance of a fifth for each wrong method,
so that most questions have several right rationales, and chains something to choose from.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from jax import lax

import stochgrad
from stochgrad import em

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TYPES, DIGITS, LENGTH = 8, 5, 7
METHOD, VALUE, END = 8, 16, 21  # tokens: types from 0, methods from 8, digits from 16, the end
VOCABULARY = 22
CHANCE = np.geomspace(0.5, 0.002, TYPES)  # of the right method, by type
COEFFICIENTS = np.array(
    [[1, 1, 0], [2, 1, 1], [1, 2, 3], [3, 1, 2], [4, 3, 0], [2, 4, 2], [3, 3, 4], [1, 4, 1]]
)


# --- the model ------------------------------------------------------------------------------------


class Block(nnx.Module):
    """Attention and a perceptron, with keys and values in a cache."""

    def __init__(self, width, heads, rngs):
        self.heads = heads
        self.before, self.between = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, inputs, cache):
        q, k, v = (
            part.reshape(*part.shape[:2], self.heads, -1)
            for part in jnp.split(self.qkv(self.before(x)), 3, axis=-1)
        )
        keys, values = (
            lax.dynamic_update_slice_in_dim(held, new, inputs.offset, axis=1)
            for held, new in zip(cache, (k, v), strict=True)
        )
        seen = jax.nn.dot_product_attention(q, keys, values, mask=inputs.mask[:, None])
        x = x + self.out(seen.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.between(x)))), (keys, values)


class Transformer(nnx.Module):
    """A small causal transformer."""

    def __init__(self, width=48, heads=4, layers=2, *, rngs):
        self.tokens = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.places = nnx.Embed(1 + DIGITS + LENGTH, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.shape = (heads, width // heads)

    def __call__(self, inputs, cache, keep):
        x, kept = self.tokens(inputs.tokens) + self.places(inputs.positions), []
        for block, held in zip(self.blocks, cache, strict=True):
            x, held = block(x, inputs, held)
            kept.append(held)
        return self.tokens.attend(self.norm(x[:, -keep:])), kept

    def cache(self, batch, slots):
        empty = jnp.zeros((batch, slots, *self.shape))
        return [(empty, empty) for _ in self.blocks]


def policy_of(model: Transformer) -> tuple[em.Policy, dict]:
    """The policy, and the parameters: a pytree."""
    graph, params = nnx.split(model)

    def network(params, inputs, cache, keep):
        return nnx.merge(graph, params)(inputs, cache, keep)

    return em.decoder(network, model.cache, length=LENGTH, end=END), params


# --- the task -------------------------------------------------------------------------------------


def running_values(method, digits):
    """The running values of each row's method."""
    values, r = [], np.zeros(len(digits), int)
    a, b, c = COEFFICIENTS[method].T
    for d in digits.T:
        r = (a * r + b * d + c) % 5
        values.append(r)
    return np.stack(values, axis=1)


def questions_of(kind, digits) -> em.Questions:
    """Types and digits as prompts, with answers."""
    prompts = em.left_padded([[k, *(VALUE + d)] for k, d in zip(kind, digits, strict=True)])
    return em.Questions(prompts, jnp.asarray(VALUE + running_values(kind, digits)[:, 1:]))


def verify(tokens, mask, answers):
    """Whether the last four values are the answer."""
    return jnp.all(tokens[:, 2:6] == answers, axis=1)


def verify_last(tokens, mask, answers):
    """Whether the last value is the answer's."""
    return tokens[:, 5] == answers[:, 3]


TASKS = {"one": verify, "many": verify_last}


def base_rationales(rng, count):
    """What the base model is trained on: any method, the right one by the type's chance."""
    kind, digits = rng.integers(0, TYPES, count), rng.integers(0, 5, (count, DIGITS))
    others = (kind + rng.integers(1, TYPES, count)) % TYPES
    method = np.where(rng.random(count) < CHANCE[kind], kind, others)
    values = VALUE + running_values(method, digits)
    tokens = np.c_[METHOD + method, values, np.full(count, END)].astype(np.int32)
    return questions_of(kind, digits).prompts, jnp.asarray(tokens)


def trained_base(policy, params, steps, rng):
    """Maximum likelihood of the base model's rationales."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    data = jax.tree.map(
        lambda leaf: leaf.reshape(steps, 128, -1), base_rationales(rng, 128 * steps)
    )

    @jax.jit
    def train(params, data):
        def step(carry, batch):
            params, state = carry
            prompts, tokens = batch

            def loss(params):
                return -jnp.mean(policy.log_prob(params, prompts, tokens, tokens >= 0))

            value, slope = jax.value_and_grad(loss)(params)
            update, state = optimizer.update(slope, state)
            return (optax.apply_updates(params, update), state), value

        return lax.scan(step, (params, optimizer.init(params)), data)

    (params, _), losses = train(params, data)
    return params, losses


# --- learning -------------------------------------------------------------------------------------

METHODS = {  # each with 64 rationales a step
    "TRICE": (64, em.trice(), em.uniform(1)),
    "TRICE, leave-one-out": (64, em.trice("leave_one_out"), em.uniform(1)),
    "TRICE, optimal": (64, em.trice("optimal"), em.uniform(1)),
    "TRICE, no control variate": (64, em.trice("none"), em.uniform(1)),
    "STaR": (64, em.star(), em.uniform(1)),
    "RAFT": (16, em.raft(), em.uniform(4)),
    "RAFT, GVM": (16, em.raft(), em.gvm(4)),
    "GRPO": (16, em.grpo(), em.uniform(4)),
}
COLORS = dict(
    zip(
        METHODS,
        ("#0b6e4f", "#2f7fc1", "#8e6bbf", "#7fb69b", "#c8553d", "#e0a458", "#a67c2d", "#4a5899"),
        strict=True,
    )
)


def learn(name, model, params, train, held_out, rates, seeds, steps, chunk):
    """All learning rates and seeds side by side; one compiled scan from report to report."""
    batch_size, estimator, allocator = METHODS[name]
    gradient = em.mcmc_em(
        model, train, batch_size=batch_size, estimator=estimator, allocator=allocator
    )
    optimizer = optax.inject_hyperparams(
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    )(rate=1.0)
    kernel = stochgrad.ascend(gradient, optimizer)

    def begin(rate, key):
        state = kernel.init(params, key)
        hyper = state.optimizer_state._replace(hyperparams={"rate": rate})
        return state._replace(optimizer_state=hyper)

    def go_on(state, key):
        def step(state, key):
            state, _ = kernel.step(key, state)
            return state, state.gradient_state.stats

        state, stats = lax.scan(step, state, jax.random.split(key, chunk))
        return state, jax.tree.map(jnp.mean, stats)

    def noise(state, key):
        """Variance of the gradient, over minibatches and proposals, by its squared mean."""

        def one(key):
            a, b = jax.random.split(key)
            batches = gradient.init(a, state.position).batches
            held = state.gradient_state._replace(batches=batches)
            return gradient.next(b, state.position, held)[0](state.position)[1]

        draws = lax.map(one, jax.random.split(key, 12))
        variance = sum(jnp.sum(jnp.var(leaf, axis=0, ddof=1)) for leaf in jax.tree.leaves(draws))
        mean = sum(jnp.sum(jnp.mean(leaf, axis=0) ** 2) for leaf in jax.tree.leaves(draws))
        return variance / jnp.maximum(mean - variance / 12, variance / 100)  # 100: no direction

    def accuracy(state):
        drawn = model.policy.greedy(state.position, held_out.prompts)
        latents = drawn.tokens, drawn.mask
        right = model.reward(state.position, held_out.prompts, *latents, held_out.answers)
        kind = held_out.prompts.tokens[:, 0]
        return jnp.mean(right.astype(float)), jnp.mean(right.astype(float), where=kind >= 6)

    each = lambda f: jax.jit(jax.vmap(jax.vmap(f)))
    keys = jax.random.split(jax.random.key(1), (len(rates), seeds))
    state = each(begin)(jnp.broadcast_to(jnp.asarray(rates)[:, None], keys.shape), keys)
    go_on, noise, accuracy = each(go_on), each(noise), each(accuracy)
    rows, tokens = [], 0.0
    for at in range(0, steps + 1, chunk):
        fold = jax.vmap(jax.vmap(partial(jax.random.fold_in, data=at)))
        stats = state.gradient_state.stats
        if at:
            state, stats = go_on(state, fold(keys))
            tokens += chunk * float(jnp.mean(stats.tokens))
        overall, hard = accuracy(state)
        rows.append((at, tokens, overall, hard, stats.acceptance_rate, noise(state, fold(keys))))
        print(
            f"{name:>26}  step {at:4d}  {tokens / 1e3:6.1f}k tokens  held-out accuracy "
            + "  ".join(
                f"{rate:g}: {np.mean(row):.2f}" for rate, row in zip(rates, overall, strict=True)
            ),
            flush=True,
        )
    return jax.tree.map(
        lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *rows
    ), state


def draw(found, rates, base, path):
    """Accuracy, acceptance and noise against tokens, a column for each learning rate."""
    figure, axes = plt.subplots(
        3, len(rates), figsize=(4.2 * len(rates), 8.4), sharex=True, sharey="row", squeeze=False
    )
    for column, rate in enumerate(rates):
        for name, (_, tokens, overall, _, acceptance, noise) in found.items():
            for row, values in enumerate((overall, acceptance, noise)):
                if row == 1 and not METHODS[name][1].chains:
                    continue
                axis, values = axes[row, column], values[:, column]
                start = 1 if row == 1 else 0
                x = tokens[start:] / 1e3
                axis.fill_between(
                    x, values[start:].min(axis=1), values[start:].max(axis=1),
                    color=COLORS[name], alpha=0.15, lw=0,
                )  # fmt: skip
                middle = np.median(values, axis=1)[start:]
                axis.plot(x, middle, color=COLORS[name], lw=1.8, label=name)
        axes[0, column].axhline(base, color="0.6", lw=0.8, ls=":")
        axes[0, column].set_title(f"learning rate {rate:g}", fontsize=11)
        axes[0, column].set_ylim(0, 1.02)
        axes[1, column].set_ylim(0, 1.02)
        axes[2, column].set_yscale("log")
        axes[2, column].set_xlabel("sampled tokens, thousands")
    axes[0, 0].set_ylabel("held-out accuracy, greedy")
    axes[1, 0].set_ylabel("acceptance of the chains")
    axes[2, 0].set_ylabel("gradient variance / squared mean")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=4, loc="lower center"
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Learning which method answers which question, from answers alone", y=0.99)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def text_of(tokens) -> str:
    """A rationale to read."""
    names = {END: "end"} | {METHOD + n: f"method {n}:" for n in range(TYPES)}
    return " ".join(names.get(int(token), str(int(token) - VALUE)) for token in tokens)


def rates_of(found: em.Evaluation) -> str:
    """Rates with their intervals."""
    rates = {"greedy": found.greedy, "majority of 16": found.majority}
    rates |= {f"pass@{k}": rate for k, rate in found.pass_at.items()}
    return ", ".join(
        f"{name} {r.mean:.3f} [{r.low:.3f}, {r.high:.3f}]" for name, r in rates.items()
    )


def main():
    """Train the base model, let each method learn, report and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="chain_of_thought.png")
    parser.add_argument("--metrics", help="a file for metrics, one JSON object a line")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--task", choices=TASKS, default="one", help="right rationales a question")
    parser.add_argument("--methods", default="", help="those whose name begins so; TRICE must be")
    parser.add_argument("--smoke", action="store_true", help="a minute or so, to see that it runs")
    options = parser.parse_args()
    rates, base_steps, chunk = options.rates, 1500, 20
    if options.smoke:
        rates, base_steps, chunk = [1e-3], 30, 2
        options.steps, options.seeds = 4, 1

    began, rng = time.perf_counter(), np.random.default_rng(0)
    policy, params = policy_of(Transformer(rngs=nnx.Rngs(0)))
    params, losses = trained_base(policy, params, base_steps, rng)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"base model: {size:,} weights, {base_steps} steps, {float(losses[-1]):.3f} nats a "
        f"rationale, {time.perf_counter() - began:.0f} s"
    )
    every = np.stack(np.meshgrid(*[np.arange(5)] * DIGITS), axis=-1).reshape(-1, DIGITS)
    kind, digits = np.divmod(rng.permutation(TYPES * len(every)), len(every))
    train, held_out = (
        questions_of(kind[rows], every[digits[rows]]) for rows in (slice(512), slice(512, 1024))
    )
    model = em.verified(policy, TASKS[options.task], end=END)
    judge = partial(
        em.evaluate, questions=held_out, key=jax.random.key(0), samples=16, batch_size=512,
        vote=lambda tokens, mask: tokens[:, 2:6] @ jnp.array([32**3, 32**2, 32, 1]),
    )  # fmt: skip
    before = judge(model, params)
    kinds = np.asarray(held_out.prompts.tokens[:, 0])
    print(f"base model, held out: {rates_of(before)}")
    right = " ".join(f"{before.solved[kinds == k].mean():.3f}" for k in range(TYPES))
    print(f"share of right draws, by type: {right}")

    found, last = {}, {}
    for name in [name for name in METHODS if name.startswith(options.methods)]:
        found[name], last[name] = learn(
            name, model, params, train, held_out, rates, options.seeds, options.steps, chunk
        )
    print("\nheld-out accuracy at the end, mean over seeds [worst, best]; of the two hardest types")
    for name, (_, tokens, overall, hard, _, _) in found.items():
        cells = [
            f"{overall[-1, n].mean():.2f} [{overall[-1, n].min():.2f}, {overall[-1, n].max():.2f}]"
            f" {hard[-1, n].mean():.2f}"
            for n in range(len(rates))
        ]
        print(f"{name:>26}  {tokens[-1] / 1e3:.0f}k tokens  " + "   ".join(cells))
        if options.metrics:
            for row, at in enumerate(found[name][0]):
                means = zip(rates, overall[row].mean(axis=1), strict=True)
                accuracies = {f"accuracy_at_{rate:g}": mean for rate, mean in means}
                em.json_lines(options.metrics, {"method": name, **accuracies}, step=int(at))

    learned = jax.tree.map(lambda leaf: leaf[len(rates) // 2, 0], last["TRICE"].position)
    after = judge(model, learned)
    print(f"TRICE, held out: {rates_of(after)}")
    print("rationales of held-out questions, before and after:")
    for n in [int(np.flatnonzero(kinds == k)[0]) for k in (0, 4, 7)]:
        digits = text_of(held_out.prompts.tokens[n][1:])
        print(
            f"  type {kinds[n]}, digits {digits}, answer {text_of(held_out.answers[n])}:", end=" "
        )
        shown = [
            f"{text_of(at.tokens[n])} ({'right' if at.right[n] else 'wrong'})"
            for at in (before, after)
        ]
        print(" -> ".join(shown))
    draw(found, rates, before.greedy.mean, options.output)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
