"""``deltakern report``: measures, prints, writes. See :func:`main`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deltakern._extras import require
from deltakern.report import collect, render, rows, stages

DEFAULT_OUT = "deltakern-report"


def _implementations(preset: str, device: torch.device) -> tuple[str, ...]:
    """All of them; but compiling this package's models takes long on a CPU, and its reference ops are what would be compiled."""
    skipped = {stages.OURS_COMPILED} if device.type == "cpu" and preset == "tiny" else set()
    return tuple(i for i in stages.IMPLEMENTATIONS if i not in skipped)


def measure(preset: str, device: str, parts: Sequence[str], *, progress: bool = True) -> dict[str, Any]:
    """Runs a report and returns its data.

    Args:
        preset: of ``stages.PRESETS``.
        device: "cpu" or "cuda".
        parts: which of ``collect.PARTS``.
        progress: a bar with the remaining time.

    Raises:
        ValueError: an unknown preset or part, a device that is not there.
    """
    if preset not in stages.PRESETS:
        raise ValueError(f"preset must be one of {tuple(stages.PRESETS)}, got {preset!r}")
    if unknown := set(parts) - set(collect.PARTS):
        raise ValueError(f"parts must be among {collect.PARTS}, got {sorted(unknown)}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that torch can use, got 'cuda' where torch.cuda.is_available() is False")
    place = torch.device(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = rows.environment(place)
    tasks = list(collect.plan(stages.PRESETS[preset], place, dtype, parts, _implementations(preset, place)))
    notes = []
    if stages.release_structure() is None and {"latency", "memory"} & set(parts):
        notes.append("The release's structure is not measured: it lies in the repository (benchmarks/), not in the installed package.")
    if not progress or not tasks:
        found = collect.collect(tasks)
    else:
        found = _with_progress(tasks)
    return render.build(found.rows, preset=preset, parts=parts, notes=[*notes, *found.notes], where=where)


class _Remaining:
    """Seconds that are left: the tasks' own estimates, stretched by how long those done took against theirs."""

    def __init__(self, tasks: Sequence[collect.Task], clock: Callable[[], float] = time.monotonic) -> None:
        self.weights, self.clock = [task.weight for task in tasks], clock
        self.done, self.begin = 0, clock()
        self.since = self.begin

    def advance(self) -> None:
        self.done, self.since = self.done + 1, self.clock()

    def __call__(self) -> float:
        known = sum(self.weights[: self.done])
        # the estimates count as some seconds' evidence, so that one short first task says little
        pace = (self.since - self.begin + 10) / (known + 10)
        current = self.weights[self.done] * pace if self.done < len(self.weights) else 0.0
        return max(current - (self.clock() - self.since), 0.0) + pace * sum(self.weights[self.done + 1 :])


def _with_progress(tasks: Sequence[collect.Task]) -> collect.Collection:
    bars, text = (require(f"rich.{m}", "report", "showing progress") for m in ("progress", "text"))
    remaining = _Remaining(tasks)

    class Left(bars.ProgressColumn):
        def render(self, task: object) -> object:
            minutes, seconds = divmod(round(remaining()), 60)
            return text.Text(f"about {minutes}:{seconds:02} left", style="progress.remaining")

    columns = (
        bars.TextColumn("{task.description:<32.32}"),
        bars.BarColumn(bar_width=None),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        Left(),
    )
    with bars.Progress(*columns, transient=True, refresh_per_second=2) as shown:
        bar = shown.add_task(tasks[0].label, total=sum(task.weight for task in tasks))
        labels = iter([task.label for task in tasks[1:]] + ["done"])

        def done(task: collect.Task) -> None:
            remaining.advance()
            shown.update(bar, advance=task.weight, description=next(labels))

        return collect.collect(tasks, done)


def main(
    preset: str | None = None,
    device: str | None = None,
    out: str | os.PathLike[str] = DEFAULT_OUT,
    only: str | None = None,
    source: str | os.PathLike[str] | None = None,
) -> int:
    """Measures (or reads), prints the tables, writes ``report.json``, ``report.md`` and ``report.html``.

    Args:
        preset: "tiny", "vitb-256" or "vitb-512"; tiny on a CPU and vitb-512 on a GPU by default.
        device: "cpu" or "cuda"; the GPU where there is one.
        out: folder.
        only: one of "flops", "latency", "memory", "accuracy" instead of all.
        source: folder of rows (``benchmarks/results``) to draw instead of measuring.

    Returns:
        The exit status: 1 where a value was found wrong, else 0.

    Raises:
        ValueError: see :func:`measure`. FileNotFoundError, rows.RowError: ``source``.
    """
    parts = collect.PARTS if only is None else (only,)
    if unknown := set(parts) - set(collect.PARTS):
        raise ValueError(f"only must be one of {collect.PARTS}, got {sorted(unknown)[0]!r}")
    if source is not None:
        kinds = {"latency": ("op", "model", "ceiling"), "memory": ("model",), "accuracy": ("accuracy",), "flops": ()}
        wanted = {kind for part in parts for kind in kinds[part]}
        found = [row for row in rows.latest(rows.read(source)) if row.kind in wanted]
        report = render.build(found, preset=f"rows of {Path(source).name}", parts=parts)
    else:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        report = measure(preset or ("tiny" if device == "cpu" else "vitb-512"), device, parts)
    render.print_tables(report)
    paths = render.write(report, out)
    print(f"{paths['html']}\n{paths['md']}\n{paths['json']}")
    wrong = any(row["kind"] == "accuracy" and not row["figures"]["ok"] for row in report["rows"])
    return 1 if wrong or any("is wrong on" in note for note in report["notes"]) else 0
