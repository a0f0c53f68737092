"""A suite: commands in processes of their own, the most important first, within a time, resumable on another machine.

A part is started only while the time left is enough for it, and killed at its limit with everything that it started. What every
part came to is written after each, and with ``out`` the state, the rows and the log are copied there, so that nothing is lost when
the machine is taken away. ``resume`` takes such a folder up again: parts done at this commit on this device are not done again, a
part that was killed gets twice the time. Nothing reads standard input; nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STATE = ROOT / "build" / "suite.json"  # which parts are done; build/ is not in the repository
LIMIT = 9 * 60  # seconds that a call on a borrowed machine may take, and so the most for any part
RESERVE = 25.0  # seconds kept for the table
DONE = "done"
KILLED = "killed"


@dataclass(frozen=True)
class Part:
    """One step of a suite.

    Attributes:
        name: unique in the suite.
        command: what runs, in the repository's root.
        limit: seconds after which it is killed.
        least: seconds that must be left for it to be started; half the limit by default.
        must: one of those that a single call has to get through.
        env: environment variables of its own.
    """

    name: str
    command: tuple[str, ...]
    limit: float = LIMIT
    least: float | None = None
    must: bool = False
    env: dict[str, str] = field(default_factory=dict)

    @property
    def enough(self) -> float:
        return self.limit / 2 if self.least is None else self.least


@dataclass
class State:
    """What the parts of earlier runs came to: name to "done" or why not, and their seconds."""

    commit: str
    device: str
    outcomes: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def load_state(path: Path, commit: str, device: str) -> State:
    """The state in ``path`` (or ``path/suite.json``), empty where there is none of this commit and device."""
    path = path / "suite.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        found = {}
    if not isinstance(found, dict) or (found.get("schema"), found.get("commit"), found.get("device")) != (SCHEMA, commit, device):
        return State(commit, device)
    return State(commit, device, found["outcomes"], found["seconds"])


def save_state(state: State, path: Path) -> None:
    """Replaces the state file at once, so that killing the run leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"schema": SCHEMA, **vars(state)}, indent=1))
    fresh.replace(path)


def outstanding(parts: Sequence[Part], state: State) -> list[Part]:
    """The parts still to run, with more time for those that were killed. The last one, the table, is always drawn again."""
    found = []
    for part in parts:
        outcome = state.outcomes.get(part.name, "")
        if outcome == DONE and part is not parts[-1]:
            continue
        if outcome.startswith(KILLED):
            longer = min(LIMIT, max(part.limit, 2 * state.seconds.get(part.name, 0.0)))
            part = Part(part.name, part.command, longer, max(part.enough, longer / 2), part.must, part.env)
        found.append(part)
    return found


def merge_rows(source: Path, results: Path = RESULTS) -> int:
    """Appends the lines of ``source/*.jsonl`` that the files of that name in ``results`` lack; returns how many."""
    added = 0
    for file in sorted(source.glob("*.jsonl")):
        target = results / file.name
        known = set(target.read_text(encoding="utf-8").splitlines()) if target.exists() else set()
        fresh = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip() and line not in known]
        if fresh:
            results.mkdir(parents=True, exist_ok=True)
            with target.open("a", encoding="utf-8") as rows:
                rows.write("".join(line + "\n" for line in fresh))
        added += len(fresh)
    return added


def copy_out(out: Path, state_path: Path, log: Path, files: Sequence[Path], report: Path | None) -> None:
    """What must outlive the machine, in one flat folder: state, log, rows, and the report once it is drawn."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = sorted(report.glob("report.*")) if report is not None and report.is_dir() else []
    for path in (state_path, log, *files, *drawn):
        if path.exists() and path.parent.resolve() != out.resolve():
            shutil.copyfile(path, out / path.name)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a part and whatever it started, which is in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_part(part: Part, log: Path, allowed: float | None = None) -> str:
    """Runs one part, its output to the terminal and to ``log``: "done", or why not."""
    limit = part.limit if allowed is None else min(part.limit, allowed)
    if shutil.which(part.command[0], path={**os.environ, **part.env}.get("PATH")) is None:
        return f"{part.command[0]} is not installed"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {shlex.join(part.command)}\n")
        file.flush()
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, **part.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

        def follow() -> None:
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                file.write(line)
                file.flush()

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            _end(process)
            process.wait()
            return f"{KILLED} after {limit:.0f} s"
        except BaseException:  # an interrupt must not leave the part behind
            _end(process)
            raise
        finally:
            reader.join(5)
    _end(process)  # a worker that the part left behind would disturb the next one's timing
    return DONE if process.returncode == 0 else f"exit status {process.returncode}"


def run_suite(
    parts: Sequence[Part],
    *,
    commit: str,
    device: str,
    dry_run: bool = False,
    only: str | None = None,
    seconds: float | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    state_path: Path = STATE,
    results: Path = RESULTS,
    report: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Runs what is outstanding, in order; a part that fails does not stop the others. The last part, the table, ends every run.

    Args:
        parts: of :mod:`benchmarks.run`.
        commit, device: which rows name; a state of others is not resumed.
        dry_run: prints the plan and stops.
        only: parts whose name holds this text.
        seconds: for the whole run: no part is started that has no room, none runs longer than is left.
        out: folder to which state, rows, log and report are copied after every part.
        resume: what ``out`` was in an earlier run.
        state_path, results, report: where these are kept.
        clock: seconds.

    Returns:
        The exit status: 0 if every part is done.
    """
    begin = clock()
    state = load_state(state_path, commit, device)
    if resume is not None:
        if not resume.exists():
            raise ValueError(f"--resume: there is no {resume}")
        earlier = load_state(resume, commit, device)
        done = {name: why for name, why in earlier.outcomes.items() if why == DONE}
        state.outcomes = {**earlier.outcomes, **state.outcomes, **done}
        state.seconds = {**earlier.seconds, **state.seconds}
    todo = [p for p in outstanding(parts, state) if only is None or only in p.name]
    print(f"{len(parts)} parts at commit {commit} on {device}, {len(todo)} to run")
    if dry_run:
        _show(todo)
        return 0
    log = state_path.with_name("suite-log.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"commit {commit} on {device}\n", encoding="utf-8")
    before = {path: path.stat().st_size for path in results.glob("*.jsonl")}
    if resume is not None and resume.is_dir():
        merge_rows(resume, results)
    skipped = []
    for number, part in enumerate(todo, 1):
        last = part is todo[-1]
        left = None if seconds is None else seconds - (clock() - begin) - (0.0 if last else RESERVE)
        if left is not None and left < part.enough and not last:
            skipped.append(part.name)
            continue
        room = "" if left is None else f", {left:.0f} s left"
        print(f"[{number}/{len(todo)}] {part.name} (at most {part.limit:.0f} s{room}): {shlex.join(part.command)}", flush=True)
        started = clock()
        state.outcomes[part.name] = run_part(part, log, None if left is None else max(left, RESERVE) if last else left)
        state.seconds[part.name] = round(clock() - started, 1)
        save_state(state, state_path)
        print(f"    {state.outcomes[part.name]}, {state.seconds[part.name]:.0f} s", flush=True)
        if out is not None:
            changed = [path for path in sorted(results.glob("*.jsonl")) if path.stat().st_size != before.get(path)]
            copy_out(out, state_path, log, changed, report if last else None)
    if skipped:
        print(f"no time left for {len(skipped)} parts; the next run begins with: {skipped[0]}")
    names = {part.name for part in parts}
    failed = {name: why for name, why in state.outcomes.items() if why != DONE and name in names}
    for name, why in failed.items():
        print(f"not done: {name}: {why}")
    return 1 if failed or skipped else 0


def _show(parts: Sequence[Part]) -> None:
    """The plan, with the time that it takes at most."""
    for number, part in enumerate(parts, 1):
        mark = "*" if part.must else " "
        print(f"{number:3} {mark} {part.name:<70} at most {part.limit:4.0f} s, begun with {part.enough:3.0f} s left")
        print(f"        {shlex.join(part.command)}")
    if musts := [part for part in parts if part.must]:
        together = sum(part.limit for part in musts)
        print(f"* the {len(musts)} that come first take at most {together:.0f} s together, with the table {together + RESERVE:.0f} s")


def describe(device: str, python: str = sys.executable, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Commit, device and the GPU's memory and capability, asked of a process of its own, so that this one holds no GPU context."""
    text = (
        "import json, sys, torch; from deltakern.report import rows; found = rows.environment(sys.argv[1]);"
        "gpu = torch.cuda.get_device_properties(0) if sys.argv[1] == 'cuda' else None;"
        "found.update(memory=gpu.total_memory, capability=f'{gpu.major}{gpu.minor}') if gpu else None; print(json.dumps(found))"
    )
    done = subprocess.run(
        [python, "-c", text, device], cwd=ROOT, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{device} cannot be used here: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
