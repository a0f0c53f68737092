"""Frames pushed one at a time: the tokens and futures of the batch path, in constant memory."""

from __future__ import annotations

import gc
import warnings

import pytest
import small
import torch
from compare import relative_rmse

import deltakern
from deltakern.models import StaleCacheError, sampling


@pytest.fixture(scope="module")
def example():
    """A float64 world, a clip of nine frames with times, and its tokens by the batch path."""
    pixels, times = small.clip(batch=1, frames=9)
    model = small.world().double().eval()
    with torch.no_grad():
        return model, pixels[0], times[0].double(), model.tokenizer.tokenize(pixels)


def later(times: torch.Tensor, count: int, horizon: int = 2) -> torch.Tensor:
    """Times of ``horizon`` frames to predict after the first ``count``."""
    return times[count - 1] + torch.arange(1, horizon + 1) * 0.2


def test_tokens_and_samples_are_those_of_the_batch_path(example):
    model, frames, times, tokens = example
    queries = torch.randn(1, 3, 2, 64, dtype=torch.float64)
    stream = model.stream(4, first="previous")
    for i, frame in enumerate(frames):
        pushed = stream.push(frame if i % 2 else frame[None], times[i])
        assert relative_rmse(pushed, tokens[:, i]) < 1e-12
        count = i + 1
        window = slice(max(0, count - 4), count)
        assert stream.timestamps == times[window].tolist()
        assert relative_rmse(stream.tokens, tokens[:, window]) < 1e-12
        assert len(stream) == count
        future = later(times, count)
        batch = model.sample(tokens[:, window], torch.cat((times[window], future))[None], 2, 3, queries=queries)
        assert relative_rmse(stream.sample(future, 3, queries=queries), batch) < 1e-10
    assert (
        relative_rmse(
            stream.sample(future.tolist(), 3, seed=4), model.sample(tokens[:, -4:], torch.cat((times[-4:], future))[None], 2, 3, seed=4)
        )
        < 1e-10
    )


@pytest.mark.parametrize("context", [1, 3, 7])
def test_futures_are_those_of_the_batch_rollout_of_the_window(example, context):
    model, frames, times, tokens = example
    stream = model.stream(context)
    for i, frame in enumerate(frames):
        assert relative_rmse(stream.push(frame, times[i]), tokens[:, i]) < 1e-12
        count = i + 1
        window = slice(max(0, count - context), count)
        future = later(times, count)
        batch = model.rollout(frames[None, window], torch.cat((times[window], future))[None], 2, 3, [1], seed=2)
        ours = stream.rollout(future, 3, [1], seed=2)
        for name in ("tokens", "features", "context", "last"):
            assert relative_rmse(getattr(ours, name), getattr(batch, name)) < 1e-10, name
        assert torch.equal(ours.indices, batch.indices)
        assert torch.equal(ours.timestamps, batch.timestamps)
        assert ours.size == batch.size


@pytest.mark.parametrize("first", ["previous", "black"])
def test_cost_of_a_push_and_of_a_sample(example, first):
    """A push: one frame through the backbone, one encode. A sample: none; with first="black" one encode after a push."""
    model, frames, times, _ = example
    calls = {"backbone": 0, "encode": 0, "decode": 0}
    blocks = {"backbone": model.backbone, "encode": model.tokenizer.encoder_blocks[0], "decode": model.tokenizer.decoder_blocks[0]}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    hooks = [module.register_forward_hook(count(name)) for name, module in blocks.items()]
    try:
        stream = model.stream(3, first=first)
        for i, frame in enumerate(frames):
            stream.push(frame, times[i])
        # the hook is to see every pass of the backbone, so the black frame's is not kept: one for the first push
        assert calls == {"backbone": 10, "encode": 9, "decode": 0}
        for _ in range(3):
            stream.sample(later(times, 9), 5)
        more = first == "black"
        assert calls == {"backbone": 10 + more, "encode": 9 + more, "decode": 0}
    finally:
        for hook in hooks:
            hook.remove()


def test_hours_into_a_video_nothing_is_lost():
    """Times enter relative to the window: the float32 futures at 10^6 seconds are those at 0."""
    pixels, times = small.clip(batch=1, frames=5)
    model = small.world().eval()
    futures = []
    for offset in (0.0, 1_048_576.0):
        stream = model.stream(3)
        shifted = times[0].double().mul(1024).round().div(1024) + offset  # exact sums
        for frame, time in zip(pixels[0], shifted.tolist(), strict=True):
            stream.push(frame, time)
        futures.append(stream.sample(shifted[-1] + torch.tensor([0.25, 0.5], dtype=torch.float64), 4, seed=1))
    assert torch.equal(*futures)


@pytest.fixture
def one_thread():
    """Tiny ops gain nothing from a second thread, and lose much to waiting for it where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_ten_thousand_frames_in_constant_memory(one_thread):
    """Tokens of the whole video equal the batch path's; what the stream holds does not grow."""
    config = deltakern.DINOv3Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    torch.manual_seed(0)
    tokenizer = deltakern.DeltaTok(deltakern.DINOv3(config=config), 1, layer_scale_init=0.5, intermediate_size=24)
    sizes = {"predictor_hidden_size": 16, "predictor_num_hidden_layers": 1, "predictor_num_heads": 1, "mlp_ratio": 1}
    model = deltakern.DeltaWorld(tokenizer, (12,), **sizes).eval()
    frames = torch.randint(0, 256, (10_000, 3, 16, 16), dtype=torch.uint8)
    stream, streamed, held = model.stream(4), torch.empty(10_000, 16), []
    for i, frame in enumerate(frames):
        streamed[i] = stream.push(frame, i / 30)[0]
        if i in (100, 5_000, 9_999):
            gc.collect()
            held.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    batch = model.tokenizer.tokenize(frames[None])[0]
    torch.testing.assert_close(streamed, batch, rtol=1e-4, atol=1e-5)
    assert held[0] >= held[1] >= held[2]  # what other tests left behind may go meanwhile
    kept = [t for group in (stream._features, stream._tokens, stream._projected) for t in group]
    assert len(kept) == 4 + 4 + 4
    assert sum(t.untyped_storage().nbytes() for t in kept) < 8192


def test_weights_that_change_make_the_stream_stale(example):
    _, frames, times, _ = example
    model = small.world().eval()
    stream = model.stream()
    stream.push(frames[0], times[0])
    for parameter in (model.backbone.backbone.norm.bias, model.tokenizer.norm.bias, model.predictor.head.bias):
        stream.sample(later(times, 1), 2)
        with torch.no_grad():
            parameter.add_(1)
        for use in (lambda: stream.sample(later(times, 1), 2), lambda: stream.push(frames[1], times[1]), lambda: stream.tokens):
            with pytest.raises(StaleCacheError, match="weights changed since this stream's frames were pushed; call reset"):
                use()
        stream.reset()
        stream.push(frames[0], times[0])
    model.load_state_dict(model.state_dict())
    stream.sample(later(times, 1), 2)  # the same weights
    model.load_state_dict(small.world(seed=1).state_dict())
    with pytest.raises(StaleCacheError):
        stream.sample(later(times, 1), 2)


def _bad(pattern, error=ValueError):
    return pytest.raises(error, match=pattern)


def test_bad_input(example):
    model, frames = example[:2]
    stream = model.stream()
    for use in (lambda: stream.sample([1.0], 2), lambda: stream.rollout([1.0], 2), lambda: stream.tokens):
        with _bad("no frame was pushed yet; push at least one before sampling", RuntimeError):
            use()
    stream.push(frames[0], 1.0)
    for bad in (frames[:2], frames[None], frames[0, 0]):
        with _bad(r"frame must be one frame, uint8 \(3,H,W\) or \(1,3,H,W\), got"):
            stream.push(bad, 2.0)
    with _bad("uint8 pixels in 0..255, got torch.float32", TypeError):
        stream.push(frames[0].float(), 2.0)
    with _bad("frame must be 32 x 48 as those before, got 16 x 48"):
        stream.push(frames[0, :, :16], 2.0)
    with _bad("timestamp must not go backwards, got 0.5 s after 1 s"):
        stream.push(frames[1], 0.5)
    with _bad("timestamp must be finite seconds, got nan"):
        stream.push(frames[1], float("nan"))
    assert len(stream) == 1
    with _bad("timestamps must not go backwards, got 0.5 s after 1 s at index 1 of clip 0"):
        stream.sample([0.5], 2)
    with _bad("timestamps must not go backwards"):
        stream.sample([2.0, 1.5], 2)
    with _bad("timestamps must hold at least one frame to predict, got none"):
        stream.sample([], 2)
    with _bad(r"queries must be \(B,S,h,D\) = \(1, 2, 1, 64\), got a tensor of shape \(1, 3, 1, 64\)"):
        stream.sample([2.0], 2, queries=torch.zeros(1, 3, 1, 64))
    with _bad("context must be an integer of at least 1, got 0"):
        model.stream(0)
    with _bad("first must be one of"):
        model.stream(first="last")
    stream.reset()
    stream.push(frames[0, :, :16], 0.0)
    assert len(stream) == 1


def test_a_long_window_warns_once(example, monkeypatch):
    model = example[0]
    monkeypatch.setattr(sampling, "_warned_long", False)
    with pytest.warns(UserWarning, match="a context of 8 tokens is longer than trained on"):
        model.stream(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.stream(9)
