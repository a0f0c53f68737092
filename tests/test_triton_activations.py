"""What is particular to the kernels of ``swiglu`` and ``gelu``; the rest is in ``test_triton_kernels.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import assert_as_accurate

from deltakern.ops import _triton, gelu, swiglu

both = pytest.mark.parametrize("op", [gelu, swiglu], ids=lambda f: f.__name__)


@both
def test_one_kernel_each_way_and_only_the_input_is_kept(op: Callable, device: torch.device) -> None:
    x = torch.randn(3, 5, 16, device=device).requires_grad_()
    kept: list[torch.Tensor] = []
    with _triton.count_launches() as launches:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = op(x, impl="triton")
        out.sum().backward()
    assert launches == {f"{op.__name__}_forward_kernel": 1, f"{op.__name__}_backward_kernel": 1}
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both
def test_over_the_whole_range(op: Callable, dtype: torch.dtype, device: torch.device) -> None:
    """From the tails, where the result is zero or the input, through the bend."""
    x = torch.linspace(-30, 30, 4000, device=device).to(dtype).view(10, 400)
    results = []
    for kind, call in ((torch.float64, op.reference), (dtype, op.reference), (dtype, op)):
        leaf = x.to(kind).requires_grad_()
        out = call(leaf, **({"impl": "triton"} if call is op else {}))
        results.append((out.detach(), torch.autograd.grad(out, leaf, torch.ones_like(out))[0]))
    truth, plain, ours = results
    for o, p, t in zip(ours, plain, truth, strict=True):
        assert_as_accurate(o, p, t)


@pytest.mark.parametrize(
    ("op", "formula"),
    [
        (gelu, lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
        (swiglu, lambda x: x[..., :1] * x[..., :1].sigmoid() * x[..., 1:]),
    ],
    ids=["gelu", "swiglu"],
)
def test_non_finite_values_are_the_formulas(op: Callable, formula: Callable, device: torch.device) -> None:
    """Not torch's: its vectorised GELU on the CPU makes NaN of infinity."""
    values = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 20.0, -20.0, 1.0]
    x = torch.tensor([[a, b] for a in values for b in values], device=device)
    ours, truth = op(x, impl="triton"), formula(x.double())
    assert torch.equal(ours.isnan(), truth.isnan())
    assert torch.equal(ours.isposinf(), truth.isposinf())
    assert torch.equal(ours.isneginf(), truth.isneginf())


@both
def test_empty(op: Callable, device: torch.device) -> None:
    for shape in ((0, 8), (3, 0)):
        x = torch.empty(shape, device=device).requires_grad_()
        out = op(x, impl="triton")
        assert out.shape == op.reference(x).shape
        assert torch.autograd.grad(out.sum(), x)[0].shape == shape


def test_swiglu_reads_gate_first(device: torch.device) -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]], device=device)
    expected = torch.tensor([[0.0, 3.0 / (1 + torch.e**-1)]], device=device)
    assert torch.allclose(swiglu(x, impl="triton"), expected)
