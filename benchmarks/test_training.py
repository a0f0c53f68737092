"""Training DeltaWorld from stored tokens against training it from video: clips a second, whole steps, in one run.

A step is everything: reading (the store's shards, or decoding and drawing clips from the bundled video), the best-of-many search,
forward, backward, AdamW. From video it is measured with this package's models and with the release's structure, which also
encodes the black frame of every clip. Nothing is timed before the loss of the stored tokens is that of the video, on the same
clips and the same noise.

``pytest benchmarks/test_training.py --preset vitb-512`` takes about a quarter of an hour on two cores.
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

BATCH = 2
STEPS = {"stored tokens": 4, "video": 1, "video, release (eager)": 1}
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

    def seconds(loss: Callable[[Any], torch.Tensor], batches: Iterator, steps: int, steady: torch.optim.Optimizer) -> list[float]:
        taken = []
        for _ in range(steps):
            start = time.perf_counter()
            with torch.autocast(**amp):
                value = loss(next(batches))
            value.backward()
            steady.step()
            steady.zero_grad()
            value.item()
            taken.append(time.perf_counter() - start)
        return taken

    world.train()
    drawn = dataset.batch(range(BATCH))
    order = sorted(range(BATCH), key=dataset.names(range(BATCH)).__getitem__)
    same = tuple(t[order] for t in drawn)
    losses = []
    started = time.perf_counter()
    for loss, batch in ((from_tokens, same), (from_video, next(_video_batches(sampling)))):
        torch.manual_seed(0)
        with torch.autocast(**amp):
            losses.append(loss(batch).item())
    checked = time.perf_counter() - started
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == torch.float32 else 1e-2), "the same clips, another loss"

    endless = TokenOrder(dataset)
    stored = (dataset.batch(endless.take(i * BATCH, (i + 1) * BATCH)) for i in range(10**6))
    contenders: dict[str, tuple] = {
        "stored tokens": (from_tokens, stored, optimizer),
        "video": (from_video, _video_batches(sampling), optimizer),
    }
    if models.release is not None:
        models.release.train()
        contenders["video, release (eager)"] = (release, _video_batches(sampling), make_optimizer(models.release, 1e-4, 0.4))
    few = 1 if checked > 20 else 5  # one step of a minute says as much as five of a second
    made = {}
    for name, (loss, batches, steady) in contenders.items():
        if few > 1:
            seconds(loss, batches, 1, steady)
        made[name] = seconds(loss, batches, STEPS[name] * few, steady)
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
    print(f"\nloss from stored tokens {losses[0]:.6f}, from video {losses[1]:.6f}")
    for row in found:
        ratio = row.seconds / statistics.median(fastest)
        print(f"{row.impl:>24}: {row.figures['clips_per_second']:.4g} clips/s, {row.seconds:.3f} s a step of {BATCH}, {ratio:.1f} x")
    assert statistics.median(made["video"]) > statistics.median(fastest)
