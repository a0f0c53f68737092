"""Compiles the package's Triton kernels for GPUs that are not there, and reads what the assembler and ``races.py`` say of them.

What is compiled is what the launchers launch: every case tagged "real" is run forward and backward, on few rows, with
``_triton.launch`` noting its arguments instead of starting the kernel and the architecture pretended: in bfloat16, and each
op's first case, and those tagged so, in float32 too. A new kernel needs nothing here. Interpreter and compiler cannot share a process, so
:func:`report` works in subprocesses without TRITON_INTERPRET.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import races

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one program may have; the driver refuses more, the compiler does not."""


def environment() -> dict[str, str]:
    """Of a process that compiles."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), kept.get("PYTHONPATH", "")])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@functools.cache
def report(workers: int = 2) -> list[dict[str, Any]]:
    """One dictionary a kernel variant and architecture: op, ops that start it, kernel, case, architecture, registers, shared, spills,
    in_place (see :func:`in_place`)."""
    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.json" for i in range(workers)]
        running = [
            subprocess.Popen(
                [sys.executable, str(here), str(i), str(workers), str(path)],
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i, path in enumerate(paths)
        ]
        found = []
        for process, path in zip(running, paths, strict=True):
            output, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"compiling ahead of time failed with status {process.returncode}:\n{output[-4000:]}")
            found += json.loads(path.read_text())
    return sorted(found, key=lambda r: (r["op"], r["kernel"], r["variant"], r["architecture"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, a line a kernel variant and a group of columns an architecture: registers, shared bytes, spilled bytes."""
    lines: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["kernel"], row["variant"]), {})[row["architecture"]] = row
    wide = max((len(f"{k} {v}") for k, v in lines), default=0)
    text = [" " * wide + "".join(f"  {f'sm_{a} regs shared spill':>24}" for a in ARCHITECTURES)]
    for (kernel, variant), by in lines.items():
        cells = "".join(
            f"  {by[a]['registers']:>10} {by[a]['shared']:>7} {by[a]['spills']:>5}" if a in by else " " * 26 for a in ARCHITECTURES
        )
        text.append(f"{f'{kernel} {variant}':<{wide}}{cells}")
    return "\n".join(text)


# Below: the subprocess.


def _launches() -> list[dict[str, Any]]:
    """What the launchers would start for each architecture."""
    import torch
    from kernel_checks import forward_backward, inputs_shrunk, random_cotangents

    from deltakern import backend, launch
    from deltakern.cases import cases
    from deltakern.ops import _triton

    seen: dict[str, dict[str, Any]] = {}
    current: dict[str, Any] = {}

    def note(kernel: Any, grid: tuple[int, ...], tile: Any, *args: Any, **constexprs: Any) -> None:
        known = specialised(kernel, args, constexprs)
        key = repr([kernel.__name__, known, constexprs, tile, current["arch"]])
        launch = {"kernel": kernel, **known, "constexprs": constexprs, "tile": tile, "ops": [], "sharing": [], **current}
        made = seen.setdefault(key, launch)
        if (together := sharing(kernel, args, constexprs)) not in made["sharing"]:
            made["sharing"].append(together)
        if current["op"] not in made["ops"]:
            made["ops"].append(current["op"])

    _triton.launch = note
    backend.triton_interprets = lambda: True  # admits CPU tensors; nothing is run
    _triton.architecture = lambda device: current["arch"]
    device = torch.device("cpu")
    mine = {name: cases(name, "real") for name, op in backend.ops().items() if "triton" in op.kernels}
    chosen = [(case, torch.bfloat16) for real in mine.values() for case in real]
    chosen += [(case, torch.float32) for real in mine.values() for case in real if case is real[0] or "float32" in case.tags]
    for arch in ARCHITECTURES:
        for case, dtype in chosen:
            current.update(arch=arch, op=case.op, case=case.name)
            args, kwargs = inputs_shrunk(case, dtype, device)
            for wanted in dict.fromkeys(((), case.differentiable)):
                launch.forget_plans()  # which start nothing that is noted here
                forward_backward(case.function, args, {**kwargs, "impl": "triton"}, wanted, random_cotangents())
    return list(seen.values())


def specialised(kernel: Any, args: tuple[Any, ...], constexprs: dict[str, Any]) -> dict[str, Any]:
    """What Triton derives from these arguments: types, which are multiples of 16, which are compile-time constants (1, None)."""
    import torch

    short = {
        torch.float64: "fp64",
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.int32: "i32",
        torch.int64: "i64",
    }
    names = [n for n in kernel.arg_names if n not in constexprs]
    if len(names) != len(args):
        raise TypeError(f"{kernel.__name__}: {len(args)} run-time arguments for {names}")
    signature, divisible, constants = {}, [], {}
    for name, value in zip(names, args, strict=True):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + short[value.dtype]
            if value.storage_offset() * value.itemsize % 16 == 0:  # allocations are aligned further than that
                divisible.append(name)
        elif value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    return {"signature": signature, "divisible": divisible, "constants": constants}


def sharing(kernel: Any, args: tuple[Any, ...], constexprs: dict[str, Any]) -> list[list[str]]:
    """Groups of arguments that lie in one memory, be it in different places of it."""
    import torch

    names: dict[int, list[str]] = {}
    for name, value in zip((n for n in kernel.arg_names if n not in constexprs), args, strict=True):
        if isinstance(value, torch.Tensor) and value.numel():
            names.setdefault(value.untyped_storage().data_ptr(), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def compiled(launch: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arch, tile = launch["kernel"], launch["arch"], launch["tile"]
    signature = {name: launch["signature"].get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch["divisible"]}
    constants = {**launch["constexprs"], **launch["constants"]}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def in_place(launch: dict[str, Any], made: Any) -> dict[str, bool]:
    """Arguments that the kernel loads and stores, by :mod:`races`: as it was written, and as the compiler has arranged it."""
    pointers = [name for name, kind in launch["signature"].items() if kind.startswith("*")]
    found: dict[str, bool] = {}
    for level in ("ttir", "ttgir"):
        for groups in launch["sharing"]:
            for argument, race in races.in_place(made.asm[level], pointers, groups).items():
                found[argument] = race or found.get(argument, False)
    return found


def _compile(launch: dict[str, Any]) -> dict[str, Any]:
    kernel, made = launch["kernel"], compiled(launch)
    registers, stack = _resources(made.asm["cubin"])
    types = "/".join(dict.fromkeys(t[1:] for t in launch["signature"].values() if t.startswith("*")))
    flags = ",".join(name.lower() if value is True else str(value) for name, value in launch["constexprs"].items() if value is not False)
    return {
        "op": launch["op"],
        "ops": launch["ops"],
        "kernel": kernel.__name__,
        "variant": f"{types} {flags}",
        "case": launch["case"],
        "architecture": launch["arch"],
        "registers": registers,
        "shared": made.metadata.shared,
        "spills": _spills(made.asm["ptx"]) if stack else 0,
        "in_place": in_place(launch, made),
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, of which spills are a part."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def _spills(ptx: str) -> int:
    """Bytes spilled, stores and loads, from the assembler that Triton chose, asked again with -v."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)[1]
    assembler = get_ptxas(int(re.search(r"\d+", target)[0])).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run(
            [assembler, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"], capture_output=True, text=True
        ).stderr
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return int(found[1]) + int(found[2])


def main(index: int, workers: int, path: str) -> None:
    launches = _launches()
    Path(path).write_text(json.dumps([_compile(launch) for launch in launches[index::workers]]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
