"""``deltakern demo``: DeltaTok and DeltaWorld trained on a few seconds of video, then judged on the seconds they have not seen.

The clip's frames are split in time. The first part, seen through many random crops (mirrored, recoloured, and played backwards as
well as forwards), trains the tokenizer on stored backbone features and then the predictor, by best of many, on stored delta
tokens. The second part is never trained on: windows inside it give every number that is reported, always beside *copy-last*,
the prediction that nothing changes.

Without real weights the backbone is a small DINOv3 with random ones. Its features mean nothing, but they are features of the
images, and the models' task on them is the real one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltakern import ops
from deltakern._extras import require
from deltakern.data import CLIP, CLIP_ATTRIBUTION
from deltakern.data.video import Clip, VideoError, read_clip
from deltakern.models import DeltaTok, DeltaWorld, DINOv3, DINOv3Config, checkpoint
from deltakern.nn import freeze
from deltakern.report import page as html

CONTEXT, HORIZON = 4, 3  # frames of a window: given, and predicted (the paper's middle horizon)
TRAIN_SHARE = 2 / 3
MOST_FRAMES = 250
BETA = 0.1  # of the smooth-L1 that the paper trains and judges futures by
STD = 0.05  # initial weights and noise of the small models: 0.02, the release's, times sqrt(768 / width), roughly


@dataclass(frozen=True)
class Settings:
    """What ``deltakern demo`` is told; the fields after ``threads`` are the sizes of the small models.

    Attributes:
        out: folder of the page; None writes none.
        seed: the same seed gives the same numbers on the same machine and number of threads.
        video: a video file or folder of images; None for the bundled clip.
        size: shorter side of the frames in pixels, a multiple of 16.
        gap: frames of the video from one step to the next.
        tokenizer_steps, world_steps: training steps.
        samples: futures of each context.
        dinov3, deltatok, deltaworld: real weights; what is named is not trained.
        threads: CPU threads; 0 leaves the number alone.
        views: random crops of the training part (the first is the whole frame).
        clips: token sequences that are stored for the predictor.
        pairs, batch: batch sizes of the tokenizer and of the predictor.
        candidates: K of best-of-many.
        width, heads, backbone_layers, layers: of the small models.
        backbone_std: deviation of the random backbone's weights.
        log: quiet when False.
    """

    out: Path | None = Path("deltakern-demo")
    seed: int = 0
    video: Path | None = None
    size: int = 96
    gap: int = 5
    tokenizer_steps: int = 600
    world_steps: int = 200
    samples: int = 20
    dinov3: str | None = None
    deltatok: Path | None = None
    deltaworld: Path | None = None
    threads: int = 0
    views: int = 64
    clips: int = 512
    pairs: int = 16
    batch: int = 32
    candidates: int = 32
    width: int = 96
    heads: int = 4
    backbone_layers: int = 4
    layers: int = 2
    backbone_std: float = 0.3
    log: bool = True

    def __post_init__(self) -> None:
        if self.size < 32 or self.size % 16:
            raise ValueError(f"size must be a multiple of 16 and at least 32, got {self.size}")
        for name in ("gap", "tokenizer_steps", "world_steps", "samples", "views", "clips", "pairs", "batch", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads < 0:
            raise ValueError(f"threads must be at least 0, got {self.threads}")
        if self.deltatok is not None and self.dinov3 is None:
            raise ValueError("deltatok was trained on DINOv3's features: give dinov3 as well")
        if self.deltaworld is not None and self.deltatok is None:
            raise ValueError("deltaworld was trained on DeltaTok's tokens: give deltatok as well")


@dataclass
class Result:
    """What the demo found.

    Attributes:
        numbers: every reported number by name; equal from run to run with the same seed.
        curves: per-step losses by name.
        seconds: wall time of each stage.
        shown: tensors of the window that the page shows.
        facts: sizes, for the text.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    shown: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


Steps = Callable[[str, int], Iterable[int]]


def _silent(_: str, total: int) -> Iterable[int]:
    return range(total)


def compute(settings: Settings, steps: Steps = _silent) -> Result:
    """Everything but the output. Torch's global random state is as before afterwards.

    Args:
        settings: see :class:`Settings`.
        steps: takes a stage's name and length and iterates over its steps; a progress bar's place.
    """
    before = torch.get_num_threads()
    try:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            return _Demo(settings, steps).run()
    finally:
        torch.set_num_threads(before)


class _Demo:
    """The stages, in the order of :meth:`run`."""

    def __init__(self, settings: Settings, steps: Steps) -> None:
        self.settings, self.steps = settings, steps
        self.random = torch.Generator().manual_seed(settings.seed)
        self.result = Result()

    def run(self) -> Result:
        self.stage("read the clip", self.read)
        self.stage("make the tokenizer", self.build)
        self.stage("features of the backbone", self.features)
        if self.settings.deltatok is None:
            self.stage("train DeltaTok", self.train_tokenizer)
        freeze(self.tokenizer)
        self.stage("make the predictor", self.build_world)
        if self.settings.deltaworld is None:
            self.stage("store delta tokens", self.store_tokens)
            self.stage("train DeltaWorld", self.train_world)
        freeze(self.world)
        self.stage("predict the held-out frames", self.judge)
        return self.result

    def stage(self, name: str, work: Callable[[], None]) -> None:
        begin = time.perf_counter()
        work()
        self.result.seconds[name] = time.perf_counter() - begin

    def read(self) -> None:
        s = self.settings
        path = s.video or CLIP
        fps = 25.0 if Path(path).is_dir() else None
        # Twice the size, so that crops are not all blur.
        clip: Clip = read_clip(path, num_frames=MOST_FRAMES, size=2 * s.size, fps=fps, strict=False)
        total = len(clip.frames)
        self.split = int(total * TRAIN_SHARE)
        span = (CONTEXT + HORIZON - 1) * s.gap + 1
        if total - self.split < span:
            raise VideoError(
                f"{path}: too short: {total} frames leave {total - self.split} held out, a window with gap {s.gap} needs {span}; "
                f"give a smaller gap or a longer video"
            )
        self.clip = clip
        self.shape = clip.frames.shape[2] // 32 * 16, clip.frames.shape[3] // 32 * 16
        self.whole = self.look(None)
        self.result.facts |= {
            "path": str(path),
            "bundled": s.video is None,
            "frames": total,
            "split": self.split,
            "seconds": float(clip.timestamps[-1]),
            "fps": clip.fps,
            "shape": self.shape,
        }

    def look(self, random: torch.Generator | None) -> torch.Tensor:
        """The frames (T,3,H,W) uint8 through one crop; the whole frame, as it is, without a generator."""
        frames = self.clip.frames
        height, width = frames.shape[2:]
        tall, wide = self.shape

        def draw(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=random, dtype=torch.float64))

        fit = min(height / tall, width / wide) * (1.0 if random is None else draw(0.35, 1.0))
        crop = round(tall * fit), round(wide * fit)
        top, left = (h - c if random is None else round(2 * draw(0, h - c)) for h, c in zip((height, width), crop, strict=True))
        top, left = top // 2, left // 2
        frames = F.interpolate(
            frames[:, :, top : top + crop[0], left : left + crop[1]], self.shape, mode="bicubic", antialias=True, align_corners=False
        )
        if random is None:
            return frames
        if draw(0, 1) < 0.5:
            frames = frames.flip(-1)
        frames = frames[:, torch.randperm(3, generator=random)].float()
        gain = 0.6 + 0.8 * torch.rand(3, 1, 1, generator=random)
        shift = 40 * (torch.rand(3, 1, 1, generator=random) - 0.5)
        return ((frames - 128) * gain + 128 + shift).clamp(0, 255).round().to(torch.uint8)

    def build(self) -> None:
        s = self.settings
        if s.dinov3 is not None:
            backbone = DINOv3.from_pretrained(s.dinov3)
        else:
            config = DINOv3Config(
                hidden_size=s.width,
                num_hidden_layers=s.backbone_layers,
                num_attention_heads=s.heads,
                intermediate_size=4 * s.width,
                initializer_range=s.backbone_std,
            )
            backbone = DINOv3(config=config)
            backbone.initializer_range = STD  # what the tokenizer, the predictor and the noise take theirs from
        freeze(backbone)
        if s.deltatok is not None:
            given = checkpoint.read(s.deltatok)
            self.tokenizer = DeltaTok(backbone, **checkpoint.infer_deltatok_config(given.state_dict))
            checkpoint.load_into(self.tokenizer, given)
        else:
            # LayerScale of the release begins at 1e-5, for a million steps; a few hundred have no time for that.
            self.tokenizer = DeltaTok(backbone, s.layers, layer_scale_init=0.1, intermediate_size=4 * backbone.hidden_size)
        self.result.facts |= {
            "real": s.dinov3 is not None,
            "grid": (self.shape[0] // backbone.patch_size, self.shape[1] // backbone.patch_size),
            "width": backbone.hidden_size,
            "tokenizer parameters": sum(p.numel() for n, p in self.tokenizer.named_parameters() if not n.startswith("backbone.")),
        }

    def build_world(self) -> None:
        """After the tokenizer's training, because it is frozen."""
        s, backbone = self.settings, self.tokenizer.backbone
        heads = backbone.num_heads
        sizes: dict[str, Any] = {
            "predictor_hidden_size": backbone.hidden_size,
            "predictor_num_hidden_layers": s.layers,
            "predictor_num_heads": heads,
            "layer_scale_init": 0.1,
        }
        if s.deltaworld is not None:
            given = checkpoint.read(s.deltaworld)
            sizes = checkpoint.infer_deltaworld_config(given.state_dict)
            heads = sizes["predictor_num_heads"]
        self.world = DeltaWorld(
            self.tokenizer,
            rope_axis_sizes=(sizes["predictor_hidden_size"] // heads - 4,),
            num_samples_train=s.candidates,
            num_samples_eval=s.samples,
            **sizes,
        )
        if s.deltaworld is not None:
            checkpoint.load_into(self.world, given)
        self.result.facts["world parameters"] = sum(p.numel() for p in self.world.predictor.parameters())

    def backbone_features(self, frames: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([self.tokenizer.features(part[None])[0] for part in frames.split(32)])

    def features(self) -> None:
        """``views`` (V,T,N,D) of the training part and ``held`` (T',N,D) of the held-out part."""
        self.held = self.backbone_features(self.whole[self.split :])
        training = [self.settings.deltatok, self.settings.deltaworld].count(None)
        count = self.settings.views if training else 0
        if count and self.settings.dinov3 is not None:
            count = min(count, 3)  # a real backbone takes its time
        views = []
        for i in self.steps("features", count):
            frames = self.whole if i == 0 else self.look(self.random)
            views.append(self.backbone_features(frames[: self.split]))
        self.views = torch.stack(views) if views else None
        self.result.facts["views"] = count

    def rope(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokenizer._rope(self.whole)

    def integers(self, low: int, high: torch.Tensor | int, count: int) -> torch.Tensor:
        """``count`` integers in low..high-1."""
        return low + (torch.rand(count, generator=self.random, dtype=torch.float64) * (high - low)).long()

    def gaps(self) -> int:
        """The longest gap trained on: a little more than the one judged, and not more than the clip has room for."""
        return max(1, min(self.settings.gap + 2, (self.split - 1) // 2))

    def optimise(self, name: str, total: int, module: nn.Module, rate: float, decay: float, loss_of: Callable[[], torch.Tensor]) -> None:
        """AdamW with warm-up and a cosine to zero; the loss of every step goes to ``curves[name]``."""
        matrices = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
        rest = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
        optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}], lr=rate)
        curve = self.result.curves.setdefault(name, [])
        warm = max(1, total // 20)
        module.train()
        for i in self.steps(name, total):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (i + 1) / warm) * 0.5 * (1 + math.cos(math.pi * i / total))
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*matrices, *rest], 1.0)
            optimizer.step()
            curve.append(loss.item())
        module.eval()

    def train_tokenizer(self) -> None:
        """Log-cosh of pairs, as the release. Half of the pairs begin not at a frame's features but at the tokenizer's own
        reconstruction of them, as the later steps of a rollout do; a few hundred steps would otherwise drift there."""
        count, longest = self.settings.pairs, self.gaps()
        copied = self.result.curves.setdefault("copy-last on the same pairs", [])
        tokenizer = self.tokenizer

        def loss() -> torch.Tensor:
            view, gap = self.integers(0, len(self.views), count), self.integers(1, longest + 1, count)
            first = self.integers(0, self.split - 2 * gap, count)
            back = torch.rand(count, generator=self.random) < 0.5
            first, gap = torch.where(back, first + 2 * gap, first), torch.where(back, -gap, gap)
            older, previous, current = (self.views[view, first + i * gap] for i in range(3))
            copied.append(ops.recon_loss(previous, current).item())
            rope = self.rope()
            with torch.no_grad():
                own = tokenizer.decode(tokenizer.encode(older, previous, rope), older, rope)
            previous = torch.where(torch.arange(count)[:, None, None] % 2 == 0, previous, own)
            return ops.recon_loss(tokenizer.decode(tokenizer.encode(previous, current, rope), previous, rope), current)

        self.optimise("DeltaTok", self.settings.tokenizer_steps, tokenizer, 1e-3, 0.05, loss)

    def store_tokens(self) -> None:
        """``tokens`` (M,T,D) of random sequences of the training part and their ``times`` (M,T)."""
        rope = self.rope()
        black = self.tokenizer.black_features(self.whole[None])
        tokens, times = [], []
        total = CONTEXT + HORIZON
        for _ in self.steps("tokens", self.settings.clips):
            gap = int(self.integers(1, 1 + min(self.gaps(), (self.split - 1) // (total - 1)), 1))
            start = int(self.integers(0, self.split - (total - 1) * gap, 1))
            places = start + gap * torch.arange(total)
            if torch.rand((), generator=self.random) < 0.5:
                places = places.flip(0)
            features = self.views[int(self.integers(0, len(self.views), 1)), places][None]
            with torch.no_grad():
                tokens.append(self.tokenizer.tokenize_offline(black, features, rope)[0, :, 0])
            times.append((self.clip.timestamps[places] - self.clip.timestamps[places[0]]).abs().float())
        self.tokens, self.times = torch.stack(tokens), torch.stack(times)

    def train_world(self) -> None:
        criterion = nn.SmoothL1Loss(reduction="none", beta=BETA)

        def loss() -> torch.Tensor:
            chosen = self.integers(0, len(self.tokens), self.settings.batch)
            predicted, target = self.world.train_on_tokens(self.tokens[chosen], self.times[chosen], criterion, generator=self.random)
            return ops.recon_loss(predicted, target, kind="smooth_l1", beta=BETA)

        self.optimise("DeltaWorld", self.settings.world_steps, self.world, 1e-3, 0.05, loss)

    @torch.no_grad()
    def judge(self) -> None:
        """All windows inside the held-out part."""
        s, numbers = self.settings, self.result.numbers
        rope, total = self.rope(), CONTEXT + HORIZON
        previous, current = self.held[: -s.gap], self.held[s.gap :]
        rebuilt = self.tokenizer.decode(self.tokenizer.encode(previous, current, rope), previous, rope)
        numbers["pairs"] = len(previous)
        numbers["pair reconstruction"] = ops.recon_loss(rebuilt, current).item()
        numbers["pair copy-last"] = ops.recon_loss(previous, current).item()

        count = len(self.held) - (total - 1) * s.gap
        places = torch.arange(count)[:, None] + s.gap * torch.arange(total)
        errors: dict[str, list[torch.Tensor]] = {
            k: [] for k in ("copy-last", "rebuilt", "best", "mean", "single", "averaged", "spread", "change")
        }
        noise = torch.Generator().manual_seed(s.seed + 1)
        most = -1.0

        def error(prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
            return F.smooth_l1_loss(prediction, truth.expand_as(prediction), beta=BETA, reduction="none").mean((-2, -1))

        for i in self.steps("windows", count):
            frames = self.whole[self.split + places[i]][None]
            stamps = self.clip.timestamps[self.split + places[i]]
            stamps = (stamps - stamps[0]).float()[None]
            futures, truth, context = self.world(frames, stamps, ctx_len=CONTEXT, generator=noise)
            futures, truth, last = futures[0], truth[0], context[0, -1]
            rebuilt = self.tokenizer(frames, horizon=HORIZON)[0][0]
            each = error(futures[:, -1], truth[-1])
            mean = futures.mean(0)
            found = {
                "copy-last": error(last, truth[-1]),
                "rebuilt": error(rebuilt[-1], truth[-1]),
                "best": each.min(),
                "mean": error(mean[-1], truth[-1]),
                "single": each.mean(),
                "averaged": error(context[0].mean(0), truth[-1]),
                "spread": (futures[:, -1] - mean[-1]).square().mean(),
                "change": (last - truth[-1]).square().mean(),
            }
            for name, value in found.items():
                errors[name].append(value)
            if float(found["copy-last"]) > most:  # the window with most happening is the one to look at
                most = float(found["copy-last"])
                best = int(each.argmin())
                self.result.shown = {
                    "frames": frames[0],
                    "times": self.clip.timestamps[self.split + places[i]],
                    "context": context[0],
                    "truth": truth,
                    "rebuilt": rebuilt,
                    "best": futures[best],
                    "mean": mean,
                    "samples": torch.cat((futures[:best], futures[best + 1 :])),
                    "change": torch.stack([error(last, t) for t in truth]),
                }
        stacked = {name: torch.stack(values) for name, values in errors.items()}
        numbers["windows"] = count
        for name in ("copy-last", "rebuilt", "best", "mean", "single", "averaged"):
            numbers[name] = stacked[name].mean().item()
        for name in ("rebuilt", "best", "mean"):
            numbers[f"{name} wins"] = (stacked[name] < stacked["copy-last"]).sum().item()
        numbers["spread"] = stacked["spread"].mean().sqrt().item()
        numbers["change"] = stacked["change"].mean().sqrt().item()


# ---- output ----------------------------------------------------------------------------------------------------------------


def verdicts(result: Result, samples: int) -> list[tuple[str, bool]]:
    """Sentences on whether copy-last was beaten, each with whether it was."""
    n = result.numbers
    claims = (
        ("Reconstruction of the next frame from its delta token", "pair reconstruction", "pair copy-last"),
        ("Reconstruction three steps on", "rebuilt", "copy-last"),
        (f"The best of {samples} futures", "best", "copy-last"),
        (f"The mean of {samples} futures", "mean", "copy-last"),
    )
    out = []
    for what, ours, base in claims:
        won = n[ours] < n[base]
        out.append(
            (f"{what} {'beats' if won else 'does NOT beat'} copy-last on held-out frames ({n[ours] / n[base]:.1%} of its loss).", won)
        )
    return out


def rows(result: Result, samples: int) -> list[tuple[str, str, str, str]]:
    """The table: what, loss, share of copy-last's loss, windows in which it is below copy-last."""
    n = result.numbers
    count = int(n["windows"])

    def line(what: str, key: str, base: str, wins: str = "") -> tuple[str, str, str, str]:
        return what, f"{n[key]:.4f}", f"{n[key] / n[base]:.1%}", wins

    def wins(key: str) -> str:
        return f"{int(n[f'{key} wins'])} of {count}"

    return [
        line("next frame, log-cosh: copy-last", "pair copy-last", "pair copy-last"),
        line("next frame, log-cosh: rebuilt from its delta token", "pair reconstruction", "pair copy-last"),
        line("3 steps on, smooth-L1: copy-last", "copy-last", "copy-last"),
        line("3 steps on: rebuilt from the true delta tokens", "rebuilt", "copy-last", wins("rebuilt")),
        line(f"3 steps on: best of {samples} futures", "best", "copy-last", wins("best")),
        line(f"3 steps on: mean of {samples} futures", "mean", "copy-last", wins("mean")),
        line("3 steps on: one future, on average", "single", "copy-last"),
        line(f"3 steps on: average of the {CONTEXT} context frames, no model", "averaged", "copy-last"),
        (
            f"diversity: RMS of futures about their mean (copy-last's RMS error: {n['change']:.4f})",
            f"{n['spread']:.4f}",
            f"{n['spread'] / n['change']:.1%}",
            "",
        ),
    ]


FLICKER = (
    "Features of random weights flicker with the least change of the image, and averaging that away is part of what the models gain over "
    "copy-last. The average of the context frames, which takes no model, shows how much: below its line is what they learnt beyond it."
)
HEADER = ("on held-out frames", "value", "of copy-last", "windows won")


def describe(settings: Settings, result: Result) -> str:
    """One paragraph on what was run."""
    f = result.facts
    weights = "DINOv3 weights as given" if f["real"] else "a small DINOv3 with random weights (its features mean nothing)"
    height, width = f["shape"]
    done = []
    if settings.deltatok is None:
        done.append(f"DeltaTok ({f['tokenizer parameters'] / 1e6:.2f} M parameters) trained for {settings.tokenizer_steps} steps")
    if settings.deltaworld is None:
        done.append(f"DeltaWorld ({f['world parameters'] / 1e6:.2f} M) for {settings.world_steps} steps with best of {settings.candidates}")
    trained = f"{' and '.join(done)}, on frames 0 to {f['split'] - 1}" if done else "Both models as given, nothing trained"
    unseen = f"{int(result.numbers['pairs'])} pairs and {int(result.numbers['windows'])} overlapping windows"
    return (
        f"{f['frames']} frames of {width}x{height} pixels; backbone: {weights}, {f['grid'][0]}x{f['grid'][1]} patches of "
        f"{f['width']} channels a frame. {trained}. "
        f"Numbers are from frames {f['split']} to {f['frames'] - 1}, which no training has seen: {unseen} of {CONTEXT} context and "
        f"{HORIZON} predicted frames, {settings.gap} frames apart."
        + (" Sizes of models and training were chosen on this clip, these frames included." if settings.video is None else "")
    )


def _colours(shown: dict[str, torch.Tensor], grid: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """(N,D) features to a (3,h,w) picture: three principal components, fitted on context and truth."""
    known = torch.cat((shown["context"], shown["truth"])).flatten(0, 1).double()
    middle = known.mean(0)
    _, _, axes = torch.linalg.svd(known - middle, full_matrices=False)
    axes = axes[:3] * axes[:3].gather(1, axes[:3].abs().argmax(1, keepdim=True)).sign()  # a sign of their own
    projected = (known - middle) @ axes.T
    low, high = torch.quantile(projected, torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)

    def colour(features: torch.Tensor) -> torch.Tensor:
        values = ((features.double() - middle) @ axes.T - low) / (high - low).clamp_min(1e-12)
        return (values.clamp(0, 1) * 255).round().to(torch.uint8).T.unflatten(1, grid)

    return colour


def _smooth(values: list[float]) -> list[float]:
    out, state = [], values[0]
    for value in values:
        state = 0.9 * state + 0.1 * value
        out.append(state)
    return out


def make_page(settings: Settings, result: Result) -> html.Page:
    """The page of a result."""
    shown, f = result.shown, result.facts
    colour = _colours(shown, f["grid"])
    times = [f"{float(t):.2f} s" for t in shown["times"]]
    page = html.Page("deltakern demo", describe(settings, result))
    page.section("Against copy-last")
    for text, won in verdicts(result, settings.samples):
        page.add(html.paragraph(text, "verdict" if won else "verdict bad"))
    page.add(
        html.table(HEADER, rows(result, settings.samples), numbers=(1, 2, 3)),
        html.paragraph(
            "Copy-last predicts that nothing changes. The best future is picked knowing the truth, as in the paper; the mean is of the "
            "futures' features and knows nothing. “Rebuilt” is what the tokenizer makes of the true tokens.",
            "soft",
        ),
        *(() if f["real"] else (html.paragraph(FLICKER, "soft"),)),
    )
    names = [f"context, {t}" for t in times[:CONTEXT]] + [f"to predict, {t}" for t in times[CONTEXT:]]
    page.section(
        "The window with most change",
        html.row([html.picture(x, n) for x, n in zip(shown["frames"], names, strict=True)], "Frames"),
        html.row(
            [html.picture(colour(x), t, pixels=True) for x, t in zip((*shown["context"], *shown["truth"]), times, strict=True)],
            "Their features: the first three principal components of context and truth as red, green and blue",
        ),
    )

    def card(title: str, maps: torch.Tensor) -> html.Html:
        loss = F.smooth_l1_loss(maps[-1], shown["truth"][-1], beta=BETA).item()
        share = "" if title == "Truth" else f": {loss / float(shown['change'][-1]):.0%}"
        return html.card(f"{title}{share}", html.row([html.picture(colour(m), pixels=True, alt=title) for m in maps]))

    copied = shown["context"][-1:].expand(HORIZON, -1, -1)
    cards = [
        card("Truth", shown["truth"]),
        card("Copy-last", copied),
        card("Rebuilt from the true tokens", shown["rebuilt"]),
        card(f"Mean of {settings.samples} futures", shown["mean"]),
        card(f"Best of {settings.samples} futures", shown["best"]),
        *(card("Another future", x) for x in shown["samples"][:7]),
    ]
    page.section(
        f"Futures side by side, {', '.join(times[CONTEXT:])}",
        html.paragraph("In the same colours. Per cent: the loss of the last frame, of copy-last's.", "soft"),
        html.cards(cards),
    )
    drawn = []
    for name, y, together in (
        ("DeltaTok", "log-cosh", ["copy-last on the same pairs"]),
        ("DeltaWorld", f"smooth-L1, best of {settings.candidates}", []),
    ):
        if result.curves.get(name):
            series = {k: (range(1, len(v) + 1), _smooth(v)) for k in (name, *together) if (v := result.curves.get(k))}
            drawn.append(html.lines(series, title=f"{name}: training loss", x="step", y=y))
    if drawn:
        page.section("Training", html.charts(*drawn), html.paragraph("Running means over about ten steps.", "soft"))
    seconds = [(name, f"{value:.1f}") for name, value in result.seconds.items()]
    seconds.append(("together", f"{sum(result.seconds.values()):.1f}"))
    page.section(
        "Times", html.table(("stage", "seconds"), seconds, numbers=(1,), caption=f"On this machine's CPU, {f['threads']} threads.")
    )
    source = CLIP_ATTRIBUTION if f["bundled"] else f"Frames from {f['path']}."
    page.section("Source of the frames", html.paragraph(source, "soft"))
    return page


class _Bars:
    """Progress bars in the terminal."""

    def __init__(self, console: Any) -> None:
        progress = require("rich.progress", "demo", "the demo")
        self.progress = progress.Progress(
            progress.TextColumn("{task.description:<11}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=console,
        )

    def __call__(self, name: str, total: int) -> Iterator[int]:
        task = self.progress.add_task(name, total=total)
        for i in range(total):
            yield i
            self.progress.advance(task)

    def shown(self) -> AbstractContextManager[Any]:
        return self.progress


def run(settings: Settings) -> Result:
    """Computes with progress bars, prints the table and writes the page ``settings.out/index.html``."""
    console = require("rich.console", "demo", "the demo").Console(quiet=not settings.log, soft_wrap=True)
    if settings.out is not None:
        for module in ("matplotlib", "PIL"):  # missed now rather than after the training
            require(module, "demo", "the demo's page")
        settings.out.mkdir(parents=True, exist_ok=True)
    bars = _Bars(console)
    with bars.shown():
        result = compute(settings, bars)
    result.facts["threads"] = settings.threads or torch.get_num_threads()
    table = require("rich.table", "demo", "the demo").Table(*HEADER)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows(result, settings.samples):
        table.add_row(*row)
    console.print(table)
    for text, won in verdicts(result, settings.samples):
        console.print(text, style=None if won else "bold red", highlight=False)
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items() if seconds >= 0.1)
    console.print(f"{spent}; together {sum(result.seconds.values()):.1f} s", highlight=False)
    if settings.out is not None:
        console.print(f"page: {make_page(settings, result).write(settings.out / 'index.html')}", highlight=False)
    return result
