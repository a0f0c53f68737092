"""A suite: commands in processes of their own, the most telling first, within a time.

A part is killed at its limit, with everything that it started, and no part runs longer than is left of the whole. After each, one line
says what it took, what it said last and what is left, and ``suite.json`` holds what all parts came to so far; their output is in
``suite-log.txt``. Nothing reads standard input; nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LEAST = 15.0  # seconds: with less left no part is started
DONE = "done"


@dataclass(frozen=True)
class Part:
    """One step of a suite.

    Attributes:
        name: unique in the suite; "stages" and "stages: training" are one group, by whose name both are asked for.
        command: what runs, in the repository's root.
        limit: seconds after which it is killed.
        must: whether the suite's exit status asks for it.
        env: environment variables of its own.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    must: bool = False
    env: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        return self.name.partition(":")[0]


def choose(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """The parts of the groups ``names``, in that order; all of them where none is named."""
    if unknown := set(names) - {part.group for part in parts}:
        raise ValueError(f"--only: expected names out of {list(dict.fromkeys(part.group for part in parts))}, got {sorted(unknown)}")
    return [part for name in names for part in parts if part.group == name] if names else list(parts)


def replace(path: Path, text: str) -> None:
    """Writes a file at once, so that whoever is killed meanwhile leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def run_part(part: Part, log: Path, limit: float) -> tuple[str, str]:
    """Runs one part: "done" or why not, and its output, which goes to the end of ``log``."""
    if shutil.which(part.command[0], path={**os.environ, **part.env}.get("PATH")) is None:
        return f"{part.command[0]} is not installed", ""
    with log.open("ab") as file:
        file.write(f"\n$ {shlex.join(part.command)}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **part.env},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            outcome = DONE if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"killed after {limit:.0f} s"
        finally:  # also a worker that the part left behind, which would disturb the next one's timing
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return outcome, log.read_bytes()[begin:].decode(errors="replace")


def run_suite(parts: Sequence[Part], out: Path, *, budget: float = float("inf"), facts: dict[str, str] | None = None) -> int:
    """Runs the parts in order; one that fails does not stop the others.

    Args:
        parts: of :mod:`benchmarks.run`.
        out: folder for ``suite.json`` and ``suite-log.txt``.
        budget: seconds for all of them.
        facts: what ``suite.json`` says beside the parts' outcomes.

    Returns:
        The exit status: 0 if every part that must be done is.
    """
    begin = time.monotonic()
    log = out / "suite-log.txt"
    replace(log, "")
    outcomes: dict[str, dict[str, object]] = {}
    for number, part in enumerate(parts, 1):
        started = time.monotonic()
        left = budget - (started - begin)
        outcome, output = run_part(part, log, min(part.limit, left)) if left >= min(part.limit, LEAST) else ("no time left", "")
        took = time.monotonic() - started
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        said = lines[-1].strip("= ")[:200] if lines else ""
        outcomes[part.name] = {"outcome": outcome, "seconds": round(took, 1), "said": said}
        replace(out / "suite.json", json.dumps({**(facts or {}), "parts": outcomes}, indent=1))
        if outcome != DONE:
            print("\n".join(f"    | {line[:200]}" for line in lines[-15:]))
        rest = ", ".join(dict.fromkeys(other.group for other in parts[number:])) or "nothing"
        room = "" if budget == float("inf") else f"{budget - (time.monotonic() - begin):.0f} s "
        print(f"{part.name}: {outcome}, {took:.1f} s; {said or 'said nothing'}; left: {room}for {rest}", flush=True)
    missed = [part for part in parts if outcomes[part.name]["outcome"] != DONE]
    if missed:
        print(f"not done: {', '.join(part.name for part in missed)}; again with --only {','.join(dict.fromkeys(p.group for p in missed))}")
    return 1 if any(part.must for part in missed) else 0


def show(parts: Sequence[Part]) -> None:
    """The plan, with the time that it takes at most."""
    total = 0.0
    for part in parts:
        total += part.limit
        print(f"{'*' if part.must else ' '} {part.name:<32} at most {part.limit:4.0f} s, {total:5.0f} s so far: {shlex.join(part.command)}")
    print("* the exit status asks for it")
