"""Whether an attention is right, forward and backward, on a slice small enough to be checked at its first use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
LONGEST = 2304


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def _with_gradients(attention: Attention, tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    *inputs, cotangent = (t.detach().to(dtype) for t in tensors)
    out = attention(*(t.requires_grad_() for t in inputs))
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def self_check(attention: Attention, device: torch.device, dtype: torch.dtype, head: int, queries: int, keys: int) -> str | None:
    """What is wrong with ``attention(q, k, v)``, (B,H,L,d) as SDPA has it, or with its gradients; None where nothing is.

    Wrong is what raises a RuntimeError, what is not finite, and what is further from float64 than twice plain math attention in
    ``dtype`` and one eps of the largest value. One sample of two heads; of more rows than ``LONGEST`` some 2,048, with the same
    remainder by 256. It takes up to half a GB for a moment, and waits for the device. The caller's modes (autocast, inference, saved
    tensors' hooks, dispatch) do not reach it, and it draws nothing from the caller's generators.
    """
    lengths = [n if n <= LONGEST else 2048 + n % 256 for n in (queries, keys, keys, queries)]
    draws = torch.Generator().manual_seed(0)
    unhooked = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            unhooked,
            _disable_current_modes(),
        ):
            drawn = [torch.randn(1, n, 2, head, generator=draws, device="cpu").to(device, dtype).transpose(1, 2) for n in lengths]
            found = [_with_gradients(*how) for how in ((attention, drawn, dtype), (_plain, drawn, dtype), (_plain, drawn, torch.float64))]
            for name, ours, usual, exact in zip(("the output", "q's gradient", "k's gradient", "v's gradient"), *found, strict=True):
                if not ours.isfinite().all():
                    return f"{name} is not finite"
                error, least = ((t - exact).abs().max().item() for t in (ours, usual))
                if error > 2 * least + torch.finfo(dtype).eps * exact.abs().max().item():
                    return f"{name} is off by {error:.1e}, in plain math attention by {least:.1e}"
    except RuntimeError as problem:
        return f"{type(problem).__name__}: {problem}"
    return None
