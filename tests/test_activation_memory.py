"""The memory of DeltaTok's training step at 512 px and batch 64, counted without a GPU.

What a forward pass keeps for its backward is counted on few tokens at the released widths, with the kernels in the interpreter.
Every kept tensor's size is a product of batch, tokens and depth, each to the power 0 or 1, so eight small passes give any other one
exactly; a ninth checks that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

import deltakern
from deltakern import ops
from deltakern.models.dinov3 import DINOv3Config, patch_rope
from deltakern.nn import block
from deltakern.nn.attend import attend

WIDTH = 768
BATCH, PATCHES, DEPTH = 64, 1024, 12
UNIT = BATCH * (1 + 2 * PATCHES + 1 + PATCHES) * WIDTH * 2
"""Bytes of one bfloat16 tensor of the stream's shape in an encoder block and in a decoder block together."""


class _Stored(torch.nn.Module):
    hidden_size, num_heads, patch_size, initializer_range = WIDTH, 12, 16, 0.02


def _kept(tokenizer: deltakern.DeltaTok, batch: int, patches: int, device: torch.device) -> int:
    """Bytes that one training forward keeps, each storage once; parameters are not counted, what is derived from them is."""
    prev, curr = torch.randn(2, batch, patches, WIDTH, device=device)
    rope = patch_rope(1, patches, WIDTH // 12, device)
    parameters = {p.untyped_storage().data_ptr() for p in tokenizer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that its place is not given to another
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, deltakern.use_impl("triton"), torch.autocast(device.type, torch.bfloat16):
        ops.recon_loss(tokenizer.decode(tokenizer.encode(prev, curr, rope), prev, rope), curr)
    return sum(storage.nbytes() for storage in kept.values())


def _at(corners: dict[tuple[int, ...], int], point: tuple[float, ...]) -> float:
    """The function through eight corners that is affine in each variable, elsewhere."""
    lows, highs = (tuple(pick(c[i] for c in corners) for i in range(3)) for pick in (min, max))
    total = 0.0
    for corner, value in corners.items():
        for i in range(3):
            part = (point[i] - lows[i]) / (highs[i] - lows[i])
            value *= part if corner[i] == highs[i] else 1 - part
        total += value
    return total


@pytest.fixture(scope="module")
def trained() -> Callable[..., deltakern.DeltaTok]:
    made: dict[str, deltakern.DeltaTok] = {}

    def tokenizer(device: torch.device, depth: int, **options) -> deltakern.DeltaTok:
        if not made:
            torch.manual_seed(0)
            made["whole"] = deltakern.DeltaTok(_Stored(), num_hidden_layers=4, layer_scale_init=0.1).to(device).train()
        whole = made["whole"]
        with torch.device("meta"):
            some = deltakern.DeltaTok(_Stored(), num_hidden_layers=depth, **options).train()
        some.load_state_dict({k: v for k, v in whole.state_dict().items() if k in some.state_dict()}, assign=True)
        return some

    return tokenizer


@pytest.mark.parametrize(
    ("residual", "flash", "units"),
    [(None, True, 13.4), (torch.bfloat16, True, 11.4), (None, False, 15.4)],
    ids=["float32-stream", "bfloat16-stream", "q-and-k-kept"],
)
def test_training_at_512_pixels_and_batch_64(residual, flash, units, trained, device, capsys, monkeypatch):
    """``flash=False``: as with flash-attn, whose backward cannot be given q and k again."""
    if not flash:
        monkeypatch.setattr(block, "attend", lambda *args, again, **kwargs: attend(*args, **kwargs))

    def kept(batch, patches, depth):
        return _kept(trained(device, depth, residual_dtype=residual), batch, patches, device)

    corners = {corner: kept(*corner) for corner in itertools.product((1, 2), (2, 3), (2, 3))}
    assert _at(corners, (3, 5, 4)) == pytest.approx(kept(3, 5, 4), rel=1e-12)

    of_block = _at(corners, (BATCH, PATCHES, 3)) - _at(corners, (BATCH, PATCHES, 2))
    derived = _at(corners, (0, PATCHES, 3)) - _at(corners, (0, PATCHES, 2))
    each = (of_block - derived) / UNIT
    activations = _at(corners, (BATCH, PATCHES, DEPTH))

    with torch.device("meta"):
        whole, backbone = deltakern.DeltaTok(_Stored()), deltakern.DINOv3(config=DINOv3Config())
    states = 16 * sum(p.numel() for p in whole.parameters())  # parameters, gradients, two moments, all float32
    frozen = 4 * sum(p.numel() for p in backbone.parameters())
    features = 2 * BATCH * PATCHES * WIDTH * 4
    # What a block's backward holds beside: at most the stream's gradient (2 units), q and k made again, their and v's gradients,
    # the packed one, and attention's float32 sums of q's gradient (2 + 3 + 3 + 2), in an encoder block.
    working = 12 * BATCH * (1 + 2 * PATCHES) * WIDTH * 2
    total = activations + states + frozen + features + working
    with capsys.disabled():
        print(
            f"\n{each:.2f} units a block; {activations / 1e9:.1f} GB kept, {states / 1e9:.1f} GB parameters and optimizer,"
            f" {(frozen + features) / 1e9:.1f} GB backbone and features, {working / 1e9:.1f} GB to work in: {total / 1e9:.1f} GB"
        )
    assert each <= units
    assert total < 65e9
