"""What the commands ``deltakern tokenize``, ``train-world`` and ``train-tok`` do. Each returns the exit status.

0: done. 1: nothing could be done. 143: ended by a signal with everything saved; the same command goes on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch

from deltakern.data.sampling import Sampling
from deltakern.data.tokenize import Job, TokenizeOptions, load_backbone, load_tokenizer, run_on_devices
from deltakern.models import DeltaTok, checkpoint
from deltakern.training.loop import TrainOptions
from deltakern.training.tok import RELEASED, train_tok
from deltakern.training.world import Predictor, train_world

STOPPED = 143


def default_devices() -> list[str]:
    """Every GPU, or the CPU."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def default_precision(device: str | None) -> str:
    """bfloat16 on a GPU, float32 elsewhere."""
    kind = torch.device(device).type if device else ("cuda" if torch.cuda.is_available() else "cpu")
    return "bfloat16" if kind == "cuda" else "float32"


def _speak() -> None:
    """The package's log to standard error, one line each."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("deltakern").setLevel(logging.INFO)


def tokenize(
    sources: Sequence[str],
    out: str,
    *,
    sampling: Sampling,
    devices: str | None,
    ray: int,
    part: str,
    precision: str | None,
    dinov3: str | None,
    deltatok: str | None,
    random_weights: bool,
    **options: Any,
) -> int:
    """See :func:`deltakern.data.tokenize.tokenize`. ``devices`` are separated by commas; ``part`` is "i/n" counted from 1.

    With ``ray`` actors see :func:`deltakern.data.ray_pipeline.tokenize_on_ray`.
    """
    _speak()
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--part must be i/n with 1 <= i <= n, such as 1/4, got {part!r}")
    used = [d.strip() for d in devices.split(",")] if devices else default_devices()
    made = TokenizeOptions(
        sampling=sampling, part=(int(index) - 1, int(count)), precision=precision or default_precision(used[0]), **options
    )
    job = Job(tuple(map(str, sources)), out, made, dinov3, deltatok, random_weights)
    if ray:
        from deltakern.data.ray_pipeline import tokenize_on_ray

        done = tokenize_on_ray(job, actors=ray)
    else:
        done = run_on_devices(job, used)
    print(f"{out}: {done.written} clips written, {done.present} were there, {done.failed} videos failed")
    if done.failed:
        print(f"which and why: {out}/failed")
    if done.stopped:
        print("stopped by a signal; the same command goes on")
        return STOPPED
    return 0 if done.written + done.present else 1


def world(
    stores: Sequence[str],
    out: str | PathLike,
    options: dict[str, Any],
    *,
    predictor: Predictor,
    dinov3: str | None,
    deltatok: str | None,
    random_weights: bool,
    **arguments: Any,
) -> int:
    """See :func:`deltakern.training.world.train_world`. The tokenizer is loaded where its weights are named or videos validate."""
    _speak()
    wanted = dinov3 or deltatok or random_weights or arguments.get("val_videos")
    tokenizer = load_tokenizer(dinov3, deltatok, random_weights=random_weights) if wanted else None
    found = train_world(stores, out, train_options(options), predictor=predictor, tokenizer=tokenizer, **arguments)
    return STOPPED if found.stopped else 0


def tok(
    sources: Sequence[str],
    out: str | PathLike,
    options: dict[str, Any],
    *,
    size: int,
    dinov3: str | None,
    init: str | None,
    random_weights: bool,
    **arguments: Any,
) -> int:
    """See :func:`deltakern.training.tok.train_tok`. ``init`` is a checkpoint to begin with."""
    _speak()
    made = train_options({**vars(RELEASED), **options})
    backbone = load_backbone(dinov3, random_weights=random_weights)
    weights = checkpoint.read(init) if init else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(made.seed)
        tokenizer = DeltaTok(backbone, **(checkpoint.infer_deltatok_config(weights.state_dict) if weights else {}))
    if weights is not None:
        checkpoint.load_into(tokenizer, weights)
    found = train_tok(sources, out, tokenizer, made, sampling=Sampling(num_frames=2, size=size), **arguments)
    return STOPPED if found.stopped else 0


def train_options(given: dict[str, Any]) -> TrainOptions:
    """With the precision that suits the device where none is given."""
    return TrainOptions(**{**given, "precision": given.get("precision") or default_precision(given.get("device"))})
