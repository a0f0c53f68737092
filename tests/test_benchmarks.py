"""The benchmarks' own logic: suites that resume, rows that name their commit, README's table, and no speed for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deltakern import backend
from deltakern.report import collect, rows, stages
from deltakern.report.rows import Row

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is in the repository, not in the package
from benchmarks import run as bench

ROOT = Path(__file__).parents[1]
WHERE = {"device": "Some GPU", "driver": "580.1", "commit": "0123456789ab", "torch": "2.13.0", "threads": 2}


# --- suites -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [bench.gpu_suite, bench.cpu_suite])
def test_suites(suite):
    parts = suite()
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert names[-1] == "table"
    assert {f"op: {op}" for op in backend.ops()} <= set(names)
    for part in parts:
        if "--measure" in part.command:
            kind, _, name = part.command[part.command.index("--measure") + 1].partition(":")
            assert kind in ("ceilings", "accuracy", "op", "stage")
            assert not name or name in backend.ops() or name in stages.STAGES
        for path in part.command:
            if path.startswith("tests/"):
                assert (ROOT / path).exists(), path


def test_gpu_suite_is_ordered_by_importance():
    parts = bench.gpu_suite()
    names = [part.name for part in parts]
    assert names[0] == "build"
    assert all(part.limit <= 9 * 60 for part in parts)
    first_row = next(i for i, part in enumerate(parts) if "--measure" in part.command)
    assert any(name.startswith("tests") for name in names[:first_row])  # nothing is timed before the tests have run
    assert names.index("vitb-512: encode") < names.index("vitb-256: encode")
    assert {"sanitizer", "doctor", "ceilings"} <= set(names)


def test_a_suite_resumes(tmp_path, capsys):
    state = tmp_path / "state" / "suite.json"
    marker = tmp_path / "ran"
    append = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
    parts = [
        bench.Part("first", (sys.executable, "-c", append, str(marker), "1")),
        bench.Part("wrong", (sys.executable, "-c", "raise SystemExit(3)")),
        bench.Part("slow", (sys.executable, "-c", "import time; time.sleep(60)"), limit=0.5),
        bench.Part("missing", ("no-such-program-here",)),
        bench.Part("table", (sys.executable, "-c", append, str(marker), "t")),
    ]
    begin = time.monotonic()
    assert bench.run_suite(parts, state_path=state, commit="abc") == 1
    assert time.monotonic() - begin < 40
    assert marker.read_text() == "1t"
    found = bench.load_state("abc", state)
    assert found["first"] == found["table"] == "done"
    assert found["wrong"] == "exit status 3"
    assert "killed" in found["slow"]
    assert "not installed" in found["missing"]
    assert [part.name for part in bench.outstanding(parts, found)] == ["wrong", "slow", "missing", "table"]
    good = [parts[0], bench.Part("wrong", (sys.executable, "-c", "")), parts[-1]]
    bench.save_state("abc", {k: v for k, v in found.items() if k in ("first", "wrong")}, state)
    assert bench.run_suite(good, state_path=state, commit="abc") == 0
    assert marker.read_text() == "1tt"  # the first part was not run again, the table was
    assert bench.load_state("another commit", state) == {}
    state.write_text("{")
    assert bench.load_state("abc", state) == {}


def test_a_dry_run_runs_nothing(tmp_path, capsys):
    parts = [bench.Part("first", (sys.executable, "-c", "raise SystemExit(3)"))]
    assert bench.run_suite(parts, dry_run=True, state_path=tmp_path / "s.json", commit="abc") == 0
    assert not (tmp_path / "s.json").exists()
    assert "first" in capsys.readouterr().out


def test_the_commit_is_passed_on_to_measurements(tmp_path, capsys):
    parts = [bench.Part("row", ("x", "--measure", "op:gelu")), bench.Part("build", ("y",))]
    bench.run_suite(parts, dry_run=True, commit="abc", state_path=tmp_path / "s.json")
    shown = capsys.readouterr().out
    assert "--measure op:gelu --commit abc" in shown
    assert "y --commit" not in shown


# --- single measurements -----------------------------------------------------------------------------------------------------------


def test_measure_a_stage(tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    chosen = f"{stages.RELEASE};{stages.OURS}"
    assert bench.main(["--measure", "stage:predictor step", "--device", "cpu", "--impl", chosen, "--commit", "abc", "--out", str(out)]) == 0
    found = rows.read(out)
    assert [row.impl for row in found] == [stages.RELEASE, stages.OURS]
    assert all(row.where["commit"] == "abc" and row.seconds > 0 for row in found)


@pytest.mark.parametrize("what", ["op:nothing", "stage:nothing", "nothing"])
def test_measure_refuses(what, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--measure", what, "--device", "cpu", "--commit", "abc", "--out", str(tmp_path / "a.jsonl")])
    assert "--measure" in capsys.readouterr().err


def test_a_row_names_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "environment", lambda device="cpu": {**WHERE, "commit": ""})
    with pytest.raises(ValueError, match="--commit"):
        bench.measure("ceilings", "cpu", "tiny", torch.float32, stages.IMPLEMENTATIONS, out=tmp_path / "a.jsonl")


def test_results_are_kept_by_device():
    assert bench.results_file({"device": "NVIDIA H200"}).name == "nvidia-h200.jsonl"


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


# --- README -------------------------------------------------------------------------------------------------------------------------


def _rows() -> list[Row]:
    made = [
        Row("model", "encode", "vitb-512", impl, "bfloat16", {"batch": 64}, took, took, took, 9, {"flops": 1}, WHERE)
        for impl, took in ((stages.RELEASE, 0.4), (stages.RELEASE_COMPILED, 0.3), (stages.OURS, 0.1))
    ]
    made += [
        Row("op", "swiglu", "decoder-512", impl, "bfloat16", {"scale": 1.0, "pass": "forward"}, took, took, took, 9, {"bytes": 4e9}, WHERE)
        for impl, took in (("reference", 4e-3), (collect.COMPILED, 2e-3), ("triton", 1e-3))
    ]
    return [*made, Row("ceiling", "copy", "", "torch", "float32", figures={"per_second": 4.4e12}, where=WHERE)]


def test_readme_table():
    table = bench.readme_table(_rows())
    assert "**Some GPU**, driver 580.1, torch 2.13.0, 2 threads, at 0123456789ab:" in table
    assert "| encode, batch 64, vitb-512, bfloat16 | 400 ms | 300 ms | 100 ms | 4.00x | 3.00x |" in table
    assert "| `swiglu` decoder-512, bfloat16 | 4.00 ms | 2.00 ms | 1.00 ms (triton) | 91% |" in table
    assert bench.readme_table([]) == "No measurements are committed yet."


def test_losing_shapes_stay_in():
    lost = [
        Row("model", "decode", "vitb-512", i, "bfloat16", {}, t, t, t, 9, {"flops": 1}, WHERE)
        for i, t in ((stages.RELEASE, 1), (stages.OURS, 2))
    ]
    assert "0.500x" in bench.readme_table(lost)


def test_readme_is_updated_between_its_markers(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    rows.append(results / "a.jsonl", _rows())
    assert bench.update_readme(readme, results) is False
    readme.write_text("# a\n")
    assert bench.update_readme(readme, results) is False
    readme.write_text(f"# a\n\n{bench.BEGIN}\nold\n{bench.END}\n\n## b\n")
    assert bench.update_readme(readme, results) is True
    first = readme.read_text()
    assert first.startswith("# a\n\n")
    assert first.endswith("\n\n## b\n")
    assert "old" not in first
    assert bench.readme_table(_rows()) in first
    bench.update_readme(readme, results)
    assert readme.read_text() == first
    with pytest.raises(ValueError, match="must hold the lines"):
        bench.updated_readme("no markers", "table")


def test_readme_shows_the_committed_rows():
    text = bench.README.read_text(encoding="utf-8") if bench.README.exists() else ""
    if bench.BEGIN not in text:
        pytest.skip("README.md has no performance table")
    assert bench.updated_readme(text, bench.readme_table(rows.read(bench.RESULTS))) == text, "run: python -m benchmarks.run --update-readme"


def test_committed_rows_say_where_they_come_from():
    for row in rows.read(bench.RESULTS):
        assert row.where["commit"]
        assert row.where["device"]
        assert row.where["torch"]
        assert json.dumps(row.shape)
        if row.kind == "op" and row.impl in backend.ops()[row.name].implementations:
            assert "error" in row.figures  # it was held to float64 in the same run


@pytest.mark.parametrize("suite", [bench.cpu_suite, bench.gpu_suite])
def test_every_part_of_a_suite_names_implementations_that_there_are(suite):
    """A suite's own commands must be understood by the command line that runs them."""
    parts = suite()
    named = [part.command[part.command.index("--impl") + 1].split(";") for part in parts if "--impl" in part.command]
    assert all(set(names) <= set(stages.IMPLEMENTATIONS) for names in named)
    assert parts
