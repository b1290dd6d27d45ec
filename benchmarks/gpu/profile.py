"""Where a sampler's time on the device goes, from jax's own trace."""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import stochgrad
from stochgrad.core import Noise

from .. import speed
from .measure import Figure, sampling, wall

KINDS = {
    "matmul": re.compile(r"gemm|cublas|cutlass|nvjet|xmma|wgmma|matmul|dot|conv(?!ert)"),
    "noise": re.compile(r"threefry|erf|rng|random|xor|shift"),
    "reductions": re.compile(r"reduc"),
}


def kind_of(name: str) -> str:
    """What a kernel is for, as its name has it; what is fused is named by its last operation."""
    return next((kind for kind, names in KINDS.items() if names.search(name)), "else")


def read(folder: Path) -> list[dict]:
    """The events of all traces under a folder."""
    events = []
    for path in folder.glob("plugins/profile/*/*.trace.json.gz"):
        events += json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return events


def lanes(events: list[dict]) -> tuple[str, list[list[dict]]]:
    """The work on the device, lane by lane, and whose lanes they are.

    Those of a device if the trace has any, streams where they are told from summaries; else those
    threads of the host that run compiled operations.
    """
    processes, threads, by_lane = {}, {}, defaultdict(list)
    for event in events:
        place = event.get("pid"), event.get("tid")
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            threads[place] = event["args"]["name"]
        elif event.get("ph") == "X":
            by_lane[place].append(event)
    device = [place for place in by_lane if "/device:" in processes.get(place[0], "")]
    streams = [place for place in device if "Stream" in threads.get(place, "")]
    if device:
        return "device", [by_lane[place] for place in streams or device]
    operations = [[e for e in lane if "hlo_op" in e.get("args", {})] for lane in by_lane.values()]
    return "host", [lane for lane in operations if lane]


def own_times(lane: list[dict]) -> Iterator[tuple[dict, float]]:
    """Events with their microseconds, less those in which a later one runs, too."""
    stack: list[list] = []
    for event in sorted(lane, key=lambda e: (e["ts"], -e["dur"])):
        while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= event["ts"]:
            yield tuple(stack.pop())
        if stack:
            end = stack[-1][0]["ts"] + stack[-1][0]["dur"]
            stack[-1][1] -= min(event["dur"], end - event["ts"])
        stack.append([event, event["dur"]])
    yield from map(tuple, stack)


def busy(events: list[dict]) -> tuple[float, float]:
    """Microseconds with any work, and from the first work to the last."""
    total, end = 0.0, events[0]["ts"]
    for event in events:
        last = event["ts"] + event["dur"]
        total += max(0.0, last - max(end, event["ts"]))
        end = max(end, last)
    return total, end - events[0]["ts"]


def shares(events: list[dict]) -> dict:
    """Of the time from first to last work of the program that takes most: who has how much."""
    whose, work = lanes(events)
    modules = defaultdict(float)
    for lane in work:
        for event in lane:
            if module := event.get("args", {}).get("hlo_module"):
                modules[module] += event["dur"]
    if modules:
        program = max(modules, key=lambda module: modules[module])
        here = lambda event: event.get("args", {}).get("hlo_module") == program
        work = [lane for lane in ([e for e in lane if here(e)] for lane in work) if lane]
    everything = sorted((e for lane in work for e in lane), key=lambda e: e["ts"])
    if not everything:
        return {"lanes": "none: this backend's trace shows no work of a device"}
    with_work, span = busy(everything)
    kinds, names = defaultdict(float), defaultdict(float)
    for lane in work:
        for event, own in own_times(lane):
            name = f"{event['name']} {event.get('args', {}).get('hlo_op', '')}".lower()
            kinds[kind_of(name)] += own
            names[event["name"][:60]] += own
    largest = sorted(names, key=lambda name: -names[name])[:6]
    return {
        "lanes": whose,
        "span_us": span,
        **{kind: kinds[kind] / span for kind in (*KINDS, "else")},
        "gaps": 1 - with_work / span,
        "events": len(everything),
        "largest": {name: names[name] / span for name in largest},
    }


def traced(kernel, init, chains: int, steps: int, share: bool) -> dict:
    run = partial(sampling(kernel, init, chains, steps, share), 4)
    for _ in range(2):
        wall(run)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            wall(run)
        return {"steps": 4 * steps, **shares(read(Path(folder)))}


def no_noise(key, tree):
    return jax.tree.map(jnp.zeros_like, tree)


def works(small: bool):
    """Names, targets, positions, chains and whether they share minibatches."""
    if not small:
        data, log_prior, log_likelihood, init = speed.perceptron()
        target = stochgrad.posterior(log_prior, log_likelihood, data, batch_size=256)
        yield "network", target, init, 16, False
        yield "network", target, init, 1, False
    size, batch_size, dim = (10_000, 100, 10) if small else (1_000_000, 500, 50)
    data, log_prior, log_likelihood, _ = speed.logistic(size, dim)
    target = stochgrad.posterior(log_prior, log_likelihood, data, batch_size=batch_size)
    for chains in [16] if small else [4096, 16]:
        yield "logistic, shared", target, jnp.zeros(dim), chains, True


def profile(small: bool) -> Iterator[Figure]:
    """Each program twice, the second time with noise of zeros.

    Noise is fused with the update, where a kernel's name does not show it: what the span is shorter
    without it is its cost.
    """
    for name, target, init, chains, share in works(small):
        noises: dict[str, Noise] = {"normal": "normal", "none": no_noise}
        for label, noise in noises.items():
            kernel = stochgrad.sghmc(target, 1e-4, 10.0, noise=noise)
            case = {"work": name, "chains": chains, "injected": label}
            steps = 10 if small else 50
            yield Figure(case, partial(traced, kernel, init, chains, steps, share))
