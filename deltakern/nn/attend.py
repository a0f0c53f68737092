"""Softmax attention over (B,L,H,d), by the best backend present or by the one that is named."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltakern.backend import traced_once
from deltakern.nn.recompute import sources
from deltakern.ops._once import once_differentiable

BACKENDS = ("auto", "flash-attn", "sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math")
# What PyTorch's SDPA may choose from. cuDNN's attention backward has returned NaN on Hopper at head size 64 (pytorch issue 196678) and
# its single-query forward is suspect too (cudnn-frontend issue 1072), so "auto" leaves cuDNN out on GPUs; it can be named.
_SDPA = {
    "auto": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "sdpa-flash": [SDPBackend.FLASH_ATTENTION],
    "sdpa-efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "sdpa-cudnn": [SDPBackend.CUDNN_ATTENTION],
    "sdpa-math": [SDPBackend.MATH],
}


@functools.cache
def _flash_attn():
    try:
        return importlib.import_module("flash_attn").flash_attn_func, None
    except Exception as problem:  # a build against another torch raises more than ImportError
        return None, f"{type(problem).__name__}: {problem}"


def check_backend(name: str) -> str:
    """Returns ``name``; raises ValueError where there is no such backend, RuntimeError where flash-attn is named and missing."""
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {BACKENDS}, got {name!r}")
    if name == "flash-attn" and _flash_attn()[0] is None:
        raise RuntimeError(f"attention='flash-attn' cannot run: {_flash_attn()[1]}")
    return name


@traced_once
def _use_flash_attn(name: str, device: str, dtype: torch.dtype) -> bool:
    if name == "flash-attn":
        return True
    return name == "auto" and device == "cuda" and dtype in (torch.bfloat16, torch.float16) and _flash_attn()[0] is not None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    again: tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], tuple[torch.Tensor | None, ...]] | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v for every head, without a mask.

    Args:
        q: (B,Lq,H,d); k, v: (B,Lk,H,d); any strides with unit stride in d.
        scale: d ** -0.5 by default.
        backend: "auto" is flash-attn where it is installed and fits, else PyTorch's SDPA (on GPUs without cuDNN).
        again: (make, sources), ``make(*sources)`` being q and k. With it they are not kept, and the backward makes them again, where
            SDPA takes its flash kernel. The other backends, flash-attn among them, keep them.

    Returns:
        (B,Lq,H,d).
    """
    if _use_flash_attn(backend, q.device.type, q.dtype):
        return _flash_attn()[0](q, k, v, softmax_scale=scale)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    allowed = None if backend == "sdpa" or (backend == "auto" and q.device.type != "cuda") else _SDPA[backend]
    with contextlib.nullcontext() if allowed is None else sdpa_kernel(allowed):
        if again is not None and _takes_flash(q, k, v, scale):
            out = FlashAgain.apply(q, k, v, scale, again[0], *sources(again[1]))
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2)


def _takes_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> bool:
    """Whether SDPA would take its flash kernel and hand it these very tensors; on a GPU it pads channels to a multiple of 8."""
    if q.device.type not in ("cpu", "cuda") or (q.device.type == "cuda" and q.shape[-1] % 8):
        return False
    return torch._fused_sdp_choice(q, k, v, scale=scale) == SDPBackend.FLASH_ATTENTION.value


class FlashAgain(torch.autograd.Function):
    """SDPA's flash attention, (B,H,L,d), which keeps neither q nor k: ``make(*made_of)`` is the two, (B,L,H,d)."""

    @staticmethod
    def forward(ctx, q, k, v, scale, make, *made_of):
        ctx.scale, ctx.make, ctx.count = scale, make, len(made_of)
        if q.device.type == "cpu":
            kept = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
            ctx.between: tuple[int, ...] = ()
        else:
            out, logsumexp, starts_q, starts_k, *ctx.between, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, scale=scale
            )
            kept = out, logsumexp, starts_q, starts_k, seed, offset
        ctx.save_for_backward(*made_of, v, *kept)
        return kept[0]

    @staticmethod
    @once_differentiable("attend")
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # once: a checkpoint makes them at the first look, and refuses a second
        made_of, (v, out, logsumexp, *rest) = saved[: ctx.count], saved[ctx.count :]
        q, k = (t.transpose(1, 2) for t in ctx.make(*made_of))
        kept = (grad, q, k, v, out, logsumexp)
        if not rest:
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*kept, 0.0, False, scale=ctx.scale)
        else:
            starts_q, starts_k, *seed = rest
            grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                *kept, starts_q, starts_k, *ctx.between, 0.0, False, *seed, scale=ctx.scale
            )
        return *grads, None, None, *(None,) * ctx.count
