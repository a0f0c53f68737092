"""The benchmarks' own logic: suites that resume, rows that name their commit, README's table, and no speed for what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deltakern import backend
from deltakern.report import collect, latency, rows, stages
from deltakern.report import run as report_run
from deltakern.report.rows import Row

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is in the repository, not in the package
from benchmarks import measure, suite
from benchmarks import run as bench
from benchmarks.suite import Part

ROOT = Path(__file__).parents[1]
WHERE = {"device": "Some GPU", "driver": "580.1", "commit": "0123456789ab", "torch": "2.13.0", "threads": 2}


# --- suites -----------------------------------------------------------------------------------------------------------------------


def _measurements(part: Part) -> list[tuple[str, str]]:
    """What a part measures; raises where its command line asks for what there is not."""
    if "--measure" not in part.command:
        return []
    given = bench._parser().parse_args(part.command[part.command.index("benchmarks.run") + 1 :])
    assert given.preset in stages.PRESETS
    assert set(given.impl.split(";") if given.impl else ()) <= {*stages.IMPLEMENTATIONS, stages.RELEASE_BLOCKS}
    return [measure.parsed(what) for what in given.measure.split(";")]


PLANS = [bench.cpu_suite, bench.gpu_suite, lambda out: bench.gpu_suite(out, "cpu")]


@pytest.mark.parametrize("plan", PLANS, ids=["cpu", "gpu", "rehearsal"])
def test_plans(plan, tmp_path):
    parts = plan(tmp_path)
    assert len({part.name for part in parts}) == len(parts)
    measured = {(kind, name.partition("/")[0]) for part in parts for kind, name in _measurements(part)}
    assert measured >= {("op", op) for op in backend.ops()} | {("stage", stage) for stage in stages.STAGES} | {("ceilings", "")}
    for part in parts:
        assert not {"git", "curl", "wget", "apt-get"} & set(part.command)
        assert "pip" not in part.command or {"--no-index", "--no-input", "--no-deps", "--no-build-isolation"} <= set(part.command)
        for path in part.command:
            assert not path.startswith("tests/") or (ROOT / path.partition("::")[0]).exists(), path


def test_a_borrowed_gpu_gives_the_most_telling_first(tmp_path):
    parts = bench.gpu_suite(tmp_path, capability="90")
    names = [part.name for part in parts]
    groups = ["build", "smoke", "stages", "compiled", "kernels", "large", "sanitizers", "ops", "profiles"]
    assert list(dict.fromkeys(part.group for part in parts)) == groups
    assert parts[0].env["DELTAKERN_CUDA_ARCHS"] == "90"
    assert sum(part.limit for part in parts[: names.index("kernels") + 1]) <= bench.BUDGET <= 600
    assert {part.group for part in parts if part.must} == {"smoke", "kernels"}
    for part in parts:
        impls = {name for name in (stages.RELEASE_COMPILED, stages.RELEASE_BLOCKS) if any(name in word for word in part.command)}
        assert bool(impls) == (part.group == "compiled")  # whose parts are of one stage each
        assert not impls or len(_measurements(part)) == 1
        assert "deltakern (torch.compile)" not in part.command
    assert all("-n" not in part.command for part in parts if part.name in ("smoke", "large"))


def _python(text: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text, *arguments)


def test_a_suite_of_parts_that_fail_in_every_way(tmp_path, capfd):
    pid = tmp_path / "pid"
    worker = (
        "import pathlib, subprocess, sys, time; print('stage one: 3 ms');"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid)); time.sleep(60)"
    )
    parts = [
        Part("first", _python("print('one'); print('== 7 passed ==')"), 60, must=True),
        Part("wrong", _python("print('E   it is wrong'); raise SystemExit(3)"), 60),
        Part("slow: a", _python(worker, str(pid)), 2.0),
        Part("slow: b", ("no-such-program-here",), 60, must=True),
        Part("asks", _python("print('answer:', input())"), 60),
    ]
    begin = time.monotonic()
    assert suite.run_suite(parts, tmp_path / "out", budget=100.0, facts={"commit": "abc"}) == 1
    assert time.monotonic() - begin < 30
    said = capfd.readouterr().out
    assert re.search(r"first: done, .* s; 7 passed; left: \d+ s for wrong, slow, asks\n", said)
    assert "    | E   it is wrong\n" in said
    assert "slow: a: killed after 2 s, 2.0 s; stage one: 3 ms; left: " in said
    assert "slow: b: no-such-program-here is not installed" in said
    assert "not done: wrong, slow: a, slow: b, asks; again with --only wrong,slow,asks" in said
    assert "s for nothing\n" in said
    found = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert found["commit"] == "abc"
    assert [part["outcome"] for part in found["parts"].values()][:2] == ["done", "exit status 3"]
    assert found["parts"]["asks"]["outcome"] == "exit status 1"  # nobody is there to answer
    log = (tmp_path / "out" / "suite-log.txt").read_text()
    assert log.index("== 7 passed ==") < log.index("it is wrong") < log.index("stage one: 3 ms")
    child = Path(f"/proc/{pid.read_text()}/stat")
    for _ in range(100):  # a killed process may lie there until its parent has seen it
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what the killed part had started runs on")


def test_the_exit_status_asks_for_what_must_be_done(tmp_path, capfd):
    good, bad = _python(""), _python("raise SystemExit(1)")
    assert suite.run_suite([Part("smoke", good, 60, must=True), Part("ops", bad, 60)], tmp_path) == 0
    assert suite.run_suite([Part("ops", good, 60), Part("smoke", bad, 60, must=True)], tmp_path) == 1


def test_a_suite_keeps_to_its_time(tmp_path, capfd, monkeypatch):
    """What is begun is cut to what is left, what has no room is not begun, and what is lost for lack of time is told."""
    monkeypatch.setattr(suite, "LEAST", 1.0)
    parts = [Part("slow", _python("import time; time.sleep(60)"), 500), Part("smoke", _python(""), 60, must=True)]
    begin = time.monotonic()
    assert suite.run_suite(parts, tmp_path, budget=1.5) == 1
    assert time.monotonic() - begin < 20
    said = capfd.readouterr().out
    assert "slow: killed after 1 s" in said or "slow: killed after 2 s" in said
    assert "smoke: no time left" in said


def test_a_killed_suite_leaves_what_it_has(tmp_path):
    """Rows, profiles, outcomes: all of them whole, up to the part that ran."""
    one = Row("op", "gelu", "odd", "triton", "float32", where={"commit": "abc", "device": "a GPU"})
    text = (
        "import sys, time; from pathlib import Path; from benchmarks import suite; from deltakern.report import rows;"
        f"rows.append(Path(sys.argv[1]) / 'a-gpu.jsonl', [rows.Row(**{vars(one)!r})]); time.sleep(float(sys.argv[2]))"
    )
    code = (
        "import sys; from pathlib import Path; from benchmarks import suite; from benchmarks.suite import Part; out = sys.argv[1];"
        f"suite.run_suite([Part(str(n), (sys.executable, '-c', {text!r}, out, str(60 * n)), 90) for n in range(2)], Path(out))"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        for _ in range(600):
            if (out / "a-gpu.jsonl").exists() and len((out / "a-gpu.jsonl").read_text().splitlines()) == 2:
                break
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait()
    assert rows.read(out) == [one, one]
    assert json.loads((out / "suite.json").read_text())["parts"]["0"]["outcome"] == "done"
    assert not list(out.glob("*.new"))


def test_parts_are_chosen_by_name_and_in_that_order():
    parts = [Part(name, ("x",), 1) for name in ("smoke", "stages", "stages: training", "ops")]
    assert [part.name for part in suite.choose(parts, ["ops", "stages"])] == ["ops", "stages", "stages: training"]
    assert suite.choose(parts, ()) == parts
    with pytest.raises(ValueError, match=r"--only: expected names out of .*'stages'.*, got \['stage'\]"):
        suite.choose(parts, ["stage"])


def test_a_dry_run_runs_nothing(tmp_path, capsys):
    chosen = ["--only", "ops,smoke", "--commit", "abc", "--out", str(tmp_path / "out")]
    assert bench.main(["--gpu-suite", "--dry-run", *chosen]) == 0
    assert not (tmp_path / "out").exists()
    first, attention, smoke, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("  ops ")
    assert first.endswith("--commit abc")  # which rows name
    assert attention.startswith("  ops: attention ")
    assert smoke.startswith("* smoke ")
    assert bench.main(["--cpu-suite", "--dry-run"]) == 0


def test_a_suite_needs_a_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        bench.main(["--cpu-suite", "--out", str(tmp_path)])
    assert "--commit" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal without a GPU")
def test_the_smoke_part_on_a_cpu(tmp_path, capfd):
    chosen = ["--only", "smoke", "--seconds", "300", "--out", str(tmp_path), "--commit", "abc"]
    assert bench.main(["--gpu-suite", "--device", "cpu", *chosen]) == 0
    said = capfd.readouterr().out
    assert re.search(r"smoke: done, .* s; \d\d passed in .*; left: \d+ s for nothing", said), said


ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "av":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
"""


def test_without_a_package_a_test_is_skipped_and_says_so(tmp_path):
    (tmp_path / "absent.py").write_text(ABSENT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "absent", "-p", "no:cacheprovider", "tests/test_fused_block.py", "-k", "curve"]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SKIPPED [2]" in done.stdout
    assert 'reading video needs the package av; install it with: pip install "deltakern[demo]"' in done.stdout


# --- single measurements -----------------------------------------------------------------------------------------------------------


CPU = ["--device", "cpu", "--commit", "abc"]


def test_measurements_in_one_process(tmp_path, capsys):
    """Rows come one after the other, into one file of the device; what fails does not stop what follows."""
    chosen = f"{stages.RELEASE};{stages.OURS}"
    what = "stage:predictor step;check:swiglu=triton;profile:predictor step"
    assert bench.main(["--measure", what, *CPU, "--impl", chosen, "--budget", "0.1", "--out", str(tmp_path)]) == 0
    found = rows.read(tmp_path)
    assert [row.impl for row in found] == [stages.RELEASE, stages.OURS]
    assert all(row.where["commit"] == "abc" and row.seconds > 0 for row in found)
    first, second, third = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"stage:predictor step: release \(eager\) [\d.]+ [um]?s, deltakern [\d.]+ [um]?s", first)
    assert second == "check:swiglu=triton: right"
    assert third == "profile:predictor step: profiles of release (eager), deltakern"
    profiles = json.loads((tmp_path / "profiles.json").read_text())
    host = {name: count for name, count, _ in profiles["predictor step, deltakern"]["host"]}
    assert host["aten::addmm"] > 0


def test_a_training_step_compiled_by_block(tmp_path):
    models = stages.Models(stages.PRESETS["tiny"], torch.device("cpu"))
    (stage,) = models.stages((stages.RELEASE, stages.RELEASE_BLOCKS), ("DeltaTok training step",))
    assert list(stage.calls) == [stages.RELEASE, stages.RELEASE_BLOCKS]
    assert stage.flops[stages.RELEASE_BLOCKS] == stage.flops[stages.RELEASE]
    blocks = models.module.Block, models.module.PredictorBlock
    assert not any(m._compiled_call_impl for m in models.release.modules() if isinstance(m, blocks)), "not in the copy alone"


def test_a_measurement_that_fails_stops_no_other(tmp_path, capsys, monkeypatch):
    def fails(self, name):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(measure.Measuring, "_ceilings", fails)
    assert bench.main(["--measure", "ceilings;check:gelu=reference", *CPU, "--out", str(tmp_path / "a.jsonl")]) == 1
    shown = capsys.readouterr().out
    assert "ceilings: no speed: RuntimeError: out of memory\ncheck:gelu=reference: right\n" in shown
    assert shown.endswith("wrong or not measured: ceilings\n")


def test_an_op_without_torch_compile(tmp_path):
    out = tmp_path / "a.jsonl"
    assert bench.main(["--measure", "op:gelu/backbone-512", *CPU, "--no-compile", "--budget", "0.02", "--out", str(out)]) == 0
    assert {row.impl for row in rows.read(out)} == {"reference"}


@pytest.mark.parametrize("what", ["op:nothing", "op:gelu/nothing", "stage:nothing", "profile:nothing", "check:swiglu=fast", "nothing"])
def test_measure_refuses(what, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--measure", f"ceilings;{what}", *CPU, "--out", str(tmp_path / "a.jsonl")])
    assert "--measure" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_row_names_its_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "environment", lambda device="cpu": {**WHERE, "commit": ""})
    with pytest.raises(SystemExit):
        bench.main(["--measure", "ceilings", "--device", "cpu", "--out", str(tmp_path / "a.jsonl")])
    assert "--commit" in capsys.readouterr().err


def test_results_are_kept_by_device():
    assert measure.results_file({"device": "NVIDIA H200"}).name == "nvidia-h200.jsonl"


def test_what_a_gpu_takes_is_told_apart(monkeypatch):
    """Kernels by their own time and by graph replay, the host by itself; what cannot be captured keeps the rest."""
    monkeypatch.setattr(latency, "profile", lambda call, device: ([("gelu_kernel", 3, 4e-3), ("Memset", 1, 1e-3)], []))
    monkeypatch.setattr(latency, "launch_overhead", lambda call, device: 7e-3)
    monkeypatch.setattr(latency, "graphed", lambda call, device: call)
    monkeypatch.setattr(latency, "interleaved", lambda calls, device, budget: {"graph": latency.Timing(5e-3, 5e-3, 5e-3, 1)})
    figures = {"kernels": 4, "kernel_seconds": 5e-3, "launch_seconds": 7e-3, "graph_seconds": 5e-3}
    assert collect.gpu_figures(lambda: None, torch.device("cuda")) == figures
    row = Row("model", "encode", "tiny", stages.OURS, "bfloat16", seconds=8e-3, figures=figures)
    assert measure._times(row) == "8.00 ms (graph 5.00 ms, kernels 5.00 ms, host 7.00 ms)"

    def refuses(call, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(latency, "graphed", refuses)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    assert collect.gpu_figures(lambda: None, torch.device("cuda")) == {k: v for k, v in figures.items() if k != "graph_seconds"}


# --- a wrong kernel -----------------------------------------------------------------------------------------------------------------

PLUGIN = """
import importlib
from deltakern.report import collect

collect.NATIVE["cpu"] = ("reference", "triton")
kernels = importlib.import_module("deltakern.ops.kernels.gelu")
right = kernels.gelu_forward
kernels.gelu_forward = lambda *args: right(*args) * 1.01
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="breaks the interpreter's kernel")
def test_a_broken_kernels_row_disappears(tmp_path):
    (tmp_path / "break_a_kernel.py").write_text(PLUGIN)
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "break_a_kernel", "benchmarks/test_ops.py", "-k", "gelu and forward"]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, "--device", "cpu", "--rows", str(out)], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no speed: gelu triton is wrong" in done.stdout
    assert not out.exists()
    assert "Mean" not in done.stdout  # pytest-benchmark's table of times
    smoke = [sys.executable, "-m", "pytest", "-q", "-p", "break_a_kernel", "tests/gpu_smoke.py", "-k", "gelu"]
    done = subprocess.run(smoke, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_op[gelu-odd-triton-float32] - AssertionError" in done.stdout


# --- README -------------------------------------------------------------------------------------------------------------------------


def _rows() -> list[Row]:
    made = [
        Row("model", "encode", "vitb-512", impl, "bfloat16", {"batch": 64}, took, took, took, 9, {"flops": 1}, WHERE)
        for impl, took in ((stages.RELEASE, 0.4), (stages.RELEASE_COMPILED, 0.3), (stages.OURS, 0.1), (stages.LIVE, 0.2))
    ]
    made += [
        Row("op", "swiglu", "decoder-512", impl, "bfloat16", {"scale": 1.0, "pass": "forward"}, took, took, took, 9, {"bytes": 4e9}, WHERE)
        for impl, took in (("reference", 4e-3), (collect.COMPILED, 2e-3), ("triton", 1e-3))
    ]
    return [*made, Row("ceiling", "copy", "", "torch", "float32", figures={"per_second": 4.4e12}, where=WHERE)]


def test_readme_table():
    table = measure.readme_table(_rows())
    assert "**Some GPU**, driver 580.1, torch 2.13.0, 2 threads, at 0123456789ab:" in table
    assert "| encode, batch 64, vitb-512, bfloat16 | 400 ms | 300 ms | 100 ms | 200 ms | 4.00x | 3.00x |" in table
    assert "| `swiglu` decoder-512, bfloat16 | 4.00 ms | 2.00 ms | 1.00 ms (triton) | 91% |" in table
    assert measure.readme_table([]) == "No measurements are committed yet."


def test_losing_shapes_stay_in():
    lost = [
        Row("model", "decode", "vitb-512", i, "bfloat16", {}, t, t, t, 9, {"flops": 1}, WHERE)
        for i, t in ((stages.RELEASE, 1), (stages.OURS, 2))
    ]
    assert "0.500x" in measure.readme_table(lost)


def test_a_step_compiled_by_block_is_called_so():
    timed = ((stages.RELEASE, 4), (stages.RELEASE_BLOCKS, 2), (stages.OURS, 1))
    made = [Row("model", "DeltaTok training step", "vitb-512", i, "bfloat16", {}, t, t, t, 9, {"flops": 1}, WHERE) for i, t in timed]
    table = measure.readme_table(made)
    assert "| DeltaTok training step, compiled by block, vitb-512, bfloat16 | 4.00 s | 2.00 s | 1.00 s |  | 4.00x | 2.00x |" in table


def test_readme_is_updated_between_its_markers(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    rows.append(results / "a.jsonl", _rows())
    assert measure.update_readme(readme, results) is False
    readme.write_text("# a\n")
    assert measure.update_readme(readme, results) is False
    readme.write_text(f"# a\n\n{measure.BEGIN}\nold\n{measure.END}\n\n## b\n")
    assert measure.update_readme(readme, results) is True
    first = readme.read_text()
    assert first.startswith("# a\n\n")
    assert first.endswith("\n\n## b\n")
    assert "old" not in first
    assert measure.readme_table(_rows()) in first
    measure.update_readme(readme, results)
    assert readme.read_text() == first
    with pytest.raises(ValueError, match="must hold the lines"):
        measure.updated_readme("no markers", "table")


def test_readme_shows_the_committed_rows():
    text = measure.README.read_text(encoding="utf-8") if measure.README.exists() else ""
    if measure.BEGIN not in text:
        pytest.skip("README.md has no performance table")
    assert measure.updated_readme(text, measure.readme_table(rows.read(measure.RESULTS))) == text, (
        "run: python -m benchmarks.run --update-readme"
    )


def test_the_committed_rows_make_a_report(tmp_path, capsys):
    """Rows of every kind that benchmarks write, those without FLOPs or seconds among them."""
    report_run.main("tiny", "cpu", tmp_path, None, measure.RESULTS)
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]
    said, text = capsys.readouterr().out, (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in {row.name for row in rows.read(measure.RESULTS) if row.kind == "model"}:
        assert any(row["name"] == name for row in written)
        assert name in text
    assert "Latency by stage" in said
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_committed_rows_say_where_they_come_from():
    for row in rows.read(measure.RESULTS):
        assert row.where["commit"]
        assert row.where["device"]
        assert row.where["torch"]
        assert json.dumps(row.shape)
        if row.kind == "op" and row.impl in backend.ops()[row.name].implementations:
            assert "error" in row.figures  # it was held to float64 in the same run
