"""The benchmarks' own logic: suites that resume, rows that name their commit, README's table, and no speed for what is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from deltakern import backend
from deltakern.report import collect, rows, stages
from deltakern.report import run as report_run
from deltakern.report.rows import Row

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is in the repository, not in the package
from benchmarks import measure, suite, wheels
from benchmarks import run as bench
from benchmarks.suite import Part

ROOT = Path(__file__).parents[1]
WHERE = {"device": "Some GPU", "driver": "580.1", "commit": "0123456789ab", "torch": "2.13.0", "threads": 2}


# --- suites -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [bench.gpu_suite, bench.cpu_suite])
def test_plans(plan):
    parts = plan()
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert names[-1] == "table"
    assert {f"op: {op}" for op in backend.ops()} <= set(names)  # a new op is in it by being registered
    for part in parts:
        assert part.enough <= part.limit
        if "--measure" in part.command:
            given = bench._parser().parse_args(part.command[part.command.index("benchmarks.run") + 1 :])
            kind, _, name = given.measure.partition(":")
            assert kind in ("ceilings", "accuracy", "op", "stage", "check")
            assert not name or name in backend.ops() or name in stages.STAGES or kind == "check"
            assert given.preset in stages.PRESETS
            assert set(given.impl.split(";") if given.impl else ()) <= set(stages.IMPLEMENTATIONS)
        for path in part.command:
            if path.startswith("tests/"):
                assert (ROOT / path).exists(), path


def test_what_a_borrowed_gpu_must_give_takes_one_call():
    parts = bench.gpu_suite()
    names = [part.name for part in parts]
    musts = [part for part in parts if part.must]
    assert parts[: len(musts)] == musts
    assert sum(part.limit for part in musts) + suite.RESERVE <= 9 * 60
    assert all(part.limit <= 9 * 60 for part in parts)
    first = {part.name for part in musts}
    assert {"build", "tests: kernels", "sanitizer: memcheck", "sanitizer: racecheck", "ceilings", "vitb-512: encode"} <= first
    assert any(name.startswith("op: ") for name in first)
    timed = next(i for i, part in enumerate(parts) if "--measure" in part.command and "compute-sanitizer" not in part.command)
    assert names.index("tests: kernels") < timed  # nothing is timed before the tests have run
    assert names.index("vitb-512: decode") < names.index("vitb-256: decode")
    for part in parts:
        assert not {"git", "curl", "wget", "apt-get"} & set(part.command)
        if "pip" in part.command:
            assert {"--no-index", "--no-input", "--no-deps", "--no-build-isolation"} <= set(part.command)


def test_a_gpu_of_little_memory_gets_half_the_batch():
    def batch(parts, name):
        command = next(part.command for part in parts if part.name == f"vitb-512: {name}")
        return int(command[command.index("--batch") + 1]) if "--batch" in command else 1

    for name, roomy, short in (("encode", 64, 32), ("DeltaWorld training step", 32, 16), ("rollout", 1, 1)):
        assert batch(bench.gpu_suite(143.0), name) == roomy
        assert batch(bench.gpu_suite(80.0), name) == short
    assert bench.gpu_suite(80.0, "90")[0].env["DELTAKERN_CUDA_ARCHS"] == "90"


def _python(text: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text, *arguments)


def _run(parts, tmp_path, **changes):
    kept = {"commit": "abc", "device": "a GPU", "state_path": tmp_path / "build" / "suite.json", "results": tmp_path / "results"}
    return suite.run_suite(parts, **{**kept, **changes})


APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"


def test_a_suite_resumes(tmp_path, capfd):
    marker, path = tmp_path / "ran", tmp_path / "build" / "suite.json"
    worker = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    parts = [
        Part("first", _python(APPEND, str(marker), "1")),
        Part("wrong", _python("raise SystemExit(3)")),
        Part("slow", _python(worker), limit=0.5),
        Part("missing", ("no-such-program-here",)),
        Part("asks", _python("print('answer:', input())")),
        Part("table", _python(APPEND, str(marker), "t")),
    ]
    begin = time.monotonic()
    assert _run(parts, tmp_path) == 1
    assert time.monotonic() - begin < 40
    assert marker.read_text() == "1t"
    found = suite.load_state(path, "abc", "a GPU")
    assert found.outcomes["first"] == found.outcomes["table"] == "done"
    assert found.outcomes["wrong"] == "exit status 3"
    assert found.outcomes["asks"] == "exit status 1"  # nobody is there to answer
    assert "killed" in found.outcomes["slow"]
    assert "not installed" in found.outcomes["missing"]
    again = suite.outstanding(parts, found)
    assert [part.name for part in again] == ["wrong", "slow", "missing", "asks", "table"]
    assert again[1].limit > parts[2].limit  # more time for what was killed
    good = [parts[0], Part("wrong", _python("")), parts[-1]]
    assert _run(good, tmp_path) == 0
    assert marker.read_text() == "1tt"  # the first part was not run again, the table was
    assert suite.load_state(path, "another commit", "a GPU").outcomes == {}
    assert suite.load_state(path, "abc", "another GPU").outcomes == {}
    path.write_text("{")
    assert suite.load_state(path, "abc", "a GPU").outcomes == {}


def test_what_was_killed_gets_twice_the_time_and_never_more_than_a_call():
    part = Part("slow", ("x",), 60)
    state = suite.State("abc", "a GPU", {"slow": "killed after 60 s"}, {"slow": 60.2})
    assert suite.outstanding([part, Part("table", ("x",))], state)[0].limit == pytest.approx(120.4)
    state.seconds["slow"] = 400.0
    assert suite.outstanding([part, Part("table", ("x",))], state)[0].limit == suite.LIMIT


def test_a_suite_keeps_to_its_time(tmp_path, capfd):
    """A clock that moves 50 s each time it is read: at the beginning, before each part, at its start and at its end."""
    marker, now = tmp_path / "ran", [0.0]

    def clock():
        now[0] += 50.0
        return now[0]

    parts = [Part(name, _python(APPEND, str(marker), name), limit=200, least=least) for name, least in (("a", 20), ("b", 120), ("c", 20))]
    parts += [Part("table", _python(APPEND, str(marker), "t"))]
    assert _run(parts, tmp_path, seconds=325.0, clock=clock) == 1
    assert marker.read_text() == "act"  # b has no room, c has, the table is always drawn
    shown = capfd.readouterr().out
    assert "no time left for 1 parts; the next run begins with: b" in shown
    assert _run(parts, tmp_path) == 0
    assert marker.read_text() == "actbt"


def test_no_part_runs_longer_than_is_left(tmp_path, capfd):
    parts = [Part("slow", _python("import time; time.sleep(60)"), limit=500, least=0.0), Part("table", _python(""))]
    begin = time.monotonic()
    assert _run(parts, tmp_path, seconds=suite.RESERVE + 1.0) == 1
    assert time.monotonic() - begin < 20
    assert "slow: killed after 1 s" in capfd.readouterr().out


def test_a_fresh_machine_resumes_from_what_came_back(tmp_path, capfd):
    """Two machines with nothing in common but the folder that travels."""
    row = json.dumps({"a": 1}) + "\n"

    def parts(machine):
        results = machine / "results" / "a-gpu.jsonl"
        add = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); p.open('a').write(sys.argv[2])"
        second = "raise SystemExit(1)" if machine.name == "one" else add
        return [
            Part("first", _python(add, str(results), row)),
            Part("second", _python(second, str(results), row.replace("1", "2"))),
            Part("table", _python("import pathlib, sys; pathlib.Path(sys.argv[1], 'report.md').write_text('t')", str(machine))),
        ]

    one, two, back, later = (tmp_path / name for name in ("one", "two", "back", "later"))
    for machine in (one, two):
        (machine / "results").mkdir(parents=True)
        (machine / "results" / "another.jsonl").write_text("{}\n")
    assert _run(parts(one), one, out=back, report=one) == 1
    assert sorted(p.name for p in back.iterdir()) == ["a-gpu.jsonl", "report.md", "suite-log.txt", "suite.json"]
    assert (back / "a-gpu.jsonl").read_text() == row
    assert "$ " in (back / "suite-log.txt").read_text()
    assert _run(parts(two), two, resume=back, out=later, report=two) == 0
    assert (two / "results" / "a-gpu.jsonl").read_text() == row + row.replace("1", "2")  # the first machine's, then its own
    assert (later / "a-gpu.jsonl").read_text() == row + row.replace("1", "2")
    assert "2 to run" in capfd.readouterr().out  # the second part and the table
    assert suite.merge_rows(later, two / "results") == 0
    with pytest.raises(ValueError, match="--resume"):
        _run(parts(two), two, resume=tmp_path / "nothing")


def test_a_dry_run_runs_nothing(tmp_path, capsys):
    parts = [Part("first", _python("raise SystemExit(3)"), 60, must=True), Part("table", ("y",))]
    assert _run(parts, tmp_path, dry_run=True) == 0
    assert not (tmp_path / "build").exists()
    shown = capsys.readouterr().out
    assert "first" in shown
    assert "the 1 that come first take at most 60 s together" in shown


def test_the_commit_is_passed_on_to_measurements():
    made = bench.named([Part("row", ("x", "--measure", "op:gelu"), 7, 3, True, {"A": "b"}), Part("build", ("y",))], "abc")
    assert made[0] == Part("row", ("x", "--measure", "op:gelu", "--commit", "abc"), 7, 3, True, {"A": "b"})
    assert made[1] == Part("build", ("y",))


def test_a_suite_needs_a_commit_and_its_device(monkeypatch, capsys):
    monkeypatch.setattr(bench, "prepare", lambda folder: None)
    monkeypatch.setattr(suite, "describe", lambda device: {"commit": "", "device": "a GPU"})
    with pytest.raises(SystemExit):
        bench.main(["--cpu-suite"])
    assert "--commit" in capsys.readouterr().err

    def fails(device):
        raise ValueError(f"{device} cannot be used here")

    monkeypatch.setattr(suite, "describe", fails)
    with pytest.raises(SystemExit):
        bench.main(["--gpu-suite"])
    assert "cuda cannot be used here" in capsys.readouterr().err
    assert bench.main(["--gpu-suite", "--dry-run"]) == 0
    assert "sanitizer" in capsys.readouterr().out


def test_the_device_is_asked_for_in_another_process():
    found = suite.describe("cpu")
    assert found["device"] == rows.environment()["device"]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda cannot be used here"):
            suite.describe("cuda")


def test_planning_needs_no_packages_but_torch():
    """A bare machine must get as far as installing the wheels."""
    text = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'numpy', 'safetensors', 'rich', 'typer', 'pytest', 'matplotlib', 'deltakern'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from benchmarks import run, suite, wheels\n"
        "run._parser().parse_args(['--gpu-suite', '--wheels', 'x'])\n"
    )
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True)


# --- wheels -------------------------------------------------------------------------------------------------------------------------


def test_wheels_are_downloaded_for_the_other_machine():
    pure, rest = wheels.downloads(Path("w"), "3.12", ("pytest", "fvcore"))
    assert pure[pure.index("wheel") :] == ["wheel", "--quiet", "--no-deps", "--wheel-dir", "w", "fvcore", "iopath"]
    assert rest[rest.index("--python-version") + 1] == "3.12"
    assert {"--only-binary=:all:", "manylinux_2_28_x86_64", "pytest", "yacs", "pillow"} <= set(rest)
    assert not {"fvcore", "iopath", "torch"} & set(rest)
    assert len(wheels.downloads(Path("w"), "3.12", ("pytest",))) == 1


def test_wheels_that_are_missing_or_too_old_are_installed(tmp_path, monkeypatch):
    least = wheels.least_versions((ROOT / "pyproject.toml").read_text())
    assert least["setuptools"] == "77"
    assert least["torch"] == "2.10"
    for name in ("pytest-9.0.0-py3-none-any.whl", "setuptools-80.1.0-py3-none-any.whl", "no_such.thing-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    installed = {"pytest": "8.4", "setuptools": "70.0"}

    def version(name):
        if name not in installed:
            raise wheels.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(wheels.importlib.metadata, "version", version)
    assert [wheels.named(w)[0] for w in wheels.missing(tmp_path, least)] == ["no-such-thing", "setuptools"]
    installed["setuptools"] = "78.1"
    assert [wheels.named(w)[0] for w in wheels.missing(tmp_path, least)] == ["no-such-thing"]
    (tmp_path / "pytest-9.1.0-py3-none-any.whl").touch()
    with pytest.raises(ValueError, match="two versions of pytest"):
        wheels.missing(tmp_path, least)
    with pytest.raises(FileNotFoundError, match="no wheels"):
        wheels.missing(tmp_path / "nothing", least)


def test_a_wheel_is_installed_without_a_network_beside_the_machines_packages(tmp_path, monkeypatch):
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "no_such_thing-1.5-py3-none-any.whl", "w") as wheel:
        info = "no_such_thing-1.5.dist-info"
        wheel.writestr("no_such_thing.py", "VALUE = 7\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: no-such-thing\nVersion: 1.5\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"no_such_thing.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    site = wheels.install(folder)
    assert site.parent == tmp_path / "build"
    assert (site / "no_such_thing.py").exists()
    assert importlib.util.find_spec("no_such_thing") is None


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


def test_check(capsys):
    assert bench.main(["--measure", "check:swiglu=reference;gelu=reference", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "swiglu reference: right\ngelu reference: right\n"
    with pytest.raises(SystemExit):
        bench.main(["--measure", "check:swiglu=fast", "--device", "cpu"])
    assert "expected OP=IMPLEMENTATION, got 'swiglu=fast'" in capsys.readouterr().err


def test_a_row_names_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "environment", lambda device="cpu": {**WHERE, "commit": ""})
    with pytest.raises(ValueError, match="--commit"):
        measure.measure("ceilings", "cpu", "tiny", torch.float32, stages.IMPLEMENTATIONS, out=tmp_path / "a.jsonl")


def test_results_are_kept_by_device():
    assert measure.results_file({"device": "NVIDIA H200"}).name == "nvidia-h200.jsonl"


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
