"""Rows of measurements: what was measured, where, with what, at which commit. One JSON object a line, appended, never rewritten."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
KINDS = ("op", "model", "ceiling", "accuracy", "host")


class RowError(ValueError):
    """A line that is no row of this schema."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        kind: "op" (one case of one op), "model" (one stage of the models), "ceiling" (the machine's), "accuracy" or "host" (thread time
            of a call with a driver that does nothing).
        name: the op, the stage, "copy" or "gemm".
        case: the op's case, or the preset.
        impl: implementation; "release (eager)" and "release (torch.compile)" are the baselines of models.
        dtype: of the inputs, or of autocast.
        shape: what else fixes the work, such as {"scale": 0.125, "samples": 20}.
        seconds, low, high, rounds: median, 10th and 90th percentile, samples.
        figures: other measurements by name: bytes, flops, peak_bytes, kernels, launch_seconds, error, ...
        where: machine and versions, see :func:`environment`.
    """

    kind: str
    name: str
    case: str
    impl: str
    dtype: str
    shape: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RowError(f"kind must be one of {KINDS}, got {self.kind!r}")


def _output(*command: str) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def processor(cpuinfo: str) -> str:
    """The processor's name out of the text of /proc/cpuinfo, with family and model where the name alone has no number in it.

    A virtual machine may say no more than "AMD EPYC" or "Intel(R) Xeon(R) Processor".
    """
    found: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = " ".join(re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b", "", found.get("model name", "")).split())
    if not name:
        return platform.processor() or platform.machine()
    if re.search(r"\d", name) or not found.get("cpu family"):
        return name
    return f"{name} family {found['cpu family']} model {found.get('model', '?')}"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    return processor(text)


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where and with what: device, driver, versions, threads, commit (with "+" where files differ from it), time."""
    import importlib.metadata

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    device = torch.device(device)
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    found = {
        "commit": f"{commit}+" if commit and changed else commit,
        "when": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": f"{_processor()}, {os.cpu_count()} cores",
        "driver": "",
        "deltakern": version("deltakern"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "platform": sys.platform,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        found["cuda"] = torch.version.cuda or ""
    return found


def append(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Adds rows to a file, one line each, made if need be; all of them are written or none, also where the process is killed."""
    text = "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + text, encoding="utf-8")
    fresh.replace(path)


def parse(line: str, where: str = "row") -> Row:
    """One line of a results file.

    Raises:
        RowError: not JSON, another schema, an unknown or missing field.
    """
    try:
        found = json.loads(line)
    except json.JSONDecodeError as problem:
        raise RowError(f"{where}: not JSON ({problem})") from problem
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise RowError(f"{where}: expected an object of schema {SCHEMA}, got {line[:80]!r}")
    known = {f.name for f in fields(Row)}
    if unknown := set(found) - known:
        raise RowError(f"{where}: unknown fields {sorted(unknown)}")
    try:
        return Row(**found)
    except TypeError as problem:
        raise RowError(f"{where}: {problem}") from problem


def read(folder: str | os.PathLike[str]) -> list[Row]:
    """Every row of the ``*.jsonl`` files in a folder (or of one file), file by file, in order.

    Raises:
        FileNotFoundError: no such folder or file. RowError: a line that is no row.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no results at {folder}")
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else [folder]
    return list(_lines(files))


def _lines(files: Iterable[Path]) -> Iterator[Row]:
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                yield parse(line, f"{file.name}:{number}")


def latest(rows: Iterable[Row]) -> list[Row]:
    """What a table shows: of each measurement on each device the rows of its last commit, of each implementation the last of them.

    Implementations are compared within a run, so what was measured at an older commit is not put beside what is newer.
    """
    newest: dict[Any, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row.where.get("when", "")):  # stable: in a file later lines are later
        shape = json.dumps(row.shape, sort_keys=True)
        measured = (row.kind, row.name, row.case, row.dtype, shape, row.where.get("device"))
        group = newest.pop(measured, {})
        if any(other.where.get("commit") != row.where.get("commit") for other in group.values()):
            group = {}
        group.pop(row.impl, None)
        newest[measured] = {**group, row.impl: row}
    return [row for group in newest.values() for row in group.values()]
