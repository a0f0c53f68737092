"""The report: timing, rows, correctness before speed, and figures that are the same in JSON, Markdown and HTML."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import time
from dataclasses import replace

import pytest
import torch

from deltakern import launch
from deltakern.cases import cases
from deltakern.report import collect, latency, render, rows, run, stages
from deltakern.report.rows import Row

SMALL = replace(stages.PRESETS["tiny"], pixels=64, samples=3, candidates=8)
WHERE = {"device": "a test's machine", "commit": "0123456789ab", "torch": "2.13", "threads": 2}


# --- timing ---------------------------------------------------------------------------------------------------------------------


def test_summary():
    found = latency.summary([float(i) for i in range(11, 0, -1)])
    assert (found.seconds, found.low, found.high, found.rounds) == (6, 2, 10, 11)
    assert latency.summary([3.0]) == latency.Timing(3.0, 3.0, 3.0, 1)


def test_implementations_take_turns():
    order = []
    calls = {name: (lambda name=name: (order.append(name), time.sleep(0.003))) for name in "abc"}
    found = latency.interleaved(calls, budget=0.0, least=4, most=4)
    assert [t.rounds for t in found.values()] == [1] * 3  # one round takes longer than no budget at all
    order.clear()
    found = latency.interleaved(calls, budget=60.0, least=3, most=3)
    assert [t.rounds for t in found.values()] == [3] * 3
    measured = [name for name, again in zip(order, [None, *order], strict=False) if name != again]
    assert "".join(measured).endswith("abcbcacab")
    assert all(t.low <= t.seconds <= t.high for t in found.values())


def test_rounds_follow_the_budget():
    found = latency.interleaved({"sleep": lambda: time.sleep(0.01)}, budget=0.1, least=3, most=100)["sleep"]
    assert 3 <= found.rounds <= 20
    assert 0.01 <= found.low < 0.1


def test_peak_memory_counts_what_is_held_at_once():
    def one_after_the_other():
        for _ in range(4):
            torch.empty(1 << 20, dtype=torch.uint8).fill_(1)

    def together():
        return [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(4)]

    assert 1 << 20 <= latency.peak_memory(one_after_the_other) < 2 << 20
    assert 4 << 20 <= latency.peak_memory(together) < 5 << 20


def test_ceilings_are_of_this_machine():
    found = latency.ceilings(budget=0.2)
    assert found.copy > 1e8
    assert found.gemm > 1e8
    assert found.dtype == "float32"


# --- rows -----------------------------------------------------------------------------------------------------------------------


def _row(**changes) -> Row:
    return replace(
        Row("op", "swiglu", "decoder-512", "triton", "bfloat16", {"scale": 1.0}, 1e-3, 9e-4, 2e-3, 7, {"bytes": 3.0}, WHERE), **changes
    )


def test_rows_round_trip(tmp_path):
    made = [_row(), _row(impl="reference", seconds=2e-3)]
    rows.append(tmp_path / "new" / "a.jsonl", made[:1])
    rows.append(tmp_path / "new" / "a.jsonl", made[1:])
    assert rows.read(tmp_path / "new") == made
    assert rows.read(tmp_path / "new" / "a.jsonl") == made


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:2: not JSON"),
        ("[1]", "expected an object of schema 1"),
        ('{"schema": 2}', "expected an object of schema 1"),
        ('{"schema": 1, "speed": 1}', "unknown fields"),
        ('{"schema": 1, "kind": "op"}', "missing"),
        ('{"schema": 1, "kind": "guess", "name": "a", "case": "b", "impl": "c", "dtype": "d"}', "kind must be one of"),
    ],
)
def test_what_is_no_row(tmp_path, line, message):
    rows.append(tmp_path / "a.jsonl", [_row()])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(rows.RowError, match=re.escape(message)):
        rows.read(tmp_path)


def test_the_last_row_of_a_measurement_counts():
    old, new, other = _row(seconds=1.0), _row(seconds=2.0), _row(where={**WHERE, "device": "another"})
    assert rows.latest([old, other, new]) == [other, new]


def test_rows_of_an_older_commit_are_not_put_beside_newer_ones():
    before, after = ({**WHERE, "commit": commit, "when": when} for commit, when in (("a", "2026-01-01"), ("b", "2026-01-02")))
    old = [_row(where=before), _row(impl="reference", where=before), _row(name="gelu", where=before)]
    new = [_row(where=after), _row(impl="cuda", where=after)]
    for order in ([*old, *new], [*new, *old]):  # another file may come first
        assert rows.latest(order) == [old[2], *new]


@pytest.mark.parametrize(
    ("name", "family", "text"),
    [
        ("AMD EPYC", "26", "AMD EPYC family 26 model 2"),
        ("Intel(R) Xeon(R) Processor", "6", "Intel Xeon family 6 model 2"),
        ("Intel(R) Xeon(R) Platinum 8488C", "6", "Intel Xeon Platinum 8488C"),
        ("AMD EPYC 9R14", "25", "AMD EPYC 9R14"),
    ],
)
def test_processors_are_told_apart(name, family, text):
    """A virtual machine may name no more than the brand."""
    assert (
        rows.processor(f"processor\t: 0\ncpu family\t: {family}\nmodel\t\t: 2\nmodel name\t: {name}\n\nprocessor\t: 1\nmodel\t: 9\n")
        == text
    )
    assert rows.processor("")


def test_environment_names_commit_and_versions():
    found = rows.environment()
    assert found["torch"] == torch.__version__
    assert re.fullmatch(r"([0-9a-f]{12}\+?)?", found["commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["when"])


# --- correctness before speed -----------------------------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch):
    """The interpreter's kernels as if they were the CPU's own, so that a kernel of this package can be broken and timed here."""
    monkeypatch.setitem(collect.NATIVE, "cpu", ("reference", "triton"))
    launch.forget_plans()  # which hold the kernel as it was
    yield importlib.import_module("deltakern.ops.kernels.swiglu")
    launch.forget_plans()


def _tiny(op):
    return cases(op, "tiny")[0]


def test_op_rows(interpreted):
    made = collect.op_rows(_tiny("swiglu"), "cpu", torch.float32, budget=0.05, where=WHERE)
    assert [row.impl for row in made] == ["reference", "triton"]
    for row in made:
        assert row.low <= row.seconds <= row.high
        assert row.figures["error"] < 1e-6
        assert row.figures["bytes"] > 0
        assert row.where == WHERE
    both = collect.op_rows(_tiny("swiglu"), "cpu", torch.float32, budget=0.05, backward=True, where=WHERE)
    assert all(row.shape["pass"] == "forward+backward" and "bytes" not in row.figures for row in both)


def test_a_wrong_kernel_has_no_speed(interpreted, monkeypatch):
    right = interpreted.swiglu_forward
    launch.forget_plans()
    monkeypatch.setattr(interpreted, "swiglu_forward", lambda *args: right(*args) + 1e-3)
    with pytest.raises(collect.RedError, match="swiglu triton is wrong"):
        collect.op_rows(_tiny("swiglu"), "cpu", torch.float32, budget=0.05, where=WHERE)
    case = _tiny("swiglu")
    tasks = [
        collect.Task("swiglu", 1, lambda: collect.op_rows(case, "cpu", torch.float32, budget=0.05, where=WHERE)),
        collect.Task("gelu", 1, lambda: collect.op_rows(_tiny("gelu"), "cpu", torch.float32, budget=0.05, where=WHERE)),
        collect.Task("accuracy", 1, lambda: collect.accuracy_rows("swiglu", "cpu", where=WHERE)),
    ]
    found = collect.collect(tasks)
    assert {row.name for row in found.rows if row.kind == "op"} == {"gelu"}
    assert "its speed is not shown" in found.notes[0]
    verdicts = {row.impl: row.figures["ok"] for row in found.rows if row.kind == "accuracy" and row.dtype == "float32"}
    assert verdicts == {"reference": 1.0, "triton": 0.0}
    report = render.build(found.rows, preset="tiny", parts=("latency", "accuracy"), notes=found.notes)
    assert "NO" in render.markdown(report)


def test_a_step_that_fails_is_noted():
    def fails():
        raise RuntimeError("out of memory\nand more")

    done = []
    found = collect.collect([collect.Task("encode", 1, fails), collect.Task("rows", 1, lambda: [_row()])], done.append)
    assert found.rows == [_row()]
    assert found.notes == ["encode: not measured (RuntimeError: out of memory)."]
    assert [task.label for task in done] == ["encode", "rows"]


def test_a_model_that_differs_has_no_speed():
    truth = torch.randn(100)
    calls = {stages.RELEASE: lambda: truth, stages.OURS: lambda: truth + 1e-3}
    stage = stages.Stage("encode", calls, dict.fromkeys(calls, 1))
    with pytest.raises(collect.RedError, match=r"encode: deltakern differs from release \(eager\)"):
        collect.stage_rows(stage, "tiny", "cpu", torch.float32, budget=0.01, where=WHERE)
    calls[stages.OURS] = lambda: truth * (1 + 1e-6)
    made = collect.stage_rows(stage, "tiny", "cpu", torch.float32, budget=0.01, where=WHERE)
    assert [row.impl for row in made] == [stages.RELEASE, stages.OURS]


def test_a_call_that_takes_long_is_made_once(monkeypatch):
    monkeypatch.setattr(collect, "LONG", 0.02)
    monkeypatch.setattr(collect, "WARM", 0.01)
    made = {stages.RELEASE: 0, stages.OURS: 0}

    def call(name, seconds):
        made[name] += 1
        time.sleep(seconds)
        return torch.ones(3)

    calls = {stages.RELEASE: lambda: call(stages.RELEASE, 0.05), stages.OURS: lambda: call(stages.OURS, 0.0)}
    found = collect.stage_rows(
        stages.Stage("rollout", calls, dict.fromkeys(calls, 1)), "tiny", "cpu", torch.float32, budget=0.1, where=WHERE
    )
    assert made[stages.RELEASE] == 1
    assert found[0].rounds == 1
    assert found[0].seconds >= 0.05
    assert made[stages.OURS] > 3
    assert "peak_bytes" not in found[0].figures
    assert "peak_bytes" in found[1].figures


def test_a_call_that_was_made_needs_no_warming(monkeypatch):
    made = []
    found = latency.interleaved({"a": lambda: made.append(time.sleep(0.01))}, budget=0.0, known={"a": 0.02})
    assert len(made) == found["a"].rounds == 1


# --- stages -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    return stages.Models(SMALL, torch.device("cpu"), batch=2)


def test_every_stage_agrees_with_the_releases_structure(models):
    wanted = (stages.RELEASE, stages.REFERENCE, stages.OURS, stages.ONE_FUTURE)
    seen = []
    for stage in models.stages(wanted):
        seen.append(stage.name)
        made = collect.stage_rows(stage, "tiny", "cpu", torch.float32, budget=0.0, memory=False, where=WHERE)
        own = {row.impl: row for row in made}
        assert stages.OURS in own
        assert (stages.RELEASE in own) == (stage.name != "streamed frame")
        if stages.RELEASE in own:
            assert own[stages.OURS].figures["flops"] <= own[stages.RELEASE].figures["flops"]
        if stage.name == "rollout":
            assert own[stages.ONE_FUTURE].figures["flops"] < own[stages.OURS].figures["flops"]
    assert tuple(seen) == stages.STAGES


def test_without_a_source_checkout_the_baselines_are_left_out(monkeypatch):
    monkeypatch.setattr(stages, "release_structure", lambda: None)
    alone = stages.Models(SMALL, torch.device("cpu"))
    (stage,) = alone.stages((stages.RELEASE, stages.OURS), ("encode",))
    assert stages.RELEASE not in stage.calls
    assert collect.stage_rows(stage, "tiny", "cpu", torch.float32, budget=0.0, memory=False, where=WHERE)
    report = run.measure("tiny", "cpu", ("flops",), progress=False)
    assert report["notes"] == []
    monkeypatch.setattr(collect, "plan", lambda *_: iter(()))
    assert "not in the installed package" in run.measure("tiny", "cpu", ("latency",), progress=False)["notes"][0]


# --- text, Markdown, HTML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.234567, "1.23"), (31349.4, "31,300"), (0.0283, "0.0283"), (999.9, "1,000"), (12, "12.0"), (0, "0"), (99.96, "100")],
)
def test_numbers(value, text):
    assert render.number(value) == text


def test_units():
    assert render.seconds(0.012345) == "12.3 ms"
    assert render.seconds(0.9999) == "1.00 s"
    assert render.seconds(3e-6) == "3.00 us"
    assert render.seconds(None) == ""
    assert render.bytes_(3 * 2**20) == "3.00 MiB"
    assert render.rate(4.3e12, "B/s") == "4.30 TB/s"
    assert render.times(1) == "1x"
    assert render.times(2.04) == "2.04x"


@pytest.fixture
def report():
    made = [
        Row("ceiling", "copy", "", "torch", "float32", figures={"per_second": 1e10}, where=WHERE),
        Row("ceiling", "gemm", "", "torch", "float32", figures={"per_second": 1e11}, where=WHERE),
    ]
    speeds = itertools.count(1)
    for impl in (stages.RELEASE, stages.OURS):
        for stage in stages.STAGES:
            took = 1e-3 * 1.37 ** next(speeds)
            figures = {"flops": 10**9, "peak_bytes": 1e6 * took**0.5}
            made.append(Row("model", stage, "tiny", impl, "float32", {}, took, took / 2, took * 2, 5, figures, WHERE))
    for impl in ("reference", "triton"):
        took = 1e-4 * next(speeds)
        figures = {"bytes": 5e5, "flops": 2e6, "error": 1e-7}
        made.append(
            Row("op", "swiglu", "a | b <i>", impl, "bfloat16", {"scale": 0.5, "pass": "forward"}, took, took, took, 9, figures, WHERE)
        )
        made.append(Row("accuracy", "swiglu", "odd", impl, "bfloat16", figures={"error": 2e-3, "plain": 1.9e-3, "ok": 1.0}, where=WHERE))
    return render.build(made, preset="tiny", parts=collect.PARTS, notes=["<b>something</b> was not measured"], where=WHERE)


def test_figures_agree_everywhere(report, tmp_path):
    paths = render.write(report, tmp_path)
    assert json.loads(paths["json"].read_text()) == json.loads(json.dumps(report))
    markdown, page = paths["md"].read_text(), paths["html"].read_text()
    for row in report["rows"]:
        if row["seconds"] is not None:
            assert render.seconds(row["seconds"]) in markdown
            assert f">{render.seconds(row['seconds'])}</td>" in page
        if "peak_bytes" in row["figures"]:
            assert render.bytes_(row["figures"]["peak_bytes"]) in page
    for size, systems in report["flops"]["systems"].items():
        assert f"Systems at {size} x {size}" in page
        for system in systems:
            assert render.times(system["flops_ratio"], 4) in page
            assert render.times(system["flops_ratio"], 4) in markdown
    assert report["flops"]["claims"]["tokens a frame, DINO-world"] == 1024
    said = ("1,024x fewer tokens, 35x fewer parameters and 2,000x fewer FLOPs", "counted twice it would be 5,786")
    for text in ("1,024x", "35.1x", "2,042x", "31,349", *said):
        assert text in page


def test_the_page_needs_nothing_else(report):
    text = render.html_page(report).html()
    assert "<script" not in text
    assert not re.search(r"""(src|href)=["']?(?!data:|#)\w""", text)
    assert "<b>something</b>" not in text
    assert "a | b <i>" not in text
    assert text.count("<svg") >= 7
    assert text == render.html_page(report).html()


def test_markdown_escapes_bars(report):
    line = next(line for line in render.markdown(report).splitlines() if "a \\| b" in line)
    assert line.replace("\\|", "").count("|") == render.markdown(report).split("## Ops\n\n")[1].splitlines()[0].count("|")


def test_devices_are_told_apart(report):
    other = [{**row, "where": {**WHERE, "device": "another machine"}} for row in report["rows"]]
    both = {**report, "rows": report["rows"] + other}
    titles = {title: header for title, header, _, _ in render.tables(both)}
    assert titles["Latency by stage"][0] == titles["Ops"][0] == "device"
    assert "another machine" in render.html_page(both).html()


@pytest.mark.parametrize("columns", [80, 140])
def test_terminal(report, capsys, monkeypatch, columns):
    """No number and no implementation is broken over lines, at any width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    other = [{**row, "where": {**WHERE, "device": "another machine with a long name, 96 cores"}} for row in report["rows"]]
    render.print_tables({**report, "rows": report["rows"] + other})
    shown = capsys.readouterr().out
    assert "something" in shown
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns
    assert "Latency by stage: a test's machine, float32" in shown
    assert "Latency by stage: another machine with a long name, 96 cores, float32" in shown
    for row in report["rows"]:
        if row["kind"] == "model":
            assert sum(row["impl"] in line and render.seconds(row["seconds"]) in line for line in lines) >= 2
    for system in report["flops"]["systems"]["512"]:
        assert any(system["name"] in line and render.times(system["flops_ratio"], 4) in line for line in lines)
    assert ("10% to 90%" in shown) == (columns == 140)


# --- the command ------------------------------------------------------------------------------------------------------------------


def test_the_heading_names_every_machine_and_commit():
    """Not the first row's for all of them, where they were read and not measured now."""
    wheres = [
        {"device": "an old one", "commit": "aaa", "torch": "2.11", "threads": 2},
        {"device": "a new one", "commit": "bbb", "torch": "2.13", "threads": 2},
        {"device": "a new one", "commit": "ccc", "torch": "2.13", "threads": 2},
    ]
    made = render.build([_row(where=where) for where in wheres], preset="rows of results", parts=("latency",))
    said = render.heading(made)
    assert said == f"{made['made']} · rows of results · an old one at aaa · a new one at bbb, ccc · torch 2.11, 2.13 · threads 2"
    now = render.build([_row(where=wheres[0])], preset="tiny", parts=("latency",), where=WHERE)
    assert render.heading(now) == f"{now['made']} · preset tiny · a test's machine at 0123456789ab · torch 2.13 · threads 2"
    nothing = render.build([], preset="rows of results", parts=("flops",))
    assert render.heading(nothing) == f"{nothing['made']} · rows of results"


def test_report_from_rows(tmp_path, capsys):
    rows.append(tmp_path / "rows" / "a.jsonl", [_row(seconds=1.0), _row(seconds=2.0)])
    assert run.main(source=tmp_path / "rows", out=tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["seconds"] for row in found["rows"]] == [2.0]
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out


def test_what_the_smallest_report_leaves_out_is_said(report):
    about = {title: about for title, _, _, about in render.tables(report)}
    assert "under torch.compile" not in about["Latency by stage"]
    more = [{**row, "impl": stages.RELEASE_COMPILED} for row in report["rows"] if row["kind"] == "model" and row["name"] == "encode"]
    about = {title: about for title, _, _, about in render.tables({**report, "rows": report["rows"] + more})}
    assert "The rollout is not measured under torch.compile" in about["Latency by stage"]


def test_a_wrong_value_makes_the_command_fail(tmp_path, monkeypatch):
    bad = Row("accuracy", "swiglu", "odd", "triton", "float32", figures={"error": 1.0, "plain": 1e-7, "ok": 0.0}, where=WHERE)
    monkeypatch.setattr(collect, "plan", lambda *_: iter([collect.Task("accuracy", 1, lambda: [bad])]))
    assert run.main("tiny", "cpu", tmp_path, "accuracy") == 1


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="preset must be one of"):
        run.main("huge", "cpu", tmp_path)
    with pytest.raises(ValueError, match="only must be one of"):
        run.main("tiny", "cpu", tmp_path, "speed")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        run.main("tiny", "tpu", tmp_path)
    with pytest.raises(FileNotFoundError):
        run.main(source=tmp_path / "nothing", out=tmp_path)


def test_the_remaining_time_is_known_from_the_start():
    now = [0.0]
    tasks = [collect.Task(str(weight), weight, list) for weight in (10, 20, 30)]
    left = run._Remaining(tasks, lambda: now[0])
    assert left() == 60
    now[0] = 4.0
    assert left() == 56
    now[0] = 30.0  # the first task took three times its estimate
    left.advance()
    assert left() == pytest.approx(2 * 50)
    now[0] = 1000.0  # and a task that overruns does not make it negative
    assert left() == pytest.approx(2 * 30)
    left.advance()
    left.advance()
    assert left() == 0


def test_progress_is_shown(capsys):
    found = run._with_progress([collect.Task("encode", 1, lambda: [_row()]), collect.Task("decode", 2, list)])
    assert found.rows == [_row()]


def test_the_plan_names_every_part():
    labels = [t.label for t in collect.plan(stages.PRESETS["tiny"], torch.device("cpu"), torch.float32, collect.PARTS, (stages.OURS,))]
    assert labels[0] == "ceilings"
    assert set(stages.STAGES) <= set(labels)
    assert "accuracy of swiglu" in labels
    assert not list(collect.plan(stages.PRESETS["tiny"], torch.device("cpu"), torch.float32, ("flops",), (stages.OURS,)))
