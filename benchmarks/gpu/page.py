"""The page of the figures, from lines of JSON alone."""

import json
from pathlib import Path

ABOUT = {
    "ceilings": "Ceilings\n\nA copy's bytes are those read and those written; tf32 is what jax "
    "makes of products of float32 by default.",
    "correct": "Is the law right?\n\nThe second moment of the stationary law on N(0, 1), step size "
    "0.3, against what it is for that step size; z in standard errors, of each of three runs and "
    "of them together.",
    "logistic": "Logistic regression\n\nSteps a second of all chains together, with minibatches "
    "shared or each chain's own. The share is of the ceiling that binds: arithmetic of the two "
    "products, or memory, where positions, momenta and the gradient are read and written once and "
    "the minibatch is read once. `products_ceiling` is memory's for products that are called one "
    "by one, so that the logits of all chains are written and read as well.",
    "network": "A network of 79,510 weights\n\n784-100-10, minibatches of 256, each chain its own.",
    "profile": "Where the time goes\n\nShares of the time from the first to the last kernel of the "
    "sampler's program, as kernels are named. Noise is fused with the update, whose name does not "
    "show it: what it costs is the difference of the spans with normal noise injected and with none.",
    "noise": "Noise\n\nThe share is of a copy's bandwidth, at four bytes a number.",
    "layouts": "Contiguous blocks against gathered rows\n\nLogistic regression, d = 50, minibatches "
    "of their own.",
    "precision": "Gradients in bfloat16, states in float32\n\nSpeed on the network, and the second "
    "moment on N(0, 1).",
    "path": "Path gradients\n\nA step of the evidence lower bound beside the plain total gradient.",
    "decoding": "Decoding\n\nA model of SmolLM2-135M's shapes with random weights, float32, prompts "
    "of 32 tokens included. The share is that of reading weights and cache once a token.",
    "dynamics": "Molecular dynamics of many networks\n\n64 atoms, all pairs, every network's "
    "replicas in one program.",
    "streaming": "Data on the host\n\n`overlap` is the time of a streamed step over the longer of "
    "transfer alone and work in memory: 1 is perfect.",
}
BASELINES = {
    "logistic": {
        "of_bare": ("name", "bare gradient"),
        "of_blackjax": ("name", "blackjax sgld, scan"),
    },
    "network": {"of_bare": ("name", "bare gradient")},
    "layouts": {"of_blocks": ("layout", "blocks")},
    "precision": {"of_float32": ("gradients", "float32")},
    "path": {"of_total": ("gradient", "total")},
    "profile": {"of_noiseless": ("injected", "none")},
}
MARK = "## All figures"
RATIO_OF = ("steps_per_s", "step_ms", "span_us")


def written(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {written(share)}" for name, share in value.items())
    if isinstance(value, list):
        return ", ".join(map(written, value))
    if isinstance(value, int | str):
        return f"{value:,}" if isinstance(value, int) else value.replace("|", "\\|")
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def with_ratios(section: str, lines: list[dict]) -> list[dict]:
    """Each line's case and figures in one, with its ratios to the baselines of the same case."""
    figures = {json.dumps(line["case"], sort_keys=True): line["figures"] for line in lines}
    rows = []
    for line in lines:
        row = {**line["case"], **line["figures"]}
        for column, (key, baseline) in BASELINES.get(section, {}).items():
            if key not in line["case"]:
                continue
            same = {name: value for name, value in line["case"].items() if name != "loop"}
            others = [
                json.dumps({**case, key: baseline}, sort_keys=True) for case in (line["case"], same)
            ]
            other = next((case for case in others if case in figures), "")
            for quantity in RATIO_OF:
                if other in figures and quantity in row and quantity in figures[other]:
                    row[column] = row[quantity] / figures[other][quantity]
        rows.append(row)
    return rows


def table(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        cells = [written(row[column]) if column in row else "" for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def latest(lines: list[dict]) -> list[dict]:
    """The last line of each case; what became of a section, unless figures of it come later."""
    by_case, whole = {}, {}
    for line in lines:
        if "case" in line:
            by_case[line["section"], json.dumps(line["case"], sort_keys=True)] = line
            whole.pop(line["section"], None)
        else:
            whole[line["section"]] = line
    return [*by_case.values(), *whole.values()]


def page(lines: list[dict]) -> str:
    """The whole page.

    Raises:
        ValueError: the lines are of no device, or of several.
    """
    devices = {json.dumps(line["versions"], sort_keys=True) for line in lines if "versions" in line}
    if len(devices) != 1:
        raise ValueError(
            f"the lines must be of one device and one set of versions, got {len(devices)}: "
            "write each to a file of its own."
        )
    (versions,) = (json.loads(device) for device in devices)
    about = ", ".join(f"{name} {value}" for name, value in versions.items() if name != "device")
    text = [
        MARK,
        "",
        f"Made by `python -m benchmarks.gpu` on one {versions['device']}; {about}. `first_s` is the "
        "first call, compilation included. `of_...` are ratios to the line named, and `loop` says how "
        "steps between kept draws go.",
        "",
    ]
    lines = latest(lines)
    for section, words in ABOUT.items():
        here = [line for line in lines if line["section"] == section]
        if not here:
            continue
        title, _, paragraph = words.partition("\n\n")
        text += [f"### {title}", "", paragraph, ""]
        if measured := [line for line in here if "figures" in line]:
            text += table(with_ratios(section, measured))
        for line in here:
            for word in ("failed", "skipped", "stopped"):
                if word in line:
                    case = f" ({written(line['case'])})" if "case" in line else ""
                    text += [f"{word.capitalize()}{case}: {line[word]}.", ""]
    return "\n".join(text)


def write(source: Path, target: Path) -> None:
    """Renew the tables of a page, and leave what stands before them."""
    lines = [json.loads(line) for line in source.read_text().splitlines() if line]
    about = target.read_text().split(MARK)[0] if target.exists() else "# On an accelerator\n\n"
    target.write_text(about + page(lines))
