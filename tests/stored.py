"""Tiny videos, models and stores for the tests of stored tokens and training, and processes that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deltakern
from deltakern.data.sampling import Sampling
from deltakern.data.store import Manifest, Writer
from deltakern.models import checkpoint
from deltakern.models.dinov3 import DINOv3Config
from deltakern.training.world import Predictor

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is in the repository, not in the package
CLIP = Path(__file__).parent / "data" / "carphone.mp4"
SMALL = Sampling(num_frames=8, size=32)
PREDICTOR = Predictor(width=32, layers=2, heads=2, mlp_ratio=2, candidates=4, samples=3, layer_scale_init=0.1)
CONFIG = DINOv3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)


def write_video(path: Path, seed: int = 0, frames: int = 12, size: tuple[int, int] = (48, 64)) -> Path:
    """Moving stripes, every frame a keyframe, 12 frames a second; ``seed`` decides their speed."""
    import av

    rows, columns = np.mgrid[: size[0], : size[1]]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=12)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"g": "1"}
        for i in range(frames):
            wave = np.sin((columns + rows * (seed % 3)) / 5 + i * (1 + seed) / 3)
            grey = (128 + 100 * wave).astype(np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, 2), format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return path


def tokenizer(seed: int = 0, **kwargs: Any) -> deltakern.DeltaTok:
    """One layer of width 64 and one head, in evaluation mode."""
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 1, "layer_scale_init": 0.5, "intermediate_size": 48, **kwargs}
    return deltakern.DeltaTok(deltakern.DINOv3(config=CONFIG), **sizes).eval()


def write_models(folder: Path, seed: int = 0) -> tuple[str, str]:
    """The tokenizer of :func:`tokenizer` as files: a DINOv3 folder and a DeltaTok file."""
    made = tokenizer(seed)
    backbone = folder / "dinov3"
    backbone.mkdir(parents=True)
    (backbone / "config.json").write_text(json.dumps(asdict(CONFIG)))
    checkpoint.save(made.backbone.state_dict(), backbone / "model.safetensors")
    checkpoint.save(made, folder / "deltatok.pth")
    return str(backbone), str(folder / "deltatok.pth")


def manifest(**changes: Any) -> Manifest:
    sizes = {"fingerprint": "f" * 32, "width": 16, "heads": 1, "patch_size": 16, "num_frames": 8, "dtype": "float32"}
    return Manifest(**{**sizes, **changes})


def write_store(folder: Path, videos: int = 12, crops: int = 2, rows_per_shard: int = 5, **changes: Any) -> Path:
    """A store of learnable tokens: each clip continues at its own pace, token t = a + b t, with random gaps in time."""
    made = manifest(**changes)
    generator = torch.Generator().manual_seed(0)
    with Writer(folder, made, rows_per_shard=rows_per_shard) as writer:
        for video in range(videos):
            for crop in range(crops):
                start, pace = torch.randn(2, made.width, generator=generator)
                times = torch.cat((torch.zeros(1), (torch.rand(made.num_frames - 1, generator=generator) * 0.3 + 0.04).cumsum(0)))
                writer.add(f"video{video:03d}.mp4", crop, times, start + pace * times[:, None])
    return folder


def clean_processes() -> Any:
    """A multiprocessing context whose children are forked from a process that has imported everything and started no thread."""
    context = multiprocessing.get_context("forkserver")
    heavy = [
        "pytest",
        "hypothesis.strategies",
        "numpy.testing",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch._dynamo",
        "pyarrow.parquet",
        "av",
        "rich.progress",
    ]
    context.set_forkserver_preload(["deltakern.training.tok", "deltakern.training.world", *heavy])
    return context


def killed_after(context: Any, done: int, seconds: float, target: Callable[..., None], *args: Any) -> tuple[bool, int]:
    """Runs ``target`` in a process of its own and sends it SIGKILL ``seconds`` after it has done that much.

    ``target`` is called with a shared counter, which it sets to 0 when it begins and raises as it goes on, then with ``args``.

    Returns:
        Whether it was still at work, and how much it had done.
    """
    count = context.Value("i", -1)
    child = context.Process(target=target, args=(count, *args))
    child.start()
    deadline = time.monotonic() + 120
    while count.value < done and child.is_alive():
        assert time.monotonic() < deadline, f"the process did {count.value} of {done}"
        time.sleep(0.001)
    time.sleep(seconds)
    with count.get_lock():  # a process that is killed while it holds the counter would leave it locked
        os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL), f"the process failed by itself: exit code {child.exitcode}"
    return child.exitcode != 0, count.value
