"""Training DeltaWorld from stored tokens against training it from video: clips a second, whole steps, in one run.

A step is everything: reading (the store's shards, or decoding and drawing clips from the bundled video), the best-of-many search,
forward, backward, AdamW. From video it is measured with this package's models and with the release's structure, which also
encodes the black frame of every clip. Nothing is timed before the loss of the stored tokens is that of the video, on the same
clips and the same noise.

``pytest benchmarks/test_training.py --preset vitb-512`` takes about a quarter of an hour on two idle cores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deltakern.data import CLIP
from deltakern.data.sampling import Sampling, draw_clips
from deltakern.data.store import TokenDataset, TokenOrder
from deltakern.data.tokenize import TokenizeOptions, tokenize
from deltakern.report import rows, stages
from deltakern.training.optim import make_optimizer
from deltakern.training.world import TokenObjective

BATCH = 4
STAGE = "DeltaWorld training, whole step"


@pytest.fixture(scope="module")
def models(preset: str, device: torch.device, dtype: torch.dtype) -> stages.Models:
    return stages.Models(stages.PRESETS[preset], device, autocast=None if dtype == torch.float32 else dtype)


def _video_batches(sampling: Sampling) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Draws 0, 1, 2... of the bundled clip, decoded when they are asked for."""
    number = 0
    while True:
        drawn = draw_clips(CLIP, sampling, 0, CLIP.name, range(number, number + BATCH))
        number += BATCH
        yield torch.stack([d.frames for d in drawn]), torch.stack([d.timestamps for d in drawn])


def test_stored_tokens_against_video(models, preset, device, dtype, where, request, tmp_path: Path):
    sampling = Sampling(num_frames=models.preset.clip, size=models.preset.pixels)
    precision = "float32" if dtype == torch.float32 else "bfloat16"
    world = models.ours
    options = TokenizeOptions(crops=BATCH, sampling=sampling, dtype="float32", precision=precision, progress=False)
    tokenize([CLIP], tmp_path / "store", world.tokenizer, options)
    dataset = TokenDataset(tmp_path / "store")
    objective = TokenObjective(world)
    optimizer = make_optimizer(world, 1e-4, 0.4)
    amp = {"device_type": device.type, "dtype": dtype, "enabled": dtype != torch.float32}

    def from_tokens(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return objective(*(t.to(device) for t in batch))

    def from_video(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        prediction, target = world(*(t.to(device) for t in batch), objective.criterion)
        return objective.criterion(prediction.float(), target.float()).mean()

    def release(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        prediction, target = models.release(*(t.to(device) for t in batch), models.module.smooth_l1)
        return models.module.smooth_l1(prediction.float(), target.float()).mean()

    values: dict[str, float] = {}

    def seconds(
        name: str, loss: Callable[[Any], torch.Tensor], batches: Iterator, steps: int, steady: torch.optim.Optimizer
    ) -> list[float]:
        taken = []
        for _ in range(steps):
            torch.manual_seed(0)
            start = time.perf_counter()
            with torch.autocast(**amp):
                value = loss(next(batches))
            value.backward()
            steady.step()
            steady.zero_grad()
            values.setdefault(name, value.item())
            taken.append(time.perf_counter() - start)
        return taken

    world.train()
    drawn = dataset.batch(range(BATCH))
    order = sorted(range(BATCH), key=dataset.names(range(BATCH)).__getitem__)
    same = tuple(t[order] for t in drawn)
    torch.manual_seed(0)
    with torch.autocast(**amp):
        value = from_tokens(same)
    values["same clips"] = value.item()
    few = 1 if models.preset.pixels > 256 and device.type == "cpu" else 5  # one step of minutes says as much as five of a second

    made = {"video": seconds("video", from_video, _video_batches(sampling), few, optimizer)}
    rounding = 1e-4 if dtype == torch.float32 else 1e-2
    assert values["same clips"] == pytest.approx(values["video"], rel=rounding), "the same clips and noise, another loss"
    if models.release is not None:
        models.release.train()
        steady = make_optimizer(models.release, 1e-4, 0.4)
        name = "video, release (eager)"
        made[name] = seconds(name, release, _video_batches(sampling), few, steady)
        assert values[name] == pytest.approx(values["video"], rel=rounding), "the release's structure finds another loss"
    endless = TokenOrder(dataset)
    stored = (dataset.batch(endless.take(i * BATCH, (i + 1) * BATCH)) for i in range(10**6))
    made["stored tokens"] = seconds("stored tokens", from_tokens, stored, 5 * few, optimizer)
    shape = {"batch": BATCH, "frames": sampling.num_frames, "candidates": models.preset.candidates}
    found = []
    for name, taken in made.items():
        middle = statistics.median(taken)
        figures = {"clips_per_second": BATCH / middle}
        found.append(
            rows.Row("model", STAGE, preset, name, precision, shape, middle, min(taken), max(taken), len(taken), figures, dict(where))
        )
    if path := request.config.getoption("--rows"):
        rows.append(path, found)
    fastest = made["stored tokens"]
    print(f"\nloss from stored tokens {values['same clips']:.6f}, from video {values['video']:.6f}")
    for row in found:
        ratio = row.seconds / statistics.median(fastest)
        print(f"{row.impl:>24}: {row.figures['clips_per_second']:.4g} clips/s, {row.seconds:.3f} s a step of {BATCH}, {ratio:.1f} x")
    assert statistics.median(made["video"]) > statistics.median(fastest)
