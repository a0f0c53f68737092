"""Filling a token store on a Ray cluster: tasks decode, actors encode, tasks write shards.

The same draws, models and shards as :mod:`deltakern.data.tokenize`, so a store begun by one is continued by the other. Every node
must see the videos, the models and the store under the same paths. Shards go through the store's own writer rather than
``write_parquet``, which leaves half a file under its final name when it is killed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltakern._extras import require
from deltakern.data.sampling import draw_clips
from deltakern.data.sources import Video, find_videos
from deltakern.data.store import Manifest, Writer
from deltakern.data.tokenize import UNREADABLE, Job, Summary, TokenizeOptions, left_to_draw, manifest_of, tokenize_videos


class _Decode:
    """A video's missing draws, one row each; none, and a note in the store, where the video cannot be read."""

    def __init__(self, store: str, manifest: Manifest, options: TokenizeOptions) -> None:
        self.store, self.manifest, self.options = store, manifest, options

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        video = Video(row["name"], Path(row["path"]), *((row["offset"], row["length"]) if row["length"] >= 0 else ()))
        crops = [int(crop) for crop in row["crops"]]
        try:
            with video.file() as path:
                clips = draw_clips(path, self.options.sampling, self.options.seed, video.name, crops)
        except UNREADABLE as problem:
            Writer(self.store, self.manifest).failed(video.name, f"{type(problem).__name__}: {problem}")
            return []
        return [
            {"video": video.name, "crop": crop, "frames": clip.frames.numpy(), "timestamps": clip.timestamps.numpy()}
            for crop, clip in zip(crops, clips, strict=True)
        ]


class _Encode:
    """An actor that holds the models."""

    def __init__(self, job: Job, device: str) -> None:
        self.tokenizer, self.precision = job.load().to(device), job.options.precision

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = tokenize_videos(self.tokenizer, torch.from_numpy(np.ascontiguousarray(batch["frames"])), self.precision)
        return {"video": batch["video"], "crop": batch["crop"], "timestamps": batch["timestamps"], "tokens": tokens.cpu().numpy()}


def tokenize_on_ray(job: Job, *, actors: int, gpus: float | None = None) -> Summary:
    """Does what :func:`deltakern.data.tokenize.tokenize` does, on the Ray that is initialised, or on one started here.

    Args:
        job: sources, store, models and options; ``workers`` and ``progress`` are Ray's affair.
        actors: processes that encode.
        gpus: of an actor; None for one where the cluster has any. 0 encodes on CPUs.

    Raises:
        MissingExtraError: Ray is not installed.
        ValueError: of the sources, the store or the options.
    """
    if actors < 1:
        raise ValueError(f"actors must be at least 1, got {actors}")
    ray = require("ray", "ray", "a Ray pipeline")
    data = require("ray.data", "ray", "a Ray pipeline")
    if not ray.is_initialized():
        ray.init()
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    options = job.options
    manifest = manifest_of(job.load(), options)
    Writer(job.store, manifest)  # creates the store, or refuses one of another kind
    videos = find_videos(job.sources)[options.part[0] :: options.part[1]]
    left = left_to_draw(videos, job.store, options.crops)
    total = sum(len(crops) for _, crops in left)
    if left:
        rows = [
            {
                "name": video.name,
                "path": str(video.path.resolve()),
                "offset": video.offset or 0,
                "length": -1 if video.length is None else video.length,
                "crops": crops,
            }
            for video, crops in left
        ]
        clips = data.from_items(rows, override_num_blocks=min(len(rows), 16 * actors)).flat_map(_Decode(job.store, manifest, options))
        tokens = clips.map_batches(
            _Encode,
            fn_constructor_args=(job, "cuda" if gpus else "cpu"),
            batch_size=options.batch,
            num_gpus=gpus or None,
            compute=data.ActorPoolStrategy(size=actors),
        )
        tokens.write_datasink(_sink(data, job.store, manifest, options.rows_per_shard))
    missing = left_to_draw(videos, job.store, options.crops)
    written = total - sum(len(crops) for _, crops in missing)
    return Summary(written, len(videos) * options.crops - total, len(missing), False)


def _sink(data: Any, store: str, manifest: Manifest, rows_per_shard: int) -> Any:
    """What writes blocks of rows as shards of a store."""

    class Shards(data.Datasink):
        @property
        def min_rows_per_write(self) -> int:
            return rows_per_shard

        def write(self, blocks: Iterable[Any], ctx: Any) -> int:
            with Writer(store, manifest, rows_per_shard=rows_per_shard) as writer:
                for block in blocks:
                    rows = data.block.BlockAccessor.for_block(block)
                    if rows.num_rows() == 0:  # of a video that could not be read; it has no columns
                        continue
                    columns = rows.to_numpy(["video", "crop", "timestamps", "tokens"])
                    for video, crop, times, tokens in zip(*columns.values(), strict=True):
                        writer.add(str(video), int(crop), torch.tensor(times), torch.tensor(tokens))
            return writer.written

    return Shards()
