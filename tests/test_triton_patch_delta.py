"""What is particular to ``patch_delta``'s kernels; the rest is in ``test_triton_kernels.py``."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_accurate

from deltakern import backend
from deltakern.ops import _triton, patch_delta
from deltakern.ops.patch_delta import MODES


def make(device: torch.device, batch: int = 2, patches: int = 3, width: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, patches, width)] * 2 + [(width,), (2, width), (width,), (width,)]
    return [torch.randn(s, generator=generator).to(device) for s in shapes]


@pytest.mark.parametrize("mode", MODES)
def test_one_kernel_each_way(mode: str, device: torch.device) -> None:
    args = [t.requires_grad_() for t in make(device)]
    with _triton.count_launches() as launches:
        stream, normed = patch_delta(*args, mode=mode, impl="triton")
        (stream.sum() + normed.square().sum()).backward()
    assert launches == {"patch_delta_forward_kernel": 1, "patch_delta_backward_kernel": 1}


@pytest.mark.parametrize("mode", MODES)
def test_writes_the_sequence_once(mode: str, device: torch.device) -> None:
    """Fresh memory: the two outputs and two numbers a row; kept for the backward: the stream and those numbers."""
    args = [t.requires_grad_() for t in make(device)]
    kept: list[torch.Tensor] = []
    made: list[int] = []
    empty = torch.empty
    torch.empty = lambda *a, **k: made.append((t := empty(*a, **k)).numel()) or t
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            stream, _ = patch_delta(*args, mode=mode, impl="triton")
    finally:
        torch.empty = empty
    rows = stream[..., 0].numel()
    assert sorted(made) == sorted([stream.numel(), stream.numel(), 2 * rows])
    own = [t for t in kept if all(t.data_ptr() != a.data_ptr() for a in (*args, stream))]
    assert [t.numel() for t in own] == [2 * rows]


@pytest.mark.parametrize("mode", ["current", "previous"])
def test_what_a_mode_does_not_read_has_no_gradient(mode: str, device: torch.device) -> None:
    args = [t.requires_grad_() for t in make(device)]
    unread = {"current": [0], "previous": [1, 3]}[mode]
    results = {}
    for impl in ("reference", "triton"):
        stream, normed = patch_delta(*args, mode=mode, impl=impl)
        grads = torch.autograd.grad(stream.sum() + normed.square().sum(), args, allow_unused=True)
        assert [i for i, g in enumerate(grads) if g is None] == unread
        results[impl] = stream
    assert torch.equal(results["triton"], results["reference"])


@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 1, 16), (2, 1, 16)])
def test_token_shapes(shape: tuple[int, ...], device: torch.device) -> None:
    args = make(device)
    args[2] = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    for t in args:
        t.requires_grad_()

    def run(call, tensors):
        stream, normed = call(*tensors)
        return torch.autograd.grad((stream * normed).sum(), tensors[2])[0]

    doubles = [t.detach().double().requires_grad_() for t in args]
    truth = run(lambda *a: patch_delta.reference(*a, mode="pair"), doubles)
    plain = run(lambda *a: patch_delta.reference(*a, mode="pair"), args)
    ours = run(lambda *a: patch_delta(*a, mode="pair", impl="triton"), args)
    assert ours.shape == shape
    assert_as_accurate(ours, plain, truth)


@pytest.mark.parametrize("mode", MODES)
def test_no_patches_and_no_clips(mode: str, device: torch.device) -> None:
    for batch, patches in ((2, 0), (0, 3)):
        args = [t.requires_grad_() for t in make(device, batch, patches)]
        stream, normed = patch_delta(*args, mode=mode, impl="triton")
        expected, _ = patch_delta.reference(*args, mode=mode)
        assert torch.equal(stream, expected)
        grads = torch.autograd.grad(stream.sum() + normed.sum(), args[2])
        assert grads[0].shape == args[2].shape
        assert torch.equal(grads[0], torch.full_like(grads[0], float(batch))) or batch


def test_stream_dtype_of_float64_is_refused(device: torch.device) -> None:
    with pytest.raises(backend.BackendError, match="float64"):
        patch_delta(*make(device), mode="pair", stream_dtype=torch.float64, impl="triton")


def test_too_wide_is_refused_by_name(device: torch.device) -> None:
    with pytest.raises(backend.BackendError, match="at most 8192 channels"):
        patch_delta(*make(device, 1, 1, 8193), mode="pair", impl="triton")


def test_default_dtypes_are_the_references(device: torch.device) -> None:
    prev, curr, token, role, weight, bias = make(device)
    for features in (torch.bfloat16, torch.float32):
        for kept in (torch.bfloat16, torch.float32):
            args = (prev.to(features), curr.to(features), token.to(kept), role, weight, bias)
            ours, theirs = patch_delta(*args, mode="pair", impl="triton"), patch_delta.reference(*args, mode="pair")
            assert [t.dtype for t in ours] == [t.dtype for t in theirs]
            assert torch.equal(ours[0], theirs[0])
