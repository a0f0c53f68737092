"""Builds ``deltakern._C``, the compiled extension: without torch, with or without nvcc, and without it if there is no compiler.

Ninja drives the compilers and keeps dependency files, so that a rebuild compiles what changed. What was built is printed
(``pip install -v`` shows it; ``deltakern doctor`` says it afterwards). Two variables steer it (deltakern/backend.py lists all):
DELTAKERN_REQUIRE_EXT=1 makes a failed build an error, DELTAKERN_CUDA_ARCHS ("none", or a list such as "80;90") chooses what
nvcc compiles for. MAX_JOBS limits the jobs, CUDA_HOME or CUDA_PATH say where CUDA is, CXX which compiler, as everywhere.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# Of every op a table of functions is compiled once for every instruction set
TABLES = {"best_of_n_cpu_isa.cpp": "kernels", "context_attention_cpu_isa.cpp": "context", "rope_qk_norm_cpu_isa.cpp": "rope"}
CPU_SOURCES = ("cpu_isa.cpp", "best_of_n_cpu.cpp", "context_attention_cpu.cpp", "rope_qk_norm_cpu.cpp")
SOURCES = ("bindings.cpp", *CPU_SOURCES, *TABLES, "best_of_n_cuda.cu")
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
REQUIRED = os.environ.get("DELTAKERN_REQUIRE_EXT", "0") not in ("", "0")

# Contraction stays off so that every instruction set, and every compiler, rounds alike (csrc/best_of_n.h).
CXX_FLAGS = ("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
ISAS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
}


def say(text: str) -> None:
    print(f"deltakern: {text}", flush=True)


class Cuda(NamedTuple):
    nvcc: str
    include: Path
    runtime: Path
    archs: tuple[str, ...]
    ptx: str


def wanted_archs() -> tuple[str, ...] | None:
    """The architectures asked for, None for none. A value that cannot be read ends the build, whatever else is wrong."""
    text = os.environ.get("DELTAKERN_CUDA_ARCHS", "").strip()
    if text.lower() == "none":
        return None
    archs = tuple(a.replace(".", "") for a in re.split(r"[;,\s]+", text) if a) or CUDA_ARCHS
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SystemExit(f"deltakern: DELTAKERN_CUDA_ARCHS: expected 'none' or a list such as '80;90', got {text!r}")
    return tuple(sorted(set(archs), key=lambda a: (int(a.rstrip("af")), a)))


def find_nvcc() -> str | None:
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    places = [*(str(Path(h, "bin", "nvcc")) for h in homes), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((p for p in places if p and os.access(p, os.X_OK)), None)


def find_cuda(archs: tuple[str, ...] | None) -> Cuda | None:
    """What nvcc offers, or None without nvcc. Raises CompileError for one that is broken."""
    nvcc = find_nvcc()
    if archs is None:
        say("CUDA: left out (DELTAKERN_CUDA_ARCHS=none)")
        return None
    if nvcc is None:
        say("CUDA: left out (no nvcc by CUDA_HOME, CUDA_PATH, PATH or in /usr/local/cuda)")
        return None
    try:
        dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
        codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as problem:
        raise CompileError(f"{nvcc} does not run: {getattr(problem, 'stderr', None) or problem}") from problem
    top = re.search(r"#\$ TOP=(\S+)", dry.stderr)  # the toolkit's root, also where nvcc is a wrapper script
    root = Path(os.path.realpath(top.group(1) if top else Path(nvcc).parents[1]))
    include = _first(root, ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include"), "cuda_runtime_api.h")
    runtime = _first(root, ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"), "libcudart_static.a")
    known = set(re.findall(r"sm_(\d+[af]?)", codes))
    taken = tuple(a for a in archs if a in known or a.rstrip("af") in known)
    dropped = [a for a in archs if a not in taken]
    if dropped:
        if os.environ.get("DELTAKERN_CUDA_ARCHS"):
            raise CompileError(f"{nvcc} cannot compile for {', '.join(dropped)} (DELTAKERN_CUDA_ARCHS)")
        say(f"CUDA: {nvcc} is too old or too new for sm_{', sm_'.join(dropped)}")
    if not taken:
        raise CompileError(f"{nvcc} compiles for none of {', '.join(archs)}")
    return Cuda(nvcc, include.parent, runtime, taken, taken[-1])


def _first(root: Path, folders: tuple[str, ...], name: str) -> Path:
    found = next((root / f / name for f in folders if (root / f / name).exists()), None)
    if found is None:
        raise CompileError(f"{name} is not under {root}")
    return found


def ninja() -> str:
    try:
        import ninja as package

        bundled = Path(package.BIN_DIR, "ninja")
        if bundled.exists():
            return str(bundled)
    except ImportError:
        pass
    found = shutil.which("ninja")
    if found is None:
        raise CompileError("ninja was not found (it is a build requirement: pip install ninja)")
    return found


def quote(words: list[str] | tuple[str, ...]) -> str:
    """Words for a shell, in a ninja file."""
    return " ".join(shlex.quote(str(w)) for w in words).replace("$", "$$")


def path(p: Path | str) -> str:
    """A path of a ninja build statement."""
    return re.sub(r"([ :$])", r"$\1", str(p))


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        archs = wanted_archs()
        try:
            self._build(target, archs)
        except Exception as problem:
            reason = problem if isinstance(problem, CompileError) else f"{type(problem).__name__}: {problem}"
            if REQUIRED:
                raise CompileError(f"deltakern: the compiled extension could not be built: {reason} (DELTAKERN_REQUIRE_EXT=1)") from problem
            target.unlink(missing_ok=True)  # one built earlier from other sources must not be taken for this one
            say(f"WARNING: installing without the compiled extension deltakern._C: {reason}")
            raise CompileError(str(reason)) from problem  # an optional extension: setuptools reports it and goes on

    def _build(self, target: Path, archs: tuple[str, ...] | None) -> None:
        cxx = list(getattr(self.compiler, "compiler_so_cxx", None) or [])
        if sys.platform == "win32" or not cxx:
            raise CompileError("a GCC-like C++ compiler is needed")
        if shutil.which(cxx[0]) is None:
            raise CompileError(f"the C++ compiler {cxx[0]!r} was not found")
        # In place, the objects stay beside the sources, so that the next build is incremental; else where setuptools wants them.
        kept = ROOT / "build" / f"ext-{sys.implementation.cache_tag}-{platform.machine()}"
        folder = kept if self.inplace or getattr(self, "editable_mode", False) else Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        openmp = self._accepts(cxx, ("-fopenmp",), "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        isas = [name for name, flags in ISAS.items() if self._is_x86(cxx) and self._accepts(cxx, flags)]
        cuda = None
        try:
            cuda = find_cuda(archs)
            if cuda is not None:
                self._ninja(folder, self._plan(folder, target, cxx, openmp, isas, cuda), ["best_of_n_cuda.o"])
        except CompileError as problem:
            if REQUIRED:
                raise
            say(f"WARNING: building without CUDA: {problem}")
            cuda = None
        self._ninja(folder, self._plan(folder, target, cxx, openmp, isas, cuda), [str(target)])
        on = f"CUDA for sm_{', sm_'.join(cuda.archs)} and PTX of {cuda.ptx} ({cuda.nvcc})" if cuda else "no CUDA"
        say(f"built {target.name}: CPU ({', '.join([*reversed(isas), 'baseline'])}; OpenMP {'yes' if openmp else 'no'}), {on}")

    def _is_x86(self, cxx: list[str]) -> bool:
        machine = subprocess.run([cxx[0], "-dumpmachine"], capture_output=True, text=True).stdout
        return machine.startswith("x86_64")

    def _accepts(self, cxx: list[str], flags: tuple[str, ...], source: str = "int main() { return 0; }\n") -> bool:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "try.cpp")
            file.write_text(source)
            command = [*cxx, *flags, str(file), "-o", str(Path(folder, "try"))]
            return subprocess.run(command, capture_output=True, cwd=folder).returncode == 0

    def _plan(self, folder: Path, target: Path, cxx: list[str], openmp: bool, isas: list[str], cuda: Cuda | None) -> str:
        """The text of build.ninja."""
        import pybind11

        csrc = ROOT / "csrc"
        python = [i for i in self.compiler.include_dirs + self.include_dirs if i]
        includes = [f"-I{i}" for i in dict.fromkeys([pybind11.get_include(), *python])]
        threads = ["-fopenmp"] if openmp else []
        x86 = ["-DDELTAKERN_X86"] if set(isas) == set(ISAS) else []
        define = []
        if cuda:
            define = [
                "-DDELTAKERN_WITH_CUDA",
                f'-DDELTAKERN_CUDA_ARCHS="{";".join([*cuda.archs, cuda.ptx + "+PTX"])}"',
                f"-I{cuda.include}",
            ]
        lines = [
            "ninja_required_version = 1.5",
            f"rule cxx\n  command = {quote([*cxx, *CXX_FLAGS])} $flags -MMD -MF $out.d -c $in -o $out",
            "  description = $in -> $out\n  depfile = $out.d\n  deps = gcc",
        ]
        objects = []

        def compile_one(name: str, source: str, flags: list[str]) -> None:
            objects.append(name)
            lines.append(f"build {name}: cxx {path(csrc / source)}\n  flags = {quote(flags)}")

        compile_one("bindings.o", "bindings.cpp", [*threads, *includes, *define])
        for source in CPU_SOURCES:
            compile_one(f"{Path(source).stem}.o", source, [*threads, *x86])
        for source, table in TABLES.items():
            for isa, isa_flags in {"baseline": (), **({i: ISAS[i] for i in isas} if x86 else {})}.items():
                name = f"{Path(source).stem.removesuffix('_isa')}_{isa}.o"
                compile_one(name, source, [*isa_flags, f"-DDELTAKERN_TABLE={table}_{isa}"])
        libraries = []
        if cuda:
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda.archs]
            codes.append(f"-gencode=arch=compute_{cuda.ptx},code=compute_{cuda.ptx}")
            flags = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-t", "0", *codes]
            lines.append(f"rule nvcc\n  command = {quote([cuda.nvcc, *flags])} -MMD -MF $out.d -c $in -o $out")
            lines.append("  description = $in -> $out\n  depfile = $out.d\n  deps = gcc")
            objects.append("best_of_n_cuda.o")
            lines.append(f"build best_of_n_cuda.o: nvcc {path(csrc / 'best_of_n_cuda.cu')}")
            libraries = [str(cuda.runtime), "-ldl", "-lrt", "-lpthread"]
        linker = list(getattr(self.compiler, "linker_so_cxx", None) or [cxx[0], "-shared"])
        strip = [] if sys.platform == "darwin" else ["-Wl,--strip-all", "-Wl,--exclude-libs,ALL"]
        lines.append(
            f"rule link\n  command = {quote(linker)} $in -o $out {quote([*threads, *libraries, *strip])}\n  description = link $out"
        )
        lines.append(f"build {path(target)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"

    def _ninja(self, folder: Path, plan: str, goals: list[str]) -> None:
        Path(goals[0] if os.path.isabs(goals[0]) else folder / goals[0]).parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(plan)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        done = subprocess.run([ninja(), "-C", str(folder), *jobs, *goals], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            last = [line for line in done.stdout.splitlines() if "error" in line.lower() or line.startswith("FAILED")]
            raise CompileError(f"compiling {' '.join(Path(g).name for g in goals)} failed: {(last or ['see the log above'])[0]}")


setup(
    ext_modules=[Extension("deltakern._C", sources=[f"csrc/{s}" for s in SOURCES], language="c++", optional=not REQUIRED)],
    cmdclass={"build_ext": BuildExt},
)
