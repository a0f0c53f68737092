"""The released optimizer: AdamW that decays linear and convolution weights alone, warm-up, constant rate, cool-downs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, as the release orders them: weights of linear and convolution layers, then everything else; by name within.

    An optimizer over these groups has the same state, entry by entry, as the release's over its own model of the same names.
    """
    decayed = {
        f"{name}.weight" if name else "weight"
        for name, child in module.named_modules()
        if isinstance(child, _DECAYED) and child.weight.requires_grad
    }
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    groups = [sorted(n for n in trained if (n in decayed) == wanted) for wanted in (True, False)]
    decays = (weight_decay, 0.0)
    return [{"params": [trained[n] for n in names], "weight_decay": decay} for names, decay in zip(groups, decays, strict=True)]


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step.

    Attributes:
        peak: after the warm-up.
        steps: before the cool-downs.
        warmup: steps over which it rises linearly from zero.
        cooldown: steps of each cool-down; in each the rate is a tenth of that before.
        cooldowns: how many there are.
    """

    peak: float
    steps: int
    warmup: int = 5000
    cooldown: int = 0
    cooldowns: int = 1

    @property
    def total(self) -> int:
        """Steps with the cool-downs."""
        return self.steps + self.cooldown * self.cooldowns

    def rate(self, step: int) -> float:
        """Of the step that follows ``step`` steps."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        stages = min(self.cooldowns, 1 + (step - self.steps) // self.cooldown) if self.cooldown and step >= self.steps else 0
        return self.peak * 0.1**stages


def make_optimizer(module: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, one pass over memory (``fused``) where the device has it."""
    groups = parameter_groups(module, weight_decay)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=rate, fused=fused)
