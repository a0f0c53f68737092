"""``deltakern rollout``: futures of a video's frames, as a page, and as tokens and features to work with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltakern._extras import require
from deltakern.data.video import Clip, VideoError, read_clip
from deltakern.models import DeltaTok, DeltaWorld, DINOv3, DINOv3Config, Futures, checkpoint
from deltakern.models.dinov3 import DEFAULT_WEIGHTS
from deltakern.models.heads import RGBHead, feature_map
from deltakern.nn import freeze
from deltakern.report import page as html

PICTURE = 192  # pixels of the shorter side of a frame on the page


@dataclass(frozen=True)
class Settings:
    """What ``deltakern rollout`` is told.

    Attributes:
        video: a video file, or a folder of images (25 a second).
        out: folder of the page, ``tokens.safetensors`` and ``features.safetensors``.
        context, horizon: frames that are given, and that are predicted.
        samples: futures; show: how many of them are decoded and drawn, the first ones.
        start: seconds of the first context frame; gap: seconds from one frame to the next.
        size: shorter side of the frames in pixels.
        seed: of the futures; future i is the same for any number of samples.
        dinov3, deltatok, deltaworld: weights, file or hub repository each; the released ones where None.
        rgb: an RGB head's weights; draws pixels beside the components.
        random: random weights of a small model instead, to try the command without a download.
        device: where to compute; None takes a GPU where there is one.
        log: quiet when False.
    """

    video: Path
    out: Path = Path("deltakern-rollout")
    context: int = 4
    horizon: int = 3
    samples: int = 20
    show: int = 6
    start: float = 0.0
    gap: float = 0.2
    size: int = 512
    seed: int = 0
    dinov3: str | None = None
    deltatok: str | None = None
    deltaworld: str | None = None
    rgb: str | None = None
    random: bool = False
    device: str | None = None
    log: bool = True

    def __post_init__(self) -> None:
        for name in ("context", "horizon", "samples", "show"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.gap <= 0:
            raise ValueError(f"--gap must be positive seconds, got {self.gap}")
        given = [f"--{name}" for name in ("dinov3", "deltatok", "deltaworld", "rgb") if getattr(self, name)]
        if self.random and given:
            raise ValueError(f"--random-weights comes without {', '.join(given)}")

    @property
    def place(self) -> torch.device:
        """Where to compute."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def weights(self) -> tuple[str, str, str]:
        """The weights of backbone, tokenizer and world model."""
        released = checkpoint.RELEASED
        return self.dinov3 or DEFAULT_WEIGHTS, self.deltatok or released["deltatok"], self.deltaworld or released["deltaworld"]


def load_world(settings: Settings) -> DeltaWorld:
    """The model of the weights named, or a small one of seeded random weights, frozen.

    Raises:
        FileNotFoundError, deltakern.models.checkpoint.CheckpointError: no such weights, or weights that do not fit together.
    """
    if settings.random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = DINOv3Config(hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, initializer_range=0.1)
            tokenizer = DeltaTok(DINOv3(config=config), 2, layer_scale_init=0.1, intermediate_size=384)
            sizes = {"predictor_hidden_size": 128, "predictor_num_hidden_layers": 2, "predictor_num_heads": 2}
            return freeze(DeltaWorld(tokenizer, **sizes, layer_scale_init=0.1).to(settings.place))
    dinov3, deltatok, deltaworld = settings.weights
    backbone = DINOv3.from_pretrained(dinov3)
    weights = checkpoint.read(deltatok)
    tokenizer = DeltaTok(backbone, **checkpoint.infer_deltatok_config(weights.state_dict))
    checkpoint.load_into(tokenizer, weights)
    weights = checkpoint.read(deltaworld)
    world = DeltaWorld(tokenizer, **checkpoint.infer_deltaworld_config(weights.state_dict))
    checkpoint.load_into(world, weights)
    return freeze(world.to(settings.place))


def read_frames(settings: Settings) -> tuple[Clip, torch.Tensor]:
    """The context's frames with as many of the predicted ones as the video has, and the times of all of them (C+h,) in seconds.

    Raises:
        deltakern.data.video.VideoError: the video does not even hold the context.
    """
    planned = settings.start + torch.arange(settings.context + settings.horizon, dtype=torch.float64) * settings.gap
    fps = 25.0 if settings.video.is_dir() else None
    for known in range(settings.horizon, -1, -1):
        try:
            clip = read_clip(settings.video, timestamps=planned[: settings.context + known], size=settings.size, fps=fps)
        except VideoError:
            if known == 0:
                raise
            continue
        break
    times = torch.cat((clip.timestamps, planned[len(clip.timestamps) :]))  # the frames' own times, where there are frames
    return clip, times


def pca_colours(known: torch.Tensor, grid: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from features (N,D) to a uint8 picture (3,h,w) of three principal components, fitted on ``known`` (F,N,D)."""
    rows = known.flatten(0, 1).double()
    middle = rows.mean(0)
    covariance = (rows - middle).T @ (rows - middle)
    axes = torch.linalg.eigh(covariance).eigenvectors[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # signs of their own, the same on any machine
    projected = (rows - middle) @ axes
    low, high = torch.quantile(projected[:: max(1, len(projected) // 100_000)], projected.new_tensor([0.02, 0.98]), dim=0)

    def colour(features: torch.Tensor) -> torch.Tensor:
        values = ((features.double() - middle) @ axes - low) / (high - low).clamp_min(1e-12)
        return (values.clamp(0, 1) * 255).round().to(torch.uint8).T.unflatten(1, grid)

    return colour


def save_futures(futures: Futures, times: torch.Tensor, out: Path, metadata: dict[str, str]) -> None:
    """``tokens.safetensors`` (tokens (S,h,D), context (C,D), timestamps (C+h,)) and ``features.safetensors`` (features (K,h,N,D),
    indices (K,), last (N,D)); each is complete or absent, see ``checkpoint.save``."""
    tokens = {"tokens": futures.tokens[0], "context": futures.context[0], "timestamps": times}
    features = {"features": futures.features[0], "indices": futures.indices[0], "last": futures.last[0]}
    checkpoint.save(tokens, out / "tokens.safetensors", metadata=metadata)
    checkpoint.save(features, out / "features.safetensors", metadata=metadata)


def _small(frame: torch.Tensor) -> torch.Tensor:
    """A uint8 frame (3,H,W) shrunk for the page."""
    scale = PICTURE / min(frame.shape[1:])
    if scale >= 1:
        return frame
    size = [round(n * scale) for n in frame.shape[1:]]
    return torch.nn.functional.interpolate(frame[None], size, mode="bicubic", antialias=True, align_corners=False)[0]


def make_page(
    settings: Settings,
    clip: Clip,
    times: torch.Tensor,
    futures: Futures,
    features: torch.Tensor,
    patch: int,
    rgb: Callable[[torch.Tensor], torch.Tensor] | None,
) -> html.Page:
    """The page: context, truth where the clip has it, and a grid of futures.

    Args:
        features: (F,N,D) of the clip's frames: the context, then those of the predicted that it has.
        patch: pixels of a patch's side.
        rgb: features (F,N,D) to uint8 pictures (F,3,H,W), where a head is given.
    """
    height, width = futures.size
    colour = pca_colours(features, (height // patch, width // patch))
    labels = [f"{t:.2f} s" for t in times.tolist()]
    count = settings.context
    context, truth = features[:count], features[count:]
    weights = (
        "Random weights: the pictures show that the command works and nothing else."
        if settings.random
        else f"Weights: {', '.join(settings.weights)}."
    )
    shown = futures.features[0]
    page = html.Page(
        "deltakern rollout",
        f"{settings.samples} futures of {settings.horizon} frames after {count} of {settings.video.name}, {width}x{height} pixels, "
        f"seed {settings.seed}; the first {len(shown)} are decoded. {weights}",
    )
    frames = [html.picture(_small(x), t) for x, t in zip(clip.frames, labels, strict=False)]
    columns = max(count, settings.horizon)
    page.section("Context", html.row(frames[:count], "Frames", columns=columns))
    maps = [html.picture(colour(x), t, pixels=True) for x, t in zip(context, labels, strict=False)]
    fitted = "context and truth" if len(truth) else "context"
    page.add(html.row(maps, f"Features: the first three principal components of {fitted} as red, green and blue", columns=columns))
    if len(truth):
        page.section("Truth", html.row(frames[count:], "Frames", columns=columns))
        maps = [html.picture(colour(x), t, pixels=True) for x, t in zip(truth, labels[count:], strict=False)]
        page.add(html.row(maps, "Features", columns=columns))
    drawn = []
    for index, future in zip(futures.indices[0].tolist(), shown, strict=True):
        maps = [html.picture(colour(x), t, pixels=True) for x, t in zip(future, labels[count:], strict=True)]
        rows = [html.row(maps)]
        if rgb is not None:
            rows.append(html.row([html.picture(_small(x)) for x in rgb(future)]))
        drawn.append(html.card(f"Future {index}", *rows))
    page.section("Futures", html.cards(drawn))
    return page


@contextmanager
def _bar(console: Any, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; the function given moves it to the next stage, which it names."""
    rich = require("rich.progress", "demo", "the progress bar")
    columns = (rich.TextColumn("{task.description:<24}"), rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn())
    with rich.Progress(*columns, console=console) as progress:
        task, started = progress.add_task("", total=total), False

        def stage(name: str) -> None:
            nonlocal started
            progress.update(task, description=name, advance=1 if started else 0)
            started = True

        yield stage
        progress.update(task, description="done", completed=total)


def run(settings: Settings) -> Futures:
    """Reads, samples, decodes, saves, draws; returns the futures."""
    require("PIL", "demo", "the page's pictures")
    console = require("rich.console", "demo", "the progress bar").Console(quiet=not settings.log, soft_wrap=True)
    clip, times = read_frames(settings)
    show = min(settings.show, settings.samples)
    count = settings.context
    with _bar(console, 2 + len(clip.frames) + show + 1) as stage, torch.no_grad():
        stage("loading weights")
        world = load_world(settings)
        tokenizer, patch = world.tokenizer, world.backbone.patch_size
        head = None
        if settings.rgb is not None:
            norm = world.backbone.backbone.norm
            head = RGBHead.from_checkpoint(settings.rgb, norm.weight, norm.bias, *vars(world.backbone.processor).values())
            head = head.to(settings.place)
        frames = clip.frames[None].to(settings.place)
        features = []
        for i in range(frames.shape[1]):
            stage(f"features of frame {i}")
            features.append(tokenizer.features(frames[:, i : i + 1]))
        features, size = torch.cat(features, 1), tuple(frames.shape[-2:])
        stage("sampling")
        context = tokenizer.tokenize_offline(tokenizer.black_features(frames), features[:, :count], tokenizer._rope(frames)).squeeze(2)
        # Relative to the first frame: attention sees differences alone, and float32 then holds them
        relative = (times - times[0]).to(settings.place, torch.float32)[None]
        seed = settings.seed if world.use_bom else None
        tokens, last = world.sample(context, relative, settings.horizon, settings.samples, seed=seed), features[:, count - 1]
        decoded = []
        for index in range(show):
            stage(f"decoding future {index}")
            decoded.append(world.decode(tokens, last, index, size=size))
        indices = torch.arange(show, device=tokens.device)[None]
        futures = Futures(tokens, torch.cat(decoded, 1), relative[:, count:], indices, context, last, size)
        stage("page")
        draw = None
        if head is not None:

            def draw(maps: torch.Tensor) -> torch.Tensor:
                rows, columns = (n // patch for n in size)
                pixels = torch.cat([head(feature_map(x.to(settings.place), rows, columns)) for x in maps])
                return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()

        futures = Futures(*(v.cpu() if isinstance(v, torch.Tensor) else v for v in vars(futures).values()))
        settings.out.mkdir(parents=True, exist_ok=True)
        weights = "random" if settings.random else ", ".join(settings.weights)
        metadata = {"video": settings.video.name, "seed": str(settings.seed), "weights": weights}
        save_futures(futures, times, settings.out, metadata)
        page = make_page(settings, clip, times, futures, features[0].cpu(), patch, draw)
        written = page.write(settings.out / "index.html")
    console.print(f"{written}, {settings.out / 'tokens.safetensors'}, {settings.out / 'features.safetensors'}", highlight=False)
    return futures
