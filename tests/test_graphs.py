"""Captured stages of frozen models, in the emulation of CUDA graphs on a CPU: each equals the plain one, whatever changes between calls."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
import sys
import warnings

import graph_tape
import pytest
import small
import torch

import deltakern
from deltakern import backend
from deltakern.nn import graphs
from deltakern.training.engines import CapturedStep
from deltakern.training.optim import parameter_groups


@pytest.fixture
def tapes(monkeypatch):
    return graph_tape.install(monkeypatch)


def _frames(batch=1, frames=2, size=32, seed=0):
    return torch.randint(0, 256, (batch, frames, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _features(batch=1, seed=0, patches=4):
    return torch.randn(batch, patches, 64, generator=torch.Generator().manual_seed(seed))


def _stages(world):
    """Name, the call of a batch and seed, and the module that keeps its graphs."""
    tokenizer = world.tokenizer
    rope = tokenizer._rope(_frames())

    def offline(batch, seed):
        return tokenizer.tokenize_offline(_features(batch, seed), _features(2 * batch, seed).unflatten(0, (batch, 2)), rope)

    return {
        "backbone": (lambda b, s: world.backbone(_frames(b, seed=s)), world.backbone),
        "encode": (lambda b, s: tokenizer.encode(_features(b, s), _features(b, s + 1), rope), tokenizer),
        "decode": (lambda b, s: tokenizer.decode(torch.randn(b, 1, 64).mul(s), _features(b, s), rope), tokenizer),
        "decode_samples": (lambda b, s: tokenizer.decode_samples(_features(b, s, 3), _features(b, s + 1), rope), tokenizer),
        "tokenize": (lambda b, s: tokenizer.tokenize(_frames(b, seed=s)), tokenizer),
        "tokenize_offline": (offline, tokenizer),
        "sample": (lambda b, s: world.sample(_features(b, s, 2), torch.arange(4.0).expand(b, -1), 2, 3, seed=s), world.predictor),
    }


STAGES = ("backbone", "encode", "decode", "decode_samples", "tokenize", "tokenize_offline", "sample")


def _world(**options):
    return small.world(**options).eval()


def _close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_a_captured_stage_equals_the_plain_one(stage, half, tapes):
    world = deltakern.freeze(_world())
    plain = deltakern.freeze(copy.deepcopy(world), cuda_graphs=False)
    (call, owner), (expected, _) = _stages(world)[stage], _stages(plain)[stage]
    for seed, batch in enumerate((1, 1, 2, 1, 2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.manual_seed(seed)
            found = call(batch, seed)
            torch.manual_seed(seed)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(graphs, "captures", lambda device: False)
                _close(found, expected(batch, seed), 2e-2 if half else 1e-5)
    assert tapes.captures == 2  # one for each shape; what is within is a part of it
    assert len(graphs.graphs_of(owner)._kept) == 2
    with torch.autocast("cpu", torch.bfloat16, enabled=not half):
        call(1, 0)
    assert tapes.captures == 3


@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_change(stage, tapes):
    world = deltakern.freeze(_world())
    call, _ = _stages(world)[stage]

    def found():
        torch.manual_seed(0)
        return call(1, 1)

    first = found()
    world.load_state_dict(small.world(seed=1).state_dict())
    other = found()
    assert not torch.allclose(first, other, rtol=1e-3)
    fresh = deltakern.freeze(copy.deepcopy(world), cuda_graphs=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "captures", lambda device: False)
        torch.manual_seed(0)
        _close(other, _stages(fresh)[stage][0](1, 1))
    for parameter in world.parameters():
        parameter.data.mul_(1.5)
    with pytest.raises(deltakern.FrozenWeightsError):
        found()


@pytest.mark.parametrize("stage", STAGES)
def test_live_and_opted_out_models_capture_nothing(stage, tapes):
    for world in (_world(), deltakern.freeze(_world(), cuda_graphs=False)):
        if stage != "sample":  # which captures live weights too, and has its own way out
            _stages(world)[stage][0](1, 1)
    assert tapes.captures == 0


def test_settings_that_change_make_another_graph(tapes):
    """What a replay cannot ask: they are looked at before."""
    world = deltakern.freeze(_world())
    tokenizer, rope = world.tokenizer, world.tokenizer._rope(_frames())
    first = tokenizer.encode(_features(), _features(seed=1), rope)
    tokenizer.use_delta = False
    alone = tokenizer.encode(_features(), _features(seed=1), rope)
    assert not torch.allclose(alone, first, rtol=1e-3)
    tokenizer.use_delta, tokenizer.residual_dtype = True, torch.float64
    assert tokenizer.encode(_features(), _features(seed=1), rope).dtype == torch.float64
    tokenizer.residual_dtype = None
    _close(tokenizer.encode(_features(), _features(seed=1), rope), first)
    world.tokenizer.encoder_blocks[0].attention.attention = "sdpa-math"
    _close(tokenizer.encode(_features(), _features(seed=1), rope), first)
    assert tapes.captures == 5


def test_what_asks_for_gradients_or_is_large_runs_as_it_is(tapes, monkeypatch):
    world = deltakern.freeze(_world())
    tokenizer, rope = world.tokenizer, world.tokenizer._rope(_frames())
    x = _features().requires_grad_()
    tokenizer.encode(x, _features(), rope).sum().backward()
    assert x.grad.abs().sum() > 0
    monkeypatch.setattr(graphs, "MOST_ELEMENTS", 100)
    tokenizer.encode(_features(), _features(), rope)
    assert tapes.captures == 0


def test_hooks_run_in_place_of_graphs(tapes):
    world = deltakern.freeze(_world())
    rope, seen = world.tokenizer._rope(_frames()), []
    world.tokenizer.encode(_features(), _features(), rope)
    handle = world.tokenizer.encoder_blocks[0].mlp.register_forward_hook(lambda *_: seen.append(0))
    world.tokenizer.encode(_features(), _features(), rope)
    assert len(seen) == 1
    handle.remove()
    world.tokenizer.encode(_features(), _features(), rope)
    assert len(seen) == 1
    assert tapes.captures == 2


def test_what_cannot_be_captured_runs_with_its_parts_captured(tapes, monkeypatch):
    """No lock is held while it runs."""
    world = deltakern.freeze(_world())
    expected = world.tokenizer.tokenize(_frames())
    features = type(world.tokenizer).features

    def waits(self, frames):
        found = features(self, frames)
        return found + 0 * found.sum().item()

    monkeypatch.setattr(type(world.tokenizer), "features", waits)
    world = deltakern.freeze(_world())
    with pytest.warns(backend.BackendWarning, match=r"DeltaTok\.tokenize could not be captured as a CUDA graph and runs as it is called"):
        _close(world.tokenizer.tokenize(_frames()), expected)
    captures = tapes.captures
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            _close(world.tokenizer.tokenize(_frames()), expected)
    assert tapes.captures == captures
    kept = list(graphs.graphs_of(world.tokenizer)._kept.values())
    assert None in kept
    assert set(kept) != {None}, "no part was captured"


def test_wrong_input_is_named_as_without_graphs(tapes):
    world = deltakern.freeze(_world())
    with pytest.raises(ValueError, match="multiples of the patch size"):
        world.tokenizer.tokenize(_frames(size=30))
    with pytest.raises(TypeError, match="uint8"):
        world.backbone(_frames().float())
    assert tapes.captures == 0


def test_results_stay_when_the_next_call_comes(tapes):
    world = deltakern.freeze(_world())
    first = world.tokenizer.tokenize(_frames(seed=1))
    kept = first.clone()
    world.tokenizer.tokenize(_frames(seed=2))
    assert torch.equal(first, kept)
    with torch.inference_mode():
        _close(world.tokenizer.tokenize(_frames(seed=1)), kept)


def test_threads(tapes):
    world = deltakern.freeze(_world())
    expected = [world.tokenizer.tokenize(_frames(1 + i % 2, seed=i)) for i in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: world.tokenizer.tokenize(_frames(1 + i % 2, seed=i % 4)), [i % 4 for i in range(16)]))
    for i, tokens in enumerate(found):
        _close(tokens, expected[i % 4])


def test_a_stream_and_a_rollout(tapes):
    world = deltakern.freeze(_world())
    plain = deltakern.freeze(copy.deepcopy(world), cuda_graphs=False)
    frames = _frames(frames=5)
    found, expected = world.stream(context=2), plain.stream(context=2, cuda_graph=False)
    for i in range(5):
        _close(found.push(frames[0, i], i / 5), expected.push(frames[0, i], i / 5))
    _close(found.sample([1.2, 1.4], 3, seed=1), expected.sample([1.2, 1.4], 3, seed=1))
    assert tapes.captures
    times = torch.arange(4.0)[None] / 5
    for seed in range(2):
        _close(
            world.rollout(frames[:, :2], times, 2, 3, seed=seed).features,
            plain.rollout(frames[:, :2], times, 2, 3, seed=seed, cuda_graph=False).features,
        )


def test_graphs_are_no_part_of_copies_or_of_the_state(tapes):
    world = deltakern.freeze(_world())
    expected = world.tokenizer.tokenize(_frames())
    assert not [name for name in world.state_dict() if "graph" in name]
    for twin in (copy.deepcopy(world), pickle.loads(pickle.dumps(world))):
        _close(twin.tokenizer.tokenize(_frames()), expected)
    deltakern.unfreeze(world)
    captures = tapes.captures
    _close(world.tokenizer.tokenize(_frames()), expected)
    assert tapes.captures == captures


# ------------------------------------------------------------------------------------------------------------ a whole training step


def _trained(tapes, captured, steps=8):
    world = small.world().train()
    groups = parameter_groups(world, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, capturable=True, foreach=False, fused=False)
    criterion = torch.nn.SmoothL1Loss(beta=0.1, reduction="none")
    times = torch.arange(4.0).expand(2, -1)

    def loss(tokens, queries):
        prediction, target = world.train_on_tokens(tokens, times, criterion, queries=queries)
        return criterion(prediction, target).mean()

    step = CapturedStep(loss, optimizer, clip=0.5, warm_up=3 if captured else 10**6)
    generator, losses = torch.Generator().manual_seed(0), []
    for i in range(steps):
        step.rate.fill_(1e-2 / (i + 1))
        batch = torch.randn(2, 4, 64, generator=generator), torch.randn(2, 3, 5, 64, generator=generator)
        losses.append(step(*batch))
    return world, step, torch.stack(losses), batch


def test_a_captured_training_step_trains_as_the_plain_one(tapes, monkeypatch):
    """Forward with its search, backward, clipping, AdamW; winners of every replay are those of the weights as they are."""
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda *_: ["cpu"])
    world, step, losses, batch = _trained(tapes, captured=True)
    assert tapes.captures == 1
    plain, _, expected, _ = _trained(tapes, captured=False)
    assert tapes.captures == 1
    _close(losses, expected)
    assert expected.unique().numel() == len(expected)
    for (name, ours), theirs in zip(world.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    with pytest.raises(ValueError, match="batch must have the captured shapes"):
        step(batch[0][:1], batch[1][:1])
    world.predictor.head.weight.data = world.predictor.head.weight.data.clone()
    with pytest.raises(ValueError, match="lies elsewhere or is another one"):
        step(*batch)


def test_a_step_that_cannot_be_captured_is_refused():
    world = small.world().train()
    with pytest.raises(ValueError, match="optimizer must have capturable=True"):
        CapturedStep(lambda: None, torch.optim.AdamW(parameter_groups(world, 0.1), lr=1e-3))
