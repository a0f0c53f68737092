"""Takes the measurements of ``python -m benchmarks.run --measure`` and writes README's table from the committed rows."""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import suite
from benchmarks.suite import RESULTS, ROOT
from deltakern import backend
from deltakern.cases import cases
from deltakern.report import accuracy, collect, latency, render, rows, stages

README = ROOT / "README.md"
BUILD = ROOT / "build"
BEGIN, END = "<!-- performance: begin (python -m benchmarks.run --update-readme) -->", "<!-- performance: end -->"


# --- single measurements ---------------------------------------------------------------------------------------------------------

WHAT = "ceilings, accuracy, op:NAME, op:NAME/CASE, stage:NAME, profile:STAGE or check:OP=IMPLEMENTATION"
PROFILED = (stages.RELEASE, stages.OURS)
LINES = 40  # of a profile: the most costly kernels, and as many operations of the host


def results_file(where: dict[str, Any], folder: Path = RESULTS) -> Path:
    """The file of a device's rows: "benchmarks/results/nvidia-h200.jsonl"."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-") + ".jsonl")


@dataclass
class Measuring:
    """Measurements in one process, one after the other; each appends its rows as soon as it has them.

    Attributes:
        device, dtype, preset, implementations: of what is measured; implementations of a stage.
        batch: clips in the stages that train or encode.
        budget: seconds of timing, for a stage or for a pass of an op's case.
        compiled: whether an op's reference is timed under torch.compile too.
        where: of every row.
        out: file of the rows.
        profiles: file of the profiles.
    """

    device: str
    dtype: torch.dtype
    preset: str
    implementations: tuple[str, ...]
    batch: int
    budget: float | None
    compiled: bool
    where: dict[str, Any]
    out: Path
    profiles: Path
    checked: collect.Checked = field(default_factory=dict)

    def take(self, kind: str, name: str) -> str:
        """One measurement, as :func:`parsed`; what it found, in words.

        Raises:
            RedError: a value is wrong.
        """
        return getattr(self, f"_{kind}")(name)

    def _ceilings(self, _: str) -> str:
        made = collect.ceiling_rows(self.device, self.dtype, budget=5 if self.device == "cpu" else 1, where=self.where)
        rows.append(self.out, made)
        copy, gemm = (row.figures["per_second"] for row in made)
        return f"copy {render.rate(copy, 'B/s')}, matrix product {render.rate(gemm, 'FLOP/s')}"

    def _accuracy(self, _: str) -> str:
        red = 0
        for op in backend.ops():
            made = collect.accuracy_rows(op, self.device, where=self.where)
            red += sum(not row.figures["ok"] for row in made)
            rows.append(self.out, made)
        rows.append(self.out, collect.model_accuracy_rows(self.device, where=self.where))
        if red:
            raise collect.RedError(f"{red} implementations are wrong")
        return "all right"

    def _op(self, name: str) -> str:
        op, _, only = name.partition("/")
        said = []
        for case in (case for case in cases(op, "benchmark") if only in ("", case.name)):
            for backward in (False, True):
                made = collect.op_rows(
                    case,
                    self.device,
                    self.dtype,
                    most_bytes=1 << 26 if self.device == "cpu" else 1 << 40,
                    budget=self.budget or 2,
                    compiled=self.compiled,
                    backward=backward,
                    checked=self.checked,
                    where=self.where,
                )
                rows.append(self.out, made)
                what = f"{case.name}, backward too" if backward else case.name
                said += [f"{what}: {', '.join(f'{row.impl} {_times(row)}' for row in made)}"] if made else []
        return "; ".join(said)

    @functools.cached_property
    def models(self) -> stages.Models:
        autocast = None if self.dtype == torch.float32 else self.dtype
        return stages.Models(stages.PRESETS[self.preset], torch.device(self.device), autocast=autocast, batch=self.batch)

    def _stage(self, name: str) -> str:
        (stage,) = self.models.stages(self.implementations, (name,))
        budget = self.budget or (5 if self.preset == "tiny" else 20)
        made = collect.stage_rows(stage, self.preset, self.device, self.dtype, budget=budget, where=self.where)
        rows.append(self.out, made)
        return ", ".join(f"{row.impl} {_times(row)}" for row in made)

    def _profile(self, name: str) -> str:
        """Where a stage's time goes, on the GPU and on the host: into the file of profiles, by stage and implementation."""
        (stage,) = self.models.stages(tuple(i for i in self.implementations if i in PROFILED), (name,))
        kept = json.loads(self.profiles.read_text(encoding="utf-8")) if self.profiles.exists() else {}
        for impl, call in stage.calls.items():
            kernels, host = (spent[:LINES] for spent in latency.profile(call, self.device, host=True))
            at = {"preset": self.preset, "dtype": str(self.dtype).removeprefix("torch."), **stage.shape}
            kept[f"{name}, {impl}"] = {**at, "device": self.where["device"], "kernels": kernels, "host": host}
        suite.replace(self.profiles, json.dumps(kept, indent=1))
        return f"profiles of {', '.join(stage.calls)}"

    def _check(self, name: str) -> str:
        """The op's first small case, forward and backward, against float64: little work, for a sanitizer."""
        op, _, impl = name.partition("=")
        verdict = accuracy.check(cases(op, "tiny")[0], impl, torch.float32, self.device)
        if not verdict.ok:
            raise collect.RedError(verdict.problem)
        return "right"


def parsed(what: str) -> tuple[str, str]:
    """A measurement of ``WHAT``: its kind and what it is of.

    Raises:
        ValueError: there is no such one.
    """
    kind, _, name = what.partition(":")
    known = {
        "ceilings": [""],
        "accuracy": [""],
        "op": [n for case in cases(tag="benchmark") for n in (case.op, f"{case.op}/{case.name}")],
        "stage": stages.STAGES,
        "profile": stages.STAGES,
        "check": [f"{op}={impl}" for op, spec in backend.ops().items() for impl in ("reference", *spec.kernels)],
    }
    if kind not in known:
        raise ValueError(f"--measure: expected {WHAT}, got {what!r}")
    if name not in known[kind]:
        raise ValueError(f"--measure {kind}: expected one of {', '.join(dict.fromkeys(known[kind]))}, got {name!r}")
    return kind, name


def apart(figures: dict[str, float]) -> str:
    """What the kernels and the host take apart, " (graph 1.50 ms, kernels 1.50 ms, host 80.0 us)"; nothing on a CPU."""
    parts = {"graph": "graph_seconds", "kernels": "kernel_seconds", "host": "launch_seconds"}
    said = ", ".join(f"{name} {render.seconds(figures[key])}" for name, key in parts.items() if key in figures)
    return said and f" ({said})"


def _times(row: rows.Row) -> str:
    return render.seconds(row.seconds) + apart(row.figures)


# --- README ------------------------------------------------------------------------------------------------------------------------


def readme_table(found: Sequence[rows.Row]) -> str:
    """The performance section's generated part, from rows: stages by device, then the ops."""
    found = [row for row in found if row.kind != "host"]  # of no device: benchmarks.host prints them
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
        ours, live, eager, compiled, by_block = (timed.get(i) for i in (stages.OURS, stages.LIVE, *stages.BASELINES))
        if compiled is None and by_block is not None:
            name, compiled = f"{name}, compiled by block", by_block
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
    """Measurements as the command line asks for them; the exit status is 1 where one is wrong or could not be made.

    Raises:
        ValueError: an unknown preset, implementation or measurement.
    """
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    known = (*stages.IMPLEMENTATIONS, stages.RELEASE_BLOCKS)
    names = tuple(n.strip() for n in given.impl.split(";")) if given.impl else stages.IMPLEMENTATIONS
    if unknown := set(names) - set(known):
        raise ValueError(f"--impl: expected names out of {known}, got {sorted(unknown)}")
    if given.preset not in stages.PRESETS:
        raise ValueError(f"--preset must be one of {tuple(stages.PRESETS)}, got {given.preset!r}")
    asked = [parsed(what) for what in given.measure.split(";")]
    dtype = getattr(torch, given.dtype) if given.dtype else torch.bfloat16 if device == "cuda" else torch.float32
    where = rows.environment(device)
    where["commit"] = given.commit or where["commit"]
    if not where["commit"]:
        raise ValueError("a row names its commit; this tree has no git history, so give it with --commit")
    out = given.out or RESULTS
    path, folder = (out, out.parent) if out.suffix else (results_file(where, out), out)
    compiled = not given.no_compile
    taking = Measuring(
        device,
        dtype,
        given.preset,
        names,
        given.batch,
        given.budget,
        compiled,
        where,
        path,
        (folder if given.out else BUILD) / "profiles.json",
    )
    failed = []
    for kind, name in asked:
        what = f"{kind}:{name}" if name else kind
        try:
            print(f"{what}: {taking.take(kind, name)}", flush=True)
        except Exception as problem:  # one that fails does not stop the others
            failed.append(what)
            said = str(problem) if isinstance(problem, collect.RedError) else f"{type(problem).__name__}: {problem}"
            print(f"{what}: no speed: {said}", flush=True)
    if failed:
        print(f"wrong or not measured: {', '.join(failed)}")
    return 1 if failed else 0
