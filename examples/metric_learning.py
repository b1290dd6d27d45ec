"""Which digits are alike? A metric learnt from pairs that ten clients keep to themselves.

After the second experiment of El Mekkaoui, Mesquita, Blomstedt & Kaski (UAI 2021), on
scikit-learn's digits: two digits are of one kind with probability sigmoid(mu - d), where
d = (x - x')' A (x - x') and A = sum_k lambda_k v_k v_k', with the leading principal components v_k
of the pixels and positive weights lambda_k, log-normal a priori, so that A has no negative
eigenvalue. Each client has pairs of three kinds of digits and few of the others.

The posterior of all pairs in one place is sampled with all of them at each step; DSGLD and FSGLD
leave the pairs where they are, and a chain stays with a client for 50 steps. On held-out digits the
metric tells like from unlike better than the Euclidean one; it finds no better neighbors.

Run ``python examples/metric_learning.py``; ``--smoke`` is a short version of the same.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

import stochgrad

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COMPONENTS, CLIENTS, KINDS = 8, 10, 3
LOCAL_STEPS, BATCH, STEP_SIZE = 50, 50, 3e-5
SHADE = {"pooled": "#3b3b3b", "FSGLD": "#1f6f8b", "DSGLD": "#b03a2e"}


def load():
    """Principal components of the pixels, and the digits in them: to learn from and held out."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = digits.data[order] / 8, digits.target[order]
    test = len(y) // 3
    center = x[test:].mean(axis=0)
    v = np.linalg.svd(x[test:] - center, full_matrices=False)[2][:COMPONENTS]
    z = (x - center) @ v.T
    return v, (z[test:], y[test:]), (z[:test], y[:test])


def pairs_of(client, z, y, random):
    """Pairs that a client has seen, half of them alike, mostly of three kinds of digits."""
    kinds = (client + np.array([0, 1, 3])) % 10
    weight = np.where(np.isin(y, kinds), 1.0, 0.03)
    count = 500 + 1000 * client // (CLIENTS - 1)
    first = random.choice(len(y), count, p=weight / weight.sum())
    second = np.empty_like(first)
    alike = random.random(count) < 0.5
    for n, (i, same) in enumerate(zip(first, alike, strict=True)):
        p = weight * ((y == y[i]) == same)
        p[i] = 0.0
        second[n] = random.choice(len(y), p=p / p.sum())
    apart = (z[first] - z[second]) ** 2
    return {"apart": apart.astype(np.float32), "alike": alike.astype(np.float32)}


def log_prior(position):
    """Log-normal weights, normal threshold."""
    weights = jnp.sum(((position["log_weight"] + 2.0) / 1.5) ** 2)
    return -0.5 * (weights + (position["threshold"] / 5.0) ** 2)


def log_likelihood(position, pairs):
    """Whether the digits of each pair are alike."""
    logit = position["threshold"] - pairs["apart"] @ jnp.exp(position["log_weight"])
    return pairs["alike"] * logit - jax.nn.softplus(logit)


def sample(clients, target, reference, draws, chains):
    """Draws of each method; one is kept at the end of each visit."""
    run = {"num_samples": draws, "num_warmup": draws // 5, "thin": LOCAL_STEPS}
    run |= {"num_chains": chains, "init": reference.position, "progress": False}
    pooled = {name: np.concatenate([c[name] for c in clients]) for name in clients[0]}
    whole = stochgrad.posterior(log_prior, log_likelihood, pooled, order="full")
    found = {"pooled": stochgrad.sample(jax.random.key(0), stochgrad.sgld(whole, STEP_SIZE), **run)}
    for method in ("FSGLD", "DSGLD"):
        found[method] = stochgrad.federated.sample(
            jax.random.key(1),
            target,
            method=method,
            local_steps=LOCAL_STEPS,
            step_size=STEP_SIZE,
            reference=reference,
            **run,
        )
    return found


def judge(weights, train, test):
    """How well a metric tells like from unlike pairs (area under the curve), finds neighbors."""
    (z, y), (z_test, y_test) = train, test
    i, j = np.random.default_rng(2).integers(0, len(y_test), (2, 20_000))
    i, j = i[i != j], j[i != j]
    area = roc_auc_score(y_test[i] == y_test[j], -((z_test[i] - z_test[j]) ** 2) @ weights)
    scale = np.sqrt(weights)
    nearest = KNeighborsClassifier(5).fit(z * scale, y)
    return area, nearest.score(z_test * scale, y_test)


def compare(found):
    """Means and sds of log weights and threshold, against those of the pooled posterior."""
    flat = {
        name: np.concatenate(
            [d.positions["log_weight"], d.positions["threshold"][..., None]], axis=-1
        )
        for name, d in found.items()
    }
    mean, sd = flat["pooled"].mean(axis=(0, 1)), flat["pooled"].std(axis=(0, 1))
    print(f"\n{'':8}weights of the components: mean ± sd{'':35}threshold")
    for name, x in flat.items():
        weights = np.exp(x[..., :-1])
        cells = zip(weights.mean(axis=(0, 1)), weights.std(axis=(0, 1)), strict=True)
        line = " ".join(f"{m:.2f}±{s:.2f}" for m, s in cells)
        print(f"{name:8}{line}  {x[..., -1].mean():.2f}±{x[..., -1].std():.2f}")
    for name in ("FSGLD", "DSGLD"):
        gap = np.abs(flat[name].mean(axis=(0, 1)) - mean) / sd
        ratio = flat[name].std(axis=(0, 1)) / sd
        noise = np.nanmedian(found[name].stats["noise_ratio"])
        sent = found[name].stats["bytes_up"][0, -1] / 1e3
        setup = found[name].attrs["setup_bytes_up"] / 1e3
        print(
            f"{name}: means off by {gap.mean():.2f} sds of the pooled posterior (largest "
            f"{gap.max():.2f}),\n  sds {np.median(ratio):.2f} times as large (largest "
            f"{ratio.max():.2f}); noise of minibatches {noise:.3f};\n  "
            f"{sent:.0f} kB up for a chain, {setup:.0f} kB once for all"
        )


def picture(found, components, scores, euclidean, path):
    """Intervals of the weights above their components, and the scores of the metrics."""
    figure = plt.figure(figsize=(13, 5.8))
    grid = figure.add_gridspec(1, 3, width_ratios=[2.6, 1, 1])
    left = figure.add_subplot(grid[0])
    for place, (name, shade) in enumerate(SHADE.items()):
        weights = np.exp(found[name].positions["log_weight"]).reshape(-1, COMPONENTS)
        low, mid, high = np.quantile(weights, [0.05, 0.5, 0.95], axis=0)
        x = np.arange(COMPONENTS) + 0.2 * (place - 1)
        left.vlines(x, low, high, color=shade, linewidth=5, alpha=0.45)
        left.plot(x, mid, "o", color=shade, markersize=5.5, label=name)
    left.set_yscale("log")
    left.set_yticks([0.05, 0.1, 0.2, 0.4], ["0.05", "0.1", "0.2", "0.4"])
    left.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    left.set_xlim(-0.5, COMPONENTS - 0.5)
    left.set_xticks([])
    left.set_ylabel("weight in the metric (90% interval)")
    left.set_title("What makes two digits differ, and how sure the pairs are of it")
    left.legend(frameon=False, fontsize=10, loc="upper right")
    left.text(0.5, -0.27, "principal component", transform=left.transAxes, ha="center")
    for k, component in enumerate(components):
        tile = left.inset_axes([(k + 0.12) / COMPONENTS, -0.19, 0.76 / COMPONENTS, 0.16])
        wide = np.abs(component).max()
        tile.imshow(component.reshape(8, 8), cmap="RdBu_r", vmin=-wide, vmax=wide)
        tile.set_xticks([])
        tile.set_yticks([])
        tile.set_xlabel(k + 1, fontsize=9, labelpad=2)

    titles = "Like or unlike?\narea under the curve", "Five nearest:\nshare right"
    for half, title in enumerate(titles):
        axis = figure.add_subplot(grid[1 + half])
        for at, (name, shade) in enumerate(SHADE.items()):
            values = scores[name][:, half]
            spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(values))
            axis.plot(at + spread, values, "o", color=shade, markersize=4, alpha=0.35, mew=0)
            axis.hlines(values.mean(), at - 0.4, at + 0.4, color=shade, linewidth=2.5)
        axis.axhline(euclidean[half], color="0.35", linewidth=1, linestyle=":")
        axis.annotate(
            "Euclidean", (1, euclidean[half]), xytext=(0, 3), textcoords="offset points",
            fontsize=9, color="0.35", ha="center",
        )  # fmt: skip
        axis.set_xticks(range(len(SHADE)), SHADE, fontsize=9)
        axis.set_xlim(-0.6, len(SHADE) - 0.4)
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    left.spines[["top", "right", "bottom"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main():
    """Pair, sample, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short run")
    parser.add_argument("--output", type=Path, default=Path("examples/output/metric_learning.png"))
    options = parser.parse_args()
    draws, chains, scored = (60, 2, 20) if options.smoke else (1000, 8, 150)

    begun = time.perf_counter()
    components, train, test = load()
    random = np.random.default_rng(1)
    clients = [pairs_of(s, *train, random) for s in range(CLIENTS)]
    sizes = [len(c["alike"]) for c in clients]
    print(
        f"{sum(sizes):,} pairs of {len(train[1]):,} digits, {min(sizes)} to {max(sizes)} with each "
        f"of {CLIENTS} clients"
    )
    target = stochgrad.federated.posterior(log_prior, log_likelihood, clients, batch_size=BATCH)
    start = {"log_weight": jnp.full(COMPONENTS, -2.0), "threshold": jnp.float32(2.0)}
    reference = stochgrad.federated.find_reference(target, start)
    print(f"reference: {reference.rounds} rounds, {reference.bytes_up / 1e3:.0f} kB up")

    found = sample(clients, target, reference, draws, chains)
    compare(found)
    euclidean = judge(np.ones(COMPONENTS), train, test)
    scores = {}
    print(
        "\nheld-out digits: area under the curve of like and unlike pairs; share right of five "
        f"nearest\n{'Euclidean':10}{euclidean[0]:.4f}            {euclidean[1]:.4f}"
    )
    for name, made in found.items():
        weights = np.exp(made.positions["log_weight"], dtype=np.float64).reshape(-1, COMPONENTS)
        pick = np.linspace(0, len(weights) - 1, scored).astype(int)
        scores[name] = np.array([judge(w, train, test) for w in weights[pick]])
        cells = zip(scores[name].mean(axis=0), scores[name].std(axis=0), strict=True)
        print(f"{name:10}" + "   ".join(f"{m:.4f} ± {s:.4f}" for m, s in cells))
    picture(found, components, scores, euclidean, options.output)
    print(f"\npicture: {options.output}   ({time.perf_counter() - begun:.0f} s in all)")


if __name__ == "__main__":
    main()
