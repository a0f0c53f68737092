"""The CUDA source of best_of_n, run on the CPU by tests/cuda_shim.h: indexing, reductions and barriers, not only formulas."""

from __future__ import annotations

import ctypes
from pathlib import Path

import native_build
import pytest
import torch
from best_of_n_checks import check_values, identical
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakern import ops
from deltakern.ops.best_of_n import LOSSES

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORWARD, BACKWARD, SCATTERED = 0, 1, 2
SETTINGS = settings(deadline=None, max_examples=40, derandomize=True, database=None)


class Shim:
    def __init__(self, library: Path) -> None:
        self._run = ctypes.CDLL(str(library)).shim_best_of_n
        self.launches = 0

    def __call__(self, candidates, target, *, loss="smooth_l1", beta=0.1, reduce_dims=1, processors=4, max_grid=2**31 - 1, order=FORWARD):
        """``(index, loss, losses)`` as the CUDA source computes them on a device of so many multiprocessors."""
        axis = candidates.ndim - reduce_dims - 1
        index = torch.full(candidates.shape[:axis], -7)
        best = torch.full(candidates.shape[:axis], 7.0)
        losses = torch.full(candidates.shape[: axis + 1], 7.0)
        launches, error = ctypes.c_int64(0), ctypes.create_string_buffer(500)

        def numbers(values):
            return (ctypes.c_int64 * len(values))(*values)

        def described(t):
            return ctypes.c_void_p(t.data_ptr()), DTYPES[t.dtype]

        status = self._run(
            *(*described(candidates), candidates.ndim, numbers(candidates.shape), numbers(candidates.stride())),
            *(*described(target), numbers(target.shape), numbers(target.stride())),
            *(reduce_dims, LOSSES.index(loss), ctypes.c_double(beta)),
            *(ctypes.c_void_p(t.data_ptr()) for t in (index, best, losses)),
            *(processors, ctypes.c_int64(max_grid), order, ctypes.byref(launches), error, ctypes.c_int64(len(error))),
        )
        if status:
            raise ValueError(error.value.decode())
        self.launches = launches.value
        return index, best, losses


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Shim:
    folder = tmp_path_factory.mktemp("shim")
    return Shim(native_build.build(folder, "shim.so", ("-O2",), ("-shared",)))


# Names of what is meant to be covered, and how many kernels it takes: rows; and totals of a row's blocks; and the best of tiles
PATHS = {
    "one-kernel": ((9, 5, 33), 1, 4, 1),
    "one-kernel-many-candidates": ((7, 150, 40), 1, 4, 1),
    "tiles": ((2, 70, 96), 1, 16, 2),
    "one-group-in-tiles": ((1, 300, 16), 1, 132, 2),
    "delta-tokens": ((2, 3, 19, 768), 1, 4, 1),
    "row-blocks": ((2, 9, 2049), 1, 2, 2),
    "feature-maps": ((2, 5, 6, 768), 2, 2, 2),
    "row-blocks-and-tiles": ((1, 300, 2100), 1, 2, 3),
    "one-candidate": ((3, 1, 20), 1, 2, 1),
    "one-element": ((2, 6, 1), 1, 1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_against_float64(shim, path, dtype):
    shape, reduce_dims, processors, launches = PATHS[path]
    generator = torch.Generator().manual_seed(3)
    candidates = torch.randn(shape, generator=generator).to(dtype)
    axis = len(shape) - reduce_dims - 1
    target = torch.randn((*shape[:axis], *shape[axis + 1 :]), generator=generator).to(dtype)
    loss = LOSSES[len(path) % 4]
    out = shim(candidates, target, loss=loss, reduce_dims=reduce_dims, processors=processors)
    assert shim.launches == launches
    check_values(out, candidates, target, loss=loss, reduce_dims=reduce_dims)
    for order in (BACKWARD, SCATTERED):
        again = shim(candidates, target, loss=loss, reduce_dims=reduce_dims, processors=processors, order=order)
        assert identical(out, again), "the order in which threads run shows: a barrier is missing"


@SETTINGS
@given(data=st.data())
def test_random_problems(shim, data):
    """Layouts, alignment, dtypes, ties, NaN, infinities; the plan and the layout must not show in the bits."""
    leading = data.draw(st.lists(st.integers(0, 3), max_size=2))
    count = data.draw(st.integers(1, 40))
    reduced = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=2))
    dtype, target_dtype = data.draw(st.sampled_from(list(DTYPES))), data.draw(st.sampled_from(list(DTYPES)))
    loss = data.draw(st.sampled_from(LOSSES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    candidates = torch.randn((*leading, count, *reduced), generator=generator).to(dtype)
    target = torch.randn((*leading, *reduced), generator=generator).to(target_dtype)
    rest = (slice(None),) * len(reduced)
    if data.draw(st.booleans()) and count > 1:
        candidates[(..., -1, *rest)] = candidates[(..., 0, *rest)]
    for value in data.draw(st.lists(st.sampled_from([float("nan"), float("inf"), -float("inf")]), max_size=3)):
        if candidates.numel():
            candidates.view(-1)[data.draw(st.integers(0, candidates.numel() - 1))] = value
    kwargs = {"loss": loss, "beta": data.draw(st.sampled_from([0.02, 0.1, 1.0])), "reduce_dims": len(reduced)}
    plain = shim(candidates, target, **kwargs)
    check_values(plain, candidates, target, **kwargs)

    layout = data.draw(st.sampled_from(["shifted", "padded", "transposed", "spread"]))
    if layout == "shifted":  # contiguous, but not at a multiple of 16 bytes
        other = torch.empty(candidates.numel() + 1, dtype=dtype)[1:].view(candidates.shape).copy_(candidates)
    elif layout == "padded":
        other = torch.empty((*candidates.shape[:-1], candidates.shape[-1] + 3), dtype=dtype)[..., :-3].copy_(candidates)
    elif layout == "transposed":
        other = candidates.transpose(0, -1).contiguous().transpose(0, -1)
    else:
        other = torch.empty((*candidates.shape[:-1], 2 * candidates.shape[-1]), dtype=dtype)[..., ::2].copy_(candidates)
    processors = data.draw(st.sampled_from([1, 3, 132]))
    assert identical(plain, shim(other, target, processors=processors, max_grid=data.draw(st.sampled_from([2, 2**31 - 1])), **kwargs))


def test_expanded_inputs(shim):
    row = torch.randn(1, 1, 24)
    target = torch.randn(1, 24).expand(3, 24)
    out = shim(row.expand(3, 17, 24), target)
    assert out[0].tolist() == [0, 0, 0], "equal candidates: the lowest index"
    assert identical(out, shim(row.expand(3, 17, 24).contiguous(), target.contiguous()))


def test_agrees_with_the_cpu_kernels(shim):
    """The orders of summation differ, the formulas and the rule do not."""
    candidates, target = torch.randn(6, 30, 200), torch.randn(6, 200)
    for loss in LOSSES:
        index, _, losses = shim(candidates, target, loss=loss)
        expected, _, expected_losses = ops.best_of_n(candidates, target, loss=loss, return_losses=True)
        assert torch.equal(index, expected)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0.0)


def test_the_shim_finds_a_missing_barrier(tmp_path, shim):
    """The kernel without the barrier behind the staging of the target must not pass the test of orders."""
    source = (native_build.CSRC / "best_of_n_cuda.cu").read_text()
    staged = source.index("alignas(16) __shared__ float target")
    barrier = source.index("  __syncthreads();\n", staged)
    broken = tmp_path / "broken.cu"
    broken.write_text(source[:barrier] + source[barrier + len("  __syncthreads();\n") :])
    without = Shim(native_build.build(tmp_path, "broken.so", ("-O1",), ("-shared",), cuda_source=broken))
    candidates, target = torch.randn(3, 20, 700), torch.randn(3, 700)
    good = shim(candidates, target)
    assert not all(identical(good, without(candidates, target, order=order)) for order in (FORWARD, BACKWARD, SCATTERED))


def test_refuses_what_it_cannot_take(shim):
    base = torch.randn((4,) * 7)[..., ::2, ::2, ::2, ::2, ::2]
    with pytest.raises(ValueError, match="at most 4 reduced dimensions"):
        shim(base, base[:, 0], reduce_dims=5)
