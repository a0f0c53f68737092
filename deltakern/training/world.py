"""DeltaWorld's recipe, from stored delta tokens: best of many, smooth-L1 (spec: paper, section 3; released ``training/world.py``)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltakern import ops
from deltakern.data.pace import counted
from deltakern.data.sampling import Drawn, generator_for, middle_clip
from deltakern.data.sources import find_videos
from deltakern.data.store import Manifest, StoreError, TokenDataset, TokenOrder, fingerprint
from deltakern.models import DeltaTok, DeltaWorld, checkpoint
from deltakern.nn.weights import freeze, is_freezable
from deltakern.training.engines import Place
from deltakern.training.loop import Result, Task, TrainOptions, fit

BETA = 0.1
_AT_ONCE = 64  # clips of tokens that are validated together


class _Sizes(nn.Module):
    """Stands where the backbone would: what a predictor needs to know of it."""

    initializer_range = 0.02

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.patch_size = manifest.width, manifest.heads, manifest.patch_size


class StoredTokens(nn.Module):
    """Stands where the tokenizer would when tokens come from a store. Rollouts in features need the real one."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self.backbone = _Sizes(manifest)


@dataclass(frozen=True)
class Predictor:
    """Sizes of the predictor; the defaults are the released ones.

    Attributes:
        width, layers, heads: D, blocks, attention heads.
        mlp_ratio: the MLP's hidden size over D.
        candidates: K, among which training takes the best.
        samples: futures drawn in validation.
        layer_scale_init: initial LayerScale.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    candidates: int = 256
    samples: int = 20
    layer_scale_init: float = 1e-5


def make_world(
    source: Manifest | DeltaTok, predictor: Predictor | None = None, *, seed: int = 0, init: str | os.PathLike | None = None
) -> DeltaWorld:
    """A DeltaWorld to be trained.

    Args:
        source: the tokenizer, or the manifest of a store, from which the sizes alone are taken.
        predictor: its sizes.
        seed: of the initial weights.
        init: a released or Lightning checkpoint to begin with.
    """
    p = predictor or Predictor()
    tokenizer = StoredTokens(source) if isinstance(source, Manifest) else source
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        world = DeltaWorld(
            tokenizer,
            rope_axis_sizes=(p.width // p.heads - 4,),
            predictor_hidden_size=p.width,
            predictor_num_hidden_layers=p.layers,
            predictor_num_heads=p.heads,
            mlp_ratio=p.mlp_ratio,
            num_samples_train=p.candidates,
            num_samples_eval=p.samples,
            layer_scale_init=p.layer_scale_init,
        )
    if init is not None:
        checkpoint.load_into(world, init)
    return world


class TokenObjective(nn.Module):
    """The training loss of tokens (B,T,D) and timestamps (B,T): mean smooth-L1 of the best candidates."""

    def __init__(self, network: DeltaWorld, beta: float = BETA) -> None:
        super().__init__()
        self.network, self.beta = network, beta
        self.criterion = nn.SmoothL1Loss(reduction="none", beta=beta)

    def forward(self, tokens: torch.Tensor, timestamps: torch.Tensor) -> torch.Tensor:
        prediction, target = self.network.train_on_tokens(tokens, timestamps, self.criterion)
        return ops.recon_loss(prediction, target, kind="smooth_l1", beta=self.beta)


def rollout_tokens(
    world: DeltaWorld, tokens: torch.Tensor, timestamps: torch.Tensor, samples: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Futures as delta tokens, each sample continuing its own.

    Args:
        world: in evaluation mode.
        tokens: (B,c,D) of the context.
        timestamps: (B,c+h) seconds.
        samples: S.
        generator: draws the noise, on the CPU.

    Returns:
        (B,S,h,D).
    """
    batch, context = tokens.shape[:2]
    past = tokens.repeat_interleave(samples, 0)
    times = timestamps.repeat_interleave(samples, 0)
    for known in range(context, timestamps.shape[1]):
        shape = (batch * samples, known, 1)
        noise = world.noise(*shape[:1], 1, 1, device=torch.device("cpu"), dtype=torch.float32, generator=generator)
        queries = noise.to(tokens.device).expand(*shape, -1)
        following = world.predict(past, times[:, : known + 1], queries)[:, -1]
        past = torch.cat((past, following.to(past.dtype)), 1)
    return past[:, context:].unflatten(0, (batch, samples))


def best_and_mean(futures: torch.Tensor, target: torch.Tensor, copied: torch.Tensor) -> dict[str, torch.Tensor]:
    """Smooth-L1 of every clip, (B,) each, as the release evaluates.

    Args:
        futures: (B,S,h,...) samples.
        target: (B,h,...).
        copied: (B,...) what there was last.

    Returns:
        "best": of the sample whose last step is nearest the truth; "mean": of the samples' mean; "copy_last": of ``copied`` at
        every step. Each is averaged over the steps.
    """

    def loss(prediction: torch.Tensor, truth: torch.Tensor, dims: int) -> torch.Tensor:
        return F.smooth_l1_loss(prediction, truth.expand_as(prediction), reduction="none", beta=BETA).flatten(dims).mean(-1)

    nearest = loss(futures[:, :, -1], target[:, None, -1], 2).argmin(1)
    best = futures[torch.arange(len(futures), device=futures.device), nearest]
    return {
        "best": loss(best, target, 1),
        "mean": loss(futures.mean(1), target, 1),
        "copy_last": loss(copied[:, None].expand_as(target), target, 1),
    }


class WorldTask(Task):
    """DeltaWorld on a token store.

    Args:
        world: of :func:`make_world`.
        train, val: clips to train on, and held-out ones or None.
        seed: of the order.
        context, horizons: frames given, and frames predicted, in validation.
        videos: clips that validation predicts in features too; the world's tokenizer must be real.
    """

    def __init__(
        self,
        world: DeltaWorld,
        train: TokenDataset,
        val: TokenDataset | None = None,
        *,
        seed: int = 0,
        context: int = 4,
        horizons: Sequence[int] = (1, 3),
        videos: Sequence[Drawn] = (),
    ) -> None:
        if train.width != world.backbone.hidden_size:
            raise StoreError(f"the store's tokens have {train.width} channels, the model takes {world.backbone.hidden_size}")
        self.network, self.objective = world, TokenObjective(world)
        if is_freezable(world.tokenizer):
            freeze(world.tokenizer)
        self.train, self.val, self.seed, self.context, self.videos = train, val, seed, context, videos
        self.horizons = [h for h in horizons if context + h <= train.num_frames]
        if not self.horizons and (val is not None or videos):
            raise ValueError(f"validation needs clips of {context} + {min(horizons)} frames, the store's have {train.num_frames}")
        self._order = TokenOrder(train, seed)

    loss = "smooth-L1"

    def size(self) -> str:
        held = [counted(len(self.val), "clip")] if self.val is not None else []
        held += [counted(len(self.videos), "video")] if self.videos else []
        return f"{counted(len(self.train), 'clip')} to train on, {' and '.join(held) or 'none'} to validate on"

    def batches(self, plan: Iterable[tuple[int, int]]) -> Iterator[tuple[torch.Tensor, ...]]:
        return (self.train.batch(self._order.take(start, stop)) for start, stop in plan)

    def names(self, start: int, stop: int) -> list[str]:
        return [f"{video} {crop}" for video, crop in self.train.names(self._order.take(start, stop))]

    def order(self) -> str:
        return f"{self.train.digest} {self.seed}"

    def identity(self) -> dict[str, Any]:
        world = self.network
        return {
            "model": "DeltaWorld",
            "fingerprint": self.train.manifest.fingerprint,
            "layers": len(world.predictor.blocks),
            "width": world.predictor_hidden_size,
        }

    @torch.no_grad()
    def validate(self, place: Place) -> dict[str, float]:
        """The means over held-out clips: in tokens "h1_best"... , in features "feature_h1_best"...; "val" as the release's."""
        sums: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}

        def add(prefix: str, losses: dict[str, torch.Tensor]) -> None:
            for name, values in losses.items():
                key = f"{prefix}_{name}"
                sums[key] = sums.get(key, 0) + values.double().sum().cpu()
                counts[key] = counts.get(key, 0) + len(values)

        for h in self.horizons:
            if self.val is not None:
                for start in range(0, len(self.val), _AT_ONCE):
                    if start // _AT_ONCE % place.size == place.rank:
                        add(f"h{h}", self._on_tokens(range(start, min(start + _AT_ONCE, len(self.val))), h, place.device))
            for i, clip in enumerate(self.videos):
                if i % place.size == place.rank:
                    add(f"feature_h{h}", self._on_video(i, clip, h, place.device))
        keys = [f"{p}h{h}_{n}" for p, there in (("", self.val is not None), ("feature_", bool(self.videos))) if there
                for h in self.horizons for n in ("best", "mean", "copy_last")]  # fmt: skip
        totals = place.mean([float(sums.get(k, 0.0)) for k in keys] + [float(counts.get(k, 0)) for k in keys])
        found = {key: totals[i] / totals[i + len(keys)] for i, key in enumerate(keys)}
        if not found:
            return {}
        prefix = "feature_" if self.videos else ""
        means = [found[f"{prefix}h{h}_mean"] for h in self.horizons]
        return {"val": sum(means) / len(means), **found}

    def _on_tokens(self, indices: range, h: int, device: torch.device) -> dict[str, torch.Tensor]:
        world, c = self.network, self.context
        tokens, times = (t.to(device) for t in self.val.batch(indices))
        generator = generator_for(self.seed, "validation", h, indices.start)
        futures = rollout_tokens(world, tokens[:, :c], times[:, : c + h], world.num_samples, generator)
        return best_and_mean(futures, tokens[:, c : c + h], tokens[:, c - 1])

    def _on_video(self, number: int, clip: Drawn, h: int, device: torch.device) -> dict[str, torch.Tensor]:
        c = self.context
        frames, times = clip.frames[None, : c + h].to(device), clip.timestamps[None, : c + h].to(device)
        seed = generator_for(self.seed, "video", h, number).initial_seed()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            futures, target, context = self.network(frames, times, ctx_len=c)
        return best_and_mean(futures.float(), target.float(), context[:, -1].float())


def train_world(
    stores: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    options: TrainOptions | None = None,
    *,
    predictor: Predictor | None = None,
    tokenizer: DeltaTok | None = None,
    init: str | os.PathLike | None = None,
    val_fraction: float = 0.02,
    val_videos: Sequence[str | os.PathLike] = (),
    val_stride: float = 0.2,
) -> Result:
    """Trains DeltaWorld from stored tokens; called again with the same ``out`` it continues.

    Args:
        stores: token stores of one tokenizer.
        out: the run's folder, see :class:`deltakern.training.run.Run`.
        options: see :class:`deltakern.training.loop.TrainOptions`.
        predictor: its sizes.
        tokenizer: if given, the stores must hold its tokens. Needed for ``val_videos``.
        init: a checkpoint to begin with, unless ``out`` holds a later one.
        val_fraction: share of the videos held out, by their names. Validation predicts their tokens 1 and 3 steps ahead after 4.
        val_videos: videos on whose middle features are predicted, at the size that the store was made at.
        val_stride: seconds between the frames of those.

    Raises:
        StoreError: stores that are missing, damaged, of different tokenizers, or of another one than ``tokenizer``.
        deltakern.training.run.TrainingError: see :func:`deltakern.training.loop.fit`.
    """
    options = options or TrainOptions()
    expected = fingerprint(tokenizer) if tokenizer is not None else None
    train = TokenDataset(stores, split="train" if val_fraction else "all", val_fraction=val_fraction, fingerprint=expected)
    val = None
    if val_fraction:
        try:
            val = TokenDataset(stores, split="val", val_fraction=val_fraction)
        except StoreError as problem:
            raise StoreError(f"{problem}; hold out more, or nothing with a val_fraction (--val-fraction) of 0") from problem
    if val_videos and tokenizer is None:
        raise ValueError("val_videos: features can be predicted with the tokenizer alone; give it")
    size = train.manifest.sampling.get("size", 512)
    clips = []
    for video in find_videos(val_videos) if val_videos else ():
        with video.file() as path:
            clips.append(middle_clip(path, 7, val_stride, size))
    world = make_world(tokenizer or train.manifest, predictor, seed=options.seed, init=init)
    return fit(WorldTask(world, train, val, seed=options.seed, videos=clips), out, options)
