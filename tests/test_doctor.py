"""``deltakern doctor``: what it finds when all is well, and that it finds what is broken."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltakern import backend, doctor, launch
from deltakern.report import accuracy

SCRIPT = Path(doctor.__file__)


@pytest.fixture(autouse=True)
def _plans():
    """None of a kernel that another one takes the place of."""
    launch.forget_plans()
    yield
    launch.forget_plans()


def _found(findings, name):
    return next(f for f in findings if f.name == name)


def test_nothing_is_broken_here(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_values", lambda: iter(()))  # the values have their own tests
    assert doctor.main(json_output=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == doctor.SCHEMA
    assert report["ok"] is True
    chosen = {f["name"]: f for f in report["findings"] if f["group"] == "choice on cpu"}
    assert set(chosen) == set(backend.ops())
    named = {f["name"] for f in report["findings"] if f["group"] == "environment"}
    assert named >= set(backend.ENVIRONMENT)
    assert doctor.main() == 0
    assert capsys.readouterr().out.endswith("Nothing is broken.\n")


def test_values_and_a_broken_kernel(monkeypatch, capsys):
    only = frozenset({"swiglu"})
    good = list(doctor._values(only))
    assert {f.name for f in good} == {"swiglu reference", "swiglu triton"}
    assert all(f.status == doctor.OK for f in good)
    kernels = importlib.import_module("deltakern.ops.kernels.swiglu")
    right = kernels.swiglu_forward
    monkeypatch.setattr(kernels, "swiglu_forward", lambda *args: right(*args) * 1.001)
    bad = {f.name: f for f in doctor._values(only)}
    assert bad["swiglu triton"].status == doctor.BROKEN
    assert "output 0: relative error 1.0e-03" in bad["swiglu triton"].detail
    assert bad["swiglu reference"].status == doctor.OK
    monkeypatch.setattr(doctor, "_values", lambda: iter(bad.values()))
    assert doctor.main() == 1
    assert "1 broken: swiglu triton" in capsys.readouterr().out


BREAK = """
import importlib, sys

losses = importlib.import_module("deltakern.ops.best_of_n").LOSSES
extension = importlib.import_module("deltakern.ops._extension")


class Broken:
    \"\"\"The compiled extension, computing another loss than it is asked for.\"\"\"

    def __init__(self, right):
        self.right = right

    def __getattr__(self, name):
        return getattr(self.right, name)

    def best_of_n_cpu(self, *args):
        self.right.best_of_n_cpu(*args[:9], (args[9] + 1) % len(losses), *args[10:])


right = extension.module
extension.module = lambda op: Broken(right(op))
"""


@pytest.mark.skipif(backend.extension().module is None, reason="needs the compiled extension")
def test_a_broken_kernel_fails_doctor_and_loses_its_speed(tmp_path):
    """Both commands as a user runs them, but for the break: the kernel that runs here computes another loss."""

    def run(text: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "DELTAKERN_IMPL": ""}
        env.pop("TRITON_INTERPRET", None)
        return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=env, cwd=SCRIPT.parents[1], check=False)

    done = run(f"{BREAK}\nfrom deltakern import doctor\nsys.exit(doctor.main(json_output=True))")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    broken = [f["name"] for f in report["findings"] if f["status"] == "broken"]
    assert broken == ["best_of_n cpp", "best_of_n_head cpp"]  # the second ends in the first's reduction
    out = tmp_path / "rows.jsonl"
    command = ["--measure", "op:best_of_n", "--device", "cpu", "--commit", "abc", "--out", str(out)]
    done = run(f"{BREAK}\nfrom benchmarks import run\nsys.exit(run.main({command!r}))")
    assert done.returncode == 1, done.stderr
    assert "no speed: best_of_n cpp is wrong" in done.stdout
    assert not out.exists()


def test_a_kernel_that_raises_or_returns_nan_is_broken(monkeypatch):
    kernels = importlib.import_module("deltakern.ops.kernels.swiglu")

    def fails(*_):
        raise RuntimeError("no such launch")

    monkeypatch.setattr(kernels, "swiglu_forward", fails)
    (found,) = (f for f in doctor._values(frozenset({"swiglu"})) if f.name == "swiglu triton")
    assert found.status == doctor.BROKEN
    assert "no such launch" in found.detail
    monkeypatch.setattr(kernels, "swiglu_forward", lambda x: torch.full((*x.shape[:-1], x.shape[-1] // 2), float("nan"), dtype=x.dtype))
    (found,) = (f for f in doctor._values(frozenset({"swiglu"})) if f.name == "swiglu triton")
    assert found.status == doctor.BROKEN


def test_it_runs_where_torch_does_not(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: undefined symbol')\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(SCRIPT), "--json"], capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 1, done.stderr
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert found["torch"]["status"] == "broken"
    assert "undefined symbol" in found["torch"]["value"]
    assert found["import"]["status"] == "broken"
    assert found["python"]["status"] == "ok"


def test_versions(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda package: ["0.0.1"])
    assert _found(doctor._packages(), "numpy").status == doctor.BROKEN
    monkeypatch.setattr(doctor, "_installed", lambda package: ["0.0.1", "0.0.2"])
    assert "several versions" in _found(doctor._packages(), "numpy").detail
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_least_versions", lambda: {"numpy": "999.0"})
    assert "at least 999.0" in _found(doctor._packages(), "numpy").detail
    monkeypatch.setattr(doctor, "_least_versions", lambda: {"numpy": "1.26", "torch": "2.10"})
    assert all(f.status != doctor.BROKEN for f in doctor._packages())


def test_extension(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (found,) = doctor._extension()
    assert found.status == doctor.NOTE
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(backend, "extension", lambda: backend.Loaded(None, "ImportError: undefined symbol: x"))
    (found,) = doctor._extension()
    assert found.status == doctor.BROKEN
    assert "undefined symbol" in found.detail


@pytest.mark.parametrize(
    ("compiled", "capability", "runs"),
    [
        (["80", "90"], (9, 0), True),
        (["80"], (8, 6), True),
        (["86"], (8, 0), False),
        (["80", "90"], (10, 0), False),
        (["80", "compute_90"], (10, 0), True),
        (["80", "120+PTX"], (12, 1), True),
        (["sm_90a"], (9, 0), True),
        (["sm_90a", "compute_90a"], (10, 0), False),
        (["sm_120"], (9, 0), False),
        ([], (9, 0), False),
    ],
)
def test_architectures(compiled, capability, runs):
    assert doctor.compiled_for(compiled, capability) is runs


def test_environment(monkeypatch):
    monkeypatch.setenv("DELTAKERN_STRICT", "1")
    monkeypatch.setenv("DELTAKERN_STRIKT", "1")
    found = {f.name: f for f in doctor._environment()}
    assert found["DELTAKERN_STRICT"].value == "1"
    assert found["DELTAKERN_STRIKT"].status == doctor.NOTE


def test_a_check_that_fails_is_a_finding():
    def look():
        yield doctor.Finding("group", "first", doctor.OK, "fine")
        raise ValueError("no")

    first, second = doctor._attempt("group", "all", look)
    assert first.status == doctor.OK
    assert second.status == doctor.BROKEN
    assert "ValueError: no" in second.value


def test_the_tolerance_rule_is_that_of_the_tests():
    """Two texts, one rule: the tests' own comparison is not in the package, and must not drift from it."""
    compare = importlib.import_module("compare")
    torch.manual_seed(0)
    truth = torch.randn(500, dtype=torch.float64)
    plain = truth + 1e-3 * torch.randn(500, dtype=torch.float64)
    for noise in (1e-3, 1.9e-3, 2.2e-3, 4e-3, float("nan")):
        value = (truth + noise * torch.randn(500, dtype=torch.float64)).float()
        allowed = accuracy.FACTOR * accuracy.relative_error(plain.float(), truth) + torch.finfo(torch.float32).eps
        ours = accuracy.Deviation("output 0", accuracy.relative_error(value, truth), 0.0, allowed).ok
        try:
            compare.assert_as_accurate(value, plain, truth)
            theirs = True
        except AssertionError:
            theirs = False
        assert ours is theirs, noise
