"""deltakern inside a Lightning training module of the released shape: same curve, same checkpoints, interchange in the middle of a run.

The module below asks of its network what the released training code asks: a call with (frames, timestamps, criterion) in training,
``horizon=`` or ``ctx_len=`` in evaluation, the backbone's norm and pixel statistics, the optimizer's two groups by sorted names, a
``load_sd`` that copies what fits and insists on everything trained, and checkpoints that hold the trained part of the network alone.
It is trained once with deltakern's models and once with the release's structure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason='needs Lightning: pip install "deltakern[lightning]"')

import lightning
import stored
from compare import relative_rmse
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import deltakern
from benchmarks import release_structure
from deltakern.models import checkpoint
from deltakern.models.dinov3 import DINOv3Config

WIDTH, HEADS, LAYERS = 32, 1, 1


class Ours:
    """deltakern's models."""

    @staticmethod
    def backbone() -> nn.Module:
        config = DINOv3Config(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=64)
        return deltakern.DINOv3(config=config)

    @staticmethod
    def tok(backbone: nn.Module) -> nn.Module:
        return deltakern.DeltaTok(backbone, num_hidden_layers=LAYERS, intermediate_size=48, layer_scale_init=0.5)

    @staticmethod
    def world(tok: nn.Module) -> nn.Module:
        return deltakern.DeltaWorld(
            tok,
            rope_axis_sizes=(12,),
            predictor_hidden_size=WIDTH,
            predictor_num_hidden_layers=2,
            predictor_num_heads=2,
            num_samples_train=4,
            num_samples_eval=3,
            layer_scale_init=0.5,
            mlp_ratio=2,
        )


class _Processor:
    image_mean, image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PlainTok(release_structure.DeltaTok):
    """With the calls of evaluation that the trainer makes."""

    def forward(self, frames: torch.Tensor, *_: Any, horizon: int | None = None):
        if self.training:
            return super().forward(frames)
        y, rope = self.backbone(frames), self._rope(frames)
        x, start, predictions = y[:, -horizon - 1], y.shape[1] - horizon, []
        for t in range(start, y.shape[1]):
            x = self.decode(self.encode(x, y[:, t], rope), x, rope)
            predictions.append(x)
        return torch.stack(predictions, 1), y[:, start:], y[:, :start]


class PlainWorld(release_structure.DeltaWorld):
    """With the calls of evaluation that the trainer makes."""

    def forward(self, frames, timestamps, criterion=release_structure.smooth_l1, ctx_len: int | None = None):
        if self.training:
            return super().forward(frames, timestamps, criterion)
        y = self.backbone(frames)
        return self.rollout(frames, timestamps, ctx_len)[0], y[:, ctx_len:], y[:, :ctx_len]


class Release:
    """The release's structure in plain PyTorch, with the same parameters."""

    @staticmethod
    def backbone() -> nn.Module:
        made = release_structure.DINOv3(WIDTH, LAYERS, HEADS, 64)
        made.processor = _Processor()
        return made

    @staticmethod
    def tok(backbone: nn.Module) -> nn.Module:
        return PlainTok(backbone, LAYERS, intermediate_size=48, layer_scale_init=0.5)

    @staticmethod
    def world(tok: nn.Module) -> nn.Module:
        return PlainWorld(tok, (12,), WIDTH, 2, 2, 4, 3, 0.5, 2)


class Released(lightning.LightningModule):
    """A training module of the released shape (DeltaTok's with ``horizons``, the world models' with ``ctx_len``)."""

    def __init__(
        self,
        network: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup: int = 2,
        ctx_len: int | None = None,
        horizons: tuple[int, ...] = (1, 3),
        use_compile: bool = False,
        ckpt_path: str | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.lr, self.weight_decay, self.warmup, self.ctx_len, self.horizons = lr, weight_decay, warmup, ctx_len, horizons
        self.use_compile = use_compile
        self.criterion = LogCoshLoss() if ctx_len is None else nn.SmoothL1Loss(reduction="none", beta=0.1)
        backbone = network.backbone
        self.head_arguments = (
            backbone.backbone.norm.weight,
            backbone.backbone.norm.bias,
            backbone.processor.image_mean,
            backbone.hidden_size,
        )
        if ckpt_path:
            load_sd(network, torch.load(ckpt_path, weights_only=True))

    def setup(self, stage: str) -> None:
        if self.use_compile:
            self.network = torch.compile(self.network, backend="eager")

    def configure_optimizers(self) -> dict[str, Any]:
        decay = {
            f"{n}.weight": m.weight
            for n, m in self.network.named_modules()
            if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.requires_grad
        }
        rest = {n: p for n, p in self.network.named_parameters() if p.requires_grad and n not in decay}
        groups = [{"params": [d[k] for k in sorted(d)], "weight_decay": w} for d, w in ((decay, self.weight_decay), (rest, 0.0))]
        optimizer = torch.optim.AdamW(groups, self.lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: min(1.0, self.trainer.global_step / self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: tuple[torch.Tensor, ...], _: int) -> torch.Tensor:
        prediction, target = self.network(*batch, self.criterion)
        with torch.autocast("cpu", enabled=False):
            loss = self.criterion(prediction.float(), target.detach().float()).mean()
        self.log("losses/train", loss)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, ...], _: int) -> None:
        frames, timestamps = batch
        losses = []
        for horizon in self.horizons:
            if self.ctx_len is None:
                prediction, target, context = self.network(frames, horizon=horizon)
                assert context.shape[1] == frames.shape[1] - horizon
            else:
                length = self.ctx_len + horizon
                futures, target, context = self.network(frames[:, -length:], timestamps[:, -length:], ctx_len=self.ctx_len)
                assert futures.shape[1] == 3
                prediction = futures.mean(1)
                last = self.criterion(futures[:, :, -1], target[:, -1].unsqueeze(1).expand_as(futures[:, :, -1])).mean((-2, -1))
                best = futures[torch.arange(len(futures)), last.argmin(1)]
                self.log(f"losses/h{horizon}_best", self.criterion(best, target).mean())
            losses.append(self.criterion(prediction, target).mean())
        self.log("losses/val", sum(losses) / len(losses))

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = False):
        return load_sd(self.network, state_dict)

    def on_load_checkpoint(self, saved: dict[str, Any]) -> None:
        saved["lr_schedulers"] = []

    def on_save_checkpoint(self, saved: dict[str, Any]) -> None:
        network = getattr(self.network, "_orig_mod", self.network)
        saved["state_dict"] = {
            k: v
            for k, v in network.state_dict().items()
            if any(p.requires_grad for p in network.get_submodule(k.rpartition(".")[0]).parameters())
        }


class LogCoshLoss(nn.Module):
    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return release_structure.log_cosh(prediction, target)


def load_sd(module: nn.Module, state_dict: dict[str, Any]):
    """Copies the tensors that fit; everything that trains must be among them."""
    state_dict = state_dict.get("state_dict", state_dict)
    module = getattr(module, "_orig_mod", module)
    own = module.state_dict()
    used = {k: v for k, v in state_dict.items() if k in own and v.shape == own[k].shape}
    missing = [n for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad and n not in used]
    assert not missing, missing
    return module.load_state_dict(used, strict=False)


class Clips(torch.utils.data.Dataset):
    """Seeded clips of 7 frames, of which DeltaTok's training takes 2."""

    def __init__(self, count: int, frames: int) -> None:
        g = torch.Generator().manual_seed(3)
        self.frames = torch.randint(0, 256, (count, frames, 3, 32, 32), generator=g, dtype=torch.uint8)
        self.times = (torch.rand(count, frames, generator=g) * 0.3 + 0.04).cumsum(1)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.frames[index], self.times[index]


class Curve(Callback):
    """The losses of a run; every step's random numbers are seeded, so that a resumed run draws what the whole one drew."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validation: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer, *_: Any) -> None:
        torch.manual_seed(trainer.global_step)

    def on_validation_start(self, trainer, *_: Any) -> None:
        torch.manual_seed(100 + trainer.global_step)

    def on_train_batch_end(self, trainer, module, outputs, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())

    def on_validation_epoch_end(self, trainer, *_: Any) -> None:
        self.validation.append({k: v.item() for k, v in trainer.callback_metrics.items() if k != "losses/train"})


def build(family: type, kind: str, **kwargs: Any) -> Released:
    """The module of a family, with the weights that deltakern's seed gives."""
    torch.manual_seed(0)
    tok = Ours.tok(Ours.backbone())
    source = Ours.world(tok) if kind == "world" else tok
    network = family.tok(family.backbone())
    network = family.world(network) if kind == "world" else network
    network.load_state_dict(source.state_dict())
    return Released(network, ctx_len=4 if kind == "world" else None, **kwargs)


def fit(module: Released, folder: Path, steps: int, *, precision: str = "32-true", resume: Path | None = None) -> Curve:
    """Trains to ``steps`` on clips in a fixed order, validates twice, saves ``last.ckpt`` every two steps."""
    curve = Curve()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        precision=precision,
        callbacks=[curve, ModelCheckpoint(folder, every_n_train_steps=2, save_last=True, save_top_k=0, enable_version_counter=False)],
        logger=False,
        check_val_every_n_epoch=None,
        val_check_interval=2,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1e-2 if module.ctx_len is None else None,
    )
    frames = 2 if module.ctx_len is None else 8
    done = 0 if resume is None else torch.load(resume, weights_only=False)["global_step"]
    data = torch.utils.data.Subset(Clips(24, frames), range(2 * done, 24)) if resume is not None else Clips(24, frames)
    loaders = torch.utils.data.DataLoader(data, 2), torch.utils.data.DataLoader(Clips(2, 7), 2)
    trusting = {"weights_only": False} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
    trainer.fit(module, *loaders, ckpt_path=resume, **trusting)
    return curve


@pytest.fixture(autouse=True)
def quiet_single_thread():
    """Tiny tensors: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


pytestmark = pytest.mark.filterwarnings("ignore:.*")
KINDS = ("tok", "world")


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_order_are_the_releases(kind):
    ours, release = build(Ours, kind).network, build(Release, kind).network
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in release.named_parameters()]
    assert ours.state_dict().keys() == release.state_dict().keys()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_and_data_give_the_same_curve(kind, precision, tmp_path):
    ours = fit(build(Ours, kind), tmp_path / "ours", 6, precision=precision)
    release = fit(build(Release, kind), tmp_path / "release", 6, precision=precision)
    rounding = 1e-4 if precision == "32-true" else 2**-8 * 4
    assert len(ours.losses) == 6
    assert ours.losses == pytest.approx(release.losses, rel=rounding)
    assert len(set(ours.losses)) == 6
    assert len(ours.validation) == len(release.validation) == 3
    for one, other in zip(ours.validation, release.validation, strict=True):
        assert one == pytest.approx(other, rel=rounding)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_training_is_the_plain_one(kind, precision, tmp_path):
    plain = fit(build(Ours, kind, horizons=(1,)), tmp_path / "plain", 2, precision=precision)
    compiled = fit(build(Ours, kind, horizons=(1,), use_compile=True), tmp_path / "compiled", 2, precision=precision)
    rounding = 1e-5 if precision == "32-true" else 2**-8 * 4
    assert compiled.losses == pytest.approx(plain.losses, rel=rounding)
    assert compiled.validation[0] == pytest.approx(plain.validation[0], rel=rounding)
    one, other = (torch.load(tmp_path / n / "last.ckpt", weights_only=False)["state_dict"] for n in ("plain", "compiled"))
    assert one.keys() == other.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_network_takes_other_sizes(kind):
    """Such as an epoch's last batch: torch.compile makes sizes that change dynamic."""
    torch._dynamo.reset()
    module = build(Ours, kind)
    network = module.network.train()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    frames, times = Clips(3, 8)[:]
    for batch, total in ((2, 8), (3, 6)):
        found = []
        for call in (network, compiled):
            torch.manual_seed(7)
            found.append(call(frames[:batch, :total], times[:batch, :total], module.criterion)[0])
        assert relative_rmse(*found) < 1e-5, (batch, total)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_run_goes_on_where_the_releases_stopped(kind, tmp_path):
    whole = fit(build(Release, kind, horizons=(1,)), tmp_path / "whole", 4)
    fit(build(Release, kind, horizons=(1,)), tmp_path / "pieces", 2)
    rest = fit(build(Ours, kind, horizons=(1,), use_compile=True), tmp_path / "pieces", 4, resume=tmp_path / "pieces/last.ckpt")
    assert rest.losses == pytest.approx(whole.losses[2:], rel=1e-4)


@pytest.mark.parametrize(("first", "second"), [(Ours, Ours), (Ours, Release), (Release, Ours)], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_by_either(kind, first, second, tmp_path):
    """Four steps, then two by the other one: the curve of six steps, optimizer state included."""
    whole = fit(build(second, kind), tmp_path / "whole", 6)
    fit(build(first, kind), tmp_path / "pieces", 4)
    rest = fit(build(second, kind), tmp_path / "pieces", 6, resume=tmp_path / "pieces/last.ckpt")
    assert rest.losses == pytest.approx(whole.losses[4:], rel=1e-4)
    one, other = (torch.load(tmp_path / n / "last.ckpt", weights_only=False) for n in ("whole", "pieces"))
    assert list(one["state_dict"]) == list(other["state_dict"])
    states = [saved["optimizer_states"][0] for saved in (one, other)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for i, state in states[0]["state"].items():
        assert state["step"] == states[1]["state"][i]["step"] == 6
        assert state["exp_avg"].shape == states[1]["state"][i]["exp_avg"].shape
        assert (state["exp_avg"] - states[1]["state"][i]["exp_avg"]).abs().max() <= 1e-3 * state["exp_avg"].abs().max() + 1e-9
    start = build(second, kind).network.state_dict()
    for name, value in one["state_dict"].items():
        moved = (value - start[name]).square().mean().sqrt()
        assert (value - other["state_dict"][name]).square().mean().sqrt() <= 1e-2 * moved, name


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_are_read_by_both(kind, tmp_path):
    """A Lightning file of the release's structure loads here, a file saved here loads in the training module."""
    fit(build(Release, kind), tmp_path, 2)
    theirs = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    network = build(Ours, kind).network
    checkpoint.load_into(network, tmp_path / "last.ckpt")
    assert all(torch.equal(network.state_dict()[k], v) for k, v in theirs.items())
    checkpoint.save(network, tmp_path / "ours.ckpt")
    module = build(Release, kind, ckpt_path=str(tmp_path / "ours.ckpt"))
    assert all(torch.equal(module.network.state_dict()[k], v) for k, v in theirs.items())


def test_the_frozen_part_computes_what_the_release_computes():
    """A DeltaWorld keeps tokenizer and backbone in evaluation mode whatever the trainer sets."""
    ours, release = build(Ours, "world").train(), build(Release, "world")
    release.network.eval()
    frames, _ = next(iter(torch.utils.data.DataLoader(Clips(2, 8), 2)))
    tokens = ours.network.tokenizer.tokenize(frames)
    assert relative_rmse(tokens, release.network.encode_frames(frames)[0]) < 1e-5
    assert not ours.network.tokenizer.training
    assert not ours.network.backbone.training


YAML = """
model:
  class_path: test_drop_in.Released
  init_args:
    ctx_len: 4
    network:
      class_path: deltakern.DeltaWorld
      init_args:
        rope_axis_sizes: [12]
        predictor_hidden_size: 32
        predictor_num_hidden_layers: 2
        predictor_num_heads: 2
        tokenizer:
          class_path: deltakern.DeltaTok
          init_args:
            num_hidden_layers: 1
            backbone:
              class_path: deltakern.DINOv3
              init_args:
                backbone_name: {dinov3}
"""


def test_the_config_names_deltakerns_classes(tmp_path):
    """LightningCLI builds the nested ``class_path`` entries of the released configs with one line changed in each."""
    pytest.importorskip("jsonargparse", reason='needs jsonargparse: pip install "deltakern[lightning]"')
    from lightning.pytorch.cli import LightningCLI

    dinov3, _ = stored.write_models(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(YAML.format(dinov3=dinov3))
    build_cli: Callable[..., Any] = LightningCLI
    made = build_cli(
        Released,
        subclass_mode_model=True,
        save_config_callback=None,
        run=False,
        args=["--config", str(config)],
        trainer_defaults={"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
    )
    network = made.model.network
    assert type(network) is deltakern.DeltaWorld
    assert type(network.tokenizer) is deltakern.DeltaTok
    assert type(network.backbone) is deltakern.DINOv3
    assert network.backbone.hidden_size == 64
