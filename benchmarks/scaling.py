"""What each device does as devices are added, by the operations and bytes of the compiled program.

``python benchmarks/scaling.py`` compiles the sampling program on 1, 2, 4 and 8 devices that it asks
XLA to make of the CPU, and over two processes, and writes ``benchmarks/results/scaling.json`` and
``docs/results/scaling.md``; ``--page`` writes the page alone. Nothing is timed. What larger machines would
give is computed from these counts, with the assumptions of ``MACHINE``.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "scaling.json"
PAGE = Path(__file__).parents[1] / "docs" / "results" / "scaling.md"
DEVICES = (1, 2, 4, 8)
CHAINS, BATCH, ROWS = 16, 2048, 16_384
"""Chains and rows of a minibatch in all, or of each device over eight, and rows of the data."""

DATA = 4 * ROWS * (784 + 1)
"""Bytes of the data: minibatches of several chains are gathered, and that counts as reading all."""

MACHINE = {
    "flops": 20e12,
    "bytes": 2.0e12,
    "link": 150e9,
    "latency": 10e-6,
    "launch": 200e-6,
}
"""Of one accelerator: operations and bytes of its memory a second that programs of this kind reach,
bytes a second to the others, seconds of one sum over all devices however small, and seconds of a
step that no size changes (starting some forty kernels)."""

COLLECTIVE = re.compile(
    r"= (\(?[^=]*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
ARRAY = re.compile(r"(f32|u32|s32|pred|f64)\[([\d,]*)\]")


def counts(compiled):
    """Operations, bytes of memory and bytes exchanged of one step on one device.

    The loop over draws has a length that the compiler does not know, and is counted once.
    """
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    exchanged, number = 0, 0
    for shapes, _ in COLLECTIVE.findall(compiled.as_text()):
        number += 1
        for kind, shape in ARRAY.findall(shapes):
            size = 1
            for length in filter(None, shape.split(",")):
                size *= int(length)
            exchanged += size * (1 if kind == "pred" else 8 if kind == "f64" else 4)
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "exchanged": exchanged,
        "collectives": number,
    }


def step_counts(mesh_shape, chains, batch):
    """Counts of the program that ``sample`` runs, on a mesh of chains and data."""
    import jax
    import numpy as np
    from speed import perceptron

    import stochgrad
    from stochgrad.core import hoisted_jit

    compiled, build = [], hoisted_jit._compile

    def record(self, closed, args, out):
        constants, run, structure = build(self, closed, args, out)
        if not self._donate:  # the program of a chunk takes over its states
            return constants, run, structure

        def call(*inputs):
            compiled.append(run if hasattr(run, "cost_analysis") else run.lower(*inputs).compile())
            return run(*inputs)

        return constants, call, structure

    hoisted_jit._compile = record
    _, log_prior, log_likelihood, init = perceptron()
    rng = np.random.default_rng(0)
    data = rng.standard_normal((ROWS, 784), np.float32), rng.integers(0, 10, ROWS).astype(np.int32)
    mesh = None
    if np.prod(mesh_shape) > 1:
        devices = np.array(jax.devices()).reshape(mesh_shape)
        mesh = jax.sharding.Mesh(devices, ("chain", "data"))
    target = stochgrad.posterior(log_prior, log_likelihood, data, batch_size=batch, mesh=mesh)
    kernel = stochgrad.sghmc(target, 1e-5, 1.0, integrator="BAOAB")
    stochgrad.sample(
        jax.random.key(0),
        kernel,
        init=init,
        num_samples=1,
        num_chains=chains,
        progress=False,
        collect=lambda state: state.position["b2"],
    )
    hoisted_jit._compile = build
    return counts(compiled[0])


def worker(options):
    """Print the counts of one layout; started anew for each number of devices."""
    import warnings

    import jax

    warnings.simplefilter("ignore")
    if "address" in options:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options["address"], 2, options["process"])
    found = step_counts(options["mesh"], options["chains"], options["batch"])
    print("COUNTS", json.dumps(found), flush=True)


def run(devices, mesh, chains, batch, processes=1):
    """Counts of a layout on so many devices, of one process or of two."""
    options = {"mesh": mesh, "chains": chains, "batch": batch}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            options["address"] = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps({**options, "process": i})],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    lines = [process.communicate()[0] for process in started]
    return json.loads(lines[0].split("COUNTS ")[1])


def measure():
    layouts = {}
    for devices in DEVICES:
        part = {
            "chains, strong": ((devices, 1), CHAINS, 256),
            "chains, weak": ((devices, 1), 2 * devices, 256),
            "data, strong": ((1, devices), 1, BATCH),
            "data, weak": ((1, devices), 1, BATCH // 8 * devices),
        }
        for name, (mesh, chains, batch) in part.items():
            layouts.setdefault(name, {})[str(devices)] = run(devices, mesh, chains, batch)
            print(name, devices, layouts[name][str(devices)], flush=True)
    processes = {
        "chains, strong": run(4, (4, 1), CHAINS, 256, processes=2),
        "data, strong": run(4, (1, 4), 1, BATCH, processes=2),
    }
    print("two processes", processes, flush=True)
    return {"layouts": layouts, "two processes of two devices": processes}


def seconds(count, devices, share):
    """Of a step on a machine: the slower of operations and memory, and what is exchanged."""
    work = max(count["flops"] / MACHINE["flops"], count["bytes"] / MACHINE["bytes"])
    ring = 2 * (devices - 1) / devices * count["exchanged"] / MACHINE["link"]
    sums = MACHINE["latency"] * (devices > 1) * (count["exchanged"] > 0)
    return MACHINE["launch"] + share * work + ring + sums


def page(results):
    layouts = results["layouts"]
    lines = [
        "# What more devices give",
        "",
        "Made by `python benchmarks/scaling.py`: operations, bytes of memory and bytes exchanged of one "
        "step of `sghmc(integrator='BAOAB')` **on one device**, counted by the compiler in the program "
        "that `sample` runs. The model is a perceptron 784-100-10 (79,510 weights); nothing is timed.",
        "",
        "*Strong* is the same work on more devices (16 chains with minibatches of 256, or one chain with "
        "minibatches of 2,048 rows); *weak* is work that grows with them (2 chains a device, or 256 rows "
        "a device). Ideal are ratios of 1/devices and of 1.",
        "",
        f"Minibatches of several chains are gathered, which the compiler counts as reading all of the data, "
        f"{DATA / 1e6:.0f} MB: the bytes of chains hold them, and the last table leaves them out. The one byte "
        "that chains exchange is whether a random order is complete.",
        "",
    ]
    for name, row in layouts.items():
        first = row["1"]
        lines += [
            f"## {name.capitalize()}",
            "",
            "| devices | operations | of one device | bytes of memory | of one device | bytes exchanged | sums |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {devices} | {c['flops']:.3g} | {c['flops'] / first['flops']:.3f} | {c['bytes']:.3g} "
            f"| {c['bytes'] / first['bytes']:.3f} | {c['exchanged']:,} | {c['collectives']} |"
            for devices, c in row.items()
        ]
        lines.append("")
    lines += [
        "Two processes of two devices each against one process of four: "
        + "; ".join(
            f"{name}: operations {c['flops'] / layouts[name]['4']['flops']:.3f}, bytes "
            f"{c['bytes'] / layouts[name]['4']['bytes']:.3f}, exchanged "
            f"{c['exchanged']:,} ({layouts[name]['4']['exchanged']:,})"
            for name, c in results["two processes of two devices"].items()
        )
        + ".",
        "",
        "## Computed, not measured: 8, 64 and 1,024 accelerators",
        "",
        "Assumptions, of one accelerator: "
        f"{MACHINE['flops'] / 1e12:g} trillion operations and {MACHINE['bytes'] / 1e12:g} TB of its memory a "
        f"second are reached; {MACHINE['link'] / 1e9:g} GB a second to the others; a sum over all takes "
        f"{1e6 * MACHINE['latency']:g} µs at least; a step takes {1e6 * MACHINE['launch']:g} µs however small "
        "it is. Counts are those above of one device, divided as the tables show that they divide.",
        "",
        "| accelerators | layout | each holds | µs a step | steps of all chains a second | of ideal | assumed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    chain = layouts["chains, weak"]["8"]
    chain = {**chain, "bytes": chain["bytes"] - DATA}
    alone = seconds({**chain, "exchanged": 0}, 1, 1.0)
    for devices in (8, 64, 1024):
        took = seconds(chain, devices, 1.0)
        lines.append(
            f"| {devices:,} | chains spread | 2 chains | {1e6 * took:.0f} | {2 * devices / took:,.0f} "
            f"| {alone / took:.2f} | one truth value is summed a step, whether a random order is complete |"
        )
    for batch in (BATCH, 1024 * BATCH):
        whole = layouts["data, strong"]["1"]
        spread = layouts["data, strong"]["8"]
        times = batch / BATCH
        alone = seconds({**whole, "exchanged": 0}, 1, times)
        for devices in (8, 64, 1024):
            if batch < devices:
                continue
            took = seconds({**whole, "exchanged": spread["exchanged"]}, devices, times / devices)
            lines.append(
                f"| {devices:,} | data spread | {batch // devices:,} of {batch:,} rows "
                f"| {1e6 * took:.0f} | {1 / took:,.0f} | {alone / took / devices:.3f} | work divides "
                f"evenly; {spread['exchanged']:,} bytes are summed around a ring |"
            )
    lines += [
        "",
        "Chains scale until their number is enough. Data spread over devices pay where a minibatch's work "
        "on one device is well above what every step costs; a model of this size does not reach that with "
        "minibatches of some thousand rows, whatever the machine.",
        "",
    ]
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="write the page from the results alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker))
    else:
        if not arguments.page:
            RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
        page(json.loads(RESULTS.read_text()))
