"""Softmax attention over (B,L,H,d), by the best backend present or by the one that is named."""

from __future__ import annotations

import functools
import importlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltakern.backend import traced_once

BACKENDS = ("auto", "flash-attn", "sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math")
_SDPA = {
    "sdpa-flash": [SDPBackend.FLASH_ATTENTION],
    "sdpa-efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "sdpa-cudnn": [SDPBackend.CUDNN_ATTENTION],
    "sdpa-math": [SDPBackend.MATH],
}
# cuDNN's attention backward has returned NaN on Hopper at head size 64 (pytorch issue 196678) and its single-query forward
# is suspect too (cudnn-frontend issue 1072), so "auto" leaves cuDNN out on GPUs; it can be named.
_SAFE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, backend: str = "auto") -> torch.Tensor:
    """softmax(scale * q k^T) v for every head, without a mask.

    Args:
        q: (B,Lq,H,d); k, v: (B,Lk,H,d); any strides with unit stride in d.
        scale: d ** -0.5 by default.
        backend: "auto" is flash-attn where it is installed and fits, else PyTorch's SDPA (on GPUs without cuDNN).

    Returns:
        (B,Lq,H,d).
    """
    if _use_flash_attn(backend, q.device.type, q.dtype):
        return _flash_attn()[0](q, k, v, softmax_scale=scale)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if backend in ("sdpa", "auto") and (backend == "sdpa" or q.device.type != "cuda"):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        with sdpa_kernel(_SAFE if backend == "auto" else _SDPA[backend]):
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2)
