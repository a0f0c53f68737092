"""Every kernel, as the launchers start it at the models' widths, compiles for sm_80, sm_90 and sm_100 without spilling."""

from __future__ import annotations

import aot
import pytest

from deltakern import backend

IN_PLACE = {
    ("best_of_n_head_kernel", "scratch", "barriers between"): (
        "a program has a part of its own; its warps store rows, meet at a barrier, load them, and meet again before the next tile's rows"
    ),
}
"""Kernel and argument that it loads and stores, and why that is safe. Between programs, and between warps where it says "no barrier",
only places that no two of them share are safe: that the store has the layout of the load, or needs what was loaded, is no reason."""


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return aot.report()


@pytest.mark.slow
def test_no_spills_and_shared_memory_within_limits(rows: list[dict], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n" + aot.table(rows))
    spilled = [f"{r['kernel']} {r['variant']} sm_{r['architecture']}: {r['spills']} bytes" for r in rows if r["spills"]]
    assert not spilled, "\n".join(spilled)
    over = [f"{r['kernel']} {r['variant']} sm_{r['architecture']}" for r in rows if r["shared"] > aot.SHARED_LIMIT[r["architecture"]]]
    assert not over, "shared memory over the limit: " + "; ".join(over)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_every_op_is_compiled(rows: list[dict], architecture: int) -> None:
    compiled = {op for r in rows if r["architecture"] == architecture for op in r["ops"]}
    assert compiled == {name for name, op in backend.ops().items() if "triton" in op.kernels}


@pytest.mark.slow
def test_nothing_is_loaded_and_stored_but_what_is_proven_safe(rows: list[dict]) -> None:
    found = {
        (r["kernel"], argument, "no barrier" if race else "barriers between") for r in rows for argument, race in r["in_place"].items()
    }
    assert found == set(IN_PLACE)
