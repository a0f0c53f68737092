"""Takes the measurements of ``python -m benchmarks.run --measure`` and writes README's table from the committed rows."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite import RESULTS, ROOT
from deltakern import backend
from deltakern.cases import cases
from deltakern.report import accuracy, collect, render, rows, stages

README = ROOT / "README.md"
BEGIN, END = "<!-- performance: begin (python -m benchmarks.run --update-readme) -->", "<!-- performance: end -->"


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
    budget: float | None = None,
) -> int:
    """Measures "ceilings", "accuracy", "op:NAME" or "stage:NAME" and appends the rows; "check:OP=IMPLEMENTATION;..." only checks.

    ``budget`` is in seconds of timing, for a stage or for a pass of an op's case. The exit status: 1 where a value is wrong.
    """
    if what.startswith("check:"):
        return check(what.removeprefix("check:"), device)
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
                        case,
                        device,
                        dtype,
                        most_bytes=most,
                        budget=budget or 2,
                        compiled=True,
                        backward=backward,
                        checked=checked,
                        where=where,
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
            try:
                made = collect.stage_rows(stage, preset, device, dtype, budget=budget or (5 if preset == "tiny" else 20), where=where)
            except collect.RedError as problem:
                print(f"no speed: {problem}", file=sys.stderr)
                return 1
            rows.append(path, made)
            print(f"{stage.name}: {', '.join(f'{row.impl} {render.seconds(row.seconds)}' for row in made)}", flush=True)
    else:
        raise ValueError(f"--measure: expected ceilings, accuracy, op:NAME, stage:NAME or check:OP=IMPLEMENTATION, got {what!r}")
    return 1 if red else 0


def check(names: str, device: str) -> int:
    """Runs the first small case of "OP=IMPLEMENTATION;..." forward and backward and holds it to float64: little work, for a sanitizer."""
    wrong = 0
    for name in names.split(";"):
        op, _, impl = name.partition("=")
        if op not in backend.ops() or impl not in backend.IMPLEMENTATIONS:
            raise ValueError(f"--measure check: expected OP=IMPLEMENTATION, got {name!r}")
        verdict = accuracy.check(cases(op, "tiny")[0], impl, torch.float32, device)
        print(f"{op} {impl}: {verdict.problem or 'right'}", flush=True)
        wrong += not verdict.ok
    return 1 if wrong else 0


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
        ours, live, eager, compiled = (timed.get(i) for i in (stages.OURS, stages.LIVE, stages.RELEASE, stages.RELEASE_COMPILED))
        cells = [f"{name}, {case}, {dtype}", *(render.seconds(t) for t in (eager, compiled, ours, live))]
        lines.append([*cells, *(render.times(t / ours) if t else "" for t in (eager, compiled))])
        if stages.ONE_FUTURE in timed:
            one = timed[stages.ONE_FUTURE]
            cells = [f"{name}, one future decoded, {case}, {dtype}", *(render.seconds(t) for t in (eager, compiled, one, None))]
            lines.append([*cells, *(render.times(t / one) if t else "" for t in (eager, compiled))])
    header = ["stage", "release, eager", "release, torch.compile", "deltakern", "live weights", "against eager", "against compile"]
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


def main(given: argparse.Namespace) -> int:
    """A measurement as the command line asks for it; the exit status.

    Raises:
        ValueError: an unknown preset, implementation or measurement.
    """
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = tuple(n.strip() for n in given.impl.split(";")) if given.impl else stages.IMPLEMENTATIONS
    if unknown := set(names) - set(stages.IMPLEMENTATIONS):
        raise ValueError(f"--impl: expected names out of {stages.IMPLEMENTATIONS}, got {sorted(unknown)}")
    if given.preset not in stages.PRESETS:
        raise ValueError(f"--preset must be one of {tuple(stages.PRESETS)}, got {given.preset!r}")
    dtype = getattr(torch, given.dtype) if given.dtype else torch.bfloat16 if device == "cuda" else torch.float32
    chosen = {"batch": given.batch, "commit": given.commit, "out": given.out, "budget": given.budget}
    return measure(given.measure, device, given.preset, dtype, names, **chosen)
