"""Closed forms against the table of the paper's models, against two counters on the meta device, and against the op formulas."""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import deltakern
from deltakern import models
from deltakern.cases import cases
from deltakern.report import flops

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is in the repository, not in the package
from benchmarks import release_structure as release

# GFLOP of the released models, to the digits that follow: written down from an independent calculation
TABLE = {
    512: {
        "backbone, a frame": "215.04",
        "encode, a pair (release)": "503.29",
        "encode, last block for the token alone": "466.20",
        "encode, and V folded": "463.82",
        "decode, a frame": "213.07",
        "predictor, a query without K and V": "0.14",
        "predictor, K and V of a context token": "0.028",
        "candidates, 7 x 256 queries": "256.45",
        "DeltaTok training, a pair": "2579",
        "DeltaWorld training, a clip of 8": "6222",
        "rollout, 4 + 3 frames, 20 samples (release)": "15675",
    },
    256: {
        "backbone, a frame": "47.15",
        "encode, a pair (release)": "96.96",
        "encode, last block for the token alone": "90.10",
        "encode, and V folded": "89.51",
        "decode, a frame": "46.15",
        "candidates, 7 x 256 queries": "256.45",
        "DeltaTok training, a pair": "524",
        "DeltaWorld training, a clip of 8": "1460",
        "rollout, 4 + 3 frames, 20 samples (release)": "3362",
    },
}


@pytest.mark.parametrize("size", TABLE)
def test_table(size):
    found = flops.pieces(size, size)
    for piece, text in TABLE[size].items():
        digits = len(text.partition(".")[2])
        assert f"{found[piece] / 1e9:.{digits}f}" == text, piece


def test_papers_own_figures():
    at_512, at_256 = (2 * flops.rollout(size, size) / 1e9 for size in (512, 256))
    assert round(at_512) == 31349
    assert round(at_256) == 6725
    assert f"{at_512:.1e}" == "3.1e+04"
    assert at_256 == pytest.approx(6721, rel=1e-3)
    # stored tokens: the saving in a training step that the project states
    assert flops.deltaworld_training(512, 512) / flops.deltaworld_training(512, 512, from_tokens=True) == pytest.approx(23.9, abs=0.05)


def test_dense_baseline_differs_from_the_paper_by_one_attention_product():
    for size, published, own, twice in ((512, "5.8e+03", 4627, 5786), (256, "959", 886, 959)):
        computed = 2 * flops.dinoworld_rollout(size, size) / 1e9
        assert round(computed) == own
        again = computed + 2 * flops.dinoworld_attention(size, size) / 1e9
        assert round(again) == twice
        assert (f"{again:.1e}" if size == 512 else f"{again:.0f}") == published


def test_no_reading_of_the_dense_baseline_gives_the_papers_figures():
    """From 4 frames 3 more: queries of all frames or of the next, past projected anew or not, one crop or two, any backbone passes."""
    for frames, crops, every, cached in itertools.product(range(10), (1, 2), (False, True), (False, True)):
        counts = {}
        for size in (512, 256):
            patches = flops.RELEASED.patches(size, size)
            total = frames * flops.backbone(size, size)
            for known in (4, 5, 6):
                fresh = (4 if known == 4 else 1) if cached else known
                total += flops.predictor((known if every else 1) * patches, known * patches, new_keys=fresh * patches)
            counts[size] = crops * total / 1e9
        assert not (5750 <= counts[512] < 5850 and 958.5 <= counts[256] < 959.5), (frames, crops, every, cached)


def test_systems_give_the_project_pages_ratios():
    rows = {row.name: row for row in flops.systems(512)}
    assert list(rows) == ["DeltaWorld", "DINO-world", "Cosmos-4B", "Cosmos-12B"]
    assert rows["DINO-world"].token_ratio == 1024
    assert int(rows["Cosmos-12B"].parameter_ratio) == 35
    assert round(rows["Cosmos-4B"].flops_ratio, -3) == round(rows["Cosmos-12B"].flops_ratio, -3) == 2000
    assert [row.published for row in rows.values()] == [False, False, True, True]
    assert rows["DeltaWorld"].flops_ratio == rows["DeltaWorld"].parameter_ratio == 1
    said = flops.claims()
    assert said["tokens a frame, DINO-world"] == 1024
    assert int(said["parameters, Cosmos-12B"]) == 35
    assert [float(f"{said[name]:.0e}") for name in ("FLOPs, Cosmos-4B", "FLOPs, Cosmos-12B")] == [2000, 2000]
    assert [row.name for row in flops.systems(256)] == ["DeltaWorld", "DINO-world"]


def _models(module):
    with torch.device("meta"):
        backbone = release.DINOv3() if module is release else module.DINOv3(config=module.DINOv3Config())
        tokenizer = module.DeltaTok(backbone).eval()
        world, dense = module.DeltaWorld(tokenizer).eval(), module.DINOWorld(backbone).eval()
    return backbone, tokenizer, world, dense


@pytest.fixture(autouse=True)
def _no_autocast_on_meta(monkeypatch):
    """torch.autocast knows no meta device, not even to be switched off there."""
    plain, enabled = torch.autocast, torch.is_autocast_enabled

    def autocast(device_type, *args, **kwargs):
        return contextlib.nullcontext() if device_type == "meta" else plain(device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": device != "meta" and enabled(device))


def _count(function, *args, **kwargs) -> int:
    flops.register()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def released():
    return _models(release)


def _inputs(size):
    with torch.device("meta"):
        patches = (size // 16) ** 2
        rope = (torch.empty(patches, 64), torch.empty(patches, 64))
        return torch.empty(1, 8, 3, size, size, dtype=torch.uint8), torch.empty(1, patches, 768), rope, torch.empty(1, 8)


def test_parameters(released):
    backbone, tokenizer, world, dense = released
    counts = flops.parameters()

    def own(module):
        return sum(p.numel() for p in module.parameters())

    assert counts["backbone"] == own(backbone)
    assert counts["encoder"] == own(tokenizer.encoder_blocks)
    assert counts["tokenizer"] == own(tokenizer) - own(backbone)
    assert counts["predictor"] == own(world.predictor)
    assert counts["deltaworld"] == own(world)
    assert counts["dinoworld"] == own(dense)


@pytest.mark.parametrize("size", [512, 256])
def test_release_structure_against_torchs_counter(released, size):
    backbone, tokenizer, world, dense = released
    frames, features, rope, times = _inputs(size)
    token = torch.empty(1, 1, 768, device="meta")
    assert _count(backbone, frames[:, :1]) == flops.backbone(size, size)
    assert _count(tokenizer.encode, features, features, rope) == flops.encode(size, size)
    assert _count(tokenizer.decode, token, features, rope) == flops.decode(size, size)
    noise, tokens = torch.empty(1, 7, 256, 768, device="meta"), torch.empty(1, 8, 768, device="meta")
    assert _count(world.candidates, noise, tokens[:, 1:], (times[:, 1:],), (times[:, 1:],)) == flops.candidates()
    searched = _count(world.train_on_tokens, tokens, times, release.smooth_l1, noise)
    assert searched == flops.candidates() + flops.predictor(7, 7)
    # the released code tokenizes the target frames and the black frame too, which the paper's figure leaves out
    waste = 4 * flops.backbone(size, size) + 3 * flops.encode(size, size)
    assert _count(world.rollout, frames[:, :7], times[:, :7], 4) == flops.rollout(size, size) + waste
    assert _count(world.sample, tokens[:, :4], times, 3) == flops.sample(cached=False)
    assert _count(dense.rollout, frames[:, :7], times[:, :7], 4) == flops.dinoworld_rollout(size, size) + 3 * flops.backbone(size, size)


def test_training_counts_three_forwards():
    flops.register()
    with torch.device("meta"):
        tokenizer = release.DeltaTok(release.DINOv3())
    _, features, rope, _ = _inputs(256)
    with FlopCounterMode(display=False) as counter:
        z = tokenizer.encode(features, features, rope)
        tokenizer.decode(z, features, rope).sum().backward()
    whole = 3 * (flops.encode(256, 256) + flops.decode(256, 256))
    # features need no gradient, so the first blocks' inputs through the residual do not either: a small saving
    assert 0.97 * whole < counter.get_total_flops() <= whole


class _Call(torch.nn.Module):
    def __init__(self, owner, function):
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, *args):
        return self.function(*args)


def _fvcore(owner, function, *args) -> int:
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis(_Call(owner, function), args)
    analysis.set_op_handle(**flops.fvcore_handles()).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_operator = analysis.by_operator()
    for name in ("layer_norm", "batch_norm"):  # counted by fvcore, not by the convention here
        by_operator.pop(name, None)
    return 2 * sum(by_operator.values())


@pytest.mark.filterwarnings("ignore")
def test_release_structure_against_fvcore(released):
    backbone, tokenizer, world, _ = released
    _, features, rope, times = _inputs(256)
    token, memory = torch.empty(1, 1, 768, device="meta"), torch.empty(1, 7, 768, device="meta")
    layers, pixels = backbone.backbone.model.layer, flops.linear(256, 768, 768)  # the embedding's convolution does not trace on meta

    def blocks(x, cos, sin):
        for layer in layers:
            x = layer(x, (cos, sin))
        return x

    assert _fvcore(backbone, blocks, torch.empty(1, 261, 768, device="meta"), *rope) == flops.backbone(256, 256) - pixels
    assert _fvcore(tokenizer, lambda x, cos, sin: tokenizer.encode(x, x, (cos, sin)), features, *rope) == flops.encode(256, 256)
    assert _fvcore(tokenizer, lambda z, x, cos, sin: tokenizer.decode(z, x, (cos, sin)), token, features, *rope) == flops.decode(256, 256)
    step = _fvcore(
        world, lambda q, kv, t: world.predictor(q, kv, None, (t[:, :1].expand(-1, 5),), (t[:, 1:],)), memory[:, :5], memory, times
    )
    assert step == flops.predictor(5, 7)


def test_savings_are_what_the_models_leave_out():
    """The closed forms with savings, against this package's own models."""
    backbone, tokenizer, world, dense = _models(models)
    frames, features, rope, times = _inputs(256)
    token, tokens = torch.empty(1, 1, 768, device="meta"), torch.empty(1, 8, 768, device="meta")
    assert _count(backbone, frames[:, :1]) == flops.backbone(256, 256)
    for frozen in (False, True):
        # a packed projection carries the 12 gates in 16 columns, where the release multiplies 12
        spare = flops.linear(1, 768, 4) if frozen else 0
        if frozen:
            deltakern.freeze(tokenizer)
        assert _count(tokenizer.encode, features, features, rope) == flops.encode(256, 256, last_block="folded") + 11 * 513 * spare
        # the last block of the decoder drops one row, which the closed form (the release's) computes
        decoded = _count(tokenizer.decode, token, features, rope) - 12 * 257 * spare
        assert 0.999 * flops.decode(256, 256) < decoded < flops.decode(256, 256)
    noise = torch.empty(1, 7, 256, 768, device="meta")
    assert _count(world.predict, tokens[:, 1:], times, noise) == flops.candidates()
    assert flops.encode(256, 256, last_block="token") > flops.encode(256, 256, last_block="folded")
    assert flops.sample(cached=True) < flops.sample(cached=False)
    # dense: the queries of a frame meet only the frames before it, and keys are projected once
    dense.requires_grad_(False)
    assert _count(dense, frames[:, :7], times[:, :7], ctx_len=4) < flops.dinoworld_rollout(256, 256) + 3 * flops.backbone(256, 256)


def test_every_library_op_is_known_to_the_counters():
    found = flops.library_ops()
    registered = flops.register()
    handles = flops.fvcore_handles()
    assert registered == tuple(found)
    for name, (op, _) in found.items():
        assert op in deltakern.backend.ops()
        assert f"deltakern::{name}" in handles


def test_op_formulas():
    normed, q, k = (2, 33, 48), (2, 3, 16), (2, 33, 3, 16)
    tensors = [torch.empty(shape, device="meta") for shape in (normed, q, k)]
    plain = _count(deltakern.ops.delta_pool.reference, *tensors, scale=0.25)
    assert flops.op_flops("delta_pool", {"normed": normed, "q": q, "k": k}) == plain
    q, k, own, time = (2, 12, 3, 16), (2, 5, 3, 16), (2, 12, 2, 3, 16), torch.empty(2, 4, device="meta")
    made = {name: torch.empty(shape, device="meta") for name, shape in (("q", q), ("k", k), ("own", own))}
    reference = deltakern.ops.context_attention.reference
    plain = _count(reference, made["q"], made["k"], made["k"], time, None, rope_size=12)
    assert flops.op_flops("context_attention", {"q": q, "k": k}) == plain
    plain = _count(reference, made["q"], made["k"], made["k"], time, None, own_k=made["own"], own_v=made["own"], rope_size=12)
    assert flops.op_flops("context_attention", {"q": q, "k": k, "own_k": own}) == plain
    stream, head = (2, 3, 5, 16), (24, 16)
    made = [torch.empty(shape, device="meta") for shape in (stream, stream, (16,), (16,), (16,), head, (24,), (2, 3, 24))]
    assert flops.op_flops("best_of_n_head", {"stream": stream, "head": head}) == _count(deltakern.ops.best_of_n_head.reference, *made)
    assert flops.op_flops("swiglu", {"gate_up": (4, 8)}) == 0


@pytest.mark.parametrize("case", cases("best_of_n_head", "tiny"), ids=lambda c: c.name)
def test_cases_of_the_fused_head_state_their_flops(case):
    args, _ = case.make(torch.float32, "cpu", torch.Generator().manual_seed(0), 1.0)
    assert case.flops == flops.op_flops("best_of_n_head", {"stream": args[0].shape, "head": args[5].shape})


def test_bad_sizes():
    with pytest.raises(ValueError, match="height must be a positive multiple of 16, got 500"):
        flops.backbone(500, 512)
    with pytest.raises(ValueError, match="last_block must be"):
        flops.encode(512, 512, last_block="none")
