"""Reading clips: real presentation times, any frame rate, no more decoding than the frames asked for need.

``read_clip`` takes a video file (through PyAV) or a folder of images. Times are seconds from the first frame of the file,
whatever the file's own clock starts at. A time names the frame on screen at that time: the last one whose presentation time
is not later, where "not later" allows a millisecond, since containers round their times (Matroska to the millisecond).
Pixels are taken as square; a display rotation stored in the file (phone videos) is applied.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from deltakern._extras import require

__all__ = ["Clip", "VideoError", "frame_times", "read_clip"]

MULTIPLE = 16  # the patch size: height and width of an int ``size`` come out as multiples of it
SLACK = 1e-3  # seconds; see the module's docstring
FAR = 5.0  # seconds ahead beyond which a seek is tried in a file that has no index
NEAR = 1.0  # seconds; a keyframe less than this ahead is reached sooner by decoding on
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


class VideoError(ValueError):
    """A video or a folder of images that cannot be read as asked. The message names the path and the reason."""


class Clip(NamedTuple):
    """Frames of a video and when they are shown.

    Attributes:
        frames: (T,3,H,W) uint8, RGB.
        timestamps: (T,) float64, presentation times in seconds from the first frame of the file.
        fps: average frames a second that the file states; NaN where it states none.
    """

    frames: torch.Tensor
    timestamps: torch.Tensor
    fps: float


class _Shown(NamedTuple):
    """A frame not yet converted: when it comes on screen, for how long (both seconds), and the decoder's object."""

    time: float
    lasts: float
    image: Any

    @property
    def until(self) -> float:
        """The last time at which it is still on screen if no frame follows; the sum may be a rounding error too late."""
        return self.time + self.lasts - 1e-6


def read_clip(
    path: str | os.PathLike[str],
    *,
    timestamps: Sequence[float] | torch.Tensor | None = None,
    num_frames: int | None = None,
    stride: int = 1,
    start: float = 0.0,
    size: int | tuple[int, int] | None = None,
    fps: float | None = None,
    strict: bool = True,
) -> Clip:
    """Reads frames at given times, or every ``stride``-th frame from ``start``.

    Args:
        path: a video file, or a folder of images (all of one video, in the natural order of their names: 2 before 10).
        timestamps: (T,) strictly increasing seconds from the first frame. Each gives the frame on screen then; two of them may
            give the same frame. Returned are the frames' own times.
        num_frames: how many frames; all that are left when neither this nor ``timestamps`` is given.
        stride: 1 for every frame, k for every k-th. Counts frames, not time.
        start: seconds; the first frame is the one on screen then.
        size: an int resizes the shorter side to it, keeping the aspect, then crops the centre so that height and width are
            multiples of 16; (height, width) resizes to cover and crops the centre to exactly that; None leaves frames alone.
            The resize is bicubic and antialiased.
        fps: of a folder of images, where it is required; a video file has its own.
        strict: a file that ends before ``num_frames`` is an error; False returns the frames that there are.

    Returns:
        :class:`Clip`: frames (T,3,H,W) uint8, timestamps (T,) float64, fps.

    Raises:
        VideoError: the file is missing, empty, corrupt, without video, too short, or a time lies beyond its end.
        ValueError: arguments that do not fit together or are out of range.
        MissingExtraError: PyAV (or Pillow, for images) is not installed.
    """
    path = Path(path)
    times = None
    if timestamps is not None:
        if num_frames is not None or stride != 1 or start != 0.0:
            raise ValueError("read_clip: timestamps come without num_frames, stride and start")
        times = _checked_times(timestamps)
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"read_clip: num_frames must be at least 1, got {num_frames}")
    if stride < 1:
        raise ValueError(f"read_clip: stride must be at least 1, got {stride}")
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"read_clip: start must be at least 0 seconds, got {start}")
    size = _checked_size(size)
    if not path.exists():
        raise VideoError(f"{path}: no such file or folder")
    if path.is_dir():
        if fps is None or not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"read_clip: a folder of images needs a positive fps, got {fps}")
        source: _Folder | _File = _Folder(path, fps)
    else:
        if fps is not None:
            raise ValueError(f"read_clip: fps is for a folder of images; {path} carries its own times")
        source = _File(path)
    with source:
        picked = _at_times(source, times) if times is not None else _every(source, start, stride, num_frames, strict)
        frames, shown_at, last = [], [], None
        for shown in picked:
            if shown is last:
                frames.append(frames[-1])
            else:
                frames.append(_resized(source.pixels(shown), size))
                if frames[-1].shape != frames[0].shape:
                    raise VideoError(f"{path}: frames differ in size, {_hw(frames[0])} then {_hw(frames[-1])}; give size=(height, width)")
            shown_at.append(shown.time)
            last = shown
        return Clip(torch.stack(frames), torch.tensor(shown_at, dtype=torch.float64), source.fps)


def frame_times(path: str | os.PathLike[str]) -> torch.Tensor:
    """When every frame of a video file is shown, found without decoding them.

    Returns:
        (F,) float64, increasing seconds from the first frame.

    Raises:
        VideoError: the file is missing, empty, without video, or its first frame cannot be decoded.
        MissingExtraError: PyAV is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"{path}: no such file")
    with _File(path) as source:
        ticks = source.ticks()
        return torch.tensor(ticks, dtype=torch.float64) * float(source.stream.time_base)


def _hw(frame: torch.Tensor) -> str:
    return f"{frame.shape[-2]}x{frame.shape[-1]}"


def _checked_times(timestamps: Sequence[float] | torch.Tensor) -> list[float]:
    times = torch.as_tensor(timestamps, dtype=torch.float64)
    if times.ndim != 1 or times.numel() == 0:
        raise ValueError(f"read_clip: timestamps must be a non-empty sequence of seconds, got shape {tuple(times.shape)}")
    listed = times.tolist()
    if not all(map(math.isfinite, listed)) or listed[0] < 0:
        raise ValueError(f"read_clip: timestamps must be finite and at least 0 seconds, got {listed}")
    for earlier, later in itertools.pairwise(listed):
        if later <= earlier:
            raise ValueError(f"read_clip: timestamps must increase strictly, got {later} after {earlier}")
    return listed


def _checked_size(size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
    if size is None:
        return None
    if isinstance(size, int):
        if size < MULTIPLE:
            raise ValueError(f"read_clip: size must be at least {MULTIPLE} pixels, got {size}")
        return size
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"read_clip: size must be an int or (height, width), got {size!r}")
    return int(size[0]), int(size[1])


def _resized(frame: torch.Tensor, size: int | tuple[int, int] | None) -> torch.Tensor:
    """(3,H,W) uint8 to the size asked for, as ``read_clip`` documents it."""
    if size is None:
        return frame
    height, width = frame.shape[-2:]
    if isinstance(size, int):
        scale = size / min(height, width)
        tall, wide = max(size, round(height * scale)), max(size, round(width * scale))
        crop = tall // MULTIPLE * MULTIPLE, wide // MULTIPLE * MULTIPLE
    else:
        scale = max(size[0] / height, size[1] / width)
        tall, wide = max(size[0], round(height * scale)), max(size[1], round(width * scale))
        crop = size
    if (tall, wide) != (height, width):
        frame = F.interpolate(frame[None], (tall, wide), mode="bicubic", antialias=True, align_corners=False)[0]
    top, left = (tall - crop[0]) // 2, (wide - crop[1]) // 2
    return frame[:, top : top + crop[0], left : left + crop[1]].contiguous()


def _at_times(source: _Folder | _File, times: list[float]) -> Iterator[_Shown]:
    """For each time the frame on screen then."""
    coming: Iterator[_Shown] = iter(())
    ahead = held = None  # the frame after the held one, already decoded; the frame on screen
    for time in times:
        if (held is None) if ahead is None else source.jump_pays(ahead.time, time):
            coming = source.shown_from(time)
            held, ahead = next(coming, None), next(coming, None)
        while ahead is not None and ahead.time <= time + SLACK:
            held, ahead = ahead, next(coming, None)
        if ahead is None and (held is None or time > held.until):
            raise VideoError(f"{source.path}: a frame at {time:.3f} s was asked for, {source.ends(held)}")
        yield held


def _from(source: _Folder | _File, time: float) -> Iterator[_Shown]:
    """The frame on screen at ``time`` and all that follow."""
    coming, held = source.shown_from(time), None
    for shown in coming:
        if shown.time > time + SLACK:
            if held is not None:
                yield held
            yield shown
            yield from coming
            return
        held = shown
    if held is None or time > held.until:
        raise VideoError(f"{source.path}: start is {time:.3f} s, {source.ends(held)}")
    yield held


def _every(source: _Folder | _File, start: float, stride: int, num_frames: int | None, strict: bool) -> Iterator[_Shown]:
    """Every ``stride``-th frame from the one on screen at ``start``."""
    given = 0
    for place, shown in enumerate(_from(source, start)):
        if place % stride == 0:
            yield shown
            given += 1
            if given == num_frames:
                return
    if num_frames is not None and strict:
        raise VideoError(
            f"{source.path}: too short: {num_frames} frames with stride {stride} from {start:.3f} s were asked for, "
            f"it has {given}; {source.ends(shown)}"
        )


class _File:
    """A video file under PyAV. Frames come in presentation order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.av = require("av", "demo", "reading video")
        if path.stat().st_size == 0:
            raise VideoError(f"{path}: the file is empty (0 bytes)")
        self._open()
        try:
            stream = self.stream
            self.rate = stream.average_rate or stream.guessed_rate
            self.fps = float(self.rate) if self.rate else math.nan
            first = next(self._decoded(None), None)
            if first is None:
                raise VideoError(f"{path}: no frame could be decoded")
            self.origin = first.pts
        except BaseException:
            self.container.close()
            raise
        self.fresh = False

    def _open(self) -> None:
        try:
            self.container = self.av.open(str(self.path))
        except self.av.FFmpegError as problem:
            raise VideoError(f"{self.path}: not a video that can be opened, or damaged ({_reason(problem)})") from problem
        cover = getattr(self.av.stream.Disposition, "attached_pic", None)
        streams = [s for s in self.container.streams.video if not (cover is not None and s.disposition & cover)]
        if not streams:
            kinds = sorted({s.type for s in self.container.streams})
            self.container.close()
            held = "audio only" if kinds == ["audio"] else f"it holds {', '.join(kinds)}" if kinds else "it holds no stream"
            raise VideoError(f"{self.path}: has no video stream ({held})")
        self.stream = streams[0]
        self.stream.thread_type = "AUTO"
        self.fresh = True

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def _decoded(self, last: float | None) -> Iterator[Any]:
        """The decoder's frames, every trouble turned into a VideoError that says where."""
        frames = self.container.decode(self.stream)
        while True:
            try:
                frame = next(frames, None)
            except self.av.FFmpegError as problem:
                where = "at its start" if last is None else f"after {last:.3f} s"
                raise VideoError(f"{self.path}: damaged {where} ({_reason(problem)})") from problem
            if frame is None:
                return
            if frame.pts is None:
                raise VideoError(f"{self.path}: its frames carry no presentation time; put it into a container that has them, such as mp4")
            if frame.is_corrupt:
                where = "at its start" if last is None else f"after {last:.3f} s"
                raise VideoError(f"{self.path}: damaged {where} (the decoder marks a frame as corrupt)")
            last = float((frame.pts - self.origin) * frame.time_base) if last is not None else 0.0
            yield frame

    def _shown(self) -> Iterator[_Shown]:
        step = 1.0 / self.fps if self.fps > 0 else 0.0
        before = None
        for frame in self._decoded(0.0):
            time = float((frame.pts - self.origin) * frame.time_base)
            if before is not None and time <= before:
                continue  # a repeated time: the first frame of it stays
            lasts = float(frame.duration * frame.time_base) if frame.duration else step
            before = time
            yield _Shown(time, lasts, frame)

    def shown_from(self, time: float) -> Iterator[_Shown]:
        """Frames from the last keyframe that is not after ``time``, or from the start."""
        back = 0.0
        while time - back > NEAR:
            self.container.seek(self.origin + int((time - back) / self.stream.time_base), stream=self.stream)
            self.fresh = False
            frames = self._shown()
            first = next(frames, None)
            if first is not None and first.time <= time + SLACK:
                yield first
                yield from frames
                return
            back = 2 * back + 2.0  # landed late (an index of decoding times, or none): further back
        if not self.fresh:
            self.container.close()
            self._open()
        self.fresh = False
        yield from self._shown()

    def ticks(self) -> list[int]:
        """Presentation times of all frames from the first that is shown, increasing, in units of the stream's time base."""
        self.container.close()
        self._open()
        self.fresh = False
        try:
            packets = [p.pts for p in self.container.demux(self.stream) if p.pts is not None and not p.is_discard]
        except self.av.FFmpegError as problem:
            raise VideoError(f"{self.path}: damaged ({_reason(problem)})") from problem
        return sorted({pts - self.origin for pts in packets if pts > self.origin} | {0})

    def jump_pays(self, at: float, time: float) -> bool:
        """Whether a keyframe lies well after ``at`` and not after ``time``, so that seeking saves decoding."""
        if time - at <= NEAR:
            return False
        index = getattr(self.stream, "index_entries", None)
        if index is None or len(index) == 0:
            return time - at > FAR
        base = self.stream.time_base
        found = index.search_timestamp(self.origin + int(time / base), backward=True, any_frame=False)
        if found < 0:
            return time - at > FAR
        return float((index[found].timestamp - self.origin) * base) > at + NEAR

    def pixels(self, shown: _Shown) -> torch.Tensor:
        """(3,H,W) uint8 RGB, turned upright."""
        array = shown.image.to_ndarray(format="rgb24")
        frame = torch.from_numpy(array).permute(2, 0, 1)
        turns = round(getattr(shown.image, "rotation", 0) / 90) % 4  # counterclockwise, as the display matrix says
        return torch.rot90(frame, turns, (1, 2)).contiguous()

    def ends(self, last: _Shown | None) -> str:
        return "but nothing can be decoded there" if last is None else f"but its last frame is at {last.time:.3f} s"


def _reason(problem: Exception) -> str:
    return getattr(problem, "strerror", None) or str(problem)


class _Folder:
    """Images of a folder as the frames of a video, ``fps`` a second."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, float(fps)
        self.image = require("PIL.Image", "demo", "reading images")
        self.turn = require("PIL.ImageOps", "demo", "reading images").exif_transpose
        self.files = sorted((f for f in path.iterdir() if f.suffix.lower() in IMAGES), key=_natural)
        if not self.files:
            raise VideoError(f"{path}: the folder holds no image ({', '.join(IMAGES)})")

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def shown_from(self, time: float) -> Iterator[_Shown]:
        first = min(int((time + SLACK) * self.fps), len(self.files) - 1)
        for i in range(first, len(self.files)):
            yield _Shown(i / self.fps, 1 / self.fps, self.files[i])

    def jump_pays(self, at: float, time: float) -> bool:
        return False  # nothing is decoded on the way

    def pixels(self, shown: _Shown) -> torch.Tensor:
        try:
            with self.image.open(shown.image) as opened:
                upright = self.turn(opened).convert("RGB")
        except (OSError, SyntaxError) as problem:  # Pillow raises SyntaxError for some broken files
            raise VideoError(f"{shown.image}: not an image that can be read, or damaged ({problem})") from problem
        raw = torch.frombuffer(bytearray(upright.tobytes()), dtype=torch.uint8)
        return raw.view(upright.height, upright.width, 3).permute(2, 0, 1).contiguous()

    def ends(self, last: _Shown | None) -> str:
        return f"but its {len(self.files)} images at {self.fps:g} a second end at {len(self.files) / self.fps:.3f} s"


def _natural(file: Path) -> list[tuple[int, int | str]]:
    """Sorts runs of digits as numbers; the leading flag keeps numbers and words comparable."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", file.name) if part]
