"""Rollouts against the release's structure in eager: sampling tokens, decoding one sample, a stream's latency.

The goals are for ``--preset vitb-512`` on two CPU cores: 20 samples, 3 steps. Tokens and features are first held to the release's.
"From a given context" starts after the context was encoded, on both sides; "from frames" is everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from deltakern.report import latency, stages

CONTEXT, HORIZON = stages.CONTEXT, stages.HORIZON
CHOSEN = 7
GOALS = {"sampling, of the rollout": 200.0, "sampling, of the predictor steps alone": 1.5, "one sample decoded, of the rollout": 10.0}


@pytest.fixture(scope="module")
def models(preset, device, dtype) -> stages.Models:
    made = stages.Models(stages.PRESETS[preset], device, autocast=None if dtype == torch.float32 else dtype)
    if made.release is None:
        pytest.skip("the release's structure is in the source tree alone")
    return made


def _once(call: Callable[[], object], device: torch.device) -> tuple[float, object]:
    begin = time.perf_counter()
    out = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin, out


def _released(release, z, last, rope, times, noise) -> tuple[torch.Tensor, torch.Tensor]:
    """The release's steps after the context: tokens and features of every sample, all decoded."""
    own, x, features = z.new_empty((z.shape[0] * noise.shape[1], 0, z.shape[2])), release._per_sample(last), []
    for step in range(HORIZON):
        token = release.predict_step(z, own, times, noise[:, :, step])
        x = release.tokenizer.decode(token, x, rope)
        own = torch.cat((own, token), 1)
        features.append(x)
    shape = noise.shape[:2]
    return own.unflatten(0, shape), torch.stack(features, 1).unflatten(0, shape)


def _say(capsys: pytest.CaptureFixture, lines: list[str]) -> None:
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_rollout(models, benchmark, capsys, request, preset, device):
    ours, release = models.ours, models.release
    frames, times = models.frames[:1, : CONTEXT + HORIZON], models.times[:1, : CONTEXT + HORIZON]
    noise, size = models.noise, tuple(frames.shape[-2:])
    samples = noise.shape[1]
    with torch.no_grad(), models.precision():
        encode_seconds, (z, y, rope) = _once(lambda: release.encode_frames(frames), device)  # the frames to predict, too
        z, last = z[:, :CONTEXT], y[:, CONTEXT - 1]
        steps_seconds, (tokens, features) = _once(lambda: _released(release, z, last, rope, times, noise), device)

        def sample():
            return ours.sample(z, times, HORIZON, samples, queries=noise)

        def one():
            return ours.decode(sample(), last, CHOSEN, size=size)

        def frames_to_one():
            return ours.rollout(frames[:, :CONTEXT], times, HORIZON, samples, CHOSEN, queries=noise).features

        bound = 1e-4 if models.autocast is None else 0.1
        for name, made, truth in (("tokens", sample(), tokens), ("features", one()[:, 0], features[:, CHOSEN])):
            error = ((made - truth).float().norm() / truth.float().norm()).item()
            assert error < bound, f"no speed: {name} differ from the release's by {error:.1e}"
        calls = {
            "release, predictor steps alone": lambda: release.sample(z, times, HORIZON, noise),
            "sampling": sample,
            "one sample decoded": one,
            "from frames, one sample decoded": frames_to_one,
        }
        timed = latency.interleaved(calls, device, budget=request.config.getoption("--budget") * len(calls))
        benchmark.pedantic(sample, rounds=1, iterations=1)
    seconds = {
        "release, rollout from a given context": steps_seconds,
        "release, rollout from frames": encode_seconds + steps_seconds,
        **{name: timing.seconds for name, timing in timed.items()},
    }
    ratios = {
        "sampling, of the rollout": seconds["release, rollout from a given context"] / seconds["sampling"],
        "sampling, of the predictor steps alone": seconds["release, predictor steps alone"] / seconds["sampling"],
        "one sample decoded, of the rollout": seconds["release, rollout from a given context"] / seconds["one sample decoded"],
        "from frames, one sample decoded, of the rollout": seconds["release, rollout from frames"]
        / seconds["from frames, one sample decoded"],
    }
    benchmark.extra_info.update(seconds)
    lines = [f"rollout, {preset}, {device}: {samples} samples, {CONTEXT} frames of context, {HORIZON} steps"]
    lines += [f"  {name:<50} {value:10.4f} s" for name, value in seconds.items()]
    for name, value in ratios.items():
        goal = GOALS.get(name) if preset == "vitb-512" else None
        said = "" if goal is None else f"   goal {goal:g}x: {'met' if value >= goal else 'MISSED'}"
        lines.append(f"  {name:<50} {value:9.2f}x{said}")
    _say(capsys, lines)


def test_stream(models, benchmark, capsys, request, preset, device):
    """What a control loop waits for: a pushed frame, and a call for samples."""
    ours, frames = models.ours, models.frames[0]
    stream, now = ours.stream(CONTEXT), 0.0

    def push():
        nonlocal now
        now += 0.2
        return stream.push(frames[round(now * 5) % len(frames)], now)

    def sample():
        return stream.sample([now + 0.2 * (i + 1) for i in range(HORIZON)], models.noise.shape[1], queries=models.noise)

    def both():
        push()
        return sample()

    with torch.no_grad(), models.precision():
        for _ in range(CONTEXT + 1):
            push()
        calls = {"push": push, "push and sample": both, "sample again": sample}
        timed = latency.interleaved(calls, device, budget=len(calls) * request.config.getoption("--budget"))
        benchmark.pedantic(push, rounds=1, iterations=1)
    benchmark.extra_info.update({name: timing.seconds for name, timing in timed.items()})
    lines = [f"stream, {preset}, {device}: a window of {CONTEXT}, {models.noise.shape[1]} samples of {HORIZON} steps"]
    lines += [f"  {name:<50} {timing.seconds:10.4f} s ({timing.low:.4f} to {timing.high:.4f})" for name, timing in timed.items()]
    _say(capsys, lines)
