"""Small models with random weights, for tests."""

from __future__ import annotations

import torch

import deltakern
from deltakern.models.dinov3 import DINOv3Config

CONFIG = DINOv3Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)


def backbone(seed: int = 0) -> deltakern.DINOv3:
    torch.manual_seed(seed)
    return deltakern.DINOv3(config=CONFIG)


def tokenizer(seed: int = 0, **kwargs) -> deltakern.DeltaTok:
    """Two layers of width 64; LayerScale 0.5 so that every branch matters, and biases that are not zero."""
    made = deltakern.DeltaTok(backbone(seed), **{"num_hidden_layers": 2, "layer_scale_init": 0.5, "intermediate_size": 96, **kwargs})
    return _stir(made)


def world(seed: int = 0, tokenizer_options: dict | None = None, **kwargs) -> deltakern.DeltaWorld:
    sizes = {"predictor_hidden_size": 64, "predictor_num_hidden_layers": 2, "predictor_num_heads": 2, "rope_axis_sizes": (28,)}
    small = {"num_samples_train": 6, "num_samples_eval": 3, "layer_scale_init": 0.5, "mlp_ratio": 2}
    return _stir(deltakern.DeltaWorld(tokenizer(seed, **(tokenizer_options or {})), **{**sizes, **small, **kwargs}))


def dense_world(seed: int = 0, **kwargs) -> deltakern.DINOWorld:
    sizes = {"predictor_hidden_size": 64, "predictor_num_hidden_layers": 2, "predictor_num_heads": 2, "rope_axis_sizes": (8, 8, 8)}
    small = {"num_samples_train": 4, "num_samples_eval": 3, "layer_scale_init": 0.5, "mlp_ratio": 2, "rope_unrotated_size": 8}
    return _stir(deltakern.DINOWorld(backbone(seed), **{**sizes, **small, **kwargs}))


def clip(batch: int = 2, frames: int = 3, height: int = 32, width: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 frames (B,T,3,H,W) and timestamps (B,T) in seconds with uneven gaps."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (batch, frames, 3, height, width), generator=generator, dtype=torch.uint8)
    return pixels, (torch.rand(batch, frames, generator=generator) * 0.3 + 0.04).cumsum(1)


def _stir(module: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and (name.endswith("bias") or "norm" in name):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return module
