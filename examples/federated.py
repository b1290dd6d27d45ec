"""Ten hospitals, one posterior: visits of any length, with and without conducive gradients.

A logistic regression whose rows belong to ten clients, who see the two outcomes in very unequal
parts (simulated). A chain stays with a client for T steps before it goes on to another. Shown is
what becomes of the posterior as T grows, for surrogates expanded at one shared reference and for
those of the literature, fitted to each client's own likelihood.

Run ``python examples/federated.py``; ``--smoke`` is a short version of the same.
"""

import argparse
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import stochgrad
from stochgrad import federated

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLIENTS, DIM, ROWS, BATCH = 10, 8, 6000, 50
COLORS = ["tab:blue", "tab:cyan", "tab:orange", "tab:red", "0.5"]


def simulate(rng):
    """Rows dealt to clients by their outcome: each client has its own mix."""
    x = np.concatenate([np.ones((ROWS, 1)), rng.normal(size=(ROWS, DIM - 1))], axis=1)
    y = rng.random(ROWS) < 1 / (1 + np.exp(-x @ rng.normal(size=DIM) * 0.8))
    mix = rng.dirichlet(np.full(CLIENTS, 1.5), size=2)
    owner = np.array([rng.choice(CLIENTS, p=mix[int(label)]) for label in y])
    x, y = x.astype(np.float32), y.astype(np.float32)
    return [(x[owner == s], y[owner == s]) for s in range(CLIENTS)]


def log_prior(w):
    """Normal with a standard deviation of two."""
    return -0.125 * jnp.sum(w**2)


def log_likelihood(w, batch):
    """Logistic regression, one value a row."""
    x, y = batch
    z = x @ w
    return y * z - jnp.logaddexp(jnp.zeros_like(z), z)


def dynamics(target, reference):
    """Underdamped Langevin dynamics in steps that the stiffest direction bears."""
    hessian = -jax.hessian(target.log_density)(reference.position, target.batches.full)
    stiff = float(jnp.linalg.eigvalsh(hessian)[-1]) ** 0.5

    def kernel(gradient):
        return stochgrad.sghmc(gradient, 0.2 / stiff, friction=0.5 * stiff, integrator="BAOAB")

    return kernel


def pooled(data, kernel, start, run):
    """Draws of the posterior of all rows in one place."""
    rows = tuple(np.concatenate(column) for column in zip(*data, strict=True))
    target = stochgrad.posterior(log_prior, log_likelihood, rows, order="full")
    return stochgrad.sample(jax.random.key(1), kernel(target), init=start, **run).positions


def contenders(target, reference):
    """Surrogates by name; one that cannot be had is left out."""
    makers = {
        "ours, first order": lambda: federated.global_first_order(target, reference),
        "ours, quadratic": lambda: federated.global_quadratic(target, reference),
        "Laplace at local modes": lambda: federated.laplace_local(target, reference),
        "moments of local draws": lambda: federated.sampled(jax.random.key(2), target, reference),
        "none (DSGLD)": lambda: None,
    }
    for name, make in makers.items():
        try:
            yield name, make()
        except ValueError as error:
            print(f"{name}: {error}")


def sample(target, surrogates, reference, kernel, steps, run):
    """Draws of a federated run with visits of some steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # runs that leave the finite numbers are shown as such
        draws = federated.sample(
            jax.random.key(3),
            target,
            method="DSGLD" if surrogates is None else "FSGLD",
            surrogate=surrogates or "global_first_order",
            reference=reference,
            local_steps=steps,
            kernel=kernel,
            on_unsafe="ignore",
            **run,
        )
    return draws.positions if draws.finite.all() else None


def score(positions, truth):
    """Error of the means in posterior sds (rms), and the ratio of sds that is farthest from one."""
    if positions is None:
        return np.inf, np.inf
    mean, sd = truth.mean(axis=(0, 1)), truth.std(axis=(0, 1))
    ratios = np.log(positions.std(axis=(0, 1)) / sd)
    gap = (positions.mean(axis=(0, 1)) - mean) / sd
    return np.sqrt(np.mean(gap**2)), np.exp(ratios[np.argmax(np.abs(ratios))])


def plot(errors, visits, at_100, truth, path):
    """Errors against the length of visits, and one coefficient's posterior at T = 100."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2))
    for color, (name, rows) in zip(COLORS, errors.items(), strict=False):
        gaps, ratios = np.array(rows).T
        gaps, ratios = np.minimum(gaps, 300), np.clip(ratios, None, 300)
        left.plot(visits, gaps, "o-", color=color, label=name)
        middle.plot(visits, ratios, "o-", color=color)
    left.axhline(0.05, color="0.7", ls=":")
    left.set_title("Error of the mean, posterior sds", loc="left")
    middle.axhspan(0.9, 1.1, color="0.9")
    middle.set_title("Ratio of sds, worst coefficient", loc="left")
    for axis in (left, middle):
        axis.set(xscale="log", yscale="log", xlabel="steps of a visit, T")
        axis.set_xticks(visits, [str(t) for t in visits])
    center, spread = truth[..., 0].mean(), truth[..., 0].std()
    grid = np.linspace(-8, 8, 81)
    right.hist(
        (truth[..., 0].ravel() - center) / spread, grid, density=True, color="0.85", label="pooled"
    )
    for color, positions in zip(COLORS, at_100.values(), strict=False):
        if positions is not None:
            z = (positions[..., 0].ravel() - center) / spread
            right.hist(z, grid, density=True, histtype="step", color=color, lw=1.5)
    right.set(xlabel="intercept, pooled posterior sds", ylim=(0, 0.6))
    right.set_title("Posterior at T = 100", loc="left")
    handles, labels = left.get_legend_handles_labels()
    pool, name = right.get_legend_handles_labels()
    figure.legend(
        handles + pool, labels + name, ncols=6, frameon=False, loc="lower center", fontsize=9
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"picture: {path}")


def main():
    """Run all contenders at all lengths of visits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("examples/output/federated.png"))
    args = parser.parse_args()
    start = time.perf_counter()
    data = simulate(np.random.default_rng(4))
    print("rows and outcomes:", [(len(y), round(float(y.mean()), 2)) for _, y in data])
    target = federated.posterior(log_prior, log_likelihood, data, batch_size=BATCH)
    reference = federated.find_reference(target, jnp.zeros(DIM))
    print(f"reference: {reference.rounds} rounds, {reference.bytes_up:,} bytes up")
    kernel = dynamics(target, reference)
    run = {"num_samples": 150 if args.smoke else 1200, "num_warmup": 50, "thin": 20}
    run |= {"num_chains": 4 if args.smoke else 16, "progress": False}
    visits = [1, 100] if args.smoke else [1, 20, 100, 1000]
    truth = pooled(data, kernel, reference.position, run)
    errors, at_100 = {}, {}
    for name, surrogates in contenders(target, reference):
        errors[name] = []
        for steps in visits:
            positions = sample(target, surrogates, reference, kernel, steps, run)
            errors[name].append(score(positions, truth))
            if steps == 100:
                at_100[name] = positions
        shown = "  ".join(
            f"T={t}: {gap:.3f}, {ratio:.2f}"
            for t, (gap, ratio) in zip(visits, errors[name], strict=True)
        )
        print(f"{name:24s} {shown}")
    plot(errors, visits, at_100, truth, args.output)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
