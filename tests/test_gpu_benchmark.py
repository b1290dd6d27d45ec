"""What benchmarks/gpu makes of traces and of its own lines."""

import gzip
import json

import pytest

from benchmarks.gpu import page
from benchmarks.gpu.__main__ import Record, run
from benchmarks.gpu.measure import Figure
from benchmarks.gpu.profile import read, shares


def named(kind, pid, name, tid=0):
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def work(name, ts, dur, module="jit_chunk", pid=1, tid=1):
    return {
        "ph": "X", "name": name, "ts": ts, "dur": dur, "pid": pid, "tid": tid,
        "args": {"hlo_module": module, "hlo_op": name},
    }  # fmt: skip


TRACE = [
    named("process_name", 1, "/device:GPU:0"),
    named("thread_name", 1, "Stream #14(Compute)", 1),
    named("thread_name", 1, "XLA Ops", 2),
    named("process_name", 2, "/host:CPU"),
    work("loop_fusion", -500.0, 20.0, "jit_init"),
    work("nvjet_tst_128", 0.0, 40.0),
    work("input_reduce_fusion", 50.0, 10.0),
    work("loop_convert_fusion", 60.0, 10.0),
    work("threefry_fusion", 80.0, 20.0),
    work("nvjet_tst_128", 0.0, 100.0, tid=2),  # the summary of what the stream has
    work("dot", 0.0, 1000.0, pid=2),
]


def test_shares_of_a_device_are_those_of_the_program_that_takes_most(tmp_path):
    folder = tmp_path / "plugins/profile/2026"
    folder.mkdir(parents=True)
    text = json.dumps({"traceEvents": TRACE}).encode()
    (folder / "host.trace.json.gz").write_bytes(gzip.compress(text))
    figures = shares(read(tmp_path))
    assert (figures["lanes"], figures["span_us"], figures["events"]) == ("device", 100.0, 4)
    parts = [figures[kind] for kind in ("matmul", "noise", "reductions", "else", "gaps")]
    assert parts == pytest.approx([0.4, 0.2, 0.1, 0.1, 0.2])


def test_time_within_an_event_is_counted_once():
    events = [e for e in TRACE if e.get("pid") == 1 and e.get("tid") == 1]
    figures = shares([*TRACE[:1], *events, work("while", -10.0, 110.0)])
    assert figures["else"] == pytest.approx((10 + 30) / 110)
    assert figures["gaps"] == 0


def test_a_trace_without_a_device_says_so():
    assert shares([named("process_name", 2, "/host:CPU")])["lanes"].startswith("none")


def broken():
    raise RuntimeError("out of memory")


def lines_of(tmp_path, until=1e9):
    def section(small):
        yield Figure({"name": "bare gradient", "chains": 1}, lambda: {"steps_per_s": 4000.0})
        yield Figure({"name": "other", "chains": 1}, broken)
        yield Figure({"name": "sgld", "chains": 1}, lambda: {"steps_per_s": 3000.0})
        raise ModuleNotFoundError("No module named 'flowjax'", name="flowjax")

    path = tmp_path / "gpu.jsonl"
    with path.open("a") as file:
        record = Record(file)
        record.line("device", versions={"device": "H100", "jax": "0.10.2"})
        run(record, "network", section, until, True)
    return path


def test_a_failure_is_a_line_and_ends_nothing_else(tmp_path):
    path = lines_of(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [("figures" in line, "failed" in line) for line in lines[1:4]] == [
        (True, False), (False, True), (True, False),
    ]  # fmt: skip
    assert lines[4]["skipped"] == "this needs the package flowjax"
    page.write(path, tmp_path / "gpu.md")
    text = (tmp_path / "gpu.md").read_text()
    assert "on one H100; jax 0.10.2" in text
    assert "| sgld | 1 | 3,000 | 0.75 |" in text
    assert "Failed (name other, chains 1): RuntimeError('out of memory')." in text
    assert "Skipped: this needs the package flowjax." in text


def test_no_figure_is_begun_after_its_time(tmp_path):
    lines = [json.loads(line) for line in lines_of(tmp_path, until=-1).read_text().splitlines()]
    assert len(lines) == 2
    assert "stopped" in lines[1]


def test_a_later_run_takes_the_place_of_a_failure(tmp_path):
    path = lines_of(tmp_path)
    with path.open("a") as file:
        case = {"name": "other", "chains": 1}
        Record(file).line("network", case=case, figures={"steps_per_s": 2000.0})
    text = page.page([json.loads(line) for line in path.read_text().splitlines()])
    assert "| other | 1 | 2,000 | 0.5 |" in text
    assert "Failed" not in text


def test_figures_of_two_devices_make_no_page():
    lines = [{"section": "device", "versions": {"device": name}} for name in ("H100", "H200")]
    with pytest.raises(ValueError, match="of one device"):
        page.page(lines)
