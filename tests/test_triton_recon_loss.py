"""What is particular to ``recon_loss``'s kernels; the rest is in ``test_triton_kernels.py``."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_accurate, relative_rmse

from deltakern.ops import _triton, recon_loss
from deltakern.ops.recon_loss import KINDS


def pair(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_each_way(kind: str, device: torch.device) -> None:
    pred, target = pair(device, 3, 7, 24)
    with _triton.count_launches() as launches:
        recon_loss(pred.requires_grad_(), target, kind=kind, impl="triton").backward()
    assert launches == {"recon_loss_forward_kernel": 1, "recon_loss_mean_kernel": 1, "recon_loss_backward_kernel": 1}


def test_keeps_one_tensor_of_the_predictions_dtype(device: torch.device) -> None:
    pred, target = pair(device, 3, 7, 24, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        recon_loss(pred.requires_grad_(), target, impl="triton")
    assert [(t.shape, t.dtype) for t in kept] == [(pred.shape, torch.bfloat16)]


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2, 0.1, 1.0, 1e3])
@pytest.mark.parametrize("kind", KINDS)
def test_small_and_large_differences(kind: str, spread: float, device: torch.device) -> None:
    """Against zero as the target, so that the differences are exact."""
    pred = spread * torch.randn(4, 500, generator=torch.Generator().manual_seed(3)).to(device)
    target = torch.zeros_like(pred)
    results = []
    for dtype, call in ((torch.float64, recon_loss.reference), (torch.float32, recon_loss.reference), (torch.float32, recon_loss)):
        leaf = pred.to(dtype).requires_grad_()
        kwargs = {"impl": "triton"} if call is recon_loss else {}
        loss = call(leaf, target.to(dtype), kind=kind, **kwargs)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    truth, plain, ours = results
    for o, p, t in zip(ours, plain, truth, strict=True):
        assert_as_accurate(o, p, t)


def test_log_cosh_near_zero_keeps_its_digits(device: torch.device) -> None:
    """Where |d| + softplus(-2|d|) - log 2 cancels, which costs the formula its digits."""
    pred = torch.linspace(-0.125, 0.125, 1001, device=device)
    leaf = pred.requires_grad_()
    loss = recon_loss(leaf, torch.zeros_like(pred), impl="triton")
    exact = torch.log(torch.cosh(pred.detach().double())).mean()
    eps = torch.finfo(torch.float32).eps
    assert relative_rmse(loss, exact) < 2 * eps
    grad = torch.autograd.grad(loss, leaf)[0]
    assert relative_rmse(grad, torch.tanh(pred.detach().double()) / pred.numel()) < 2 * eps


def test_float16_gradient_of_many_elements_does_not_underflow(device: torch.device) -> None:
    """1/n of a large mean is below float16's smallest number; a loss scale brings the product back."""
    count, scale = 70_000, 2.0**15
    pred = torch.full((count,), 3.0, dtype=torch.float16, device=device).requires_grad_()
    loss = recon_loss(pred, torch.zeros_like(pred), kind="mse", impl="triton")
    grad = torch.autograd.grad(loss, pred, torch.tensor(scale, device=device))[0]
    assert torch.allclose(grad.float(), torch.full_like(grad, 6.0 * scale / count, dtype=torch.float32), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_is_not_a_number(kind: str, device: torch.device) -> None:
    pred = torch.empty(0, 5, device=device).requires_grad_()
    loss = recon_loss(pred, torch.empty(0, 5, device=device), kind=kind, impl="triton")
    assert loss.isnan()
    assert torch.autograd.grad(loss, pred)[0].shape == (0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_differences(kind: str, device: torch.device) -> None:
    for value in (float("inf"), float("-inf"), float("nan")):
        pred, target = pair(device, 40)
        pred[7] = value
        results = []
        for impl in ("triton", "reference"):
            leaf = pred.clone().requires_grad_()
            loss = recon_loss(leaf, target, kind=kind, impl=impl)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        (ours, our_grad), (theirs, their_grad) = results
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert torch.equal(our_grad[:7].isfinite(), their_grad[:7].isfinite())


def test_mean_over_many_programs(device: torch.device) -> None:
    """Several tiles for each of several programs: the sum of partial sums is the mean of all."""
    pred, target = pair(device, 5, 4001, dtype=torch.bfloat16)
    truth = recon_loss.reference(pred.double(), target.double())
    plain = recon_loss.reference(pred, target)
    assert_as_accurate(recon_loss(pred, target, impl="triton"), plain, truth)
