"""Argument checks that the ops share. Every message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rank(op: str, name: str, tensor: torch.Tensor, layout: str) -> None:
    """``layout`` as in ``"(B,L,D)"``; the number of its letters is the rank."""
    wanted = layout.count(",") + 1
    if tensor.ndim != wanted:
        raise ValueError(f"{op}: {name} must be {layout}, got {wanted_shape(tensor)}")


def shape(op: str, name: str, tensor: torch.Tensor, expected: Sequence[int], layout: str) -> None:
    if tensor.shape != expected and tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must be {layout} = {tuple(expected)}, got {wanted_shape(tensor)}")


def floating(op: str, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def one_device(op: str, **tensors: torch.Tensor | None) -> None:
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first} is on {device}")


def floating_on_one_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Both in one pass."""
    device = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if device is None:
            device = tensor.device
        if tensor.dtype not in FLOATS or tensor.device != device:
            floating(op, **tensors)
            one_device(op, **tensors)


def choice(op: str, name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {tuple(allowed)}, got {value!r}")


def wanted_shape(tensor: torch.Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)}"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; every other floating dtype is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
