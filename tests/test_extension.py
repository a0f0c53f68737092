"""deltakern._C and its build: what C++ refuses, what it says of itself, and what an install does with broken tools."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from deltakern import backend, ops

ROOT = Path(__file__).parents[1]
_C = backend.extension().module
needs_extension = pytest.mark.skipif(_C is None, reason=f"no compiled extension: {backend.extension().error}")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


# --- the extension -----------------------------------------------------------------------------------------------------------


@needs_extension
def test_build_info():
    info = _C.build_info()
    assert info["cpu_isa"] == info["cpu_isas"][0]
    assert info["cpu_isas"][-1] == "baseline"
    assert info["with_cuda"] == bool(info["cuda_archs"]) == bool(info["cuda_version"]) == hasattr(_C, "best_of_n_cuda")
    if info["with_cuda"]:
        assert [a for a in info["cuda_archs"] if a.endswith("+PTX")] == [info["cuda_archs"][-2] + "+PTX"], "PTX of the newest"


@needs_extension
def test_loads_without_torch():
    """Nothing of torch, Triton or CUDA is needed to load it, or comes with it."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.build_info()["cpu_isa"]
assert not {{"torch", "triton", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
    if shutil.which("readelf"):
        needed = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
        assert not [name for name in ("torch", "c10", "cudart", "libcuda.") if name in needed]


class Call:
    """Arguments of ``best_of_n_cpu`` for candidates (2,3,4); any of them can be replaced."""

    def __init__(self, **changes):
        self.tensors = [torch.randn(2, 3, 4), torch.randn(2, 4), torch.empty(2, dtype=torch.int64), torch.empty(2), torch.empty(2, 3)]
        candidates, target, index, loss, losses = self.tensors
        self.arguments = {
            "candidates": candidates.data_ptr(),
            "candidates_dtype": 0,
            "sizes": candidates.shape,
            "strides": candidates.stride(),
            "target": target.data_ptr(),
            "target_dtype": 0,
            "target_sizes": target.shape,
            "target_strides": target.stride(),
            "reduce_dims": 1,
            "loss_kind": 0,
            "beta": 0.1,
            "index": index.data_ptr(),
            "loss": loss.data_ptr(),
            "losses": losses.data_ptr(),
            "threads": 1,
            "isa": "auto",
            **changes,
        }

    def __call__(self):
        _C.best_of_n_cpu(**self.arguments)
        return self.tensors


@needs_extension
def test_a_plain_call():
    candidates, target, index, loss, losses = Call()()
    expected = ops.best_of_n.reference(candidates, target, return_losses=True)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close((loss, losses), expected[1:])


@needs_extension
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 0}, "candidates: null pointer"),
        ({"target": 0}, "target: null pointer"),
        ({"target": 4097}, "target: the address must be a multiple"),
        ({"index": 0}, "index: null pointer"),
        ({"loss": 0}, "loss: null pointer"),
        ({"index": 4}, "index: misaligned"),
        ({"candidates_dtype": 3}, "candidates: dtype must be 0"),
        ({"target_dtype": -1}, "target: dtype must be 0"),
        ({"sizes": (2, -3, 4)}, "must not be negative"),
        ({"strides": (12, 4)}, "as many strides as sizes"),
        ({"strides": (12, 4, -1)}, "must not be negative"),
        ({"sizes": (2, 0, 4)}, "at least one candidate"),
        ({"sizes": (2, 3, 5)}, "target's dimension 1 must be 5, got 4"),
        ({"sizes": (2, 3, 0), "target_sizes": (2, 0)}, "must not be empty"),
        ({"sizes": (2**40, 2**40, 4)}, "overflow"),
        ({"target_sizes": (2, 1, 4), "target_strides": (4, 4, 1)}, "one dimension less"),
        ({"reduce_dims": 0}, "reduce_dims"),
        ({"reduce_dims": 3}, "reduce_dims"),
        ({"loss_kind": 4}, "loss must be 0"),
        ({"beta": 0.0}, "beta must be from 1e-6 to 1e6"),
        ({"beta": float("nan")}, "beta must be from 1e-6 to 1e6"),
        ({"threads": 0}, "threads must be from 1"),
        ({"isa": "sse9"}, "isa must be auto or one of"),
    ],
)
def test_arguments_are_checked_in_cpp(changes, message):
    with pytest.raises(ValueError, match=message):
        Call(**changes)()


@needs_extension
def test_instruction_sets():
    """AVX2 and AVX-512 give the same bits; a CPU without FMA rounds twice."""
    generator = torch.Generator().manual_seed(0)
    for dtype, kind in ((torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 2)):
        candidates = torch.randn(2, 3, 5000, generator=generator).to(dtype)
        candidates[0, 1, :4] = torch.tensor([float("inf"), 6e-8, -1e-5, 65504.0]).to(dtype)  # subnormal and largest float16 too
        candidates[1, 2, 7] = float("nan")
        target = torch.randn(2, 5000, generator=generator).to(dtype)
        for loss in range(4):
            found = {}
            for isa in _C.build_info()["cpu_isas"]:
                call = Call(candidates=candidates.data_ptr(), target=target.data_ptr(), candidates_dtype=kind, target_dtype=kind)
                call.arguments |= {"sizes": candidates.shape, "strides": candidates.stride(), "loss_kind": loss, "isa": isa}
                call.arguments |= {"target_sizes": target.shape, "target_strides": target.stride()}
                found[isa] = call()[4]
            torch.testing.assert_close(found["baseline"], found[_C.build_info()["cpu_isa"]], rtol=1e-6, atol=0.0, equal_nan=True)
            fused = [losses.view(torch.int32) for isa, losses in found.items() if isa != "baseline"]
            assert all(torch.equal(fused[0], other) for other in fused[1:])


@needs_extension
def test_log_cosh_keeps_its_digits():
    """Relative error of one element's value, from where the textbook formula has cancelled to nothing up to where it is |d|."""
    difference = torch.cat([torch.logspace(-15, 4, 20000), torch.linspace(0.9, 1.1, 5000)])
    losses = ops.best_of_n(difference[:, None, None], torch.zeros(len(difference), 1), loss="log_cosh", impl="cpp")[1]
    exact = difference.double()
    truth = torch.where(
        exact < 1e-3,
        exact.square() / 2 - exact.pow(4) / 12,
        exact + torch.log1p(torch.exp(-2 * exact)) - torch.log(torch.tensor(2.0).double()),
    )
    assert ((losses.double() - truth) / truth).abs().max() < 4e-7


@needs_extension
@pytest.mark.skipif(_C is None or not _C.build_info()["with_cuda"], reason="built without CUDA")
def test_no_cuda_kernel_spills():
    """Registers that spill go to the stack; read from the very binary that is installed."""
    found = importlib.util.find_spec("triton")
    bundled = Path(found.origin).parent / "backends/nvidia/bin/cuobjdump" if found else None
    tool = shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)
    if tool is None:
        pytest.skip("needs cuobjdump")
    usage = subprocess.run([tool, "--dump-resource-usage", _C.__file__], capture_output=True, text=True, check=True).stdout.splitlines()
    kernels = [line for line in usage if "STACK:" in line]
    compiled = [a for a in _C.build_info()["cuda_archs"] if not a.endswith("+PTX")]
    assert len(kernels) >= 16 * len(compiled)
    assert [line for line in kernels if "STACK:0 " not in line] == []


# --- the build ---------------------------------------------------------------------------------------------------------------


def build(folder: Path, **environment: str) -> tuple[int, str, list[Path]]:
    """Exit status, log and extensions of a build into ``folder``, with CUDA looked for where ``environment`` says."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stdout + done.stderr, sorted((folder / "lib").rglob("_C*"))


def broken_toolkit(folder: Path) -> Path:
    """A CUDA whose nvcc answers questions and cannot compile."""
    for name in ("bin/nvcc", "include/cuda_runtime_api.h", "lib64/libcudart_static.a"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"""#!/bin/sh
case "$1" in
  --dryrun) echo '#$ TOP={folder}' >&2 ;;
  --list-gpu-code) echo sm_80; echo sm_90 ;;
  *) echo 'nvcc fatal error: this compiler is broken' >&2; exit 1 ;;
esac
""")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.slow
@needs_compiler
def test_broken_cuda_gives_a_cpu_build_and_a_rebuild_compiles_nothing(tmp_path):
    cuda = str(broken_toolkit(tmp_path / "cuda"))
    status, log, built = build(tmp_path, CUDA_HOME=cuda, DELTAKERN_CUDA_ARCHS="90", DELTAKERN_REQUIRE_EXT="0")
    assert (status, len(built)) == (0, 1), log
    assert "deltakern: WARNING: building without CUDA: compiling best_of_n_cuda.o failed" in log
    assert "OpenMP" in log
    assert "no CUDA" in log
    spec = importlib.util.spec_from_file_location("_C", built[0])
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {str(spec.origin)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not module.build_info()["with_cuda"] and not hasattr(module, "best_of_n_cuda")
"""
    subprocess.run([sys.executable, "-c", code], check=True)

    status, log, _ = build(tmp_path, DELTAKERN_CUDA_ARCHS="none")
    assert status == 0, log
    assert "left out (DELTAKERN_CUDA_ARCHS=none)" in log
    assert "ninja: no work to do" in log

    status, log, _ = build(tmp_path, CUDA_HOME=cuda, DELTAKERN_CUDA_ARCHS="90", DELTAKERN_REQUIRE_EXT="1")
    assert status != 0
    assert "DELTAKERN_REQUIRE_EXT=1" in log


def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path):
    status, log, built = build(tmp_path, CXX="no-such-compiler", DELTAKERN_REQUIRE_EXT="0")
    assert (status, built) == (0, []), log
    assert "WARNING: installing without the compiled extension deltakern._C: the C++ compiler 'no-such-compiler' was not found" in log


def test_a_required_extension_fails_the_build(tmp_path):
    status, log, built = build(tmp_path, CXX="no-such-compiler", DELTAKERN_REQUIRE_EXT="1")
    assert status != 0
    assert built == []
    assert "the C++ compiler 'no-such-compiler' was not found (DELTAKERN_REQUIRE_EXT=1)" in log


def test_a_misspelt_architecture_always_fails(tmp_path):
    status, log, built = build(tmp_path, DELTAKERN_CUDA_ARCHS="hopper")
    assert status != 0
    assert built == []
    assert "DELTAKERN_CUDA_ARCHS: expected 'none' or a list such as '80;90', got 'hopper'" in log


def test_the_source_distribution_holds_the_sources(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.split("/", 1)[1] for name in packed.getnames() if "/" in name}
    assert {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir() if p.is_file()} <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "deltakern/ops/best_of_n.py"} <= names
