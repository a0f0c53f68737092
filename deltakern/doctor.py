"""``deltakern doctor``: what is installed, what was loaded, which implementation every op takes and why, and whether its values are right.

The standard library is all that this file needs to start, so that it can say what is wrong with the rest: where ``import
deltakern`` itself fails, run it by its path, ``python .../deltakern/doctor.py``. The exit status is 0 where nothing is broken.
A kernel that is merely absent is a note: the PyTorch reference runs. A wrong value, an extension that does not load, a package
that is older than required or loaded from elsewhere than installed is broken.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
OK, NOTE, BROKEN = "ok", "note", "broken"
REQUIRED = ("torch", "numpy", "safetensors", *(("triton",) if sys.platform == "linux" else ()))
OPTIONAL = ("av", "matplotlib", "pillow", "rich", "typer", "fvcore", "huggingface-hub", "flash-attn", "pyarrow", "lightning")


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``status`` is "ok", "note" or "broken"."""

    group: str
    name: str
    status: str
    value: str
    detail: str = ""


def _attempt(group: str, name: str, look: Any) -> Iterator[Finding]:
    """The findings of ``look()``; a check that itself fails is a finding."""
    try:
        yield from look()
    except Exception as problem:
        yield Finding(group, name, BROKEN, f"the check failed: {type(problem).__name__}: {problem}")


def _run(*command: str) -> str | None:
    """Standard output of a command, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _machine() -> Iterator[Finding]:
    group = "machine"
    yield Finding(group, "python", OK, f"{platform.python_version()} ({sys.executable})")
    yield Finding(group, "system", OK, f"{platform.platform()}, {os.cpu_count()} CPU cores")
    query = _run("nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader")
    for i, line in enumerate((query or "").splitlines()):
        yield Finding(group, f"GPU {i}", OK, ", driver ".join(line.split(", ")[:2]), f"compute capability {line.split(', ')[-1]}")
    if not query:
        yield Finding(group, "GPU", NOTE, "none found by nvidia-smi")
    compilers = {name: shutil.which(name) for name in ("c++", "nvcc")}
    found = ", ".join(f"{name}: {path or 'not found'}" for name, path in compilers.items())
    yield Finding(group, "compilers", OK if compilers["c++"] else NOTE, found, "needed only to build the extension")


def _installed(package: str) -> list[str]:
    """Versions of every installed copy of a distribution on the path."""
    normal = package.replace("_", "-").lower()
    found = (d for d in importlib.metadata.distributions() if (d.metadata["Name"] or "").replace("_", "-").lower() == normal)
    return list(dict.fromkeys(d.version for d in found))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def _least_versions() -> dict[str, str]:
    """Least versions that the installed deltakern asks for; empty for a source tree that was never installed."""
    try:
        requirements = importlib.metadata.requires("deltakern") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)\s*>=\s*([\w.]+)(.*)", line) for line in requirements)
    return {m[1].lower(): m[2] for m in found if m and "extra" not in m[3]}


def _packages() -> Iterator[Finding]:
    group, least = "packages", _least_versions()
    for package in REQUIRED:
        installed = _installed(package)
        try:
            module = importlib.import_module(package)
        except Exception as problem:  # a broken binary raises more than ImportError
            missing = "needed" if package != "triton" else "no Triton kernel can run"
            status = BROKEN if installed or package != "triton" else NOTE
            found = f"installed {', '.join(installed)}, " if installed else ""
            yield Finding(group, package, status, f"{found}could not be imported: {type(problem).__name__}: {problem}", missing)
            continue
        loaded, where = getattr(module, "__version__", "?"), getattr(module, "__file__", None) or ""
        if len(installed) > 1:
            yield Finding(group, package, BROKEN, f"loaded {loaded}", f"several versions are installed: {', '.join(installed)}")
        elif installed and loaded != "?" and loaded.partition("+")[0] != installed[0].partition("+")[0]:
            yield Finding(group, package, BROKEN, f"loaded {loaded}", f"installed is {installed[0]}; loaded from {where}")
        elif package in least and _numbers(loaded) < _numbers(least[package]):
            yield Finding(group, package, BROKEN, f"loaded {loaded}", f"at least {least[package]} is needed")
        else:
            yield Finding(group, package, OK, f"loaded {loaded}, installed {', '.join(installed) or 'not as a distribution'}", where)
    for package in OPTIONAL:
        installed = _installed(package)
        status = BROKEN if len(installed) > 1 else OK if installed else NOTE
        yield Finding(group, package, status, ", ".join(installed) or "not installed", "optional")


def _package() -> Iterator[Finding]:
    import deltakern

    installed, folder = _installed("deltakern"), Path(deltakern.__file__).parent
    if not installed:
        yield Finding("deltakern", "version", NOTE, "not installed", f"loaded from the source tree {folder}")
    else:
        status = OK if installed == [deltakern.__version__] else BROKEN
        yield Finding("deltakern", "version", status, f"loaded {deltakern.__version__}, installed {', '.join(installed)}", str(folder))


def _extension() -> Iterator[Finding]:
    import importlib.util

    from deltakern import backend

    group, name = "deltakern", "extension"
    if importlib.util.find_spec("deltakern._C") is None:
        how = "install from source with a C++ compiler at hand; with DELTAKERN_REQUIRE_EXT=1 the install says what fails"
        yield Finding(group, name, NOTE, "not built", how)
        return
    loaded = backend.extension()
    if loaded.module is None:
        yield Finding(group, name, BROKEN, "built, but does not load", str(loaded.error))
        return
    built = build_info(loaded.module)
    shown = {key: " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else value for key, value in built.items()}
    text = ", ".join(f"{key}: {value}" for key, value in shown.items())
    yield Finding(group, name, OK, str(loaded.module.__file__), text)


def build_info(module: Any) -> dict[str, Any]:
    """What the compiled extension says about its own build; empty if it says nothing."""
    found = getattr(module, "build_info", None)
    found = found() if callable(found) else found
    return dict(found) if found else {}


def compiled_for(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures ("90", "sm_90a", "compute_120", "120+PTX") runs on a device of this capability.

    Binary code runs on later minor versions of its own major; PTX on anything as new or newer.
    """
    device = 10 * capability[0] + capability[1]
    for text in architectures:
        number = int(re.search(r"\d+", text)[0])
        specific = re.search(r"\d+a", text) is not None
        ptx = "compute" in text or "ptx" in text.lower()
        if specific:
            if device == number:
                return True
        elif (number // 10 == device // 10 and number <= device) or (ptx and number <= device):
            return True
    return False


def _devices() -> Iterator[Finding]:
    import torch

    from deltakern import backend

    group = "devices"
    yield Finding(group, "cpu", OK, torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        build = torch.version.cuda
        why = "torch is built without CUDA" if build is None else f"torch is built for CUDA {build}, but no device works"
        yield Finding(group, "cuda", NOTE, "not available", why)
        return
    module = backend.extension().module
    built = build_info(module) if module is not None else {}
    compiled = [str(a) for a in built.get("cuda_archs", ())]
    if compiled and built.get("cuda_ptx"):
        compiled.append(f"compute_{built['cuda_ptx']}")
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        capability = (found.major, found.minor)
        size = f"{found.multi_processor_count} multiprocessors, {found.total_memory / 2**30:.0f} GiB"
        text = f"{found.name}, sm_{found.major}{found.minor}, {size}"
        if not compiled_for(torch.cuda.get_arch_list(), capability):
            yield Finding(group, f"cuda:{i}", BROKEN, text, f"torch is compiled for {' '.join(torch.cuda.get_arch_list())}")
        elif compiled and not compiled_for(compiled, capability):
            yield Finding(group, f"cuda:{i}", BROKEN, text, f"the extension is compiled for {' '.join(compiled)}; see DELTAKERN_CUDA_ARCHS")
        else:
            mine = f"the extension is compiled for {' '.join(compiled)}" if compiled else "the extension has no CUDA part"
            yield Finding(group, f"cuda:{i}", OK if compiled else NOTE, text, mine)


def _choices() -> Iterator[Finding]:
    """Which implementation ``impl="auto"`` takes for every op on every device, and why."""
    import torch

    from deltakern import backend
    from deltakern.cases import cases

    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        group = f"choice on {device}"
        for op in backend.ops():
            case = next(iter(cases(op, "tiny")), None)
            if case is None:
                yield Finding(group, op, NOTE, "no case in deltakern.cases to ask about")
                continue
            args, kwargs = case.make(torch.float32, device, torch.Generator().manual_seed(0), 1.0)
            try:
                found = backend.explain(case.function, *args, **kwargs)
            except backend.BackendError as problem:
                yield Finding(group, op, BROKEN, str(problem))
                continue
            others = "; ".join(f"not {name}: {reason}" for name, reason in found.refused.items())
            missed = found.chosen == "reference" and found.why == backend._MISSED
            yield Finding(group, op, NOTE if missed else OK, f"{found.chosen} ({found.why})", others)


def _attention() -> Iterator[Finding]:
    """Which attention ``attention="auto"`` takes at the models' head size, after its self-check where one is due."""
    import torch

    from deltakern.nn.attend import PACKAGES, _own, _package, decide

    group = "attention"
    for name in PACKAGES:
        found, problem = _package(name)
        yield Finding(group, name, OK if found else NOTE, "can be named" if found else "not usable", problem or "")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device, (queries, keys) in itertools.product(devices, ((2049, 2049), (1, 2049))):
        q, k = (torch.zeros(1, n, 12, 64, dtype=torch.bfloat16, device=device) for n in (queries, keys))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is in the finding
            found = decide(q, k, k)
        kernel = _own(*(t.transpose(1, 2) for t in (q, k, k)), None) if found.kernel == "sdpa" else found.kernel
        status = NOTE if "failed" in found.why else OK
        yield Finding(group, f"{device}, {queries} by {keys}", status, f"{kernel} in bfloat16", found.why)


def _values(only: frozenset[str] | None = None) -> Iterator[Finding]:
    """Every implementation that can run here against float64, forward and backward, on the tiny cases; ``only`` names ops."""
    import torch

    from deltakern import backend
    from deltakern.cases import cases
    from deltakern.report.accuracy import check, runnable

    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        group = f"values on {device}"
        for op in backend.ops() if only is None else sorted(only):
            verdicts: dict[str, list[Any]] = {}
            for case in cases(op, "tiny"):
                for dtype in (torch.float32, torch.bfloat16):
                    for impl in runnable(case, dtype, device)[0]:
                        # Triton's interpreter computes in bfloat16 as the GPU does not
                        if impl == "triton" and device == "cpu" and dtype != torch.float32:
                            continue
                        verdicts.setdefault(impl, []).append(check(case, impl, dtype, device))
            for impl, found in verdicts.items():
                bad = [v for v in found if not v.ok]
                if bad:
                    where = "; ".join(f"{v.case} in {v.dtype}: {v.problem}" for v in bad[:3])
                    yield Finding(group, f"{op} {impl}", BROKEN, f"{len(bad)} of {len(found)} checks fail", where)
                else:
                    worst = max(v.error for v in found if v.dtype == "float32")
                    yield Finding(group, f"{op} {impl}", OK, f"{len(found)} checks", f"greatest relative error in float32 {worst:.1e}")


def _environment() -> Iterator[Finding]:
    from deltakern import backend

    for name, meaning in backend.ENVIRONMENT.items():
        yield Finding("environment", name, OK, os.environ.get(name, "not set"), meaning)
    for name in sorted(set(os.environ) - set(backend.ENVIRONMENT)):
        if name.startswith("DELTAKERN_"):
            yield Finding("environment", name, NOTE, os.environ[name], "set, but nothing reads it")


def diagnose() -> Iterator[Finding]:
    """All findings, in order, as they are made. Where torch or the package cannot be imported the rest is left out."""
    yield from _attempt("machine", "machine", _machine)
    packages = list(_attempt("packages", "packages", _packages))
    yield from packages
    try:
        importlib.import_module("deltakern")
    except Exception as problem:
        yield Finding("deltakern", "import", BROKEN, f"{type(problem).__name__}: {problem}")
        return
    for group, look in (
        ("deltakern", _package),
        ("deltakern", _extension),
        ("devices", _devices),
        ("choice", _choices),
        ("attention", _attention),
        ("values", _values),
        ("environment", _environment),
    ):
        yield from _attempt(group, look.__name__.strip("_"), look)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """The report as JSON-ready data: ``schema``, ``ok``, ``findings``."""
    return {"schema": SCHEMA, "ok": all(f.status != BROKEN for f in findings), "findings": [asdict(f) for f in findings]}


def _print(findings: Iterator[Finding]) -> list[Finding]:
    shown, group = [], None
    for finding in findings:
        if finding.group != group:
            group = finding.group
            print(f"\n{group}")
        mark = {OK: "  ok  ", NOTE: " note ", BROKEN: "BROKEN"}[finding.status]
        together = f"{finding.value}; {finding.detail}" if finding.detail else finding.value
        if len(together) <= 100:
            print(f"  {mark}  {finding.name:<28} {together}")
        else:
            print(f"  {mark}  {finding.name:<28} {finding.value}\n{'':<39}{finding.detail}")
        sys.stdout.flush()
        shown.append(finding)
    return shown


def main(json_output: bool = False) -> int:
    """Prints the report; the exit status: 0, or 1 where anything is broken."""
    if json_output:
        report = as_json(list(diagnose()))
        print(json.dumps(report, indent=2))
        return 0 if report["ok"] else 1
    broken = [f for f in _print(diagnose()) if f.status == BROKEN]
    print(f"\n{len(broken)} broken: {', '.join(f.name for f in broken)}" if broken else "\nNothing is broken.")
    return 1 if broken else 0


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    # Run by its path, Python puts this folder first, where "data" or "report" would hide packages of that name
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != here] + [str(here.parent)]
    parser = argparse.ArgumentParser(description="What is installed, what runs, and whether its values are right.")
    parser.add_argument("--json", action="store_true")
    sys.exit(main(parser.parse_args().json))
