"""Compiles the package's C++ outside of it, for tests."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
SHIM = ("-x", "c++", "-DDELTAKERN_CUDA_SHIM", "-include", str(TESTS / "cuda_shim.h"))
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512")


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler and x86-64")
    return found


def tables(source: str, table: str) -> dict[str, list[str]]:
    """Compiler arguments for a table of functions, once for every instruction set."""
    file = str(CSRC / source)
    isas = {"baseline": (), "avx2": AVX2, "avx512": AVX512}
    return {isa: [*flags, f"-DDELTAKERN_TABLE={table}_{isa}", file] for isa, flags in isas.items()}


def cpu(source: str) -> list[str]:
    return ["-DDELTAKERN_X86", "-fopenmp", str(CSRC / source)]


def build(folder: Path, out: str, flags: Sequence[str], link: Sequence[str] = (), cuda_source: Path = CSRC / "best_of_n_cuda.cu") -> Path:
    """Compiles the CUDA source with the shim and tests/best_of_n_native.cpp into ``folder / out``; a program has the CPU kernels too."""
    units = {
        "cuda": [*SHIM, str(cuda_source)],
        "native": ["-include", str(TESTS / "cuda_shim.h"), str(TESTS / "best_of_n_native.cpp")],
    }
    if "-shared" not in link:
        units |= {"isa": cpu("cpu_isa.cpp"), "cpu": cpu("best_of_n_cpu.cpp"), **tables("best_of_n_cpu_isa.cpp", "kernels")}
    return compile_and_link(folder, out, units, flags, link)


def build_cpu(folder: Path, out: str, op: str, table: str, flags: Sequence[str]) -> Path:
    """tests/<op>_native.cpp, a program, with the CPU kernels of that op, into ``folder / out``."""
    units = {"native": [str(TESTS / f"{op}_native.cpp")], "isa": cpu("cpu_isa.cpp"), "cpu": cpu(f"{op}_cpu.cpp")}
    return compile_and_link(folder, out, {**units, **tables(f"{op}_cpu_isa.cpp", table)}, flags)


def compile_and_link(folder: Path, out: str, units: dict[str, list[str]], flags: Sequence[str], link: Sequence[str] = ()) -> Path:
    cxx = compiler()
    common = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{CSRC}", *flags]

    def compile_one(name: str) -> None:
        run([cxx, *common, *units[name], "-c", "-o", str(folder / f"{out}-{name}.o")])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, units))
    run([cxx, *flags, "-fopenmp", *(str(folder / f"{out}-{n}.o") for n in units), "-o", str(folder / out), *link])
    return folder / out


def run(command: Sequence[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
