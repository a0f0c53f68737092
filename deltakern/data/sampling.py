"""Drawing training clips from videos as the release does: random gaps in time, a random resized crop, a flip.

Every draw is a function of (seed, video, number of the draw) alone, never of the order in which videos are visited or of the
process that visits them: what a run was about to draw when it was killed, the next one draws.

Source: the released datasets (``sample_frame_indices``, ``VidTrainDataset``); paper, section 4.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from deltakern.data.video import MULTIPLE, VideoError, frame_times, read_clip

__all__ = ["Drawn", "Sampling", "draw_clips", "generator_for", "middle_clip"]

_AT_ONCE = 64  # frames of a video in memory at their full size


@dataclass(frozen=True)
class Sampling:
    """How a clip is drawn. The defaults are the release's for Kinetics at 512 pixels.

    Attributes:
        num_frames: T.
        size: height and width of the drawn frames, a multiple of 16.
        gaps: seconds between consecutive frames, drawn uniformly from this range.
        scale: share of the frame's area that the crop takes.
        ratio_jitter: width over height of the crop is drawn between 1 / ratio_jitter and ratio_jitter.
        flip: mirror half of the clips.
    """

    num_frames: int = 8
    size: int = 512
    gaps: tuple[float, float] = (1 / 25, 1 / 3)
    scale: tuple[float, float] = (0.6, 1.0)
    ratio_jitter: float = 4 / 3
    flip: bool = True

    def __post_init__(self) -> None:
        if self.num_frames < 2:
            raise ValueError(f"num_frames must be at least 2, got {self.num_frames}")
        if self.size < MULTIPLE or self.size % MULTIPLE:
            raise ValueError(f"size must be a positive multiple of {MULTIPLE}, got {self.size}")
        if not 0 < self.gaps[0] <= self.gaps[1]:
            raise ValueError(f"gaps must be 0 < least <= most seconds, got {self.gaps}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be 0 < least <= most <= 1, got {self.scale}")
        if self.ratio_jitter < 1:
            raise ValueError(f"ratio_jitter must be at least 1, got {self.ratio_jitter}")


class Drawn(NamedTuple):
    """A clip: frames (T,3,size,size) uint8, and timestamps (T,) float32, seconds from its first frame."""

    frames: torch.Tensor
    timestamps: torch.Tensor


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on ``key`` alone."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_frames(shown: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Indices (T,) of the frames nearest to times with random gaps, from a random start.

    Args:
        shown: (F,) increasing presentation times in seconds from the first frame. Where the video is shorter than the drawn
            gaps together, the times beyond its end all give the last frame.
    """
    least, most = sampling.gaps
    gaps = torch.rand(sampling.num_frames - 1, generator=generator, dtype=torch.float64) * (most - least) + least
    offsets = torch.cat((torch.zeros(1, dtype=torch.float64), gaps.cumsum(0)))
    room = max(0.0, shown[-1].item() - offsets[-1].item())
    times = torch.rand(1, generator=generator, dtype=torch.float64) * room + offsets
    after = torch.searchsorted(shown, times).clamp(max=len(shown) - 1)
    before = (after - 1).clamp(min=0)
    return torch.where(times - shown[before] <= shown[after] - times, before, after)


def draw_crop(height: int, width: int, sampling: Sampling, generator: torch.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop; after ten draws that do not fit, the largest central one of an allowed shape."""
    area, log_ratio = height * width, math.log(sampling.ratio_jitter)

    def uniform(low: float, high: float) -> float:
        return torch.rand(1, generator=generator, dtype=torch.float64).item() * (high - low) + low

    for _ in range(10):
        target, ratio = area * uniform(*sampling.scale), math.exp(uniform(-log_ratio, log_ratio))
        tall, wide = round(math.sqrt(target / ratio)), round(math.sqrt(target * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            top = int(torch.randint(height - tall + 1, (1,), generator=generator))
            return top, int(torch.randint(width - wide + 1, (1,), generator=generator)), tall, wide
    ratio = min(max(width / height, 1 / sampling.ratio_jitter), sampling.ratio_jitter)
    tall, wide = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def augment(frames: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One random crop, resized bilinearly, and one flip for all frames (T,3,H,W) uint8: (T,3,size,size) uint8."""
    top, left, tall, wide = draw_crop(*frames.shape[-2:], sampling, generator)
    crop = frames[..., top : top + tall, left : left + wide]
    flip = sampling.flip and torch.rand(1, generator=generator).item() < 0.5
    out = F.interpolate(crop.float(), (sampling.size, sampling.size), mode="bilinear", align_corners=False)
    out = out.round_().clamp_(0, 255).to(torch.uint8)
    return out.flip(-1) if flip else out


def draw_clips(path: str | os.PathLike, sampling: Sampling, seed: int, name: str, crops: Sequence[int]) -> list[Drawn]:
    """The draws numbered ``crops`` of a video, decoded together where memory allows.

    Args:
        path: the video file.
        sampling: how to draw.
        seed, name: with the draw's number they are all that the draw depends on.
        crops: numbers of the draws.

    Raises:
        VideoError: the video cannot be read.
    """
    shown = frame_times(path)
    generators = [generator_for(seed, name, crop) for crop in crops]
    picked = [draw_frames(shown, sampling, g) for g in generators]
    together = max(1, _AT_ONCE // sampling.num_frames)
    drawn = []
    for start in range(0, len(crops), together):
        group = slice(start, start + together)
        wanted, places = torch.unique(torch.cat(picked[group]), return_inverse=True)
        clip = read_clip(path, timestamps=shown[wanted])
        for generator, indices, place in zip(generators[group], picked[group], places.split(sampling.num_frames), strict=True):
            times = shown[indices]
            drawn.append(Drawn(augment(clip.frames[place], sampling, generator), (times - times[0]).float()))
    return drawn


def middle_clip(path: str | os.PathLike, num_frames: int, stride: float, size: int) -> Drawn:
    """The middle of a video for validation: ``num_frames`` frames about ``stride`` seconds apart, the central square of ``size``.

    Raises:
        VideoError: the video cannot be read or has too few frames.
    """
    shown = frame_times(path)
    total = len(shown)
    if total < num_frames:
        raise VideoError(f"{path}: too short: {num_frames} frames were asked for, it has {total}")
    rate = (total - 1) / shown[-1].item() if shown[-1] > 0 else 1.0
    step = min(max(1, round(stride * rate)), (total - 1) // (num_frames - 1))
    span = (num_frames - 1) * step
    start = min(max(0, total // 2 - span // 2), total - 1 - span)
    times = shown[start : start + span + 1 : step]
    clip = read_clip(path, timestamps=times, size=(size, size))
    return Drawn(clip.frames, (times - times[0]).float())
