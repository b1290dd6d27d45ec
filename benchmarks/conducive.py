"""What a conducive gradient adds to a step of distributed SGLD.

``python benchmarks/conducive.py`` prints the table and writes it to ``docs/results/conducive.md``.
Measured as in ``benchmarks/speed.py``: CPU time that a step of one chain adds, median over rounds
in which all take turns.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from speed import logistic, measure, perceptron, sampler

import stochgrad
from stochgrad import federated

CLIENTS = 20


def work(name, rounds):
    """Microseconds a step without conducive gradients, and with them."""
    if name == "small":
        data, prior, likelihood, _ = logistic()
        init, batch, count = jnp.zeros(50), 500, 1500
    else:
        data, prior, likelihood, init = perceptron()
        batch, count = 256, 30
    clients = list(zip(*(np.array_split(column, CLIENTS) for column in data), strict=True))
    target = federated.posterior(prior, likelihood, clients, batch_size=batch)
    target = federated.visiting(target, local_steps=20)
    pooled = stochgrad.posterior(prior, likelihood, data, batch_size=batch)
    surrogates = {
        "first order": federated.global_first_order(target, init),
        "diagonal": federated.global_quadratic(target, init, form="diagonal", curvature="fisher"),
    }
    if name == "small":
        surrogates["full"] = federated.global_quadratic(target, init)
    gradients = {"none (DSGLD)": target, "none, data in one place": pooled}
    gradients |= {
        form: stochgrad.federated.conducive(target, made) for form, made in surrogates.items()
    }
    contenders = {
        form: sampler(stochgrad.sgld(gradient, 1e-7), init, 1)
        for form, gradient in gradients.items()
    }
    return measure(contenders, dict.fromkeys(contenders, count), rounds)


def table(title, figures):
    lines = [f"## {title}", "", "| surrogates | µs a step | of DSGLD |", "| --- | --- | --- |"]
    base = figures["none (DSGLD)"]
    lines += [f"| {form} | {value:.1f} | {value / base:.2f} |" for form, value in figures.items()]
    return [*lines, ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("docs/results/conducive.md"))
    options = parser.parse_args()
    lines = [
        "# What a conducive gradient costs",
        "",
        "Made by `python benchmarks/conducive.py`: CPU time that a step of one SGLD chain adds, median "
        f"of {options.rounds} rounds in which all take turns in one process; {CLIENTS} clients.",
        "",
        *table("Logistic regression, d = 50, batch 500", work("small", options.rounds)),
        *table("Multilayer perceptron, d = 79,510, batch 256", work("large", options.rounds)),
    ]
    text = "\n".join(lines)
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
