"""What is particular to ``residual_norm``'s kernels; the rest is in ``test_triton_kernels.py``."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_accurate

from deltakern import backend
from deltakern.ops import _triton, layer_norm, residual_norm


def make(device: torch.device, shape: tuple[int, ...] = (3, 5, 24), dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, shape, shape[-1:], shape[-1:], shape[-1:]]
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def test_one_kernel_each_way(device: torch.device) -> None:
    args = [t.requires_grad_() for t in make(device)]
    with _triton.count_launches() as launches:
        stream, normed = residual_norm(*args, impl="triton")
        (stream.sum() + normed.square().sum()).backward()
    assert launches == {"residual_norm_forward_kernel": 1, "residual_norm_backward_kernel": 1}


def test_keeps_stream_branch_and_two_numbers_a_row(device: torch.device) -> None:
    args = [t.requires_grad_() for t in make(device)]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stream, _ = residual_norm(*args, impl="triton")
    own = [t for t in kept if all(t.data_ptr() != a.data_ptr() for a in (*args, stream))]
    assert [t.numel() for t in own] == [2 * stream[..., 0].numel()]


def test_without_a_scale_the_branch_is_not_kept(device: torch.device) -> None:
    stream, branch, _, weight, bias = (t.requires_grad_() for t in make(device))
    for vectors in ((weight, bias), (None, None)):
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            total, _ = residual_norm(stream, branch, None, *vectors, impl="triton")
        large = [t for t in kept if t.numel() >= total.numel()]
        assert [t.data_ptr() for t in large] == ([total.data_ptr()] if vectors[0] is not None else [])


def test_layer_norm_makes_the_second_output_again(device: torch.device) -> None:
    """From the first, bit for bit, in any dtype; and no other kernel is needed."""
    for stream_dtype, out_dtype in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        stream, branch, *vectors = make(device, (3, 5, 770))
        total, normed = residual_norm(stream.to(stream_dtype), branch.bfloat16(), *vectors, out_dtype=out_dtype, impl="triton")
        with _triton.count_launches() as launches:
            again = layer_norm(total, *vectors[1:], out_dtype=out_dtype, impl="triton")
        assert torch.equal(again, normed)
        assert launches == {"residual_norm_forward_kernel": 1}


def test_no_norm_hands_the_streams_gradient_on(device: torch.device) -> None:
    """Nothing is computed and nothing copied where the gradient is the incoming one."""
    stream, branch, *_ = make(device)
    stream.requires_grad_()
    branch.requires_grad_()
    out, normed = residual_norm(stream, branch, None, None, None, impl="triton")
    assert normed is None
    incoming = torch.randn_like(out)
    with _triton.count_launches() as launches:
        grads = torch.autograd.grad(out, [stream, branch], incoming)
    assert launches.total() == 0
    assert all(torch.equal(g, incoming) for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_mean_costs_no_digits(dtype: torch.dtype, device: torch.device) -> None:
    stream, branch, scale, weight, bias = make(device, dtype=dtype)
    stream = stream + 300  # the deviation is a small part of the mean
    truth = residual_norm.reference(*(t.double() for t in (stream, branch, scale, weight, bias)))
    plain = residual_norm.reference(stream, branch, scale, weight, bias)
    ours = residual_norm(stream, branch, scale, weight, bias, impl="triton")
    for o, p, t in zip(ours, plain, truth, strict=True):
        assert_as_accurate(o, p, t)


@pytest.mark.parametrize("width", [1, 2, 255, 257, 768, 1280, 3000, 8192])
def test_widths(width: int, device: torch.device) -> None:
    args = make(device, (3, width))
    truth = residual_norm.reference(*(t.double() for t in args))
    plain = residual_norm.reference(*args)
    for o, p, t in zip(residual_norm(*args, impl="triton"), plain, truth, strict=True):
        assert_as_accurate(o, p, t)


def test_too_wide_is_refused_by_name(device: torch.device) -> None:
    with pytest.raises(backend.BackendError, match="at most 8192 channels"):
        residual_norm(*make(device, (1, 8193)), impl="triton")


def test_float64_output_is_refused(device: torch.device) -> None:
    with pytest.raises(backend.BackendError, match="float64"):
        residual_norm(*make(device), out_dtype=torch.float64, impl="triton")


def test_empty_batch(device: torch.device) -> None:
    args = [t.requires_grad_() for t in make(device, (0, 5, 8))]
    stream, normed = residual_norm(*args, impl="triton")
    assert stream.shape == normed.shape == (0, 5, 8)
    grads = torch.autograd.grad(stream.sum() + normed.sum(), args)
    assert [g.shape for g in grads] == [a.shape for a in args]
    assert all(not g.any() for g in grads)


def test_not_a_number_stays_in_its_row(device: torch.device) -> None:
    args = make(device, (4, 24))
    args[0][1, 3] = float("nan")
    args[1][2, 5] = float("inf")
    ours, theirs = residual_norm(*args, impl="triton"), residual_norm.reference(*args)
    for o, t in zip(ours, theirs, strict=True):
        assert torch.equal(o.isnan(), t.isnan())
        assert torch.equal(o.isinf(), t.isinf())
        assert o[[0, 3]].isfinite().all()


def test_weights_of_any_stride(device: torch.device) -> None:
    stream, branch, *vectors = make(device)
    strided = [torch.stack((v, v + 1), -1)[:, 0] for v in vectors]
    for a, b in zip(
        residual_norm(stream, branch, *strided, impl="triton"), residual_norm(stream, branch, *vectors, impl="triton"), strict=True
    ):
        assert torch.equal(a, b)


def test_autocast_changes_no_dtype(device: torch.device) -> None:
    args = make(device)
    with torch.autocast(device.type, torch.bfloat16):
        stream, normed = residual_norm(*args, impl="triton")
    assert stream.dtype == normed.dtype == torch.float32
