"""Measures rows in parts, each in a process of its own, resumable; writes README's table from them.

``python -m benchmarks.run --cpu-suite`` and ``--gpu-suite`` do everything for one machine, the most important parts first, and append
rows to ``benchmarks/results/<device>.jsonl``. A part that is done at this commit is not done again; ``--dry-run`` shows the plan.
``--measure`` takes single measurements, ``--update-readme`` writes the table of the committed rows into README.md.

On a borrowed GPU without a network, with wheels fetched here beforehand and what came back of the last call:

    python -m benchmarks.run --fetch-wheels .wheels --python 3.12
    python -m benchmarks.run --gpu-suite --wheels .wheels --seconds 540 --commit $(git rev-parse --short=12 HEAD) --out DIR [--resume DIR]

then copy DIR/*.jsonl into benchmarks/results.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import suite, wheels
from benchmarks.suite import RESULTS, ROOT, Part

REPORT = ROOT / "deltakern-report"
SANITIZED = "check:best_of_n=cuda;residual_norm=triton"  # a compiled kernel and a Triton kernel, on their first small case each


def _measure(what: str, device: str, preset: str | None = None, *extra: str) -> tuple[str, ...]:
    chosen = ("--preset", preset) if preset else ()
    return (sys.executable, "-m", "benchmarks.run", "--measure", what, "--device", device, *chosen, *extra)


def _table() -> Part:
    """Draws all rows; the last part of every suite."""
    return Part("table", (sys.executable, "-m", "deltakern.cli", "report", "--from", str(RESULTS), "--out", str(REPORT)), 90)


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def gpu_suite(gigabytes: float = 80.0, capability: str = "") -> list[Part]:
    """Everything for a borrowed GPU, by importance; what must be had takes one call of at most nine minutes.

    That is: built, right, sanitized, the machine's ceilings, the op that every block runs, and three stages beside the release's
    structure in eager and under torch.compile. Then the first training step, every op, the other stages, then all implementations.

    Args:
        gigabytes: the GPU's memory; the release's training at 512 px needs more than 80 at its own batch.
        capability: such as "90"; what the extension is compiled for, everything by default.
    """
    from deltakern import backend
    from deltakern.report import stages

    python = sys.executable
    roomy = gigabytes >= 120
    compared = stages.RELEASE, stages.RELEASE_COMPILED, stages.OURS, stages.LIVE, stages.ONE_FUTURE
    baselines = ("--impl", ";".join(compared), "--budget", "5")

    def batch(stage: str) -> tuple[str, ...]:
        """The batch a GPU gets in the release's training at 512 px, half of it where memory is short; a forecast is of one clip."""
        if stage in ("backbone", "encode", "decode", "DeltaTok training step"):
            return ("--batch", "64" if roomy else "32")
        return ("--batch", "32" if roomy else "16") if stage == "candidate search" or stage.startswith("DeltaWorld training") else ()

    def stage(name: str, limit: float, *, must: bool = False) -> Part:
        return Part(f"vitb-512: {name}", _measure(f"stage:{name}", "cuda", "vitb-512", *batch(name), *baselines), limit, must=must)

    def op(name: str, limit: float = 90, *, must: bool = False) -> Part:
        return Part(f"op: {name}", _measure(f"op:{name}", "cuda", None, "--budget", "0.5"), limit, 30, must)

    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every tensor has bounds of its own
    build = {"DELTAKERN_REQUIRE_EXT": "1", **({"DELTAKERN_CUDA_ARCHS": capability} if capability else {})}
    install = ("install", "--no-input", "--no-deps", "--no-build-isolation", "--no-index", "-e", ".")
    kernels = tuple(f"tests/test_{name}.py" for name in ("triton_kernels", "best_of_n", "best_of_n_head"))
    first = "residual_norm"
    parts = [
        Part("build", (python, "-m", "pip", *install), 60, 20, True, build),
        Part("tests: kernels", _pytest("-n", "8", *kernels), 100, 50, True),
        Part("tests: weights", _pytest("-n", "4", "tests/test_weights_gpu.py"), 40, 20, True),
        Part("sanitizer: memcheck", (*sanitizer, "memcheck", *_measure(SANITIZED, "cuda")), 45, 20, True, uncached),
        Part("sanitizer: racecheck", (*sanitizer, "racecheck", *_measure(SANITIZED, "cuda")), 45, 20, True, uncached),
        Part("ceilings", _measure("ceilings", "cuda"), 20, 10, True),
        stage("encode", 75, must=True),
        stage("predictor step", 45, must=True),
        stage("candidate search", 45, must=True),
        op(first, 30, must=True),
        stage("DeltaTok training step", 240),
        *(op(name) for name in backend.ops() if name != first),
        *(stage(name, 90) for name in ("decode", "backbone", "rollout", "token-space sample")),
        Part("tests: gpu", _pytest("-m", "gpu", "tests"), 240, 60),
        Part("tests: attention", _pytest("tests/test_attend.py"), 90, 40),
        Part("attention", _pytest("benchmarks/test_attention.py"), 90, 40),
        Part("doctor", (python, "-m", "deltakern.doctor"), 180, 60),
        Part("accuracy", _measure("accuracy", "cuda"), 180, 60),
        *(stage(name, 240) for name in stages.STAGES if name.startswith("DeltaWorld training")),
        stage("streamed frame", 60),
    ]
    light = ("--budget", "5")
    parts += [Part(f"vitb-256: {s}", _measure(f"stage:{s}", "cuda", "vitb-256", *light), 240, 60) for s in stages.STAGES]
    single = [s for s in stages.STAGES if batch(s)]
    parts += [Part(f"vitb-512, one clip: {s}", _measure(f"stage:{s}", "cuda", "vitb-512", *light), 240, 60) for s in single]
    several = [s for s in stages.STAGES if s != "streamed frame"]
    every = [(s, _measure(f"stage:{s}", "cuda", "vitb-512", *batch(s), *light)) for s in several]
    parts += [Part(f"vitb-512, all implementations: {s}", command, 300, 120) for s, command in every]
    parts += [Part("tests: all", _pytest("-n", "8", "tests"), suite.LIMIT, 300)]
    return [*parts, _table()]


def cpu_suite() -> list[Part]:
    """Rows of a machine without a GPU, about twenty minutes on two cores; what follows README's rows takes as long again."""
    from deltakern import backend
    from deltakern.report import stages

    slow = 20 * 60
    chosen = ("--impl", ";".join((stages.RELEASE, stages.RELEASE_COMPILED, stages.OURS, stages.LIVE, stages.ONE_FUTURE)))
    native = [name for name, op in backend.ops().items() if "cpp" in op.kernels]
    eager = ("--impl", ";".join((stages.RELEASE, stages.OURS, stages.ONE_FUTURE)))
    parts = [
        Part("doctor", (sys.executable, "-m", "deltakern.doctor"), 180, 20),
        Part("ceilings", _measure("ceilings", "cpu"), 60, 10),
        *(Part(f"tiny: {s}", _measure(f"stage:{s}", "cpu", "tiny", *chosen, "--budget", "3"), 180, 20) for s in stages.STAGES),
        *(Part(f"op: {name}", _measure(f"op:{name}", "cpu", None, "--budget", "1"), slow, 30) for name in native),
        *(Part(f"vitb-256: {s}", _measure(f"stage:{s}", "cpu", "vitb-256", *chosen, "--budget", "8"), slow, 45) for s in stages.STAGES),
        Part("accuracy", _measure("accuracy", "cpu"), slow, 20),
    ]
    parts += [
        Part(f"op: {name}", _measure(f"op:{name}", "cpu", None, "--budget", "1"), slow, 60) for name in backend.ops() if name not in native
    ]
    large = ("predictor step", "token-space sample", "rollout")
    parts += [Part(f"vitb-512: {s}", _measure(f"stage:{s}", "cpu", "vitb-512", *eager, "--budget", "8"), slow, 60) for s in large]
    return [*parts, _table()]


def named(parts: Sequence[Part], commit: str) -> list[Part]:
    """The parts, with the commit that the rows of their measurements are to name."""
    return [
        Part(p.name, (*p.command, "--commit", commit), p.limit, p.least, p.must, p.env) if "--measure" in p.command else p for p in parts
    ]


def prepare(folder: Path | None) -> None:
    """The environment of all parts: this tree first on the path, then the wheels; pip and the hub without a network."""
    paths = [str(ROOT)]
    if folder is not None:
        site = wheels.install(folder.resolve())
        sys.path.insert(1, str(site))
        paths.append(str(site))
        os.environ.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder.resolve()), HF_HUB_OFFLINE="1")
        os.environ["PATH"] = os.pathsep.join([str(site / "bin"), os.environ.get("PATH", "")])
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")  # where compute-sanitizer is, also where it is on no path
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(cuda)])
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")


def _run_suite(given: argparse.Namespace) -> int:
    prepare(given.wheels)
    facts: dict[str, Any] = {"commit": "", "device": "no GPU"}
    try:
        facts = suite.describe("cuda" if given.gpu_suite else "cpu")
    except ValueError:
        if not given.dry_run:
            raise
    commit = given.commit or facts["commit"]
    if not commit and not given.dry_run:
        raise ValueError("a row names its commit; this tree has no git history, so give it with --commit")
    parts = gpu_suite(facts.get("memory", 80e9) / 1e9, facts.get("capability", "")) if given.gpu_suite else cpu_suite()
    return suite.run_suite(
        named(parts, given.commit) if given.commit else parts,
        commit=commit,
        device=facts["device"],
        dry_run=given.dry_run,
        only=given.only,
        seconds=given.seconds,
        out=given.out,
        resume=given.resume,
        report=REPORT,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gpu-suite", action="store_true", help="everything for a borrowed GPU")
    what.add_argument("--cpu-suite", action="store_true", help="rows of a machine without a GPU; needs it quiet")
    what.add_argument("--measure", metavar="WHAT", help="ceilings, accuracy, op:NAME, stage:NAME or check:OP=IMPLEMENTATION;...")
    what.add_argument("--update-readme", action="store_true", help="write README's table from the committed rows")
    what.add_argument("--fetch-wheels", metavar="DIR", type=Path, help="download wheels for a machine without a network")
    suites = parser.add_argument_group("suites")
    suites.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    suites.add_argument("--only", metavar="TEXT", help="only the parts whose name holds this")
    suites.add_argument("--seconds", type=float, help="for the whole run: start nothing that has no room, keep some for the table")
    suites.add_argument("--wheels", metavar="DIR", type=Path, help="install what is missing from there first; no network is used")
    suites.add_argument("--resume", metavar="DIR", type=Path, help="what --out was in an earlier run: its parts are done, its rows kept")
    parser.add_argument("--commit", help="the commit that rows name, where the tree has no git history")
    parser.add_argument("--out", type=Path, help="a suite: folder for copies of state, rows, log and report\na measurement: file of rows")
    one = parser.add_argument_group("measurements")
    one.add_argument("--device", choices=("cpu", "cuda"), help="the GPU where there is one")
    one.add_argument("--batch", type=int, default=1, help="clips in the stages that train or encode")
    one.add_argument("--preset", default="tiny", help="tiny, vitb-256 or vitb-512")
    one.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, float32 on a CPU by default")
    one.add_argument("--impl", metavar="NAMES", help="implementations of a stage, separated by semicolons; all by default")
    one.add_argument("--budget", type=float, help="seconds of timing for a stage or for a case of an op")
    fetching = parser.add_argument_group("wheels")
    fetching.add_argument("--python", default="3.12", help="the other machine's Python")
    fetching.add_argument("--packages", help=f"separated by spaces, instead of: {' '.join(wheels.NEEDED)}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        if given.fetch_wheels:
            found = wheels.fetch(given.fetch_wheels, given.python, given.packages.split() if given.packages else wheels.NEEDED)
            print(f"{len(found)} wheels in {given.fetch_wheels}, {sum(w.stat().st_size for w in found) / 2**20:.0f} MiB")
            return 0
        if given.gpu_suite or given.cpu_suite:
            return _run_suite(given)
        from benchmarks import measure

        if given.update_readme:
            if measure.update_readme():
                return 0
            print("README.md is missing or has no performance markers; nothing written")
            return 1
        return measure.main(given)
    except (ValueError, FileNotFoundError, subprocess.CalledProcessError) as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    sys.exit(main())
