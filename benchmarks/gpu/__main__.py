"""How near an accelerator's ceilings the samplers come: ``python -m benchmarks.gpu``.

Sections run in the order of their worth until the budget of seconds is spent. Every figure is a
line of JSON, written at once, so that a run that is cut short keeps what it has; what fails is a
line, too, and ends nothing else. ``--page docs/results/gpu.md`` makes the page from these lines and
measures nothing. ``--smoke`` runs small sizes on whatever device there is, and writes no file
unless ``--output`` names one.
"""

import argparse
import json
import platform
import time
import traceback
from pathlib import Path
from typing import IO

import blackjax
import jax
import jaxlib
import numpyro

from . import applications, device, page, profile, samplers
from .measure import Section

SECTIONS: dict[str, tuple[Section, float]] = {
    "ceilings": (device.ceilings, 0.1),
    "correct": (device.correct, 0.15),
    "logistic": (samplers.logistic, 0.35),
    "network": (samplers.network, 0.15),
    "profile": (profile.profile, 0.15),
    "noise": (device.noise, 0.1),
    "layouts": (samplers.layouts, 0.1),
    "precision": (samplers.precision, 0.1),
    "path": (applications.path, 0.1),
    "decoding": (applications.decoding, 0.1),
    "dynamics": (applications.dynamics, 0.1),
    "streaming": (applications.streaming, 0.1),
}
"""Each section, and the most of the budget that it may take."""


def versions(small: bool) -> dict:
    accelerator = jax.devices()[0]
    return {
        "device": accelerator.device_kind,
        "backend": accelerator.client.platform_version,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (jax, jaxlib, numpyro, blackjax)},
        **({"sizes": "small"} if small else {}),
    }


class Record:
    """Where lines go, each with its section and the seconds since the beginning."""

    def __init__(self, file: IO | None):
        self.file, self.begun = file, time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def line(self, section: str, **values) -> None:
        text = json.dumps({"section": section, "at_s": round(self.elapsed, 1), **values})
        print(text, flush=True)
        if self.file is not None:
            self.file.write(text + "\n")
            self.file.flush()


def failure(error: Exception) -> dict:
    if isinstance(error, ModuleNotFoundError):
        return {"skipped": f"this needs the package {error.name}"}
    return {"failed": repr(error)[:300], "where": traceback.format_exc()[-800:]}


def run(record: Record, name: str, section: Section, until: float, small: bool) -> None:
    """The figures of a section, as many as there is time for."""
    try:
        for case, measure in section(small):
            if record.elapsed > until:
                record.line(name, case=case, stopped="no time was left for this and what follows")
                return
            try:
                record.line(name, case=case, figures=measure())
            except Exception as error:
                record.line(name, case=case, **failure(error))
    except Exception as error:  # in what all figures of the section have in common
        record.line(name, **failure(error))


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS")
    parser.add_argument("--output", type=Path, help="benchmarks/results/gpu.jsonl by default")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--smoke", action="store_true", help="small sizes on any device")
    parser.add_argument("--page", type=Path, help="make this page from the lines, measure nothing")
    options = parser.parse_args()
    output = options.output or Path("benchmarks/results/gpu.jsonl")
    if options.page:
        page.write(output, options.page)
        return
    if jax.default_backend() == "cpu" and not options.smoke:
        parser.error("there is no accelerator here; --smoke runs on the CPU")
    file = None if options.smoke and options.output is None else output.open("a")
    record, budget = Record(file), options.budget
    record.line("device", versions=versions(options.smoke))
    for name in options.only or SECTIONS:
        section, most = SECTIONS[name]
        share = budget if options.only else min(budget, record.elapsed + most * budget)
        run(record, name, section, share, options.smoke)
    record.line("end")


if __name__ == "__main__":
    main()
