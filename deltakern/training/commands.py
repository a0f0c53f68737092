"""What the commands ``deltakern tokenize``, ``train-world`` and ``train-tok`` do. Each returns the exit status.

0 done · 1 nothing could be done · 2 refused, with the reason on standard error · 143 ended by a signal with everything saved: the
same command goes on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deltakern._extras import MissingExtraError
from deltakern.data.sampling import Sampling
from deltakern.data.tokenize import Job, TokenizeOptions, load_backbone, load_tokenizer, run_on_devices
from deltakern.models import DeltaTok, checkpoint
from deltakern.training.loop import Result, TrainOptions
from deltakern.training.run import TrainingError
from deltakern.training.tok import train_tok
from deltakern.training.world import Predictor, train_world

STOPPED = 143


def _reported(body: Callable[[], int]) -> int:
    """Runs a command; what the user can mend is said in one line instead of a traceback."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("deltakern").setLevel(logging.INFO)
    try:
        return body()
    except (ValueError, FileNotFoundError, MissingExtraError, TrainingError) as problem:
        print(f"deltakern: {problem}", file=sys.stderr)
        return 2


def default_devices() -> list[str]:
    """Every GPU, or the CPU."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def default_precision(device: str | None) -> str:
    """bfloat16 on a GPU, float32 elsewhere."""
    kind = torch.device(device).type if device else ("cuda" if torch.cuda.is_available() else "cpu")
    return "bfloat16" if kind == "cuda" else "float32"


def tokenize(
    sources: Sequence[str],
    out: str,
    *,
    crops: int = 1,
    frames: int = 8,
    size: int = 512,
    dinov3: str | None = None,
    deltatok: str | None = None,
    random_weights: bool = False,
    float32: bool = False,
    precision: str | None = None,
    devices: str | None = None,
    workers: int = 0,
    batch: int = 1,
    shard: int = 1024,
    part: str = "1/1",
    seed: int = 0,
) -> int:
    """See :func:`deltakern.data.tokenize.tokenize`. ``devices`` are separated by commas; ``part`` is "i/n" counted from 1."""

    def body() -> int:
        index, _, count = part.partition("/")
        if not (index.isdigit() and count.isdigit()):
            raise ValueError(f"--part must be i/n, such as 1/4, got {part!r}")
        used = [d.strip() for d in devices.split(",")] if devices else default_devices()
        options = TokenizeOptions(
            crops=crops,
            sampling=Sampling(num_frames=frames, size=size),
            dtype="float32" if float32 else "float16",
            precision=precision or default_precision(used[0]),
            seed=seed,
            batch=batch,
            workers=workers,
            rows_per_shard=shard,
            part=(int(index) - 1, int(count)),
        )
        done = run_on_devices(Job(tuple(sources), out, options, dinov3, deltatok, random_weights), used)
        print(f"{out}: {done.written} clips written, {done.present} were there, {done.failed} videos failed")
        if done.failed:
            print(f"which and why: {out}/failed")
        if done.stopped:
            print("stopped by a signal; the same command goes on")
            return STOPPED
        return 0 if done.written + done.present else 1

    return _reported(body)


def _tokenizer(dinov3: str | None, deltatok: str | None, random_weights: bool, needed: bool) -> DeltaTok | None:
    wanted = needed or dinov3 or deltatok or random_weights
    return load_tokenizer(dinov3, deltatok, random_weights=random_weights) if wanted else None


def _end(out: str, found: Result) -> int:
    if found.stopped:
        print(f"{out}: stopped by a signal after step {found.step}; the same command goes on")
        return STOPPED
    print(f"{out}: done after step {found.step}")
    return 0


def train_world_command(
    stores: Sequence[str],
    out: str,
    *,
    predictor: Predictor,
    options: dict[str, Any],
    dinov3: str | None = None,
    deltatok: str | None = None,
    random_weights: bool = False,
    init: str | None = None,
    val_fraction: float = 0.02,
    val_videos: Sequence[str] = (),
    val_stride: float = 0.2,
) -> int:
    """See :func:`deltakern.training.world.train_world`; ``options`` are those of :class:`deltakern.training.loop.TrainOptions`."""

    def body() -> int:
        found = train_world(
            stores,
            out,
            _options(options),
            predictor=predictor,
            tokenizer=_tokenizer(dinov3, deltatok, random_weights, bool(val_videos)),
            init=init,
            val_fraction=val_fraction,
            val_videos=val_videos,
            val_stride=val_stride,
        )
        return _end(out, found)

    return _reported(body)


def train_tok_command(
    sources: Sequence[str],
    out: str,
    *,
    options: dict[str, Any],
    dinov3: str | None = None,
    init: str | None = None,
    size: int = 256,
    workers: int = 0,
    val_fraction: float = 0.0,
    val_videos: Sequence[str] = (),
    val_stride: float = 0.2,
    random_weights: bool = False,
) -> int:
    """See :func:`deltakern.training.tok.train_tok`; ``options`` are those of :class:`deltakern.training.loop.TrainOptions`."""

    def body() -> int:
        made = _options(options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(made.seed)
            backbone = load_backbone(dinov3, random_weights=random_weights)
            weights = checkpoint.read(init) if init else None
            tokenizer = DeltaTok(backbone, **(checkpoint.infer_deltatok_config(weights.state_dict) if weights else {}))
        if weights is not None:
            checkpoint.load_into(tokenizer, weights)
        found = train_tok(
            sources,
            out,
            tokenizer,
            made,
            sampling=Sampling(num_frames=2, size=size),
            workers=workers,
            val_fraction=val_fraction,
            val_videos=val_videos,
            val_stride=val_stride,
        )
        return _end(out, found)

    return _reported(body)


def _options(given: dict[str, Any]) -> TrainOptions:
    return TrainOptions(**{**given, "precision": given.get("precision") or default_precision(given.get("device"))})
