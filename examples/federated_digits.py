"""A Bayesian neural network on digits that twenty clients keep to themselves, each its own few.

A network of 64-50-10 units and a Gaussian prior, on scikit-learn's digits. A chain visits one
client after the other and stays for 40 steps: without conducive gradients (DSGLD) and with them
(FSGLD), against SGLD on the pooled data with the same step size, minibatches and number of steps.
What is compared is the prediction of a third of the digits, held out: log-likelihood, accuracy and
expected calibration error.

Twelve hundred digits say little about 3,760 weights. At temperature one the chains move far from
the reference, and the slopes that FSGLD took there help little. In the cold posterior that is
common for networks they help much, less as the chains move away; adding a diagonal of squared
scores changes nothing. No ensemble here predicts better than the reference, the mode, alone. The
table has both temperatures, the picture the cold one.

Run ``python examples/federated_digits.py``; ``--smoke`` is a short version of the same.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from sklearn.datasets import load_digits

import stochgrad

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HIDDEN, CLIENTS, SKEW = 50, 20, 0.3
LOCAL_STEPS, BATCH, STEP_SIZE = 40, 32, 5e-5
SCALE = {"w1": 0.3, "b1": 0.3, "w2": 0.5, "b2": 0.5}  # of the prior
SHAPE = {"w1": (64, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, 10), "b2": (10,)}
BINS = 12
SHADE = {"SGLD, pooled data": "#3b3b3b", "FSGLD": "#1f6f8b", "DSGLD": "#b03a2e"}


def load():
    """Digits to learn from, and a third of them to predict: pixels and labels."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = digits.data[order].astype(np.float32) / 8
    y = digits.target[order].astype(np.int32)
    test = len(y) // 3
    x = x - x[test:].mean(axis=0)
    return {"x": x[test:], "y": y[test:]}, {"x": x[:test], "y": y[:test]}


def split(train):
    """The rows of each client: every digit is dealt out in shares of a Dirichlet distribution."""
    random = np.random.default_rng(1)
    owner = np.empty(len(train["y"]), int)
    for label in range(10):
        mine = train["y"] == label
        shares = random.dirichlet(np.full(CLIENTS, SKEW))
        owner[mine] = random.choice(CLIENTS, mine.sum(), p=shares)
    rows = [np.flatnonzero(owner == s) for s in range(CLIENTS)]
    return [{name: v[r] for name, v in train.items()} for r in rows if len(r)]


def log_probabilities(weights, x):
    """Of the ten digits, for each row."""
    hidden = jnp.tanh(x @ weights["w1"] + weights["b1"])
    return jax.nn.log_softmax(hidden @ weights["w2"] + weights["b2"])


def log_prior(weights):
    """Independent Gaussians."""
    return sum(-0.5 * jnp.sum((weights[name] / s) ** 2) for name, s in SCALE.items())


def log_likelihood(weights, rows):
    """Of the labels, for each row."""
    log_p = log_probabilities(weights, rows["x"])
    return jnp.take_along_axis(log_p, rows["y"][:, None], axis=1)[:, 0]


def from_prior(key):
    """A network whose weights are draws from the prior."""
    keys = jax.random.split(key, len(SHAPE))
    return {n: SCALE[n] * jax.random.normal(k, SHAPE[n]) for n, k in zip(SHAPE, keys, strict=True)}


def diagonal(target, reference):
    """Surrogates of slope and Fisher diagonal."""
    return stochgrad.federated.global_quadratic(
        target, reference, form="diagonal", curvature="fisher"
    )


def sample(name, train, target, reference, temperature, draws, chains):
    """Chains of one method, from the reference; a draw is kept at the end of each visit."""
    run = {"num_samples": draws, "thin": LOCAL_STEPS, "num_chains": chains, "progress": False}
    kernel = lambda gradient: stochgrad.sgld(gradient, STEP_SIZE, temperature=temperature)
    key = jax.random.key(1)
    if "pooled" in name:
        pooled = stochgrad.posterior(log_prior, log_likelihood, train, batch_size=BATCH)
        return stochgrad.sample(key, kernel(pooled), init=reference, **run)
    return stochgrad.federated.sample(
        key,
        target,
        method=name.split(",")[0],
        surrogate=diagonal if "diagonal" in name else "global_first_order",
        local_steps=LOCAL_STEPS,
        kernel=kernel,
        control_variate=False,  # the pooled chain has none either
        reference=reference,
        init=reference.position,
        on_unsafe="ignore",  # a network's own curvature is negative somewhere
        **run,
    )


@jax.jit
def predict(positions, x):
    """Probabilities of the digits under each draw: (chain, draw, row, digit)."""
    one = jax.vmap(lambda weights: jnp.exp(log_probabilities(weights, x)))
    return jax.lax.map(one, positions)


def log_score(probabilities, y):
    """Mean log probability of the true digit; the last axes are (row, digit)."""
    return np.log(probabilities[..., np.arange(len(y)), y]).mean(axis=-1)


def reliability(probabilities, y):
    """Rows, mean confidence and share right of each bin of confidence, and the calibration error.

    The last axes are (row, digit); rows of all other axes count together.
    """
    confidence = probabilities.max(axis=-1).ravel()
    right = (probabilities.argmax(axis=-1) == y).ravel()
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    full = count > 0
    stated = np.bincount(bins, confidence, BINS)[full] / count[full]
    seen = np.bincount(bins, right, BINS)[full] / count[full]
    error = np.sum(count[full] * np.abs(stated - seen)) / count.sum()
    return count[full], stated, seen, error


def judge(draws, test):
    """Scores of each chain's ensemble, and its log-likelihood as the draws come in."""
    y = test["y"]
    p = np.asarray(predict(draws.positions, test["x"]))
    skip = p.shape[1] // 5
    ensemble = p[:, skip:].mean(axis=1)
    count = np.arange(1, p.shape[1] + 1)[:, None, None]
    so_far = [log_score(np.cumsum(chain, axis=0) / count, y) for chain in p]
    scores = np.array(
        [[log_score(e, y), (e.argmax(-1) == y).mean(), reliability(e, y)[3]] for e in ensemble]
    )
    return {
        "scores": scores,
        "single": log_score(p, y),
        "so_far": np.array(so_far),
        "reliability": reliability(ensemble, y),
    }


def row(name, found):
    """A line of the table: means over chains, and their standard errors."""
    mean = found["scores"].mean(axis=0)
    error = found["scores"].std(axis=0, ddof=1) / np.sqrt(len(found["scores"]))
    cells = "   ".join(f"{m:7.4f} ± {e:.4f}" for m, e in zip(mean, error, strict=True))
    return f"  {name:19}{cells}"


def picture(found, before, visit_bytes, path):
    """Log-likelihood as the draws come in, and reliability."""
    figure = plt.figure(figsize=(12.5, 5.6))
    grid = figure.add_gridspec(2, 2, width_ratios=[1.5, 1], height_ratios=[3.2, 1])
    axes = [figure.add_subplot(grid[where]) for where in ((slice(None), 0), (0, 1), (1, 1))]
    for name, shade in SHADE.items():
        single, so_far = found[name]["single"], found[name]["so_far"]
        steps = LOCAL_STEPS * np.arange(1, single.shape[1] + 1)
        mean, sd = so_far.mean(axis=0), so_far.std(axis=0)
        axes[0].plot(steps, single.mean(axis=0), color=shade, linewidth=0.7, alpha=0.45)
        axes[0].fill_between(steps, mean - sd, mean + sd, color=shade, alpha=0.2, linewidth=0)
        axes[0].plot(steps, mean, color=shade, linewidth=2.2)
        axes[0].annotate(
            name, (steps[-1], mean[-1]), xytext=(7, 0), textcoords="offset points", va="center",
            color=shade, fontsize=11, fontweight="bold",
        )  # fmt: skip
    axes[0].axhline(before, color="0.6", linewidth=1, linestyle=":")
    axes[0].text(steps[-1], before, "the reference alone ", va="bottom", ha="right", fontsize=9)
    axes[0].set_xlim(0, 1.22 * steps[-1])
    axes[0].set_xticks([t for t in axes[0].get_xticks() if t <= steps[-1]])
    axes[0].set_xlabel(f"steps, in visits of {LOCAL_STEPS}")
    axes[0].set_ylabel("test log-likelihood of a digit")
    axes[0].set_title("Cold posterior. Thick: all draws so far; thin: the last one")
    scale = visit_bytes / LOCAL_STEPS / 1e6
    below = axes[0].secondary_xaxis(-0.16, functions=(lambda t: t * scale, lambda b: b / scale))
    below.set_xlabel("megabytes that clients sent for one chain (DSGLD, FSGLD)")
    below.spines["bottom"].set_bounds(0, steps[-1] * scale)
    ticks = matplotlib.ticker.MaxNLocator(5).tick_values(0, steps[-1] * scale)
    below.set_xticks([b for b in ticks if b <= steps[-1] * scale])
    axes[0].spines["bottom"].set_bounds(0, steps[-1])

    axes[1].plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for place, (name, shade) in enumerate(SHADE.items()):
        count, stated, seen, _ = found[name]["reliability"]
        error = found[name]["scores"][:, 2].mean()
        keep = count >= 5 * len(found[name]["scores"])
        label = f"{name}: error {error:.3f}"
        axes[1].plot(stated[keep], seen[keep], "o-", color=shade, markersize=5, label=label)
        middle = (np.floor(stated * BINS) + 0.5 + 0.27 * (place - 1)) / BINS
        axes[2].bar(middle, count / count.sum(), 0.25 / BINS, color=shade)
    axes[1].set_ylim(0.25, 1.03)
    axes[1].text(0.27, 0.9, "too modest", fontsize=9, color="0.4", va="top")
    axes[1].text(0.84, 0.62, "too sure", fontsize=9, color="0.4", va="top")
    axes[1].set_ylabel("share right")
    axes[1].set_title("Calibration on the test digits")
    axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    axes[1].tick_params(labelbottom=False)
    axes[2].set_xlabel("probability of the predicted digit")
    axes[2].set_ylabel("share of digits")
    for ax in axes[1:]:
        ax.set_xlim(0.25, 1.0)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main():
    """Split, sample, predict, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short run")
    parser.add_argument("--output", type=Path, default=Path("examples/output/federated_digits.png"))
    options = parser.parse_args()
    draws, chains, rounds = (25, 2, 10) if options.smoke else (300, 8, 60)

    begun = time.perf_counter()
    train, test = load()
    clients = split(train)
    sizes = [len(c["y"]) for c in clients]
    labels = [np.sum(np.bincount(c["y"], minlength=10) > 0.1 * len(c["y"])) for c in clients]
    print(
        f"{len(train['y']):,} digits of {len(clients)} clients with {min(sizes)} to {max(sizes)} "
        f"each; {np.median(labels):.0f} digits make up a tenth or more of a client's (median)"
    )
    target = stochgrad.federated.posterior(log_prior, log_likelihood, clients, batch_size=BATCH)
    reference = stochgrad.federated.find_reference(
        target, from_prior(jax.random.key(0)), max_rounds=rounds
    )
    at = np.exp(log_probabilities(reference.position, test["x"]))
    before = log_score(at, test["y"])
    print(
        f"reference: {reference.rounds} rounds, {reference.bytes_up / 1e6:.1f} MB up; test "
        f"log-likelihood {before:.4f}, accuracy {(at.argmax(-1) == test['y']).mean():.4f}, "
        f"calibration error {reliability(at, test['y'])[3]:.4f}"
    )

    for temperature in (0.1,) if options.smoke else (1.0, 0.1):
        print(f"\ntemperature {temperature:g}: {chains} chains of {draws * LOCAL_STEPS:,} steps")
        print(f"  {'':19}log-likelihood     accuracy           calibration error  noise  seconds")
        names = list(SHADE) + ["FSGLD, diagonal"] * (temperature < 1 and not options.smoke)
        found, sent = {}, {}
        for name in names:
            clock = time.perf_counter()
            made = sample(name, train, target, reference, temperature, draws, chains)
            noise = np.nanmedian(made.stats["noise_ratio"][:, draws // 5 :])
            found[name] = judge(made, test)
            print(f"{row(name, found[name])}  {noise:5.3f}{time.perf_counter() - clock:7.0f}")
            if "pooled" not in name:
                setup = made.attrs["setup_bytes_up"]
                sent[name] = (int(made.stats["bytes_up"][0, -1]), setup)
        pooled, fsgld, dsgld = (found[name]["scores"][:, 0].mean() for name in SHADE)
        print(f"  FSGLD closes {(fsgld - dsgld) / (pooled - dsgld):.0%} of the gap of DSGLD")
    print(
        "  (noise: of the minibatches within a visit, over what is injected; what a client's own "
        "data\n  are off by lasts for the visit and is not in it)"
    )
    print("\nsent by the clients, cold posterior (a chain; once for all chains)")
    for name, (visits, setup) in sent.items():
        print(f"  {name:19}{visits / 1e6:5.1f} MB{setup / 1e6:8.1f} MB")
    visit_bytes = sent["FSGLD"][0] / draws
    picture(found, before, visit_bytes, options.output)
    print(f"\npicture: {options.output}   ({time.perf_counter() - begun:.0f} s in all)")


if __name__ == "__main__":
    main()
