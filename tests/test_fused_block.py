"""The block on its kernels: nothing falls back in silence, and training with them is training without them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from compare import assert_as_accurate, outputs_and_grads, relative_rmse

import deltakern
from deltakern import ops
from deltakern.data.video import read_clip
from deltakern.models import DINOv3Config
from deltakern.nn import Assembly, Block
from deltakern.ops import _triton

CLIP = Path(__file__).parent / "data" / "carphone.mp4"

# What one DeltaTok block starts, forward and backward, beside the matrix products and the attention.
FORWARD = {f"{op}_forward_kernel": 1 for op in ("patch_delta", "rope_qk_norm", "head_gate", "residual_norm", "swiglu")}
BACKWARD = {name.replace("forward", "backward"): count for name, count in FORWARD.items()}
# What the backward makes again: both LayerNorms' outputs, q and k, the gated attention, the hidden layer.
AGAIN = {"residual_norm_forward_kernel": 2, **{f"{op}_forward_kernel": 1 for op in ("rope_qk_norm", "head_gate", "swiglu")}}


def _again(device: torch.device, half: bool) -> dict[str, int]:
    """q and k are made again by flash attention and cuDNN's, which on a GPU take half precision alone."""
    return {name: count for name, count in AGAIN.items() if half or device.type == "cpu" or "rope" not in name}


def _block(device: torch.device, **options) -> tuple[Block, Assembly, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    block = Block(64, 2, 88, swiglu=True, qk_norm="pre_rope", gated=True, **options).to(device)
    for scale in (block.layer_scale1, block.layer_scale2):
        torch.nn.init.uniform_(scale.lambda1, 0.2, 0.9)
    prev, curr = torch.randn(2, 2, 6, 64, device=device).unbind(0)
    entry = Assembly(prev, curr, torch.randn(1, 64, device=device), torch.randn(2, 64, device=device), "pair")
    angles = torch.randn(6, 32, device=device)
    return block, entry, (angles.cos(), angles.sin())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["auto", "none"])
def test_a_block_launches_every_kernel_once_each_way(recompute, half, device):
    block, entry, rope = _block(device, recompute=recompute)
    entry = entry._replace(prev=entry.prev.requires_grad_(True))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
    with _triton.count_launches() as forward, deltakern.use_impl("triton"), autocast:
        out = block(entry, rope, num_prefix=1)
    assert dict(forward) == FORWARD
    with _triton.count_launches() as backward, deltakern.use_impl("triton"):
        (out.stream + out.branch).sum().backward()
    assert out.scale is None, "LayerScale was not folded into the projection"
    assert dict(backward) == (BACKWARD if recompute == "none" else {**BACKWARD, **_again(device, half)})
    assert entry.prev.grad.isfinite().all()


@pytest.mark.parametrize("frozen", [False, True])
def test_without_gradients_the_same_kernels_and_scales_folded_into_frozen_weights(frozen, device):
    block, entry, rope = _block(device)
    if frozen:
        deltakern.freeze(block)
    with torch.no_grad(), _triton.count_launches() as launches, deltakern.use_impl("triton"):
        out = block.eval()(entry, rope, num_prefix=1)
    assert dict(launches) == FORWARD
    assert (out.scale is None) is frozen


def test_the_last_encoder_block_pools_instead_of_projecting_values(device):
    block, entry, rope = _block(device)
    with torch.no_grad(), _triton.count_launches() as launches, deltakern.use_impl("triton"):
        block.eval()(entry, rope, num_prefix=1, rows="first")
    assert {name for name in launches if name.startswith("delta_pool")}, f"no delta_pool among {dict(launches)}"
    assert launches["rope_qk_norm_forward_kernel"] == launches["head_gate_forward_kernel"] == 1


@pytest.mark.parametrize("rows", ["all", "first", "rest"])
def test_a_block_with_kernels_is_as_accurate_as_without(rows, device):
    """Outputs and every gradient against float64."""
    block, entry, rope = _block(device)
    exact = copy.deepcopy(block).double()
    names = [name for name, _ in block.named_parameters()]

    def run(module, impl):
        def function(prev, curr, token, role, *parameters):
            with deltakern.use_impl(impl):
                made = torch.func.functional_call(
                    module,
                    dict(zip(names, parameters, strict=True)),
                    (Assembly(prev, curr, token, role, "pair"), tuple(t.to(prev.dtype) for t in rope)),
                    {"num_prefix": 1, "rows": rows},
                )
            return made.stream, made.branch

        arguments = [entry.prev, entry.curr, entry.token, entry.role, *block.parameters()]
        arguments = [a.detach().to(next(module.parameters()).dtype) for a in arguments]
        torch.manual_seed(1)
        length = {"all": 13, "first": 1, "rest": 12}[rows]
        cotangents = [torch.randn(2, length, 64, device=device), torch.randn(2, length, 64, device=device)]
        outputs, grads = outputs_and_grads(function, arguments, range(len(arguments)), cotangents)
        gate = 4 + names.index("attention.attn_gate.weight")  # with its bias, two numbers that err by chance, as one vector
        grads[gate] = torch.cat((grads[gate].flatten(), grads.pop(gate + 1)))
        return outputs, grads

    kernel, plain, truth = run(block, "triton"), run(block, "reference"), run(exact, "reference")
    for kind, ours, theirs, right in zip(("output", "gradient"), kernel, plain, truth, strict=True):
        for i, (a, b, c) in enumerate(zip(ours, theirs, right, strict=True)):
            assert_as_accurate(a, b, c, name=f"{kind} {i}")


class _Stored(torch.nn.Module):
    """Stands for the backbone; features are given."""

    hidden_size, num_heads, patch_size, initializer_range = 64, 2, 16, 0.02


def _features() -> torch.Tensor:
    """(T,N,D) features of a real clip under a small backbone."""
    torch.manual_seed(0)
    config = DINOv3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    clip = read_clip(CLIP, num_frames=12, stride=2, size=(48, 64))
    return deltakern.DINOv3(config=config)(clip.frames[None])[0]


def _train(
    features: torch.Tensor, steps: int, *, impl: str, dtype: torch.dtype, autocast: bool, device: torch.device, rate: float
) -> torch.Tensor:
    """Losses of a small DeltaTok's first steps."""
    torch.manual_seed(0)
    # What is made again has the same bits (test_recompute.py), so the long run does without.
    sizes = {"num_hidden_layers": 1, "layer_scale_init": 0.1, "intermediate_size": 96, "recompute": "auto" if autocast else "none"}
    tok = deltakern.DeltaTok(_Stored(), **sizes).to(device, dtype)
    features = features.to(device, dtype)
    optimizer = torch.optim.AdamW(tok.parameters(), lr=rate)
    rope = tuple(t.to(dtype) for t in tok.eval()._rope(torch.empty(1, 3, 48, 64, device=device)))
    losses = []
    for step in range(steps):
        i = step % (len(features) - 2)
        prev, curr = features[i : i + 2], features[i + 1 : i + 3]
        with deltakern.use_impl(impl), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = ops.recon_loss(tok.decode(tok.encode(prev, curr, rope), prev, rope), curr)
        optimizer.zero_grad()
        with deltakern.use_impl(impl):
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "rate", "autocast"), [(200, 1e-3, False), (40, 1e-2, True)], ids=["float32", "bfloat16"])
def test_training_follows_the_reference_loss_curve(steps, rate, autocast, device):
    """Against the same run in float64: the kernels' curve strays no more than twice as far as plain PyTorch's.

    Training amplifies rounding by chance, so plain PyTorch runs four times, on inputs that differ in their last bit; the farthest counts.
    """
    features = _features()
    truth = _train(features, steps, impl="reference", dtype=torch.float64, autocast=False, device=device, rate=rate)
    bit = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps / 2
    nudged = [features * (1 + bit * torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))) for seed in range(3)]
    options = {"impl": "reference", "dtype": torch.float32, "autocast": autocast, "device": device, "rate": rate}
    plain = max((_train(f, steps, **options) for f in (features, *nudged)), key=lambda curve: relative_rmse(curve, truth))
    with _triton.count_launches() as launches:
        fused = _train(features, steps, impl="triton", dtype=torch.float32, autocast=autocast, device=device, rate=rate)
    assert launches["residual_norm_backward_kernel"] >= steps
    assert fused[-10:].mean() < 0.95 * fused[:10].mean(), "nothing was learned, so nothing was compared"
    assert_as_accurate(fused, plain, truth, name="loss curve")
