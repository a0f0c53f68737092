"""Compiles the C++ of best_of_n outside of the package, for tests."""

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


def build(folder: Path, out: str, flags: Sequence[str], link: Sequence[str] = (), cuda_source: Path = CSRC / "best_of_n_cuda.cu") -> Path:
    """Compiles the CUDA source with the shim and tests/best_of_n_native.cpp into ``folder / out``; a program has the CPU kernels too."""
    cxx, isa = compiler(), CSRC / "best_of_n_cpu_isa.cpp"
    common = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{CSRC}", *flags]
    units = {
        "cuda": [*SHIM, str(cuda_source)],
        "native": ["-include", str(TESTS / "cuda_shim.h"), str(TESTS / "best_of_n_native.cpp")],
        "cpu": ["-DDELTAKERN_X86", "-fopenmp", str(CSRC / "best_of_n_cpu.cpp")],
        "baseline": [str(isa)],
        "avx2": [*AVX2, "-DDELTAKERN_TABLE=kernels_avx2", str(isa)],
        "avx512": [*AVX512, "-DDELTAKERN_TABLE=kernels_avx512", str(isa)],
    }

    if "-shared" in link:
        units = {name: units[name] for name in ("cuda", "native")}

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
