"""Do weather and airline matter? Three models of 327,000 flights, compared and checked.

The model of ``flights.py`` on every flight that left New York in 2013 and arrived, once as it is,
once without the weather, and once with one effect for all airlines. Each is sampled by minibatches
and compared by leave-one-out cross-validation on 500 of the rows (``stochgrad.diagnostics.loo``);
then each predicts every flight, and the share of late ones is held against what each airline had.
A log likelihood for each flight and draw would take 5 GB for each model; it is never made.

Run ``python examples/flights_compare.py``; ``--smoke`` is a short version of the same.
"""

import argparse
import resource
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")

import arviz as az  # noqa: E402
import jax  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from flights import GROUPS, load, model  # noqa: E402

import stochgrad  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = {"full": "#1f6f8b", "no weather": "#3a7d44", "airlines pooled": "#b5651d"}
CHECKED = ("full", "airlines pooled")
BLOCK = 8192


def models(rows, sizes):
    """Arguments of the three models."""
    distance_only = {**rows, "x": rows["x"][:, -1:]}
    pooled = {name: size for name, size in sizes.items() if name != "carrier"}
    return {
        "full": (rows, sizes),
        "no weather": (distance_only, sizes),
        "airlines pooled": (rows, pooled),
    }


def full_run(key, arguments, num_samples):
    """Warm-up, four chains and a verdict."""
    options = {"num_samples": num_samples, "method": "sghmc", "progress": False}
    return stochgrad.infer(key, model, *arguments, minibatch=1000, **options)


def short_run(key, arguments, num_samples):
    """Draws for the rest to run on, from no more than the neighborhood of a start."""
    target = stochgrad.from_numpyro(model, *arguments, minibatch=500)
    kernel = stochgrad.sgld(target, 1e-4)
    return stochgrad.sample(key, kernel, num_samples=num_samples, num_warmup=500, num_chains=4)


def predicted_shares(draws, key, carrier):
    """Share of late flights by carrier, predicted by each draw: (draw, carrier)."""
    of_carrier = np.eye(carrier.max() + 1, dtype=np.float32)[carrier]
    late = 0.0
    for start in range(0, len(carrier), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(carrier)))
        block_key = jax.random.fold_in(key, start)  # one key would repeat its random numbers
        predicted = draws.predict(block_key, rows=rows, memory_bytes=2**28)["late"]
        late = late + predicted.astype(np.float32) @ of_carrier[rows]
    return late.reshape(-1, late.shape[-1]) / of_carrier.sum(axis=0)


def picture(table, shares, observed, names, path):
    """Differences of elpd, and shares of late flights by carrier against what was predicted."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), width_ratios=[1, 1.5])
    best = table.index[0]
    for place, name in enumerate(table.index):
        loss, error = abs(table.elpd_diff[name]), table.dse[name]
        left.errorbar(
            -loss, place, xerr=2 * error, fmt="o", color=COLORS[name], markersize=8, capsize=4
        )
        text = f"{-loss:,.0f} ± {error:,.0f}" if name != best else "best"
        left.annotate(text, (-loss, place), (0, 12), textcoords="offset points", ha="center")
    left.axvline(0, color="0.6", linewidth=1, zorder=0)
    left.set_yticks(range(len(table)), table.index)
    left.set_ylim(len(table) - 0.4, -0.6)
    left.margins(x=0.18)
    left.set_xlabel("difference in expected log predictive density (± 2 standard errors)")
    left.set_title("Which model predicts a flight that was left out", pad=28)

    order = np.argsort(observed)
    for name, shift in zip(CHECKED, (0.17, -0.17), strict=True):
        low, high = np.quantile(shares[name][:, order], [0.025, 0.975], axis=0)
        right.hlines(
            np.arange(len(order)) + shift,
            100 * low,
            100 * high,
            color=COLORS[name],
            linewidth=5,
            alpha=0.65,
            label=f"predicted, {name} (95%)",
        )
    right.plot(100 * observed[order], range(len(order)), "k|", markersize=14, label="observed")
    right.set_yticks(range(len(order)), np.array(names)[order], fontsize=9)
    right.set_xlabel("flights more than 15 minutes late (%)")
    right.set_title("Posterior predictive check by airline", pad=28)
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3, "fontsize": 9}
    right.legend(frameon=False, **above)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def peak_memory():
    """The most memory that the process has had, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def main():
    """Sample, compare, check, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short run")
    parser.add_argument("--output", type=Path, default=Path("examples/output/flights_compare.png"))
    options = parser.parse_args()
    every, num_samples, loo_rows = (100, 100, 100) if options.smoke else (1, 1000, 500)

    begun = time.perf_counter()
    rows, labels, _ = load(month=None)
    rows = {name: value[::every] for name, value in rows.items()}
    sizes = {name: len(labels[name]) for name in GROUPS}
    late, carrier = rows["late"], rows["carrier"]
    print(
        f"{len(late):,} flights, {sizes['carrier']} airlines; peak memory {peak_memory():.2f} GiB"
    )

    results, shares = {}, {}
    for number, (name, arguments) in enumerate(models(rows, sizes).items()):
        clock = [time.perf_counter()]
        fit = short_run if options.smoke else full_run
        draws = fit(jax.random.key(number), arguments, num_samples)
        clock.append(time.perf_counter())
        results[name] = stochgrad.diagnostics.loo(draws, rows=loo_rows)
        clock.append(time.perf_counter())
        if name in CHECKED:
            shares[name] = predicted_shares(draws, jax.random.key(10 + number), carrier)
            clock.append(time.perf_counter())
        elpd, se, k = summary(results[name])
        stages = zip(("draws", "loo", "predictions"), np.diff(clock), strict=False)
        print(
            f"\n{name}: {draws.num_chains} chains of {draws.num_draws} draws, "
            f"{'ok' if draws.verdict.ok else ' '.join(draws.verdict.reasons)}\n"
            f"  elpd {elpd:,.1f}, se {se:,.1f}; largest Pareto k of {loo_rows} flights {k:.2f}\n"
            f"  {', '.join(f'{stage} {seconds:.0f} s' for stage, seconds in stages)}; "
            f"peak memory {peak_memory():.2f} GiB"
        )

    table = az.compare(results)
    with pd.option_context("display.width", 120, "display.max_columns", 20):
        print(f"\n{table}\n")
    count = np.bincount(carrier, minlength=sizes["carrier"])
    observed = np.bincount(carrier, late, minlength=sizes["carrier"]) / np.maximum(count, 1)
    for name in CHECKED:
        low, high = np.quantile(shares[name], [0.025, 0.975], axis=0)
        inside = (observed >= low) & (observed <= high)
        print(
            f"{name}: {inside.sum()} of {len(inside)} airlines' shares of late flights are in "
            "their 95% intervals"
        )
    picture(table, shares, observed, labels["carrier"], options.output)
    print(
        f"picture: {options.output}   ({time.perf_counter() - begun:.0f} s in all, peak memory "
        f"{peak_memory():.2f} GiB)"
    )


def summary(result):
    """elpd, its standard error and the largest Pareto k, in both lines of ArviZ."""
    old = not hasattr(result, "elpd")
    elpd, se = (result["elpd_loo"], result["se"]) if old else (result.elpd, result.se)
    return elpd, se, float(np.nanmax(result["pareto_k"]))


if __name__ == "__main__":
    main()
