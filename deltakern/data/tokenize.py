"""Videos to delta tokens, once: the stage that fills a token store."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deltakern._extras import MissingExtraError, require
from deltakern.data.pace import Pace, figure
from deltakern.data.sampling import Drawn, Sampling, draw_clips
from deltakern.data.sources import Video, find_videos
from deltakern.data.store import Manifest, StoreError, Writer, done_clips, fingerprint
from deltakern.models import DeltaTok, DINOv3, DINOv3Config, checkpoint
from deltakern.models.dinov3 import DEFAULT_WEIGHTS
from deltakern.nn import freeze, frozen

__all__ = ["PRECISIONS", "Summary", "TokenizeOptions", "load_backbone", "load_tokenizer", "tokenize", "tokenize_videos"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
log = logging.getLogger("deltakern")


class Summary(NamedTuple):
    """What a run of :func:`tokenize` did: clips written, clips that were there, videos that failed, and whether it was stopped."""

    written: int
    present: int
    failed: int
    stopped: bool


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the content of a store, and how it is made.

    Attributes:
        crops: draws of every video.
        sampling: of a draw.
        dtype: "float16" or "float32", of the stored tokens.
        precision: "float32" or "bfloat16" (autocast) of the computation.
        seed: of the draws.
        batch: clips encoded at once. With 1 a clip's tokens do not depend, to the last bit, on which clips were left to do.
        workers: processes that decode video, besides this one; 0 decodes in this one.
        rows_per_shard: clips to a shard, what a kill loses at most.
        part: (i, n): take every n-th video from the i-th on, so that n machines can share the work.
        progress: show a bar, or a line a minute where standard output is no terminal.
    """

    crops: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    dtype: str = "float16"
    precision: str = "float32"
    seed: int = 0
    batch: int = 1
    workers: int = 0
    rows_per_shard: int = 1024
    part: tuple[int, int] = (0, 1)
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("crops", "batch", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {self.precision!r}")
        index, count = self.part
        if not 0 <= index < count:
            raise ValueError(f"part must be (i, n) with 0 <= i < n, got {self.part}")


def load_backbone(dinov3: str | None = None, *, random_weights: bool = False) -> DINOv3:
    """The frozen backbone: a folder or hub repository, None for the one that the released models use, or seeded random weights."""
    if random_weights:
        if dinov3:
            raise ValueError("random weights come without dinov3")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return DINOv3(config=DINOv3Config())
    return DINOv3.from_pretrained(dinov3 or DEFAULT_WEIGHTS)


def load_tokenizer(dinov3: str | None = None, deltatok: str | None = None, *, random_weights: bool = False) -> DeltaTok:
    """The frozen backbone and tokenizer.

    Args:
        dinov3: folder or hub repository of a DINOv3 ViT; None for the one that the released models use.
        deltatok: a DeltaTok checkpoint, file or hub repository; None for the released one.
        random_weights: seeded random weights of the released sizes instead, to try things without a download.

    Raises:
        FileNotFoundError, deltakern.models.checkpoint.CheckpointError: no such weights, or weights that do not fit together.
    """
    if random_weights and deltatok:
        raise ValueError("random weights come without deltatok")
    backbone = load_backbone(dinov3, random_weights=random_weights)
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return freeze(DeltaTok(backbone, layer_scale_init=0.1))
    weights = checkpoint.read(deltatok or checkpoint.RELEASED["deltatok"])
    tokenizer = DeltaTok(backbone, **checkpoint.infer_deltatok_config(weights.state_dict))
    checkpoint.load_into(tokenizer, weights)
    return freeze(tokenizer)


UNREADABLE = (ValueError, OSError, RuntimeError, MemoryError)
"""What a broken video raises; a missing package is another matter."""


class _Draws(torch.utils.data.Dataset):
    """What is left to draw of every video; items are (name, crops, clips) or (name, crops, reason)."""

    def __init__(self, left: list[tuple[Video, list[int]]], options: TokenizeOptions) -> None:
        self.left, self.options = left, options

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, index: int) -> tuple[str, list[int], list[Drawn] | str]:
        video, crops = self.left[index]
        try:
            with video.file() as path:
                return video.name, crops, draw_clips(path, self.options.sampling, self.options.seed, video.name, crops)
        except MissingExtraError:
            raise
        except UNREADABLE as problem:
            return video.name, crops, f"{type(problem).__name__}: {problem}"


def tokenize_videos(tokenizer: DeltaTok, frames: torch.Tensor, precision: str = "float32") -> torch.Tensor:
    """Delta tokens (B,T,D) float32 of uint8 frames (B,T,3,H,W), on the tokenizer's device, without gradient."""
    device = next(tokenizer.parameters()).device
    wanted = PRECISIONS[precision]
    with torch.inference_mode(), torch.autocast(device.type, wanted, enabled=wanted != torch.float32):
        return tokenizer.tokenize(frames.to(device, non_blocking=True)).float()


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Within the context SIGTERM and the first SIGINT only set a flag, which the given function reads."""
    caught: list[int] = []

    def catch(number: int, _: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread, which alone receives signals
        before = {}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def manifest_of(tokenizer: DeltaTok, options: TokenizeOptions) -> Manifest:
    """The manifest of a store that these models fill with these options."""
    backbone = tokenizer.backbone
    return Manifest(
        fingerprint=fingerprint(tokenizer),
        width=backbone.hidden_size,
        heads=backbone.num_heads,
        patch_size=backbone.patch_size,
        num_frames=options.sampling.num_frames,
        dtype=options.dtype,
        precision=options.precision,
        seed=options.seed,
        sampling=asdict(options.sampling),
    )


def left_to_draw(videos: Sequence[Video], store: str | os.PathLike, crops: int) -> list[tuple[Video, list[int]]]:
    """The videos of which a store does not hold draws 0 to ``crops`` - 1, and the draws that are missing."""
    done = done_clips(store)
    left = [(v, [c for c in range(crops) if c not in done.get(v.name, ())]) for v in videos]
    return [(video, missing) for video, missing in left if missing]


def tokenize(
    sources: Sequence[str | os.PathLike], store: str | os.PathLike, tokenizer: DeltaTok, options: TokenizeOptions | None = None
) -> Summary:
    """Draws clips from videos and adds their delta tokens to a store.

    Clips that the store holds are not computed again, so a run that was killed is continued by the same call, and more
    ``crops`` can be added later. A video that cannot be read is logged, noted in the store, and passed over. SIGTERM and
    SIGINT end the run after the clip in hand, with everything written.

    Args:
        sources: see :func:`deltakern.data.sources.find_videos`.
        store: folder, created if need be.
        tokenizer: on the device that is to compute; frozen meanwhile.
        options: see :class:`TokenizeOptions`.

    Raises:
        deltakern.data.sources.SourceError: of the sources.
        StoreError: the store holds tokens of another kind; float16 cannot hold the tokens.
        MissingExtraError: pyarrow, PyAV or rich is not installed.
    """
    options = options or TokenizeOptions()
    require("av", "store", "reading video")
    videos = find_videos(sources)[options.part[0] :: options.part[1]]
    manifest = manifest_of(tokenizer, options)
    with stop_on_signal() as stopped, frozen(tokenizer), Writer(store, manifest, rows_per_shard=options.rows_per_shard) as writer:
        left = left_to_draw(videos, store, options.crops)
        total = sum(len(crops) for _, crops in left)
        present = len(videos) * options.crops - total
        failed = 0
        waiting: list[tuple[str, int, Drawn]] = []
        with _bar(Path(store).name, total, options.progress) as advance:
            for name, crops, clips in _decoded(left, options):
                if isinstance(clips, str):
                    log.warning("skipped %s: %s", name, clips)
                    writer.failed(name, clips)
                    failed += 1
                    advance(len(crops))
                else:
                    waiting += [(name, crop, clip) for crop, clip in zip(crops, clips, strict=True)]
                while len(waiting) >= options.batch and not stopped():
                    _encode(waiting[: options.batch], tokenizer, options, writer)
                    del waiting[: options.batch]
                    advance(options.batch)
                if stopped():
                    break
            if waiting and not stopped():
                _encode(waiting, tokenizer, options, writer)
                advance(len(waiting))
        writer.flush()
        return Summary(writer.written, present, failed, stopped())


def _decoded(left: list[tuple[Video, list[int]]], options: TokenizeOptions) -> Iterator[tuple[str, list[int], list[Drawn] | str]]:
    """The draws, in the order of the videos."""
    draws = _Draws(left, options)
    if options.workers == 0:
        yield from (draws[i] for i in range(len(draws)))
        return
    yield from torch.utils.data.DataLoader(draws, batch_size=None, num_workers=options.workers, worker_init_fn=leave_signals)


def leave_signals(_: int) -> None:
    """For workers that decode: Ctrl-C is their parent's affair, and a forked worker must not keep the parent's handlers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _encode(clips: list[tuple[str, int, Drawn]], tokenizer: DeltaTok, options: TokenizeOptions, writer: Writer) -> None:
    tokens = tokenize_videos(tokenizer, torch.stack([clip.frames for _, _, clip in clips]), options.precision)
    for (name, crop, clip), own in zip(clips, tokens.cpu(), strict=True):
        writer.add(name, crop, clip.timestamps, own)


@contextlib.contextmanager
def _bar(title: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, a line a minute in a log; the given function advances it."""
    if not show:
        yield lambda count: None
        return
    progress = require("rich.progress", "store", "the progress bar")
    if not sys.stdout.isatty():  # a bar would be seen at the end alone
        pace = Pace(total, 60.0)

        def advance(count: int) -> None:
            pace.advance(count)
            if pace.due() and pace.done < total:
                log.info("%s: %d of %d clips, %s a second, %s left", title, pace.done, total, figure(pace.rate), pace.left)

        yield advance
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("clips"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns) as shown:
        task = shown.add_task(title, total=total)
        yield lambda count: shown.advance(task, count)


@dataclass(frozen=True)
class Job:
    """:func:`tokenize` with models named instead of made, so that it can be sent to other processes."""

    sources: tuple[str, ...]
    store: str
    options: TokenizeOptions
    dinov3: str | None = None
    deltatok: str | None = None
    random_weights: bool = False

    def load(self) -> DeltaTok:
        """The models."""
        return load_tokenizer(self.dinov3, self.deltatok, random_weights=self.random_weights)

    def run(self, device: str, part: tuple[int, int] = (0, 1), *, progress: bool = True) -> Summary:
        """On one device, every ``part[1]``-th video of the options' part."""
        index, count = self.options.part
        mine = (index + count * part[0], count * part[1])
        options = TokenizeOptions(**{**vars(self.options), "part": mine, "progress": progress and self.options.progress})
        return tokenize(self.sources, self.store, self.load().to(device), options)


def run_on_devices(job: Job, devices: Sequence[str]) -> Summary:
    """Runs the job in one process a device (in this one if it is only one), and adds up what they did."""
    if not devices:
        raise ValueError("devices must name at least one device")
    if len(devices) == 1:
        return job.run(devices[0])
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    children = [context.Process(target=_child, args=(job, device, (i, len(devices)), results)) for i, device in enumerate(devices)]
    for child in children:
        child.start()
    with stop_on_signal() as stopped:
        told = False
        while any(child.is_alive() for child in children):
            for child in children:
                child.join(0.2)
            if stopped() and not told:
                told = True
                for child in children:
                    child.terminate()
    broken = [f"{device} (exit code {child.exitcode})" for device, child in zip(devices, children, strict=True) if child.exitcode]
    if broken:
        raise StoreError(f"tokenizing failed on {', '.join(broken)}; what the others wrote is kept, the same command continues")
    done = [results.get() for _ in children]
    return Summary(*(sum(s[i] for s in done) for i in range(3)), any(s.stopped for s in done))


def _child(job: Job, device: str, part: tuple[int, int], results: Any) -> None:
    results.put(job.run(device, part, progress=part[0] == 0))
