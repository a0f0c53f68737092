"""What the Triton ops share on the host: light imports, launch sizes, views of strided tensors, the counter, the interpreter's repairs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltakern import ops
from deltakern.ops import _triton
from deltakern.ops.kernels import tiles

KERNELS = Path(tiles.__file__).parent
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used on a GPU")


def test_import_loads_neither_triton_nor_dynamo() -> None:
    code = "import sys, deltakern.ops; print([m for m in ('triton', 'torch._dynamo') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_kernel_missing_without_triton_names_the_reason() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, deltakern\n"
        "x = torch.randn(3, 8)\n"
        "assert torch.equal(deltakern.ops.gelu(x), torch.nn.functional.gelu(x))\n"
        "try: deltakern.ops.gelu(x, impl='triton')\n"
        "except deltakern.BackendError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "gelu: impl='triton' cannot run" in done.stdout
    assert "Triton could not be imported" in done.stdout


@pytest.mark.parametrize("row", tiles.TABLE, ids=lambda r: f"{r.kernel}-{r.up_to}")
def test_launch_sizes(row: tiles.Row) -> None:
    width = min(row.up_to, 1 << 20)
    size = tiles.tile(row.kernel, width, row.dtype or torch.bfloat16, row.architecture or 90)
    assert size.block & (size.block - 1) == 0
    assert row.block is not None or size.block >= width
    assert size.num_warps in (1, 2, 4, 8, 16, 32)
    fits = [r for r in tiles.TABLE if r.kernel == row.kernel and width <= r.up_to]
    special = [r for r in fits if (r.dtype, r.architecture) != (None, None)]
    if row not in special:
        assert row is next(r for r in fits if r not in special), "an earlier row hides this one"
        assert not [r for r in special if fits.index(r) > fits.index(row)], "this row hides an exception"


def test_launch_sizes_missing() -> None:
    with pytest.raises(KeyError, match="no launch sizes for residual_norm_forward at width 9000"):
        tiles.tile("residual_norm_forward", 9000, torch.float32, 90)


def test_every_launch_is_counted() -> None:
    """No file starts a kernel but through ``_triton.launch``."""
    starts = {path.name: re.findall(r"\w+\[[^\]]*\]\(", path.read_text()) for path in KERNELS.glob("*.py")}
    assert {name: [s for s in found if "kernel" in s.split("[")[0]] for name, found in starts.items()} == {name: [] for name in starts}


def test_counters_nest(device: torch.device) -> None:
    x = torch.randn(3, 8, device=device)
    with _triton.count_launches() as outer:
        ops.gelu(x, impl="triton")
        with _triton.count_launches() as inner:
            ops.gelu(x, impl="triton")
    ops.gelu(x, impl="triton")
    assert inner == {"gelu_forward_kernel": 1}
    assert outer == {"gelu_forward_kernel": 2}


@pytest.mark.parametrize(
    ("name", "expected", "copied"),
    [
        ("contiguous", (2, 5, 8), False),
        ("rows dropped", (2, 4, 8), False),
        ("channels dropped", (2, 5, 6), False),
        ("clips expanded", (7, 5, 8), False),
        ("channels strided", (2, 5, 4), True),
        ("channels expanded", (2, 5, 3), True),
        ("one row", (1, 1, 8), False),
        ("four dimensions", (6, 5, 8), False),
        ("empty", (0, 5, 8), False),
    ],
)
def test_rows(name: str, expected: tuple[int, ...], copied: bool) -> None:
    x = torch.arange(80.0).view(2, 5, 8)
    tensor = {
        "contiguous": x,
        "rows dropped": x[:, 1:],
        "channels dropped": x[..., 1:7],
        "clips expanded": x[:1].expand(7, 5, 8),
        "channels strided": x[..., ::2],
        "channels expanded": x[..., :1].expand(2, 5, 3),
        "one row": x[0, 0],
        "four dimensions": torch.arange(240.0).view(2, 3, 5, 8),
        "empty": x[:0],
    }[name]
    view = _triton.rows(tensor)
    assert view.shape == expected
    assert torch.equal(view.reshape(-1), tensor.reshape(-1))
    assert view.stride(2) == 1
    assert (view.data_ptr() != tensor.data_ptr()) == copied


def test_segments() -> None:
    x = torch.arange(240.0).view(2, 3, 5, 8)
    for tensors, shape in (
        ([x, x + 1], (1, 240)),
        ([x[:, 1:], x[:, 1:].clone()], (2, 80)),
        ([x[..., 2:], x[..., 2:]], (30, 6)),
        ([x[:, :, 1:, :4], x[:, 0:, 1:, 4:]], (1, 96)),  # no two strides do: copied
        ([torch.tensor(2.0)], (1, 1)),
        ([x[:0]], (1, 0)),
    ):
        for tensor, view in zip(tensors, _triton.segments(tensors), strict=True):
            assert view.shape == shape
            assert view.stride(1) == 1
            assert torch.equal(view.reshape(-1), tensor.reshape(-1))


@cpu_only
def test_interpreter_rounds_bfloat16_as_hardware_does() -> None:
    from interpreter_fix import bfloat16_to_float32, float32_to_bfloat16

    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    values = torch.cat((bits.view(torch.float32), torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1 + 2**-8, 1 + 3 * 2**-8])))
    values = values[~values.isnan()]
    ours = torch.from_numpy(bfloat16_to_float32(float32_to_bfloat16(values.numpy())))
    assert torch.equal(ours, values.bfloat16().float())


@cpu_only
def test_interpreter_refuses_arithmetic_on_bfloat16() -> None:
    import interpreter_kernels

    x = torch.randn(16).bfloat16()
    for kernel in (interpreter_kernels.add_kernel, interpreter_kernels.sum_kernel):
        with pytest.raises(Exception, match="bfloat16: the interpreter works on its raw bits"):
            kernel[(1,)](x, torch.empty_like(x), BLOCK=16)


@cpu_only
@pytest.mark.parametrize(
    ("operation", "x", "y", "fits"),
    [
        ("add", 2**31 - 2, 1, True),
        ("add", 2**31 - 1, 1, False),
        ("add", -(2**31), -1, False),
        ("sub", -(2**31) + 1, 1, True),
        ("sub", -(2**31), 1, False),
        ("mul", 2**15, -(2**16), True),
        ("mul", 2**15, 2**16, False),
        ("mul", 2**31 - 1, 2**31 - 1, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_interpreter_refuses_overflow_of_32_bits(operation: str, x: int, y: int, fits: bool, dtype: torch.dtype) -> None:
    """In one element of sixteen. An offset of 32 bits that wraps would be read from somewhere else on a GPU."""
    import interpreter_kernels
    import triton.language as tl

    def language() -> dict[str, object]:
        """What names mean, wherever they are inherited from: the first launch writes some of tensor's own that it had inherited."""
        return {f"{of.__name__}.{name}": getattr(of, name) for of in (tl, tl.tensor) for name in dir(of) if name != "__dict__"}

    before = language()
    operands = torch.ones(2, 16, dtype=dtype)
    operands[:, 7] = torch.tensor([x, y])
    out = torch.empty(16, dtype=dtype)

    def launch() -> None:
        interpreter_kernels.integer_kernel[(1,)](*operands, out, OPERATION=operation, BLOCK=16)

    if fits or dtype == torch.int64:
        launch()
        assert torch.equal(out, getattr(torch, operation)(*operands))
    else:
        with pytest.raises(Exception, match=f"int32 overflow detected for operation {operation}"):
            launch()
    assert language() == before, "the interpreter left triton.language patched"
