"""Checks of what users hand to the models. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import torch


def check_frames(frames: torch.Tensor, patch_size: int, *, least: int = 1) -> None:
    """Frames must be (B,T,3,H,W) with at least ``least`` frames, height and width positive multiples of ``patch_size``."""
    if not isinstance(frames, torch.Tensor):
        raise TypeError(f"frames must be a uint8 tensor (B,T,3,H,W), got {type(frames).__name__}")
    if frames.ndim != 5 or frames.shape[2] != 3:
        raise ValueError(f"frames must be (B,T,3,H,W), got a tensor of shape {tuple(frames.shape)}")
    if frames.shape[1] < least:
        raise ValueError(f"frames must hold at least {least} frame{'s' * (least > 1)} a clip, got T={frames.shape[1]}")
    height, width = frames.shape[3:]
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise ValueError(f"frames must have a height and a width that are multiples of the patch size {patch_size}, got {height} x {width}")


def check_uint8(frames: torch.Tensor) -> None:
    """Pixels must be uint8 in 0..255; the message for floats says what to do."""
    if frames.dtype == torch.uint8:
        return
    hint = ""
    if frames.is_floating_point() and frames.numel() and not torch.compiler.is_compiling():
        if bool(frames.isnan().any()):
            hint = " holding NaN"
        elif bool(frames.amax() <= 1):
            hint = " in [0, 1]; multiply by 255, round and convert to uint8"
    raise TypeError(f"frames must be uint8 pixels in 0..255, got {frames.dtype}{hint}")


def check_floating(name: str, value: torch.Tensor, layout: str, shape: tuple[int, ...], *, of: str = "", like: str = "") -> None:
    """A floating tensor of this shape; ``layout`` names its axes, ``of`` what it holds, ``like`` what has the same axes."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating tensor {layout}{of}, got {got}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {layout} = {shape}{like}, got a tensor of shape {tuple(value.shape)}")


def check_positive(**values: int) -> None:
    """Every value must be an integer of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
