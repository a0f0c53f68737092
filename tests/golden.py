"""The golden vectors: what the released code (amazon-far/deltatok, Apache-2.0) computes on small models with random weights.

``golden/*.safetensors`` holds its outputs, losses, gradients and whatever else was not drawn from a seeded generator. The
weights and inputs that were drawn are drawn again here, in the order and by the laws of ``golden/meta.json``: they are four
fifths of the bytes. On an x86-64 CPU with AVX2 that gives the very bits; elsewhere torch's normal numbers may differ in the last
bit, which the tests' 1e-5 allows. A torch whose generator gives other numbers is noticed by the sum of magnitudes.

The released code exists in two variants, by the place of QK-norm: "post_rope" (first release) and "pre_rope" (the current one).
Their weights and inputs are the same but for the names of the QK-norm weights.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "golden"
VARIANTS = ("post_rope", "pre_rope")
_DRAWS = {
    "normal": lambda shape, generator, number: torch.randn(shape, generator=generator) * number,
    "uniform": lambda shape, generator, number: torch.rand(shape, generator=generator) + number,
    "bytes": lambda shape, generator, number: torch.randint(0, 256, shape, generator=generator).to(torch.uint8),
}


def load(name: str, variant: str = "post_rope") -> dict[str, torch.Tensor]:
    """All tensors of a golden file, e.g. "deltatok_default", with the names that the released code of ``variant`` has. Copies.

    "deltatok_nodelta" has weights and inputs alone in "pre_rope"; its gradient norms are in :func:`meta`.
    """
    return {k: v.clone() for k, v in _load(name, variant).items()}


def meta(name: str, variant: str = "post_rope") -> dict[str, Any]:
    """What is known about a golden file besides its tensors: ``config``, ``grad_norms``, ..."""
    found = _meta()
    return {**found["post_rope"].get(name, {}), **found[variant].get(name, {})}


def state_dict_keys(model: str, variant: str = "post_rope") -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in order of a released state dict: "deltatok" with one layer, or "predictor"."""
    return [(named(k, variant), tuple(shape)) for k, shape in _meta()["post_rope"]["state_dict_keys"][model]]


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose name starts with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def named(key: str, variant: str) -> str:
    """The name in ``variant`` of a tensor that "post_rope" calls ``key``."""
    return re.sub(r"(?<=\.[qk]_norm)(?=\.weight$)", "_prerope", key) if variant == "pre_rope" else key


@functools.cache
def _meta() -> dict[str, Any]:
    return json.loads((FOLDER / "meta.json").read_text())


@functools.cache
def _load(name: str, variant: str) -> dict[str, torch.Tensor]:
    drawn, stored = _drawn(name), load_file(FOLDER / f"{name}.safetensors")
    changed = FOLDER / f"{name}_pre_rope.safetensors"
    if variant == "pre_rope" and changed.exists():
        stored |= load_file(changed)
    elif variant == "pre_rope" and any(named(k, variant) != k for k in drawn):
        stored = {}  # only the gradient norms of this variant were kept
    return {named(k, variant): v for k, v in {**drawn, **stored}.items()}


def _drawn(name: str) -> dict[str, torch.Tensor]:
    recipe = _meta()["draws"][name]
    generator, tensors = torch.Generator().manual_seed(recipe["seed"]), {}
    for key, law, shape in recipe["tensors"]:
        kind, _, number = law.partition(" ")
        tensors[key] = _DRAWS[kind](shape, generator, float(number or 0))
    tensors.pop("", None)  # drawn only to move the generator on
    total = sum(t.double().abs().sum().item() for t in tensors.values())
    if abs(total / recipe["sum_of_magnitudes"] - 1) > 1e-6:
        raise RuntimeError(
            f"{name}: torch {torch.__version__} draws other numbers from seed {recipe['seed']} than the golden files were made with"
        )
    return tensors
