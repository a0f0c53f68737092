"""Measures rows in parts, each in a process of its own, within a time; writes README's table from them.

``python -m benchmarks.run --gpu-suite --out DIR`` is for a borrowed GPU, ``--cpu-suite`` for a machine without one: the most telling parts
first, each killed at its limit, rows and profiles in DIR as they come. ``--dry-run`` shows the plan; ``--gpu-suite --device cpu`` rehearses
it at small sizes. ``--measure`` takes single measurements, ``--update-readme`` writes the table of the committed rows into README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import suite
from benchmarks.suite import ROOT, Part

PYTHON = sys.executable
BUDGET = 540.0  # seconds: a command on a borrowed GPU may take ten minutes
FIRST = ("encode", "predictor step", "candidate search", "decode", "backbone", "token-space sample", "streamed frame", "rollout")
TRAINING = ("DeltaTok training step", "DeltaWorld training step, stored tokens", "DeltaWorld training step")
COMPILED = {"predictor step": 30.0, "encode": 45.0, "candidate search": 35.0}  # seconds that compiling the release's structure may take
SANITIZED = ("best_of_n=cuda", "residual_norm=triton", "delta_pool=triton", "rope_qk_norm=triton", "context_attention=triton")
LAUNCHES = "tests/test_fused_block.py::test_a_block_launches_every_kernel_once_each_way"
KERNELS = ("triton_*", "best_of_n", "best_of_n_head", "context_attention", "fused_block")
ELSEWHERE = ("opcheck", "one_graph", "gradcheck", "gradients_of_the_reference")  # what shows on a CPU as well, and takes long
WORKERS = 4


def _measure(what: Sequence[str], device: str, out: Path | None, preset: str | None = None, *extra: str) -> tuple[str, ...]:
    chosen = ("--preset", preset) if preset else ()
    kept = ("--out", str(out)) if out else ()
    return (PYTHON, "-m", "benchmarks.run", "--measure", ";".join(what), "--device", device, *chosen, *kept, *extra)


def _pytest(*arguments: str) -> tuple[str, ...]:
    """Says what came of every test at once, so that something is known where it is killed."""
    return (PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--maxfail", "20", *arguments)


def gpu_suite(out: Path, device: str = "cuda", capability: str = "") -> list[Part]:
    """Everything for a borrowed GPU: whether it is right, then how fast, ours and the release in eager before torch.compile.

    The parts up to the kernels' tests take at most ``BUDGET`` together. On a CPU, a rehearsal: the same commands at small sizes, of
    tests beyond the smoke test the collection alone.

    Args:
        out: folder for rows and profiles.
        device: "cuda" or "cpu".
        capability: such as "90"; what the extension is compiled for, everything by default.
    """
    from deltakern.cases import cases
    from deltakern.report import stages

    gpu = device == "cuda"
    preset = "vitb-512" if gpu else "tiny"
    quick = ("--budget", "2" if gpu else "0.1")
    wide, narrow = (("--batch", n) if gpu else () for n in ("32", "16"))  # what 80 GB hold

    def staged(kind: str, names: Sequence[str], *impls: str) -> tuple[str, ...]:
        batch = narrow if set(names) & set(TRAINING) else wide
        return _measure([f"{kind}:{name}" for name in names], device, out, preset, *batch, "--impl", ";".join(impls), *quick)

    def compiled(name: str, limit: float, impl: str = stages.RELEASE_COMPILED) -> Part:
        return Part(f"compiled: {name}", staged("stage", [name], impl, stages.OURS), limit)

    def sanitizer(tool: str) -> Part:
        command = ("compute-sanitizer", "--error-exitcode", "9", "--tool", tool) if gpu else ()
        checks = [f"check:{what}" for what in SANITIZED] if gpu else ["check:residual_norm=reference"]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every tensor has bounds of its own
        return Part(f"sanitizers: {tool}", (*command, *_measure(checks, device, out)), 45, env=uncached)

    eager = (stages.RELEASE, stages.OURS, stages.LIVE, stages.ONE_FUTURE)
    install = ("install", "--quiet", "--no-input", "--no-deps", "--no-build-isolation", "--no-index", "-e", ".")
    build = {"DELTAKERN_REQUIRE_EXT": "1", **({"DELTAKERN_CUDA_ARCHS": capability} if capability else {})}
    workers = ("-n", str(WORKERS)) if importlib.util.find_spec("xdist") else ()
    workers = workers if gpu else ("--collect-only", "-q")
    files = [f"tests/{path.name}" for name in KERNELS for path in sorted((ROOT / "tests").glob(f"test_{name}.py"))]
    models = ("tests/test_weights_gpu.py", "tests/test_attend.py", "tests/test_sampling.py")
    timed = {case.op: case for case in reversed(cases(tag="benchmark"))}  # the first of every op, then the others
    rest = [case for case in cases(tag="benchmark") if case is not timed[case.op]]
    ops = ["ceilings", *(f"op:{case.op}/{case.name}" for case in (*timed.values(), *(rest if gpu else ())))]
    return [
        *([Part("build", (PYTHON, "-m", "pip", *install), 50, env=build)] if gpu else []),
        Part("smoke", _pytest("tests/gpu_smoke.py", LAUNCHES), 90, must=True),
        Part("stages", staged("stage", FIRST, *eager), 90),
        Part("stages: training", staged("stage", TRAINING, *eager), 50),
        *(compiled(name, limit) for name, limit in COMPILED.items()),
        Part("kernels", _pytest(*workers, "-m", "not large", "-k", f"not ({' or '.join(ELSEWHERE)})", *files), 150, must=True),
        Part("kernels: models", _pytest(*workers, "-m", "gpu and not large" if gpu else "gpu or not gpu", *models), 60, must=True),
        Part("large", _pytest(*(() if gpu else workers), "-m", "large", *files), 60),
        *(sanitizer(tool) for tool in ("memcheck", "racecheck")),
        Part("ops", _measure(ops, device, out, None, "--no-compile", "--budget", "0.3" if gpu else "0.02"), 120),
        Part("ops: attention", _pytest("benchmarks/test_attention.py", "--device", device, *quick), 40),
        Part("profiles", staged("profile", FIRST, *eager), 60),
        Part("profiles: training", staged("profile", TRAINING, *eager), 60),
        Part("compiled: DeltaTok training step", staged("stage", TRAINING[:1], stages.RELEASE_BLOCKS, stages.OURS), 120),
    ]


def cpu_suite(out: Path) -> list[Part]:
    """Rows of a machine without a GPU, about twenty minutes on two cores; what follows README's rows takes as long again."""
    from deltakern import backend
    from deltakern.report import stages

    slow = 20 * 60.0
    chosen = ("--impl", ";".join((stages.RELEASE, stages.RELEASE_COMPILED, stages.OURS, stages.LIVE, stages.ONE_FUTURE)))
    native = [name for name, op in backend.ops().items() if "cpp" in op.kernels]
    eager = ("--impl", ";".join((stages.RELEASE, stages.OURS, stages.ONE_FUTURE)))

    def stage(preset: str, name: str, limit: float, *options: str) -> Part:
        return Part(f"{preset}: {name}", _measure([f"stage:{name}"], "cpu", out, preset, *options), limit, must=True)

    def op(name: str) -> Part:
        return Part(f"op: {name}", _measure([f"op:{name}"], "cpu", out, None, "--budget", "1"), slow, must=True)

    return [
        Part("doctor", (PYTHON, "-m", "deltakern.doctor"), 180, must=True),
        Part("ceilings", _measure(["ceilings"], "cpu", out), 60, must=True),
        *(stage("tiny", name, 180, *chosen, "--budget", "3") for name in stages.STAGES),
        *(op(name) for name in native),
        *(stage("vitb-256", name, slow, *chosen, "--budget", "8") for name in stages.STAGES),
        Part("accuracy", _measure(["accuracy"], "cpu", out), slow, must=True),
        *(op(name) for name in backend.ops() if name not in native),
        *(stage("vitb-512", name, slow, *eager, "--budget", "8") for name in ("predictor step", "token-space sample", "rollout")),
    ]


def _capability() -> str:
    """Of the first GPU, such as "90"; empty where nobody knows."""
    try:
        asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0].replace(".", "")
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def _environment() -> dict[str, str]:
    """Of all parts: this tree first on the path, CUDA's tools also where they are on none, nothing asked of a network."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return {
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), str(cuda)]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _run_suite(given: argparse.Namespace) -> int:
    out = (given.out or ROOT / "build" / "suite").resolve()
    if not given.commit and not (ROOT / ".git").exists() and not given.dry_run:
        raise ValueError("a row names its commit; this tree has no git history, so give it with --commit")
    parts = gpu_suite(out, given.device or "cuda", _capability()) if given.gpu_suite else cpu_suite(out)
    commit = ("--commit", given.commit) if given.commit else ()
    env = _environment()
    parts = [
        dataclasses.replace(p, command=p.command + (commit if "--measure" in p.command else ()), env={**env, **p.env})
        for p in suite.choose(parts, given.only.split(",") if given.only else ())
    ]
    if given.dry_run:
        suite.show(parts)
        return 0
    budget = given.seconds or (BUDGET if given.gpu_suite else float("inf"))
    return suite.run_suite(parts, out, budget=budget, facts={"commit": given.commit or ""})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gpu-suite", action="store_true", help="everything for a borrowed GPU; --device cpu rehearses it")
    what.add_argument("--cpu-suite", action="store_true", help="rows of a machine without a GPU; needs it quiet")
    what.add_argument(
        "--measure",
        metavar="WHAT",
        help="several, separated by semicolons, of: ceilings, accuracy,\n"
        "op:NAME, op:NAME/CASE, stage:NAME, profile:STAGE, check:OP=IMPLEMENTATION",
    )
    what.add_argument("--update-readme", action="store_true", help="write README's table from the committed rows")
    suites = parser.add_argument_group("suites")
    suites.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    suites.add_argument("--only", metavar="NAMES", help="only these parts, in this order, separated by commas")
    suites.add_argument("--seconds", type=float, help=f"for the whole run; {BUDGET:.0f} for --gpu-suite by default")
    parser.add_argument("--commit", help="the commit that rows name, where the tree has no git history")
    parser.add_argument(
        "--out", type=Path, help="folder of rows and profiles, of a suite's log and outcomes too;\na measurement: or file of rows"
    )
    one = parser.add_argument_group("measurements")
    one.add_argument("--device", choices=("cpu", "cuda"), help="the GPU where there is one")
    one.add_argument("--batch", type=int, default=1, help="clips in the stages that train or encode")
    one.add_argument("--preset", default="tiny", help="tiny, vitb-256 or vitb-512")
    one.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, float32 on a CPU by default")
    one.add_argument("--impl", metavar="NAMES", help="implementations of a stage, separated by semicolons; all by default")
    one.add_argument("--no-compile", action="store_true", help="no torch.compile of an op's reference")
    one.add_argument("--budget", type=float, help="seconds of timing for a stage or for a case of an op")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        if given.gpu_suite or given.cpu_suite:
            return _run_suite(given)
        from benchmarks import measure

        if given.update_readme:
            if measure.update_readme():
                return 0
            print("README.md is missing or has no performance markers; nothing written")
            return 1
        return measure.main(given)
    except ValueError as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    sys.exit(main())
