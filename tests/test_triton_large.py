"""Tensors of more than 2^31 elements on the GPU: the tail of the result is that of the tail alone."""

from __future__ import annotations

import pytest
import torch

from deltakern.ops import best_of_n_head, gelu, patch_delta, recon_loss, residual_norm, swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.large]
ROWS = 2**31 // 768 + 4096
TAIL = 64


@pytest.fixture(scope="module")
def memory(device: torch.device):
    """8 GiB that all tests share."""
    if torch.cuda.get_device_properties(device).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    yield torch.empty(2, ROWS, 768, dtype=torch.bfloat16, device=device)
    torch.cuda.empty_cache()


@pytest.fixture
def big(memory: torch.Tensor):
    """Two tensors of normal numbers, (ROWS,768) each."""
    yield memory.normal_().unbind(0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("op", [gelu, swiglu], ids=lambda f: f.__name__)
def test_activations(op, big) -> None:
    x = big[0].requires_grad_()
    out = op(x, impl="triton")
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    tail = x.detach()[-TAIL:].clone().requires_grad_()
    alone = op(tail, impl="triton")
    assert torch.equal(out[-TAIL:], alone)
    assert torch.equal(grad[-TAIL:], torch.autograd.grad(alone, tail, torch.ones_like(alone))[0])


def test_residual_norm(big, device: torch.device) -> None:
    stream, branch = (t.requires_grad_() for t in big)
    vectors = [torch.randn(768, device=device) for _ in range(3)]
    out = residual_norm(stream, branch, *vectors, impl="triton")
    grads = torch.autograd.grad(out, [stream, branch], [torch.ones_like(o) for o in out])
    tails = [t.detach()[-TAIL:].clone().requires_grad_() for t in (stream, branch)]
    alone = residual_norm(*tails, *vectors, impl="triton")
    alone_grads = torch.autograd.grad(alone, tails, [torch.ones_like(o) for o in alone])
    for big, small in zip((*out, *grads), (*alone, *alone_grads), strict=True):
        assert torch.equal(big[-TAIL:], small)


@pytest.mark.usefixtures("memory")
def test_patch_delta(device: torch.device) -> None:
    clips, patches = 1400, 1024  # 1 + 2 * 1024 rows a clip
    prev, curr = (torch.randn(1, patches, 768, dtype=torch.bfloat16, device=device).expand(clips, -1, -1) for _ in range(2))
    vectors = [
        torch.randn(768, device=device),
        torch.randn(2, 768, device=device),
        torch.randn(768, device=device),
        torch.randn(768, device=device),
    ]
    kwargs = {"mode": "pair", "stream_dtype": torch.bfloat16, "impl": "triton"}
    out = patch_delta(prev, curr, *vectors, **kwargs)
    assert out[0].numel() > 2**31
    alone = patch_delta(prev[-1:], curr[-1:], *vectors, **kwargs)
    for big, small in zip(out, alone, strict=True):
        assert torch.equal(big[-1:], small)


def test_recon_loss(big, device: torch.device) -> None:
    pred, target = big[0].fill_(1).requires_grad_(), big[1].zero_()
    loss = recon_loss(pred, target, kind="mse", impl="triton")
    assert abs(loss.item() - 1.0) < 1e-5
    (grad,) = torch.autograd.grad(loss, pred, torch.tensor(float(pred.numel()), device=device))
    assert (grad[-TAIL:] == 2).all()


def test_best_of_n_head(big, device: torch.device) -> None:
    """The last candidate of many wins, and its loss is that of it alone."""
    stream = big[0].copy_(torch.randn(768, device=device))[None]
    stream[0, -1] = torch.randn(768, device=device)
    weight, head = torch.ones(768, device=device), torch.eye(768, dtype=torch.bfloat16, device=device)
    target = torch.nn.functional.layer_norm(stream[:, -1].float(), (768,))
    rest = (None, None, weight, None, head, None, target)
    index, loss = best_of_n_head(stream, *rest, impl="triton")
    assert index.item() == ROWS - 1
    assert torch.equal(loss, best_of_n_head(stream[:, -1:].clone(), *rest, impl="triton")[1])
