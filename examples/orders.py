"""What limits a minibatch sampler: the integrator, or the order of its minibatches?

The bias of stationary second moments against the step size, without Monte Carlo noise, on the step
functions that ship: every integrator on a double well with the full gradient; two of them at a
finite time; and independent, reshuffled and symmetric minibatches of a Gaussian.

Run ``python examples/orders.py``; ``--smoke`` is a short version of the same.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np

import stochgrad
from stochgrad.diagnostics import double_well, gaussian, minibatch_gaussian, weak_order

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

INTEGRATORS = ["EM", "SGHMC", "LEAPFROG", "SSI", "LT", "OBABO", "BAOAB", "ABOBA", "OABAO", "UBU"]
INTEGRATORS += ["BUB", "MT3"]
SHADE = {"EM": "#b03a2e", "MT3": "#1b7f5c"}
ORDER_SHADE = {"iid": "#b03a2e", "reshuffled": "#1f6f8b", "symmetric": "#d08c2e"}


def sghmc(integrator, friction=1.0):
    """A kernel factory for ``weak_order``."""
    return partial(stochgrad.sghmc, friction=friction, integrator=integrator)


def measure(smoke):
    """Errors by panel and name."""
    integrators = ["EM", "BAOAB", "MT3"] if smoke else INTEGRATORS
    steps = [0.1, 0.05] if smoke else [0.2, 0.1, 0.05, 0.025]
    fine = [0.01, 0.005] if smoke else [0.02, 0.01, 0.005, 0.0025]  # where Euler's scheme is stable
    well = {
        name: weak_order(
            sghmc(name, 5.0 if name == "EM" else 1.0), double_well, fine if name == "EM" else steps
        )
        for name in integrators
    }
    finite = {
        "LT": weak_order(sghmc("LT"), gaussian, steps, time=1.0),
        "LT, stationary": weak_order(sghmc("LT"), gaussian, steps),
        "OBABO": weak_order(sghmc("OBABO"), gaussian, steps, time=1.0),
    }
    swept = {
        (order, name): weak_order(sghmc(name, 1.7), minibatch_gaussian(order), steps)
        for order in ("iid", "reshuffled", "symmetric")
        for name in ("BAOAB", "MT3")
    }
    return well, finite, swept


def picture(well, finite, swept, path):
    """Three log-log panels."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.4))
    for name, found in well.items():
        axes[0].loglog(
            found.step_sizes,
            found.position_error,
            "o-",
            color=SHADE.get(name, "#4a6fa5"),
            alpha=1 if name in SHADE else 0.45,
            markersize=4,
        )
    ends = {}
    for name, found in well.items():  # names of curves that end at one place share a label
        y = found.position_error[-1]
        near = next((k for k in ends if abs(np.log(ends[k][1] / y)) < 0.35), None)
        if near is None or name in SHADE:
            ends[name] = (found.step_sizes[-1], y, [name])
        else:
            ends[near][2].append(name)
    for x, y, names in ends.values():
        label = "\n".join(", ".join(names[i : i + 3]) for i in range(0, len(names), 3))
        axes[0].annotate(
            label, (x, y), xytext=(-6, 0), textcoords="offset points", ha="right", va="center",
            fontsize=8,
        )  # fmt: skip
    axes[0].set_xlim(left=min(f.step_sizes.min() for f in well.values()) / 6)
    axes[0].set_title("Double well, full gradient: Euler 1, splittings 2, MT3 3")
    shades = {"LT": "#b03a2e", "LT, stationary": "#1f6f8b", "OBABO": "#4a6fa5"}
    for name, found in finite.items():
        label = name if "stationary" in name else f"{name}, at time 1"
        axes[1].loglog(
            found.step_sizes, found.position_error, "o-", color=shades[name], markersize=4,
            label=f"{label}: slope {found.position_order:.2f}",
        )  # fmt: skip
    axes[1].set_title("Gaussian: Lie-Trotter's order depends on the question")
    for (order, name), found in swept.items():
        axes[2].loglog(
            found.step_sizes,
            found.position_error,
            "o-" if name == "BAOAB" else "s--",
            color=ORDER_SHADE[order],
            markersize=4,
            label=f"{order}, {name}: slope {found.position_order:.2f}",
        )
    axes[2].set_title("Minibatches: their order decides, not the integrator")
    for axis in axes[1:]:
        axis.set_xticks(next(iter(swept.values())).step_sizes)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.legend(frameon=False, fontsize=9, loc="lower right")
    for axis in axes:
        axis.set_xlabel("step size h")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("relative error of the position's second moments")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main():
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short run")
    parser.add_argument("--output", type=Path, default=Path("examples/output/orders.png"))
    options = parser.parse_args()
    begun = time.perf_counter()
    well, finite, swept = measure(options.smoke)
    print("double well, full gradient, stationary: slope of position and momentum errors")
    for name, found in well.items():
        print(f"  {name:10} {found.position_order:6.2f} {found.momentum_order:6.2f}")
    print("three minibatches of a Gaussian, stationary: slope of the position error")
    for (order, name), found in swept.items():
        print(f"  {order:10} {name:6} {found.position_order:6.2f}")
    print("Gaussian at time 1")
    for name, found in finite.items():
        print(f"  {name:16} {found.position_order:6.2f}")
    picture(well, finite, swept, options.output)
    print(f"picture: {options.output}   ({time.perf_counter() - begun:.0f} s in all)")


if __name__ == "__main__":
    main()
