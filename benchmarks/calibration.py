"""Simulation-based calibration of the recommended sampler, and of one that must fail.

``python benchmarks/calibration.py`` runs every model and writes docs/results/calibration.md.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist

import stochgrad

PAGE = Path(__file__).parents[1] / "docs" / "results" / "calibration.md"
N = 200
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 2)).astype(np.float32)
G = np.arange(N, dtype=np.int32) % 8


def slopes():
    return numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def rows(x, y):
    """The plate's rows of what is given and of what is observed."""
    return numpyro.subsample(x, x.ndim - 1), numpyro.subsample(y, 0)


def regression(x, y):
    b = slopes()
    with numpyro.plate("rows", N, subsample_size=20):
        xb, yb = rows(x, y)
        numpyro.sample("y", dist.Normal(xb @ b, 1.0), obs=yb)


def logistic(x, y):
    b = slopes()
    with numpyro.plate("rows", N, subsample_size=20):
        xb, yb = rows(x, y)
        numpyro.sample("y", dist.Bernoulli(logits=xb @ b), obs=yb)


def hierarchy(g, y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    s = numpyro.sample("s", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("groups", 8):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", N, subsample_size=20):
        gb, yb = rows(g, y)
        numpyro.sample("y", dist.Normal(m + s * z[gb], 1.0), obs=yb)


def heavy_tails(x, y):
    b, s = slopes(), numpyro.sample("s", dist.HalfNormal(1.0))
    with numpyro.plate("rows", N, subsample_size=20):
        xb, yb = rows(x, y)
        numpyro.sample("y", dist.StudentT(2.0, xb @ b, s), obs=yb)


MODELS = {
    "conjugate regression": (regression, X, np.float32),
    "logistic regression": (logistic, X, np.int32),
    "hierarchy, non-centered": (hierarchy, G, np.float32),
    "heavy tails (Student-t, 2 degrees of freedom)": (heavy_tails, X, np.float32),
}
SAMPLERS = {
    "BAOAB, control variate (recommended)": (None, {}),
    "SGLD, step 0.05": (lambda p: stochgrad.sgld(p, 0.05), {"thin": 100}),
    "SGLD, step 0.5": (lambda p: stochgrad.sgld(p, 0.5), {"thin": 100}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=500)
    options = parser.parse_args()
    lines = [
        "# Calibrated on simulated data",
        "",
        "Ranks of parameters among the draws given the data that they made "
        f"(`stochgrad.diagnostics.sbc`, {options.simulations} data sets of {N} rows, minibatches "
        "of 20, symmetric sweeps; `python benchmarks/calibration.py`). A right sampler's are "
        "uniform; p is that of the smallest of all parameters' χ² tests, times their number, and "
        "zero where a chain diverged.",
        "",
        "| model | sampler | finite | p | seconds |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, (model, x, dtype) in MODELS.items():
        target = stochgrad.from_numpyro(model, x, np.zeros(N, dtype), order="symmetric")
        for sampler, (factory, settings) in SAMPLERS.items():
            if factory is not None and model is not regression:
                continue
            begin = time.perf_counter()
            result = stochgrad.diagnostics.sbc(
                jax.random.key(1), target, factory, simulations=options.simulations, **settings
            )
            seconds = time.perf_counter() - begin
            finite = f"{100 * result.finite.mean():.1f}%"
            p = f"{min(result.p_value, 1.0):.2g}"
            lines.append(f"| {name} | {sampler} | {finite} | {p} | {seconds:.0f} |")
            print(lines[-1], flush=True)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
