"""How much of the gap between distributed SGLD and SGLD on pooled data renewed slopes close.

The network and the twenty skewed clients of ``examples/federated_digits.py`` at temperature one,
where draws are far from the mode. ``python benchmarks/renewal.py`` writes
``benchmarks/results/renewal.json`` and prints the table of ``docs/start/federated.md``; ``--seeds`` and
``--draws`` make it shorter. Seeds are of the starting network, of chains and minibatches.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np

import stochgrad
from stochgrad import federated

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from federated_digits import (
    BATCH,
    LOCAL_STEPS,
    STEP_SIZE,
    from_prior,
    load,
    log_likelihood,
    log_prior,
    log_probabilities,
    log_score,
    predict,
    split,
)

METHODS = {
    "DSGLD": {"method": "DSGLD"},
    "slopes at the mode": {},
    "slopes at the mean of a first run": {"reference": "trajectory"},
    "renewed every 20 visits": {"surrogate_period": 20},
    "renewed every 5 visits": {"surrogate_period": 5},
    "renewed every visit": {"surrogate_period": 1},
}


def draw(key, train, target, reference, settings, draws, chains):
    """Draws after as many of warm-up, one at the end of each visit."""
    run = {"num_warmup": draws // 2, "num_samples": draws, "thin": LOCAL_STEPS}
    run |= {"num_chains": chains, "progress": False}
    if settings is None:
        pooled = stochgrad.posterior(log_prior, log_likelihood, train, batch_size=BATCH)
        return stochgrad.sample(key, stochgrad.sgld(pooled, STEP_SIZE), init=reference, **run)
    at = {"init": reference.position}
    if "reference" not in settings:
        at["reference"] = reference
    return federated.sample(
        key,
        target,
        surrogate="auto" if "method" in settings else "global_first_order",
        local_steps=LOCAL_STEPS,
        step_size=STEP_SIZE,
        control_variate=False,  # the pooled chain has none either
        on_unsafe="ignore",
        **{**at, **settings},
        **run,
    )


def score(draws, test):
    """Test log likelihood of each chain's ensemble."""
    p = np.asarray(predict(draws.positions, test["x"])).mean(axis=1)
    return [float(log_score(chain, test["y"])) for chain in p]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--chains", type=int, default=4)
    results = Path(__file__).parent / "results" / "renewal.json"
    parser.add_argument("--output", type=Path, default=results)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    train, test = load()
    target = federated.posterior(log_prior, log_likelihood, split(train), batch_size=BATCH)
    scores, sent, modes = {}, {}, []
    for seed in range(options.seeds):
        reference = federated.find_reference(
            target, from_prior(jax.random.key(seed)), max_rounds=60
        )
        at = np.exp(log_probabilities(reference.position, test["x"]))
        modes.append(float(log_score(at, test["y"])))
        for name, settings in {"SGLD, pooled": None, **METHODS}.items():
            begun = time.perf_counter()
            draws = draw(
                jax.random.key(100 + seed),
                train,
                target,
                reference,
                settings,
                options.draws,
                options.chains,
            )
            scores.setdefault(name, []).append(score(draws, test))
            if settings is not None:
                visits = (draws.stats["bytes_up"] + draws.stats["bytes_down"])[:, -1].mean()
                setup = draws.attrs["setup_bytes_up"] + draws.attrs["setup_bytes_down"]
                found = reference.bytes_up + reference.bytes_down
                # the search for the mode is the same for all, a first run finds it for itself
                setup = 0 if "method" in settings else setup - found
                sent[name] = float(visits + setup / options.chains)
            took = time.perf_counter() - begun
            print(f"{seed} {name:36}{np.mean(scores[name][-1]):9.4f}  {took:.0f} s", flush=True)
    mean = {name: np.mean(of, axis=1) for name, of in scores.items()}
    gap = mean["SGLD, pooled"] - mean["DSGLD"]
    rows = []
    for name, value in mean.items():
        closed = (value - mean["DSGLD"]) / gap
        rows.append(
            {
                "name": name,
                "log_likelihood": float(value.mean()),
                "error": float(value.std(ddof=1) / np.sqrt(len(value))) if len(value) > 1 else None,
                "closed": closed.tolist(),
                "megabytes_per_chain": sent[name] / 1e6 if name in sent else None,
            }
        )
    about = {"seeds": options.seeds, "draws": options.draws, "chains": options.chains}
    about |= {"local_steps": LOCAL_STEPS, "mode_log_likelihood": modes, "jax": jax.__version__}
    options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print("| | test log likelihood | of the gap closed | MB a chain |\n| --- | --- | --- | --- |")
    for row in rows:
        low, high = min(row["closed"]), max(row["closed"])
        share = f"{np.mean(row['closed']):.0%} ({low:.0%} to {high:.0%})"
        print(
            f"| {row['name']} | {row['log_likelihood']:.3f} ± {row['error'] or 0:.3f} | {share} | "
            f"{row['megabytes_per_chain'] or 0:.1f} |"
        )
    print(f"the modes alone: {', '.join(f'{m:.3f}' for m in modes)}")


if __name__ == "__main__":
    main()
