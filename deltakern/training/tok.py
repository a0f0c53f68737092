"""DeltaTok's recipe, from videos: reconstruct each clip's second frame, log-cosh (paper, section 3; released ``training/deltatok.py``)."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from deltakern import ops
from deltakern._extras import MissingExtraError
from deltakern.data.pace import counted
from deltakern.data.sampling import Drawn, Sampling, draw_clips, middle_clip
from deltakern.data.sources import SourceError, Video, find_videos
from deltakern.data.store import video_share
from deltakern.data.tokenize import leave_signals
from deltakern.data.video import VideoError
from deltakern.models import DeltaTok
from deltakern.nn.weights import freeze, is_freezable
from deltakern.training.engines import Place
from deltakern.training.loop import Result, Task, TrainOptions, fit

log = logging.getLogger("deltakern")
_ATTEMPTS = 20  # unreadable videos in a row before giving up


class VideoClips(torch.utils.data.Dataset):
    """The endless order of clips drawn from videos: every video once an epoch, a function of the seed alone.

    Item p is (frames (T,3,size,size) uint8, timestamps (T,) float32). In place of a video that cannot be read the next one of the
    epoch is drawn from, and the log says so.
    """

    def __init__(self, videos: Sequence[Video], sampling: Sampling, seed: int) -> None:
        self.videos, self.sampling, self.seed = list(videos), sampling, seed
        self._epoch: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        self._broken: set[str] = set()

    def video(self, position: int, attempt: int = 0) -> tuple[Video, int]:
        """Which video stands at a position, and in which epoch."""
        epoch, place = divmod(position, len(self.videos))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.videos)))
        return self.videos[self._epoch[1][(place + attempt) % len(self.videos)]], epoch

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        problem: Exception | None = None
        for attempt in range(_ATTEMPTS):
            video, epoch = self.video(position, attempt)
            if video.name in self._broken:
                continue
            try:
                with video.file() as path:
                    frames, timestamps = draw_clips(path, self.sampling, self.seed, f"{video.name} {attempt}", [epoch])[0]
                return frames, timestamps
            except MissingExtraError:
                raise
            except (ValueError, OSError, RuntimeError) as found:
                problem = found
                self._broken.add(video.name)
                log.warning("skipped %s: %s", video.name, found)
        raise VideoError(f"{_ATTEMPTS} videos in a row cannot be read; the last: {problem}")


class _Ranges:
    """Batches for a DataLoader: the positions of each (start, stop) of a plan."""

    def __init__(self, plan: Iterable[tuple[int, int]]) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[range]:
        return (range(start, stop) for start, stop in self.plan)


class PairObjective(nn.Module):
    """The training loss of frames (B,T,3,H,W): mean log-cosh of the last frame's reconstruction."""

    def __init__(self, network: DeltaTok) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: torch.Tensor, timestamps: torch.Tensor) -> torch.Tensor:
        prediction, target = self.network(frames, timestamps)
        return ops.recon_loss(prediction, target, kind="log_cosh")


class TokTask(Task):
    """DeltaTok on videos.

    Args:
        tokenizer: with its frozen backbone.
        clips: to train on, two frames each.
        workers: processes that decode video; 0 decodes in this one.
        held_out: clips for validation.
        horizons: how many last frames of them are reconstructed, one from the other.
    """

    def __init__(
        self, tokenizer: DeltaTok, clips: VideoClips, *, workers: int = 0, held_out: Sequence[Drawn] = (), horizons: Sequence[int] = (1, 3)
    ) -> None:
        self.network, self.objective = tokenizer, PairObjective(tokenizer)
        if is_freezable(tokenizer.backbone):
            freeze(tokenizer.backbone)
        self.clips, self.workers, self.held_out, self.horizons = clips, workers, held_out, horizons

    loss = "log-cosh"

    def size(self) -> str:
        return f"{counted(len(self.clips.videos), 'video')} to train on, {len(self.held_out) or 'none'} to validate on"

    def batches(self, plan: Iterable[tuple[int, int]]) -> Iterator[tuple[torch.Tensor, ...]]:
        options = {"num_workers": self.workers, "worker_init_fn": leave_signals} if self.workers else {}
        loader = torch.utils.data.DataLoader(
            self.clips, batch_sampler=_Ranges(plan), pin_memory=self.workers > 0 and torch.cuda.is_available(), **options
        )
        return (tuple(batch) for batch in loader)

    def names(self, start: int, stop: int) -> list[str]:
        return [f"{video.name} {epoch}" for video, epoch in map(self.clips.video, range(start, stop))]

    def order(self) -> str:
        digest = hashlib.sha256("\0".join(v.name for v in self.clips.videos).encode()).hexdigest()[:32]
        return f"{digest} {self.clips.seed} {self.clips.sampling}"

    def identity(self) -> dict[str, Any]:
        network = self.network
        return {
            "model": "DeltaTok",
            "layers": len(network.encoder_blocks),
            "width": network.backbone.hidden_size,
            "qk_norm": network.qk_norm_order,
        }

    @torch.no_grad()
    def validate(self, place: Place) -> dict[str, float]:
        """Mean log-cosh of reconstructing the last 1 and 3 frames, and of repeating the frame before them; "val" as the release's."""
        if not self.held_out:
            return {}
        sums = [0.0] * (2 * len(self.horizons) + 1)
        for i, clip in enumerate(self.held_out):
            if i % place.size != place.rank:
                continue
            sums[-1] += 1
            for j, h in enumerate(self.horizons):
                prediction, target, context = self.network(clip.frames[None].to(place.device), horizon=h)
                copied = context[:, -1:].expand_as(target)
                sums[2 * j] += ops.recon_loss(prediction.float(), target.float(), kind="log_cosh").item()
                sums[2 * j + 1] += ops.recon_loss(copied.float(), target.float(), kind="log_cosh").item()
        *losses, count = place.mean(sums)
        names = [name for h in self.horizons for name in (f"h{h}", f"h{h}_copy_last")]
        found = {name: loss / count for name, loss in zip(names, losses, strict=True)}
        return {"val": sum(found[f"h{h}"] for h in self.horizons) / len(self.horizons), **found}


def train_tok(
    sources: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    tokenizer: DeltaTok,
    options: TrainOptions | None = None,
    *,
    sampling: Sampling | None = None,
    workers: int = 0,
    val_fraction: float = 0.0,
    val_videos: Sequence[str | os.PathLike] = (),
    val_stride: float = 0.2,
) -> Result:
    """Trains DeltaTok from videos; called again with the same ``out`` it continues.

    Args:
        sources: see :func:`deltakern.data.sources.find_videos`.
        out: the run's folder, see :class:`deltakern.training.run.Run`.
        tokenizer: with its frozen backbone, and the weights to begin with.
        options: of None the released ones for 256 pixels (:data:`RELEASED`).
        sampling: how clips are drawn; two frames by default.
        workers: processes that decode video.
        val_fraction: share of the videos held out, by their names.
        val_videos: videos for validation besides those.
        val_stride: seconds between the frames of validation.

    Raises:
        deltakern.data.sources.SourceError: of the sources.
        deltakern.training.run.TrainingError: see :func:`deltakern.training.loop.fit`.
    """
    options = options or RELEASED
    sampling = sampling or Sampling(num_frames=2, size=256)
    videos = find_videos(sources)
    held = [v for v in videos if video_share(v.name) < val_fraction]
    train = [v for v in videos if video_share(v.name) >= val_fraction]
    if not train:
        raise SourceError(f"val_fraction={val_fraction} holds out all {len(videos)} videos")
    clips = []
    for video in [*held, *(find_videos(val_videos) if val_videos else ())]:
        try:
            with video.file() as path:
                clips.append(middle_clip(path, 4, val_stride, sampling.size))
        except VideoError as problem:
            log.warning("skipped %s: %s", video.name, problem)
    return fit(TokTask(tokenizer, VideoClips(train, sampling, options.seed), workers=workers, held_out=clips), out, options)


RELEASED = TrainOptions(steps=1_000_000, rate=1e-3, weight_decay=1e-2, clip=1e-2, cooldown=0, log_every=10)
"""The release's recipe for DeltaTok at 256 pixels."""
