"""The stages of the models, each in several implementations on the same weights, inputs and noise.

Baselines are the release's structure in eager and under torch.compile. It lives in the repository, in
``benchmarks/release_structure.py``, not in the installed package; without a source checkout the baselines are left out, and
whoever reads the result is told.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import deltakern
from deltakern import backend
from deltakern.report import flops
from deltakern.report.latency import Call

RELEASE, RELEASE_COMPILED = "release (eager)", "release (torch.compile)"
REFERENCE, OURS, OURS_COMPILED = "deltakern (reference ops)", "deltakern", "deltakern (torch.compile)"
LIVE, ONE_FUTURE = "deltakern, live weights", "deltakern, one future decoded"
IMPLEMENTATIONS = (RELEASE, RELEASE_COMPILED, REFERENCE, OURS, LIVE, OURS_COMPILED, ONE_FUTURE)
"""OURS and what derives from it run inference with frozen weights, everything else with live ones."""
RELEASE_BLOCKS = "release (torch.compile, by block)"
"""Of a training step, where it is asked for: the whole takes minutes to compile on a GPU."""
BASELINES = (RELEASE, RELEASE_COMPILED, RELEASE_BLOCKS)
CONTEXT, HORIZON = 4, 3


@dataclass(frozen=True)
class Preset:
    """Sizes of the models and of the clip."""

    name: str
    pixels: int
    sizes: flops.Sizes
    samples: int = 20
    candidates: int = 256
    clip: int = 8


_TINY = flops.Sizes(
    hidden=128,
    heads=2,
    backbone_layers=2,
    backbone_mlp=512,
    tokenizer_layers=2,
    tokenizer_mlp=512,
    predictor_hidden=128,
    predictor_layers=2,
)
PRESETS = {
    "tiny": Preset("tiny", 128, _TINY),
    "vitb-256": Preset("vitb-256", 256, flops.RELEASED),
    "vitb-512": Preset("vitb-512", 512, flops.RELEASED),
}


@functools.cache
def release_structure() -> ModuleType | None:
    """The baseline's module from the source tree around the package, or None."""
    path = Path(deltakern.__file__).resolve().parents[1] / "benchmarks" / "release_structure.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("deltakern_release_structure", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile imports the modules of what it traces by name
    spec.loader.exec_module(module)
    return module


@dataclass
class Stage:
    """One stage: what each implementation calls, and the FLOPs that each of them does in closed form.

    ``calls`` return the tensor by which implementations are compared; a training step returns its loss. ``part`` takes, for an
    implementation that computes less, what it computes out of the others' tensor.
    """

    name: str
    calls: dict[str, Call]
    flops: dict[str, int]
    shape: dict[str, Any] = field(default_factory=dict)
    part: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)


def kernels_differ(device: torch.device) -> bool:
    """Whether any op has a kernel that ``impl="auto"`` takes on this device; else the reference is all there is."""
    facts = backend.Facts(device.type, (torch.float32,))
    return any(
        rule(facts) is None
        for op in backend.ops().values()
        for name, rule in op.kernels.items()
        if name in {"cuda": ("triton", "cuda"), "cpu": ("cpp",)}.get(device.type, ())
    )


class Models:
    """Both models of a preset with the same random weights, and the inputs of every stage.

    ``batch`` clips go through the stages that train or encode; those of a forecast take one clip.
    """

    def __init__(self, preset: Preset, device: torch.device, *, autocast: torch.dtype | None = None, batch: int = 1, seed: int = 0) -> None:
        self.preset, self.device, self.autocast, self.batch = preset, device, autocast, batch
        sizes = preset.sizes
        torch.manual_seed(seed)
        config = deltakern.models.DINOv3Config(
            hidden_size=sizes.hidden,
            num_hidden_layers=sizes.backbone_layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.backbone_mlp,
            patch_size=sizes.patch,
            num_register_tokens=sizes.registers,
        )
        tokenizer = {
            "num_hidden_layers": sizes.tokenizer_layers,
            "intermediate_size": sizes.tokenizer_mlp,
            "layer_scale_init": 0.1,  # at the release's 1e-5 blocks would hardly change what they are given
            "use_rope_aug": False,
        }
        predictor = {
            "predictor_hidden_size": sizes.predictor_hidden,
            "predictor_num_hidden_layers": sizes.predictor_layers,
            "predictor_num_heads": sizes.predictor_hidden // 64,
            "num_samples_train": preset.candidates,
            "num_samples_eval": preset.samples,
            "layer_scale_init": 0.1,
        }
        with torch.device(device):
            ours = deltakern.DINOv3(config=config)
            self.ours = deltakern.DeltaWorld(deltakern.DeltaTok(ours, **tokenizer), **predictor)
        self.release = None
        self.module = release_structure()
        if self.module is not None:
            backbone = {k: v for k, v in vars(config).items() if k in ("hidden_size", "num_hidden_layers", "intermediate_size")}
            with torch.device(device):
                theirs = self.module.DINOv3(**backbone, num_heads=sizes.heads, patch_size=sizes.patch, num_register_tokens=sizes.registers)
                self.release = self.module.DeltaWorld(self.module.DeltaTok(theirs, **tokenizer), **predictor)
            self.release.load_state_dict(self.ours.state_dict())
            self.release.eval()
        self.ours.eval()
        self.frozen = deltakern.freeze(copy.deepcopy(self.ours))
        generator = torch.Generator().manual_seed(seed)
        frames = torch.randint(0, 256, (batch, preset.clip, 3, preset.pixels, preset.pixels), generator=generator, dtype=torch.uint8)
        self.frames = frames.to(device)
        self.times = (torch.arange(preset.clip) * 0.2).repeat(batch, 1).to(device)
        width = sizes.predictor_hidden
        self.noise = (torch.randn(1, preset.samples, HORIZON, width, generator=generator) * 0.02).to(device)
        self.candidates = (torch.randn(batch, preset.clip - 1, preset.candidates, width, generator=generator) * 0.02).to(device)
        with torch.no_grad(), self.precision():
            self.features = self.ours.backbone(self.frames[:, :2]).float()
            self.rope = self.ours.tokenizer._rope(self.frames)
            self.token = self.ours.tokenizer.encode(self.features[:, 0], self.features[:, 1], self.rope).float()
        self.tokens = torch.randn(batch, preset.clip, sizes.hidden, generator=generator).to(device)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast where the run asks for it."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()

    def compiled_release(self) -> Any:
        """The release's structure with its methods compiled, on the same parameters."""
        twin = copy.deepcopy(self.release, memo={id(p): p for p in self.release.parameters()})
        twin.backbone.compile()
        twin.tokenizer.encode = torch.compile(twin.tokenizer.encode)
        twin.tokenizer.decode = torch.compile(twin.tokenizer.decode)
        twin.predictor.compile()
        return twin

    def _call(self, function: Callable[[], torch.Tensor], *, impl: str | None = None, grad: bool = False) -> Call:
        """``function`` as it is timed: precision, gradient mode, and for the reference rows the forced implementation."""

        def run() -> torch.Tensor:
            forced = backend.use_impl(impl) if impl else contextlib.nullcontext()
            with forced, torch.set_grad_enabled(grad), self.precision():
                return function()

        return run

    def _calls(
        self,
        release: Callable[[Any], torch.Tensor],
        ours: Callable[[Any], torch.Tensor],
        *,
        wanted: tuple[str, ...],
        twin: Any = None,
        live: bool = False,
    ) -> dict[str, Call]:
        """``live``: a stage of training, whose weights are never frozen."""
        calls, inference = {}, self.ours if live else self.frozen
        if self.release is not None:
            calls[RELEASE] = self._call(lambda: release(self.release))
            if twin is not None:
                calls[RELEASE_COMPILED] = self._call(lambda: release(twin))
        if kernels_differ(self.device):
            calls[REFERENCE] = self._call(lambda: ours(inference), impl="reference")
        calls[OURS] = self._call(lambda: ours(inference))
        if not live:
            calls[LIVE] = self._call(lambda: ours(self.ours))
        if OURS_COMPILED in wanted:
            compiled = torch.compile(lambda: ours(self.ours))
            calls[OURS_COMPILED] = self._call(compiled)
        return {name: call for name, call in calls.items() if name in wanted}

    def _stage(
        self,
        name: str,
        release: Callable[[Any], torch.Tensor],
        ours: Callable[[Any], torch.Tensor],
        counts: tuple[int, int],
        wanted: tuple[str, ...],
        twin: Any,
        live: bool,
        **shape: Any,
    ) -> Stage:
        calls = self._calls(release, ours, wanted=wanted, twin=twin, live=live)
        return Stage(name, calls, {impl: counts[0] if impl in BASELINES else counts[1] for impl in calls}, shape)

    def _training(
        self,
        name: str,
        part: Callable[[Any], nn.Module],
        loss: Callable[[Any], torch.Tensor],
        counts: tuple[int, int],
        wanted: tuple[str, ...],
        **shape: Any,
    ) -> Stage:
        """A step with gradient, clipping and AdamW, on copies, so that no stage sees the weights of another's training.

        ``part`` sets a world to training and returns the module whose parameters learn.
        """
        calls: dict[str, Call] = {}

        def add(impl: str, world: Any, *, compiled: bool = False, by_block: bool = False, forced: str | None = None) -> None:
            if impl not in wanted:
                return
            world = copy.deepcopy(world)
            learning = part(world).requires_grad_(True)
            world.backbone.requires_grad_(False)
            parameters = [p for p in learning.parameters() if p.requires_grad]
            capturable = self.device.type == "cuda"  # so that a graph of the whole step can be replayed
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2, capturable=capturable)
            for module in world.modules() if by_block else ():
                if isinstance(module, (self.module.Block, self.module.PredictorBlock)):
                    module.compile()
            forward = torch.compile(lambda: loss(world)) if compiled else lambda: loss(world)

            def step() -> torch.Tensor:
                value = forward()
                value.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                return value.detach()

            calls[impl] = self._call(step, impl=forced, grad=True)

        if self.release is not None:
            add(RELEASE, self.release)
            add(RELEASE_COMPILED, self.release, compiled=True)
            add(RELEASE_BLOCKS, self.release, by_block=True)
        if kernels_differ(self.device):
            add(REFERENCE, self.ours, forced="reference")
        add(OURS, self.ours)
        add(OURS_COMPILED, self.ours, compiled=True)
        return Stage(name, calls, {impl: counts[0] if impl in BASELINES else counts[1] for impl in calls}, shape)

    def stages(self, wanted: tuple[str, ...] = IMPLEMENTATIONS, names: tuple[str, ...] = ()) -> Iterator[Stage]:
        """The stages in order, each built when it is asked for; ``names`` restricts them."""
        twin = self.compiled_release() if RELEASE_COMPILED in wanted and self.release is not None else None
        for name, build in self._builders(wanted, twin):
            if not names or name in names:
                yield build()

    def _builders(self, wanted: tuple[str, ...], twin: Any) -> list[tuple[str, Callable[[], Stage]]]:
        preset, sizes = self.preset, self.preset.sizes
        at = (preset.pixels, preset.pixels, sizes)
        now = self.frames[:, :1]
        x, y, rope, token = self.features[:, 0], self.features[:, 1], self.rope, self.token
        context, times, ahead_times = self.tokens[:1, :CONTEXT], self.times, self.times[:1]
        seen = CONTEXT + HORIZON
        smooth = nn.SmoothL1Loss(reduction="none", beta=0.1)
        elementwise = self.module.smooth_l1 if self.module else None
        log_cosh = self.module.log_cosh if self.module else None

        def plain(name, release, ours, counts, live=False, **shape):
            return name, lambda: self._stage(name, release, ours, counts, wanted, twin, live, **shape)

        def batched(name, release, ours, counts, **shape):
            return plain(name, release, ours, tuple(self.batch * c for c in counts), batch=self.batch, **shape)

        def training(name, part, loss, counts, **shape):
            counts = tuple(self.batch * c for c in counts)
            return name, lambda: self._training(name, part, loss, counts, wanted, batch=self.batch, **shape)

        def is_release(world: Any) -> bool:
            return self.module is not None and isinstance(world, self.module.DeltaWorld)

        def tokenizer_loss(world: Any) -> torch.Tensor:
            prediction, target = world.tokenizer(self.frames[:, :2])
            with torch.autocast(self.device.type, enabled=False):
                prediction, target = prediction.float(), target.float()
                return log_cosh(prediction, target).mean() if is_release(world) else deltakern.ops.recon_loss(prediction, target)

        def world_loss(world: Any) -> torch.Tensor:
            criterion = elementwise if is_release(world) else smooth
            prediction, target = world(self.frames, times, criterion, queries=self.candidates)
            with torch.autocast(self.device.type, enabled=False):
                return smooth(prediction.float(), target.float()).mean()

        def token_loss(world: Any) -> torch.Tensor:
            criterion = elementwise if is_release(world) else smooth
            prediction, target = world.train_on_tokens(self.tokens, times, criterion, queries=self.candidates)[:2]
            with torch.autocast(self.device.type, enabled=False):
                return smooth(prediction.float(), target.float()).mean()

        def search(world: Any) -> torch.Tensor:
            """The winners' losses: where two candidates are as good but for rounding, either may win, with another prediction."""
            criterion = elementwise if is_release(world) else smooth
            prediction, target = world.train_on_tokens(self.tokens, times, criterion, queries=self.candidates)[:2]
            return smooth(prediction.float(), target.float()).mean(-1)

        searched = flops.candidates(sizes, frames=preset.clip, count=preset.candidates) + flops.predictor(
            preset.clip - 1, preset.clip - 1, sizes
        )
        encoded = (flops.encode(*at), flops.encode(*at, last_block="folded"))
        one = {"context": CONTEXT, "horizon": 1, "samples": preset.samples}
        all_steps = {**one, "horizon": HORIZON}
        ahead = {"context": CONTEXT, "samples": preset.samples}
        from_video = {"frames": preset.clip, "count": preset.candidates}
        unseen = HORIZON * (flops.backbone(*at) + flops.encode(*at)) + flops.backbone(*at)  # the release's rollout does these too
        return [
            batched("backbone", lambda w: w.backbone(now), lambda w: w.backbone(now), (flops.backbone(*at),) * 2),
            batched("encode", lambda w: w.tokenizer.encode(x, y, rope), lambda w: w.tokenizer.encode(x, y, rope), encoded),
            batched(
                "decode",
                lambda w: w.tokenizer.decode(token, x, rope),
                lambda w: w.tokenizer.decode(token, x, rope),
                (flops.decode(*at),) * 2,
            ),
            plain(
                "predictor step",
                lambda w: w.sample(context, ahead_times, 1, self.noise[:, :, :1]),
                lambda w: w.sample(context, ahead_times[:, : CONTEXT + 1], 1, preset.samples, queries=self.noise[:, :, :1]),
                (flops.sample(sizes, **ahead, horizon=1, cached=False), flops.sample(sizes, **ahead, horizon=1)),
                **one,
            ),
            batched("candidate search", search, search, (searched, searched), live=True, frames=preset.clip, candidates=preset.candidates),
            plain(
                "token-space sample",
                lambda w: w.sample(context, ahead_times, HORIZON, self.noise),
                lambda w: w.sample(context, ahead_times[:, :seen], HORIZON, preset.samples, queries=self.noise),
                (flops.sample(sizes, **ahead, horizon=HORIZON, cached=False), flops.sample(sizes, **ahead, horizon=HORIZON)),
                **all_steps,
            ),
            ("rollout", lambda: self._rollout(wanted, twin, at, unseen, seen, all_steps)),
            ("streamed frame", lambda: self._push(wanted, at)),
            training(
                "DeltaTok training step",
                lambda w: w.tokenizer.train(),
                tokenizer_loss,
                (flops.deltatok_training(*at), flops.deltatok_training(*at, last_block="folded")),
                frames=2,
            ),
            training(
                "DeltaWorld training step",
                lambda w: w.train().predictor,
                world_loss,
                (
                    flops.deltaworld_training(*at, **from_video),
                    flops.deltaworld_training(*at, **from_video, last_block="folded", black_frame=False),
                ),
                frames=preset.clip,
                candidates=preset.candidates,
            ),
            training(
                "DeltaWorld training step, stored tokens",
                lambda w: w.train().predictor,
                token_loss,
                (flops.deltaworld_training(*at, **from_video, from_tokens=True),) * 2,
                frames=preset.clip,
                candidates=preset.candidates,
            ),
        ]

    def _rollout(self, wanted: tuple[str, ...], twin: Any, at: Any, unseen: int, seen: int, shape: dict[str, int]) -> Stage:
        """The forecast of the paper's table, and beside it the one that decodes a single future."""
        preset = self.preset
        frames, times = self.frames[:1, :seen], self.times[:1, :seen]
        ours = {"queries": self.noise}
        calls = self._calls(
            lambda w: w.rollout(frames, times, CONTEXT, self.noise)[0],
            lambda w: w.rollout(frames[:, :CONTEXT], times, HORIZON, preset.samples, decode="all", **ours).features,
            wanted=tuple(w for w in wanted if w != OURS_COMPILED),  # a loop over steps of growing length: nothing to compile as one
            twin=twin,
        )
        if ONE_FUTURE in wanted:
            calls[ONE_FUTURE] = self._call(
                lambda: self.frozen.rollout(frames[:, :CONTEXT], times, HORIZON, preset.samples, decode=[0], **ours).features
            )
        every = {"context": CONTEXT, "horizon": HORIZON, "samples": preset.samples}
        release = flops.rollout(*at, **every) + unseen
        saved = flops.rollout(*at, **every, cached=True, last_block="folded")
        single = flops.rollout(*at, **every, cached=True, last_block="folded", decoded=HORIZON)
        counts = {RELEASE: release, RELEASE_COMPILED: release, ONE_FUTURE: single}
        return Stage("rollout", calls, {impl: counts.get(impl, saved) for impl in calls}, shape, {ONE_FUTURE: lambda every: every[:, :1]})

    def _push(self, wanted: tuple[str, ...], at: Any) -> Stage:
        """One frame of a camera: a backbone pass, an encode, the window's caches rolled on. The release has nothing like it."""
        calls = {}
        if OURS in wanted:
            stream, clock = self.frozen.stream(CONTEXT), itertools.count()
            frame = self.frames[0, 0]
            calls[OURS] = self._call(lambda: stream.push(frame, 0.2 * next(clock)))
        return Stage("streamed frame", calls, dict.fromkeys(calls, flops.backbone(*at) + flops.encode(*at, last_block="folded")))


STAGES = (
    "backbone",
    "encode",
    "decode",
    "predictor step",
    "candidate search",
    "token-space sample",
    "rollout",
    "streamed frame",
    "DeltaTok training step",
    "DeltaWorld training step",
    "DeltaWorld training step, stored tokens",
)
"""Names of the stages, in the order in which they run."""
