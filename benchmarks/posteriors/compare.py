"""One call of ``stochgrad.infer`` on every posterior, against the references."""

import json
import math
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import ENTRIES, references

RESULTS = Path(__file__).parents[1] / "results" / "posteriors.json"
SEED = 7
MEAN_ERROR, SD_ERROR = 0.2, 0.15
"""What counts as right: errors of means in reference sds, relative errors of sds."""


def errors(draws, reference):
    """Error of the mean in reference sds and sd over reference sd, by component of each parameter."""
    table = {}
    for name, mean in reference["mean"].items():
        mean, sd = np.asarray(mean), np.asarray(reference["sd"][name])
        values = np.asarray(draws[name], np.float64)
        table[name] = {
            "mean_error": np.ravel(np.abs(values.mean((0, 1)) - mean) / sd).tolist(),
            "sd_ratio": np.ravel(values.std((0, 1)) / sd).tolist(),
        }
    return table


def worst(table):
    """The largest error of a mean, the sd ratio furthest from one, and where they are."""

    def distance(ratio):
        return abs(ratio - 1.0) if math.isfinite(ratio) else math.inf

    def size(error):
        return error if math.isfinite(error) else math.inf

    means = [
        (size(v), f"{n}[{i}]") for n, t in table.items() for i, v in enumerate(t["mean_error"])
    ]
    ratios = [
        (distance(v), v, f"{n}[{i}]") for n, t in table.items() for i, v in enumerate(t["sd_ratio"])
    ]
    mean_error, mean_at = max(means)
    off, sd_ratio, sd_at = max(ratios)
    return {
        "mean_error": mean_error,
        "mean_at": mean_at,
        "sd_ratio": sd_ratio,
        "sd_at": sd_at,
        "right": mean_error <= MEAN_ERROR and off <= SD_ERROR,
    }


def outcome(right, ok):
    if ok:
        return "right" if right else "WRONG IN SILENCE"
    return "says no, is right" if right else "says no"


def compare(entry, infer, method, reference) -> dict[str, Any]:
    """Run ``infer`` on an entry; the record of what it gave, or of the error that it raised."""
    record: dict[str, Any] = {"rows": entry.rows, "batch_size": entry.batch_size}
    begin = time.perf_counter()
    try:
        options: dict[str, Any] = {"num_samples": 1000, "num_chains": 4, "progress": False}
        if entry.batch_size is not None:
            options |= {"batch_size": entry.batch_size, "method": method}
        model = entry.minibatch_model()
        draws = infer(jax.random.key(SEED), model, *entry.data(), **options)
        table = errors(draws.constrained(), reference)
        record |= worst(table)
        record |= {
            "ok": bool(draws.verdict.ok),
            "reasons": [str(reason) for reason in draws.verdict.reasons],
            "outcome": outcome(record["right"], bool(draws.verdict.ok)),
            "method": str(draws.attrs.get("method", method)),
            "gradients": draws.attrs.get("gradients"),
            "timings": {k: float(v) for k, v in draws.timings.items()},
            "errors": table,
        }
    except Exception as error:
        record |= {
            "outcome": "error",
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc()[-3000:],
        }
    record["seconds"] = round(time.perf_counter() - begin, 1)
    return record


def read():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def plain(value):
    """What json cannot write by itself."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def save(section, name, record):
    """Put one record into the file of results, which is whole after each."""
    results = read()
    results.setdefault(section, {})[name] = record
    RESULTS.parent.mkdir(exist_ok=True)
    text = json.dumps(results, indent=1, sort_keys=True, default=plain)
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(RESULTS)


def run(names, method):
    from stochgrad import infer  # type: ignore[attr-defined]

    for name in names:
        if not references.known(name):
            print(f"{name}: no reference yet, see --references", flush=True)
            continue
        record = compare(ENTRIES[name], infer, method, references.reference(name))
        save(method, name, record)
        if record["outcome"] == "error":
            print(f"{name}: {record['error']}", flush=True)
        else:
            print(
                f"{name}: {record['outcome']}; mean off by {record['mean_error']:.2f} sd at "
                f"{record['mean_at']}, sd ratio {record['sd_ratio']:.2f} at {record['sd_at']}; "
                f"{record['gradients']} gradients, {record['seconds']} s {record['reasons']}",
                flush=True,
            )
        jax.clear_caches()
