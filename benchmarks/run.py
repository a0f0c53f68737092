"""Measures rows in parts, each in a process of its own, resumable; writes README's table from them.

``python -m benchmarks.run --cpu-suite`` and ``--gpu-suite`` do everything for one machine, the most important parts first, and append
rows to ``benchmarks/results/<device>.jsonl``. A part that is done at this commit is not done again; ``--dry-run`` shows the plan.
``--measure`` takes single measurements, ``--update-readme`` writes the table of the committed rows into README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltakern import backend
from deltakern.cases import cases
from deltakern.report import collect, render, rows, stages

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- performance: begin (python -m benchmarks.run --update-readme) -->", "<!-- performance: end -->"
STATE = ROOT / "build" / "suite.json"  # which parts are done; build/ is not in the repository
LIMIT = 9 * 60  # seconds a part on a borrowed GPU may take


@dataclass(frozen=True)
class Part:
    """One step of a suite: a command in a process of its own, killed after ``limit`` seconds."""

    name: str
    command: tuple[str, ...]
    limit: float = LIMIT


def _measure(what: str, device: str, preset: str | None = None, *extra: str) -> tuple[str, ...]:
    chosen = ("--preset", preset) if preset else ()
    return (sys.executable, "-m", "benchmarks.run", "--measure", what, "--device", device, *chosen, *extra)


def _batch(stage: str) -> tuple[str, ...]:
    """The batch a GPU gets in the release's training at 512 px; a forecast is of one clip."""
    if stage in ("backbone", "encode", "decode", "DeltaTok training step"):
        return ("--batch", "64")
    return ("--batch", "32") if stage == "candidate search" or stage.startswith("DeltaWorld training") else ()


def gpu_suite() -> list[Part]:
    """Everything for a borrowed GPU, by importance: built and right, then the claims, then the rest, the table last."""
    python = sys.executable
    main = ("encode", "DeltaTok training step", "decode", "backbone", "predictor step", "candidate search", "token-space sample", "rollout")
    later = [s for s in stages.STAGES if s not in main]
    parts = [
        Part("build", (python, "-m", "pip", "install", "--no-deps", "-e", ".")),
        Part("doctor", (python, "-m", "deltakern.doctor")),
        Part("tests: gpu", (python, "-m", "pytest", "-q", "-m", "gpu", "tests")),
        Part(
            "tests: kernels",
            (python, "-m", "pytest", "-q", *(f"tests/test_{name}.py" for name in ("triton_kernels", "best_of_n", "best_of_n_head"))),
        ),
        Part("ceilings", _measure("ceilings", "cuda")),
    ]
    parts += [Part(f"vitb-512: {stage}", _measure(f"stage:{stage}", "cuda", "vitb-512", *_batch(stage))) for stage in main]
    parts += [Part(f"op: {op}", _measure(f"op:{op}", "cuda")) for op in backend.ops()]
    parts += [
        Part("sanitizer", ("compute-sanitizer", "--error-exitcode", "1", python, "-m", "pytest", "-q", "-x", "tests/test_best_of_n.py")),
        Part("accuracy", _measure("accuracy", "cuda")),
    ]
    parts += [Part(f"vitb-512: {stage}", _measure(f"stage:{stage}", "cuda", "vitb-512", *_batch(stage))) for stage in later]
    parts += [Part(f"vitb-256: {stage}", _measure(f"stage:{stage}", "cuda", "vitb-256", *_batch(stage))) for stage in stages.STAGES]
    single = [stage for stage in stages.STAGES if _batch(stage)]
    parts += [Part(f"vitb-512, one clip: {stage}", _measure(f"stage:{stage}", "cuda", "vitb-512")) for stage in single]
    parts += [Part("tests: all", (python, "-m", "pytest", "-q", "tests"))]
    return [*parts, _table()]


def cpu_suite() -> list[Part]:
    """Rows of a machine without a GPU. One stage takes minutes at the released sizes, so the limits are wide."""
    slow = 60 * 60
    parts = [
        Part("doctor", (sys.executable, "-m", "deltakern.doctor")),
        Part("ceilings", _measure("ceilings", "cpu")),
        *(Part(f"tiny: {stage}", _measure(f"stage:{stage}", "cpu", "tiny"), slow) for stage in stages.STAGES),
        *(Part(f"op: {op}", _measure(f"op:{op}", "cpu"), slow) for op in backend.ops()),
        Part("accuracy", _measure("accuracy", "cpu"), slow),
    ]
    light = tuple(i for i in stages.IMPLEMENTATIONS if i not in (stages.REFERENCE, stages.OURS_COMPILED))
    chosen = ("--impl", ";".join(light))
    parts += [Part(f"vitb-256: {stage}", _measure(f"stage:{stage}", "cpu", "vitb-256", *chosen), slow) for stage in stages.STAGES]
    eager = ("--impl", ";".join((stages.RELEASE, stages.OURS, stages.ONE_FUTURE)))
    large = ("predictor step", "token-space sample", "rollout")
    parts += [Part(f"vitb-512: {stage}", _measure(f"stage:{stage}", "cpu", "vitb-512", *eager), slow) for stage in large]
    return [*parts, _table()]


def _table() -> Part:
    return Part("table", (sys.executable, "-m", "deltakern.cli", "report", "--from", str(RESULTS), "--out", "deltakern-report"))


def load_state(commit: str, path: Path = STATE) -> dict[str, str]:
    """What the parts of earlier runs at this commit came to: name to "done" or why not."""
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found.get("parts", {}) if found.get("commit") == commit else {}


def save_state(commit: str, parts: dict[str, str], path: Path = STATE) -> None:
    """Replaces the state file at once, so that killing the run leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"commit": commit, "parts": parts}, indent=1))
    fresh.replace(path)


def outstanding(parts: Sequence[Part], state: dict[str, str]) -> list[Part]:
    """The parts still to run: all that are not done. The table is always drawn again."""
    return [part for part in parts if state.get(part.name) != "done" or part.name == "table"]


def run_part(part: Part) -> str:
    """Runs one part: "done", or why not."""
    if shutil.which(part.command[0]) is None:
        return f"{part.command[0]} is not installed"
    try:
        done = subprocess.run(part.command, cwd=ROOT, timeout=part.limit, check=False)
    except subprocess.TimeoutExpired:
        return f"killed after {part.limit:.0f} s"
    return "done" if done.returncode == 0 else f"exit status {done.returncode}"


def run_suite(
    parts: Sequence[Part], *, dry_run: bool = False, only: str | None = None, commit: str | None = None, state_path: Path = STATE
) -> int:
    """Runs what is outstanding, in order; a part that fails does not stop the others. The exit status: 0 if all are done."""
    if commit is not None:
        parts = [Part(p.name, (*p.command, "--commit", commit), p.limit) if "--measure" in p.command else p for p in parts]
    commit = commit or rows.environment()["commit"]
    state = load_state(commit, state_path)
    todo = [p for p in outstanding(parts, state) if only is None or only in p.name]
    print(f"{len(parts)} parts at commit {commit}, {len(todo)} to run")
    for i, part in enumerate(todo, 1):
        print(f"[{i}/{len(todo)}] {part.name} (at most {part.limit:.0f} s): {shlex.join(part.command)}", flush=True)
        if dry_run:
            continue
        begin = time.monotonic()
        state[part.name] = run_part(part)
        save_state(commit, state, state_path)
        print(f"    {state[part.name]}, {time.monotonic() - begin:.0f} s", flush=True)
    failed = {name: why for name, why in state.items() if why != "done"}
    for name, why in failed.items():
        print(f"not done: {name}: {why}")
    return 1 if failed else 0


# --- single measurements ---------------------------------------------------------------------------------------------------------


def results_file(where: dict[str, Any]) -> Path:
    """The file of a device's rows: "benchmarks/results/nvidia-h200.jsonl"."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-") + ".jsonl")


def measure(
    what: str,
    device: str,
    preset: str,
    dtype: torch.dtype,
    implementations: tuple[str, ...],
    *,
    batch: int = 1,
    commit: str | None = None,
    out: Path | None = None,
) -> int:
    """Measures "ceilings", "accuracy", "op:NAME" or "stage:NAME" and appends the rows. The exit status: 1 where a value is wrong."""
    where = rows.environment(device)
    if commit is not None:
        where["commit"] = commit
    if not where["commit"]:
        raise ValueError("a row names its commit; this tree has no git history, so give it with --commit")
    path = out or results_file(where)
    kind, _, name = what.partition(":")
    red = 0
    if kind == "ceilings":
        rows.append(path, collect.ceiling_rows(device, dtype, budget=5, where=where))
    elif kind == "accuracy":
        for op in backend.ops():
            made = collect.accuracy_rows(op, device, where=where)
            red += sum(not row.figures["ok"] for row in made)
            rows.append(path, made)
        rows.append(path, collect.model_accuracy_rows(device, where=where))
    elif kind == "op":
        if name not in backend.ops():
            raise ValueError(f"--measure op:NAME: NAME must be one of {sorted(backend.ops())}, got {name!r}")
        checked: collect.Checked = {}
        most = 1 << 26 if device == "cpu" else 1 << 40
        for case in cases(name, "benchmark"):
            for backward in (False, True):
                try:
                    made = collect.op_rows(
                        case, device, dtype, most_bytes=most, budget=2, compiled=True, backward=backward, checked=checked, where=where
                    )
                except collect.RedError as problem:
                    print(f"no speed: {problem}", file=sys.stderr)
                    red += 1
                    continue
                rows.append(path, made)
                print(f"{case.op} {case.name}: {', '.join(f'{row.impl} {render.seconds(row.seconds)}' for row in made)}", flush=True)
    elif kind == "stage":
        if name not in stages.STAGES:
            raise ValueError(f"--measure stage:NAME: NAME must be one of {stages.STAGES}, got {name!r}")
        autocast = None if dtype == torch.float32 else dtype
        models = stages.Models(stages.PRESETS[preset], torch.device(device), autocast=autocast, batch=batch)
        for stage in models.stages(implementations, (name,)):
            budget = 5 if preset == "tiny" else 20
            try:
                made = collect.stage_rows(stage, preset, device, dtype, budget=budget, where=where)
            except collect.RedError as problem:
                print(f"no speed: {problem}", file=sys.stderr)
                return 1
            rows.append(path, made)
            print(f"{stage.name}: {', '.join(f'{row.impl} {render.seconds(row.seconds)}' for row in made)}", flush=True)
    else:
        raise ValueError(f"--measure: expected ceilings, accuracy, op:NAME or stage:NAME, got {what!r}")
    return 1 if red else 0


# --- README ------------------------------------------------------------------------------------------------------------------------


def readme_table(found: Sequence[rows.Row]) -> str:
    """The performance section's generated part, from rows: stages by device, then the ops."""
    if not found:
        return "No measurements are committed yet."
    report = render.build(rows.latest(found), preset="", parts=("latency",))
    parts = []
    for device in dict.fromkeys(row.where["device"] for row in found):
        here = [row for row in rows.latest(found) if row.where["device"] == device]
        last = here[-1].where
        driver = f", driver {last['driver']}" if last.get("driver") else ""
        commits = sorted({row.where["commit"] for row in here})
        parts.append(f"**{device}**{driver}, torch {last['torch']}, {last['threads']} threads, at {', '.join(commits)}:")
        parts += [_stage_table(report, device), _op_table(report, device)]
    return "\n\n".join(p for p in parts if p)


def _stage_table(report: dict[str, Any], device: str) -> str:
    lines = []
    for (where, stage, case, dtype, shape), impls in render.side_by_side(report, "model").items():
        name = render.stage_name(stage, json.loads(shape))
        timed = {impl: row["seconds"] for impl, row in impls.items() if row["seconds"] is not None}
        if where != device or stages.OURS not in timed:
            continue
        ours, eager, compiled = (timed.get(i) for i in (stages.OURS, stages.RELEASE, stages.RELEASE_COMPILED))
        cells = [f"{name}, {case}, {dtype}", *(render.seconds(t) for t in (eager, compiled, ours))]
        lines.append([*cells, *(render.times(t / ours) if t else "" for t in (eager, compiled))])
        if stages.ONE_FUTURE in timed:
            one = timed[stages.ONE_FUTURE]
            cells = [f"{name}, one future decoded, {case}, {dtype}", *(render.seconds(t) for t in (eager, compiled, one))]
            lines.append([*cells, *(render.times(t / one) if t else "" for t in (eager, compiled))])
    header = ["stage", "release, eager", "release, torch.compile", "deltakern", "against eager", "against compile"]
    return render.markdown_table(header, lines) if lines else ""


def _op_table(report: dict[str, Any], device: str) -> str:
    """Ops with a kernel on this device; the reference alone makes no claim."""
    lines = []
    for (where, name, case, dtype, shape), impls in render.side_by_side(report, "op").items():
        kernels = {impl: row for impl, row in impls.items() if impl in backend.IMPLEMENTATIONS[1:]}
        if where != device or not kernels:
            continue
        best = min(kernels.values(), key=lambda row: row["seconds"])
        plain, compiled = (impls.get(i, {}).get("seconds") for i in ("reference", collect.COMPILED))
        ceilings = render.machine_ceilings(report, device)
        moved = best["figures"].get("bytes")
        share = f"{100 * moved / best['seconds'] / ceilings['copy']:.0f}%" if moved and "copy" in ceilings else ""
        what = f"`{name}` {case}, {dtype}" + (", forward and backward" if "backward" in json.loads(shape).get("pass", "") else "")
        times = (render.seconds(t) for t in (plain, compiled))
        lines.append([what, *times, f"{render.seconds(best['seconds'])} ({best['impl']})", share])
    header = ["op", "reference", "reference, torch.compile", "kernel", "of copy bandwidth"]
    return render.markdown_table(header, lines) if lines else ""


def updated_readme(text: str, table: str) -> str:
    """``text`` with the table between the markers.

    Raises:
        ValueError: the markers are missing or out of order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must hold the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def update_readme(readme: Path = README, results: Path = RESULTS) -> bool:
    """Writes the table of the committed rows into README.md; False where there is no README or it holds no markers."""
    if not readme.exists() or BEGIN not in readme.read_text(encoding="utf-8"):
        return False
    text = readme.read_text(encoding="utf-8")
    readme.write_text(updated_readme(text, readme_table(rows.read(results))), encoding="utf-8")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gpu-suite", action="store_true", help="everything for a borrowed GPU")
    what.add_argument("--cpu-suite", action="store_true", help="rows of a machine without a GPU; needs it quiet")
    what.add_argument("--measure", metavar="WHAT", help="ceilings, accuracy, op:NAME or stage:NAME")
    what.add_argument("--update-readme", action="store_true", help="write README's table from the committed rows")
    parser.add_argument("--dry-run", action="store_true", help="print a suite's plan and stop")
    parser.add_argument("--only", metavar="TEXT", help="only the parts of a suite whose name holds this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1, help="clips in the stages that train or encode")
    parser.add_argument("--commit", help="the commit that rows name, where the tree has no git history")
    parser.add_argument("--preset", choices=tuple(stages.PRESETS), default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, float32 on a CPU by default")
    parser.add_argument("--impl", metavar="NAMES", help=f"separated by semicolons, of: {'; '.join(stages.IMPLEMENTATIONS)}")
    parser.add_argument("--out", type=Path, help="file of rows instead of benchmarks/results/<device>.jsonl")
    given = parser.parse_args(argv)
    if given.update_readme:
        if not update_readme():
            print("README.md is missing or has no performance markers; nothing written")
            return 1
        return 0
    if given.gpu_suite or given.cpu_suite:
        if given.gpu_suite and not given.dry_run and not torch.cuda.is_available():
            parser.error("--gpu-suite needs a GPU that torch can use; --dry-run shows the plan")
        parts = gpu_suite() if given.gpu_suite else cpu_suite()
        return run_suite(parts, dry_run=given.dry_run, only=given.only, commit=given.commit)
    names = tuple(n.strip() for n in given.impl.split(";")) if given.impl else stages.IMPLEMENTATIONS
    if unknown := set(names) - set(stages.IMPLEMENTATIONS):
        parser.error(f"--impl: unknown {sorted(unknown)}")
    dtype = getattr(torch, given.dtype) if given.dtype else torch.bfloat16 if given.device == "cuda" else torch.float32
    try:
        extra = {"batch": given.batch, "commit": given.commit, "out": given.out}
        return measure(given.measure, given.device, given.preset, dtype, names, **extra)
    except ValueError as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    sys.exit(main())
