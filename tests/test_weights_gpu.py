"""On a GPU: live weights follow every optimizer, a write to frozen ones is told at a later call, graphs follow or end."""

from __future__ import annotations

import copy

import pytest
import small
import torch
from torch import nn

import deltakern
from deltakern.models import DeltaWorld

pytestmark = pytest.mark.gpu
CRITERION = nn.SmoothL1Loss(reduction="none", beta=0.1)


def _world(**sizes) -> DeltaWorld:
    return small.world(**{"predictor_hidden_size": 768, "predictor_num_heads": 12, "rope_axis_sizes": (60,), **sizes}).cuda()


def _sample(model: DeltaWorld, z: torch.Tensor, **options) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return model.sample(z, torch.arange(4.0, device="cuda")[None], 2, 20, seed=1, **options)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("how", ["plain", "foreach", "fused", "capturable"])
def test_winners_are_those_of_a_fresh_copy(optimizer, how):
    options = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}, "capturable": {"capturable": True}}[how]
    model = _world(num_samples_train=256).train()
    try:
        stepping = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-3, **options)
    except TypeError:
        assert how == "capturable", f"{optimizer.__name__} has no {how} form"
        return
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        tokens, noise = torch.randn(4, 8, 64, generator=generator).cuda(), (torch.randn(4, 7, 256, 768, generator=generator) * 0.02).cuda()
        times = torch.arange(8.0, device="cuda").expand(4, -1) / 5
        with torch.autocast("cuda", torch.bfloat16):
            fresh = copy.deepcopy(model).train_on_tokens(tokens, times, CRITERION, queries=noise)[0]
            prediction, target = model.train_on_tokens(tokens, times, CRITERION, queries=noise)
        assert torch.equal(prediction, fresh)
        (prediction - target).square().mean().backward()
        stepping.step()
        stepping.zero_grad()


def test_frozen_is_live_within_rounding_and_follows_the_model():
    model = _world().eval()
    z = torch.randn(1, 2, 64, device="cuda")
    live = _sample(model, z)
    deltakern.freeze(model)
    torch.testing.assert_close(_sample(model, z), live, rtol=2e-2, atol=2e-2)
    other = _world(seed=1).eval()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(_sample(model, z), _sample(other, z, cuda_graph=False), rtol=2e-2, atol=2e-2)
    assert torch.equal(_sample(copy.deepcopy(model), z, cuda_graph=False), _sample(model, z, cuda_graph=False))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_write_to_frozen_weights_is_told_at_a_later_call(cuda_graph):
    model = deltakern.freeze(_world())
    z = torch.randn(1, 2, 64, device="cuda")
    for _ in range(3):
        _sample(model, z, cuda_graph=cuda_graph)
    model.predictor.blocks[1].mlp.up_proj.weight.data.mul_(1.5)

    def use() -> None:
        for _ in range(3):
            _sample(model, z, cuda_graph=cuda_graph)
            torch.cuda.synchronize()

    with pytest.raises(deltakern.FrozenWeightsError, match="up_proj"):
        use()


def test_a_graph_of_live_weights_follows_them():
    model = _world().eval()
    z = torch.randn(1, 2, 64, device="cuda")
    before = _sample(model, z)
    for change in (lambda p: p.data.mul_(1.5), lambda p: setattr(p, "data", p.data * 1.5)):
        change(model.predictor.blocks[1].mlp.up_proj.weight)
        after = _sample(model, z)
        assert torch.equal(after, _sample(copy.deepcopy(model), z, cuda_graph=False))
        assert not torch.equal(after, before)
        before = after


def test_a_stream_tells_of_weights_that_changed():
    model, frames = _world().eval(), small.clip(batch=1, frames=3)[0][0].cuda()
    stream = model.stream()
    stream.push(frames[0], 0.0)
    model.tokenizer.encoder_blocks[0].mlp.up_proj.weight.data.mul_(1.5)

    def use() -> None:
        for i in range(3):
            stream.push(frames[1], 0.1 * (i + 1))
            torch.cuda.synchronize()

    with pytest.raises(deltakern.models.StaleCacheError):
        use()
