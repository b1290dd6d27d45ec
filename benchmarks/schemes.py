"""What an integrator adds to a step: every scheme with one gradient, against the default.

``python benchmarks/schemes.py`` prints the table and writes it to ``docs/results/schemes.md``. Measured as
in ``benchmarks/speed.py``: CPU time that a step adds, median over rounds in which all take turns.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
from speed import logistic, measure, perceptron, sampler

import stochgrad

SCHEMES = ["SGHMC", "EM", "LEAPFROG", "SSI", "LT", "OBABO", "BAOAB", "ABOBA", "OABAO", "UBU", "BUB"]
DRAWS = {"OBABO": 2, "OABAO": 2, "UBU": 4, "BUB": 2}


def work(name, rounds):
    """Microseconds a step of each scheme, for each kind of noise."""
    if name == "small":
        data, prior, likelihood, _ = logistic()
        target = stochgrad.posterior(prior, likelihood, data, batch_size=500)
        init, h, count = jnp.zeros(50), 1e-3, 1500
    else:
        data, prior, likelihood, init = perceptron()
        target = stochgrad.posterior(prior, likelihood, data, batch_size=256)
        h, count = 1e-4, 30
    figures = {}
    for noise in ("normal", "discrete"):  # one at a time: the loop keeps 16 compiled programs
        contenders = {
            (noise, scheme): sampler(
                stochgrad.sghmc(target, h, 10.0, integrator=scheme, noise=noise), init, 1
            )
            for scheme in SCHEMES
        }
        figures |= measure(contenders, dict.fromkeys(contenders, count), rounds)
    return figures


def table(title, figures):
    lines = [
        f"## {title}",
        "",
        "| scheme | draws of noise a step | normal noise, µs | of SGHMC | discrete noise, µs | of SGHMC |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for scheme in SCHEMES:
        cells = []
        for noise in ("normal", "discrete"):
            value = figures[noise, scheme]
            cells += [f"{value:.1f}", f"{value / figures[noise, 'SGHMC']:.2f}"]
        lines.append(f"| {scheme} | {DRAWS.get(scheme, 1)} | {' | '.join(cells)} |")
    return [*lines, ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("docs/results/schemes.md"))
    options = parser.parse_args()
    lines = [
        "# What an integrator costs",
        "",
        "Made by `python benchmarks/schemes.py`: CPU time that a step of one chain adds, median of "
        f"{options.rounds} rounds in which all schemes take turns in one process. All schemes take one "
        "gradient a step. Words with two O's or a U draw noise several times, and at 80,000 parameters "
        'a draw of normal variables is a good part of a step; `noise="discrete"` has the moments that '
        "second order needs, for a fraction of the time.",
        "",
        *table("Logistic regression, d = 50, batch 500", work("small", options.rounds)),
        *table("Multilayer perceptron, d = 79,510, batch 256", work("large", options.rounds)),
    ]
    text = "\n".join(lines)
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
