"""AddressSanitizer and UndefinedBehaviorSanitizer over random problems: CPU kernels, driver, and the CUDA source under the shim.

``valgrind PROGRAM 20 2500`` runs on the same program built without the sanitizers.
"""

from __future__ import annotations

import subprocess

import native_build
import pytest

SANITIZE = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["best_of_n", "rope_qk_norm", "context_attention"])
def test_random_problems_are_right_and_clean(op, tmp_path):
    cxx = native_build.compiler()
    (tmp_path / "try.cpp").write_text("int main() { return 0; }\n")
    tried = subprocess.run([cxx, *SANITIZE, "try.cpp", "-o", "try"], cwd=tmp_path, capture_output=True)
    if tried.returncode:
        pytest.skip("the compiler has no AddressSanitizer")
    if op == "best_of_n":
        program = native_build.build(tmp_path, "program", (*SANITIZE, "-DBEST_OF_N_PROGRAM"))
    else:
        table = {"rope_qk_norm": "rope", "context_attention": "context"}[op]
        program = native_build.build_cpu(tmp_path, "program", op, table, (*SANITIZE, "-O0"))  # which halves the compiler's time
    # The shim's fibers swap stacks, which the check for uses after return does not follow
    said = native_build.run([str(program), "60"], ASAN_OPTIONS="detect_stack_use_after_return=0")
    assert said.startswith("60 problems, all as plain loops in double")
