"""The recipes: optimizer, resuming bit for bit, kills, damaged checkpoints, losses that are not finite, validation, logs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("av")
pytest.importorskip("pyarrow")

import stored
from compare import relative_rmse

from benchmarks import release_structure
from deltakern.data import TokenDataset
from deltakern.data.pace import Pace, counted, duration, figure
from deltakern.data.sampling import Drawn, Sampling, generator_for
from deltakern.data.sources import find_videos
from deltakern.data.store import StoreError, TokenOrder, fingerprint
from deltakern.data.tokenize import TokenizeOptions, tokenize
from deltakern.models import checkpoint
from deltakern.training import loop, tok, world
from deltakern.training.loop import TrainOptions, read_metrics
from deltakern.training.optim import Schedule, make_optimizer, parameter_groups
from deltakern.training.run import Log, Run, TrainingError
from deltakern.training.tok import TokTask, VideoClips, train_tok
from deltakern.training.world import WorldTask, best_and_mean, make_world, rollout_tokens, train_world


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored.write_store(tmp_path_factory.mktemp("tokens") / "store")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(3):
        stored.write_video(folder / f"{i}.mp4", i)
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder


def options(**changes) -> TrainOptions:
    few = {"steps": 10, "cooldown": 2, "warmup": 2, "batch_size": 8, "rate": 1e-3, "save_every": 3, "validate_every": 6, "log_every": 1}
    return TrainOptions(**{**few, "device": "cpu", **changes})


def train(tokens: Path, out: Path, changes: dict | None = None, **kwargs):
    return train_world(tokens, out, options(**(changes or {})), **{"predictor": stored.PREDICTOR, "val_fraction": 0.3, **kwargs})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(folder / "pytorch_model.bin").state_dict


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def curve(folder: Path) -> list[tuple[float, ...]]:
    return [(row["step"], row["loss"], row["rate"], row["grad_norm"]) for row in read_metrics(folder / "metrics.csv")]


# The recipe


def test_linear_weights_alone_decay_in_the_order_of_names():
    model = make_world(stored.manifest(), stored.PREDICTOR)
    decayed, rest = parameter_groups(model, 0.4)
    names = {id(p): n for n, p in model.named_parameters()}
    linear = sorted(f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear))
    assert [names[id(p)] for p in decayed["params"]] == linear
    assert [names[id(p)] for p in rest["params"]] == sorted(set(names.values()) - set(linear))
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.4, 0.0)
    frozen = stored.tokenizer()
    trained = {id(p) for group in parameter_groups(frozen, 0.1) for p in group["params"]}
    assert trained == {id(p) for n, p in frozen.named_parameters() if not n.startswith("backbone.")}


def test_the_schedule_is_the_releases():
    """Zero at the first step, the peak from the warm-up on, a tenth in each cool-down."""
    schedule = Schedule(1e-3, steps=100, warmup=10, cooldown=20, cooldowns=2)
    assert schedule.total == 140
    assert [schedule.rate(s) for s in (0, 5, 10, 99)] == [0.0, 5e-4, 1e-3, 1e-3]
    assert [schedule.rate(s) for s in (100, 119, 120, 139, 200)] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-5])
    assert Schedule(1.0, steps=5, warmup=0).rate(0) == 1.0


def test_released_defaults():
    assert dataclasses.asdict(TrainOptions()).items() >= {
        "steps": 300_000, "batch_size": 1024, "rate": 1e-4, "weight_decay": 0.4, "warmup": 5000, "cooldown": 5000, "clip": None
    }.items()  # fmt: skip
    assert (tok.RELEASED.rate, tok.RELEASED.weight_decay, tok.RELEASED.clip) == (1e-3, 1e-2, 1e-2)
    assert (world.Predictor().candidates, world.Predictor().samples, world.BETA) == (256, 20, 0.1)


def test_training_is_the_recipe_written_out(tokens, tmp_path):
    """Against a plain loop over the release's structure: same clips, same noise, same losses and weights."""
    train(tokens, tmp_path, {"steps": 4, "cooldown": 0, "weight_decay": 0.4}, val_fraction=0.0)
    dataset = TokenDataset(tokens)
    order = TokenOrder(dataset, 0)
    model = make_world(dataset.manifest, stored.PREDICTOR)
    p = stored.PREDICTOR
    plain = release_structure.Predictor(16, p.width, p.layers, p.heads, (12,), p.layer_scale_init, p.mlp_ratio)
    plain.load_state_dict({k.removeprefix("predictor."): v for k, v in model.state_dict().items()})
    reference = release_structure.DeltaWorld.__new__(release_structure.DeltaWorld)
    nn.Module.__init__(reference)
    reference.predictor, reference.width, reference.num_samples_train = plain, p.width, p.candidates
    linear = {id(m.weight) for m in plain.modules() if isinstance(m, nn.Linear)}
    groups = [[q for q in plain.parameters() if (id(q) in linear) == wanted] for wanted in (True, False)]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.4}, {"params": groups[1], "weight_decay": 0.0}])
    losses = []
    for step in range(4):
        clips, times = dataset.batch(order.take(8 * step, 8 * step + 8))
        torch.manual_seed(generator_for(0, "step", step, 0, 0).initial_seed())
        prediction, target, _, _ = reference.train_on_tokens(clips, times, release_structure.smooth_l1)
        loss = release_structure.smooth_l1(prediction, target).mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 2)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [row[1] for row in curve(tmp_path)] == pytest.approx(losses, rel=1e-5)
    begun = make_world(dataset.manifest, stored.PREDICTOR).state_dict()
    for name, value in weights(tmp_path).items():
        moved = (value - begun[name]).square().mean().sqrt()
        error = (value - plain.state_dict()[name.removeprefix("predictor.")]).square().mean().sqrt()
        assert error <= 1e-3 * moved, name


def test_it_learns(tokens, tmp_path):
    train(tokens, tmp_path, {"steps": 120, "cooldown": 0, "rate": 3e-3, "validate_every": 60, "save_every": 120})
    losses = [row[1] for row in curve(tmp_path)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_accumulated_parts_are_one_batch(videos, tmp_path):
    """Without anything random in the loss, parts give the gradient of the whole."""
    runs = []
    for i, accumulate in enumerate((1, 2)):
        made = stored.tokenizer(use_rope_aug=False)
        train_tok(
            [videos], tmp_path / str(i), made, options(steps=3, cooldown=0, accumulate=accumulate, clip=1e-2, batch_size=4), sampling=PAIRS
        )
        runs.append(curve(tmp_path / str(i)))
    for one, other in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


PAIRS = Sampling(num_frames=2, size=32)


def test_gradients_are_clipped_to_the_norm(videos, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *args):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(nn.utils.get_total_norm(grads).item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train_tok([videos], tmp_path, stored.tokenizer(), options(steps=2, cooldown=0, clip=1e-3, batch_size=2), sampling=PAIRS)
    assert norms == pytest.approx([1e-3] * 2, rel=1e-3)
    assert all(row[3] > 1e-3 for row in curve(tmp_path))  # what is logged is the norm before clipping


def test_a_batch_that_the_parts_do_not_divide_is_refused(tokens, tmp_path):
    with pytest.raises(ValueError, match="multiple of processes x accumulate = 1 x 3, got 8"):
        train(tokens, tmp_path, {"accumulate": 3})


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"rate": math.nan}, {"weight_decay": -1.0}, {"clip": 0.0}, {"precision": "int8"}, {"save_every": 0}]
)
def test_options_refuse_nonsense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainOptions(**bad)
    with pytest.raises(ValueError, match="keep"):
        Run("somewhere", keep=1)


# Going on


def test_a_run_in_pieces_is_the_run_in_one(tokens, tmp_path, monkeypatch):
    """Bit for bit: weights, losses, best; the log has every step once."""
    whole = train(tokens, tmp_path / "one")
    assert whole == (12, False, whole.loss)
    told = iter([False] * 3 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_on_signal", lambda: _told(lambda: next(told)))
        assert train(tokens, tmp_path / "two")[:2] == (4, True)
    assert (tmp_path / "two/checkpoints/step-00000004").is_dir()
    assert not (tmp_path / "two/pytorch_model.bin").exists()
    assert train(tokens, tmp_path / "two")[:2] == (12, False)
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert_same_weights(tmp_path / "one/best", tmp_path / "two/best")
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    assert read_metrics(tmp_path / "one/validation.csv") == read_metrics(tmp_path / "two/validation.csv")
    assert train(tokens, tmp_path / "two")[:2] == (12, False)  # nothing left to do


class _told:
    """A context manager that gives ``function``, as ``stop_on_signal`` does."""

    def __init__(self, function):
        self.function = function

    def __enter__(self):
        return self.function

    def __exit__(self, *_):
        pass


def test_a_lost_step_is_repeated_as_it_was(tokens, tmp_path):
    """The run went on past its last checkpoint and was killed: the rows of the lost steps are written again, the same."""
    train(tokens, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/step-00000012")
    os.remove(tmp_path / "two/pytorch_model.bin")
    train(tokens, tmp_path / "two")
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_deterministic_mode_repeats_bit_for_bit(tokens, tmp_path):
    for name in ("one", "two"):
        train(tokens, tmp_path / name, {"deterministic": True, "precision": "bfloat16"})
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    assert not torch.are_deterministic_algorithms_enabled()
    train(tokens, tmp_path / "other", {"deterministic": True, "precision": "bfloat16", "seed": 1})
    assert curve(tmp_path / "other") != curve(tmp_path / "one")


def test_training_leaves_the_callers_random_numbers_alone(tokens, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tokens, tmp_path, {"steps": 2, "cooldown": 0})
    assert torch.equal(torch.rand(3), expected)


def test_later_options_win_over_saved_ones(tokens, tmp_path):
    """As in the release: a resumed run takes learning rate and weight decay from its own call."""
    train(tokens, tmp_path, {"steps": 4, "cooldown": 0})
    train(tokens, tmp_path, {"steps": 6, "cooldown": 0, "rate": 5e-4, "weight_decay": 0.1})
    assert [row[2] for row in curve(tmp_path)][-3:] == [1e-3, 5e-4, 5e-4]
    assert json.loads((tmp_path / "config.json").read_text())["options"]["weight_decay"] == 0.1


def _train_counting(count, tokens, out):
    torch.set_num_threads(1)
    add = Log.add

    def counting(self, *args, **kwargs):
        add(self, *args, **kwargs)
        with count.get_lock():
            count.value += 1

    Log.add = counting
    count.value = 0
    train(tokens, out, {"steps": 60, "save_every": 4})


def test_ten_kills_lose_at_most_the_steps_since_the_last_checkpoint(tokens, tmp_path):
    train(tokens, tmp_path / "clean", {"steps": 60, "save_every": 4})
    context, chance, killed, reached = stored.clean_processes(), random.Random(1), 0, 0
    for _ in range(10):
        moment = chance.randint(0, 7), chance.uniform(0, 0.02)
        killed += stored.killed_after(context, *moment, _train_counting, tokens, tmp_path / "run")[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a damaged checkpoint
            found = Run(tmp_path / "run").load()
        step = 0 if found is None else found[0]["step"]
        assert step >= reached
        reached = step
        logged = read_metrics(tmp_path / "run/metrics.csv") if (tmp_path / "run/metrics.csv").exists() else []
        assert not logged or logged[-1]["step"] <= step + 4
    assert killed >= 8
    train(tokens, tmp_path / "run", {"steps": 60, "save_every": 4})
    assert_same_weights(tmp_path / "clean", tmp_path / "run")
    assert curve(tmp_path / "run") == curve(tmp_path / "clean")
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_weights_half_written_are_removed(tmp_path):
    run = Run(tmp_path)
    run.create({})
    run.best_weights.parent.mkdir()
    whole = run.weights, run.best_weights
    left = [path.with_name(f".{path.name}.{pid}.partial") for path in whole for pid in (7, 4711)]
    for path in (*whole, *left):
        path.write_bytes(b"half")
    run.create({})
    assert all(path.exists() for path in whole)
    assert not any(path.exists() for path in left)


def _train_until_told(began, tokens, out):
    torch.set_num_threads(1)
    add = Log.add

    def telling(self, *args, **kwargs):
        add(self, *args, **kwargs)
        began.set()

    Log.add = telling
    raise SystemExit(20 + train(tokens, out, {"steps": 10**6, "save_every": 10**6, "validate_every": 10**6}).stopped)


def test_sigterm_saves_and_ends(tokens, tmp_path):
    context = stored.clean_processes()
    began = context.Event()
    child = context.Process(target=_train_until_told, args=(began, tokens, tmp_path))
    child.start()
    assert began.wait(60)
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 21
    state, _ = Run(tmp_path).load()
    assert state["step"] == read_metrics(tmp_path / "metrics.csv")[-1]["step"] >= 1


# What is damaged or does not fit


def _truncate(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-20])


def _flip(folder: Path) -> None:
    path = folder / "training_state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _empty(folder: Path) -> None:
    (folder / "sha256.json").write_bytes(b"")


def _lose(folder: Path) -> None:
    (folder / "training_state.pt").unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _lose])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tokens, tmp_path, damage):
    train(tokens, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    damage(tmp_path / "two/checkpoints/step-00000012")
    with pytest.warns(UserWarning, match=r"step-00000012: a damaged checkpoint .*falling back to the one before"):
        assert Run(tmp_path / "two").load()[0]["step"] == 9
    with pytest.warns(UserWarning, match="damaged"):
        train(tokens, tmp_path / "two")
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    for folder in (tmp_path / "two/checkpoints").iterdir():
        damage(folder)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(TrainingError, match="all 3 checkpoints are damaged"):
        train(tokens, tmp_path / "two")


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(tokens, tmp_path):
    broken = make_world(stored.manifest(), stored.PREDICTOR)
    checkpoint.save(broken, tmp_path / "before.pth")
    dataset = TokenDataset(tokens)
    task = WorldTask(broken, dataset)
    calls = []

    def poison(module, args):
        calls.append(0)
        return (args[0] * math.inf, args[1]) if len(calls) == 3 else args

    task.objective.register_forward_pre_hook(poison)
    with pytest.raises(
        TrainingError, match=r"step 2: the loss is nan .*no step was taken. The batch is in .*failed-step-00000002-rank-0.pt"
    ):
        loop.fit(task, tmp_path / "run", options(save_every=2))
    saved = torch.load(tmp_path / "run/failed-step-00000002-rank-0.pt", weights_only=True)
    clips, times = dataset.batch(TokenOrder(dataset, 0).take(16, 24))
    assert torch.equal(saved["batch"][0], clips)
    assert torch.equal(saved["batch"][1], times)
    assert len(saved["names"]) == 8
    assert saved["names"][0].startswith("video")
    assert math.isnan(saved["loss"])
    state, kept = Run(tmp_path / "run").load()
    assert state["step"] == 2
    assert all(torch.equal(v, broken.state_dict()[k]) for k, v in kept.state_dict.items())


def test_a_gradient_that_is_not_finite_stops_too(tokens, tmp_path):
    task = WorldTask(make_world(stored.manifest(), stored.PREDICTOR), TokenDataset(tokens))
    task.network.predictor.head.weight.register_hook(lambda g: g * math.nan)
    with pytest.raises(TrainingError, match="the gradient's norm nan"):
        loop.fit(task, tmp_path / "run", options())


def test_another_runs_folder_is_refused(tokens, tmp_path):
    train(tokens, tmp_path / "run", {"steps": 3})
    other = stored.write_store(tmp_path / "other", fingerprint="e" * 32)
    with pytest.raises(TrainingError, match=r"holds another run: fingerprint was 'f+' and is 'e+'; give another folder"):
        train(other, tmp_path / "run")
    with pytest.raises(TrainingError, match="holds another run: layers was 2 and is 1"):
        train(tokens, tmp_path / "run", predictor=dataclasses.replace(stored.PREDICTOR, layers=1))


def test_more_clips_are_gone_on_with(tokens, tmp_path):
    train(tokens, tmp_path / "run", {"steps": 3, "cooldown": 0})
    more = stored.write_store(tmp_path / "more", videos=20)
    with pytest.warns(UserWarning, match="the clips are not those of before"):
        assert train([tokens, more], tmp_path / "run", {"steps": 5, "cooldown": 0}).step == 5


def test_stores_of_another_tokenizer_are_refused(videos, tmp_path):
    made = stored.tokenizer()
    tokenize([videos], tmp_path / "store", made, TokenizeOptions(sampling=stored.SMALL, progress=False))
    with pytest.raises(StoreError, match=f"expected {fingerprint(stored.tokenizer(seed=1))}"):
        train(tmp_path / "store", tmp_path / "run", tokenizer=stored.tokenizer(seed=1))
    with pytest.raises(ValueError, match="val_videos: features can be predicted with the tokenizer alone"):
        train(tmp_path / "store", tmp_path / "run", val_fraction=0.0, val_videos=[videos])
    with pytest.raises(StoreError, match="hold out more, or nothing"):
        train(tmp_path / "store", tmp_path / "run", val_fraction=0.01)


# What comes out


def test_released_files_come_out_and_go_in(tokens, tmp_path):
    train(tokens, tmp_path / "run")
    found = weights(tmp_path / "run")
    made = stored.tokenizer()
    p = stored.PREDICTOR
    released = make_world(stored.manifest(), p)
    assert list(found) == [name for name in released.state_dict() if name.startswith("predictor.")]
    assert found.keys() == {f"predictor.{k}" for k in release_structure.Predictor(16, 32, 2, 2, (12,), 0.1, 2).state_dict()}
    real = make_world(made, dataclasses.replace(p))
    fit = checkpoint.load_into(make_world(stored.manifest(), p, seed=9), tmp_path / "run")
    assert not fit.unknown
    assert not fit.left
    with pytest.raises(checkpoint.CheckpointError):  # this predictor is for tokens of 16 channels, the tokenizer makes 64
        checkpoint.load_into(real, tmp_path / "run")
    begun = make_world(stored.manifest(), p, seed=9, init=tmp_path / "run/pytorch_model.bin")
    assert all(torch.equal(v, begun.state_dict()[k]) for k, v in found.items())


def test_old_checkpoints_go(tokens, tmp_path):
    train(tokens, tmp_path, {"save_every": 2, "keep": 2})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]


def test_rollouts_of_tokens_are_the_releases(tmp_path):
    """Against the release's structure, which recomputes everything, on the same noise."""
    made = stored.tokenizer()
    ours = make_world(made, stored.PREDICTOR).eval()
    p = stored.PREDICTOR
    plain = release_structure.Predictor(64, p.width, p.layers, p.heads, (12,), p.layer_scale_init, p.mlp_ratio)
    plain.load_state_dict({k.removeprefix("predictor."): v for k, v in ours.state_dict().items() if k.startswith("predictor.")})
    clips, times = torch.randn(2, 4, 64), torch.rand(2, 7).cumsum(1)
    with torch.no_grad():
        futures = rollout_tokens(ours, clips, times, 3, generator_for(7))
        g = generator_for(7)
        past = clips.repeat_interleave(3, 0)
        for step in range(4, 7):
            noise = torch.randn(6, 1, 1, p.width, generator=g)[:, :, 0] * 0.02
            t = times.repeat_interleave(3, 0)
            past = torch.cat((past, plain(noise, past, None, (t[:, step : step + 1],), (t[:, :step],))), 1)
    assert futures.shape == (2, 3, 3, 64)
    assert relative_rmse(futures, past[:, 4:].unflatten(0, (2, 3))) < 1e-5


def test_best_mean_and_copy_last_by_hand():
    target = torch.zeros(1, 2, 4)
    futures = torch.stack((torch.tensor([[0.0] * 4, [3.0] * 4]), torch.tensor([[5.0] * 4, [1.0] * 4])))[None]
    found = best_and_mean(futures, target, torch.ones(1, 4))
    smooth = lambda x: abs(x) - 0.05  # noqa: E731
    assert found["best"].item() == pytest.approx((smooth(5) + smooth(1)) / 2)  # the second: its last step is nearest
    assert found["mean"].item() == pytest.approx((smooth(2.5) + smooth(2)) / 2)
    assert found["copy_last"].item() == pytest.approx(smooth(1))


def test_validation_is_logged_repeats_and_keeps_the_best(tokens, tmp_path):
    train(tokens, tmp_path)
    rows = read_metrics(tmp_path / "validation.csv")
    assert [row["step"] for row in rows] == [6, 12]
    names = {f"h{h}_{n}" for h in (1, 3) for n in ("best", "mean", "copy_last")}
    assert set(rows[0]) == {"step", "val"} | names
    assert rows[0]["val"] == pytest.approx((rows[0]["h1_mean"] + rows[0]["h3_mean"]) / 2)
    assert all(row["h1_best"] < row["h1_mean"] + 0.1 for row in rows)
    assert rows[0]["h3_copy_last"] == rows[1]["h3_copy_last"] > 0
    val = TokenDataset(tokens, split="val", val_fraction=0.3)
    copied, target = val.batch(range(len(val)))[0][:, 3:4], val.batch(range(len(val)))[0][:, 4:5]
    by_hand = nn.functional.smooth_l1_loss(copied, target, beta=0.1).item()
    assert rows[0]["h1_copy_last"] == pytest.approx(by_hand, rel=1e-5)
    best = min(rows, key=lambda row: row["val"])
    state, kept = Run(tmp_path).load()
    assert state["best"] == best["val"]
    if best["step"] == 12:
        assert_same_weights(tmp_path, tmp_path / "best")
    else:
        assert any(not torch.equal(v, kept.state_dict[k]) for k, v in weights(tmp_path / "best").items())


def test_another_validation_starts_a_new_best(tokens, videos, tmp_path):
    """A run that goes on with other measures does not hold them against the old ones."""
    made = stored.tokenizer()
    tokenize([videos], tmp_path / "store", made, TokenizeOptions(crops=4, sampling=stored.SMALL, progress=False))
    few = {"cooldown": 0, "validate_every": 2, "batch_size": 4}
    train(tmp_path / "store", tmp_path / "run", {"steps": 2, **few}, val_fraction=0.7)
    first = Run(tmp_path / "run").load()[0]
    with pytest.warns(UserWarning, match="the clips are not those of before"):
        train(
            tmp_path / "store",
            tmp_path / "run",
            {"steps": 4, **few},
            val_fraction=0.0,
            tokenizer=made,
            val_videos=[videos / "0.mp4"],
            val_stride=0.1,
        )
    rows = read_metrics(tmp_path / "run/validation.csv")
    second = Run(tmp_path / "run").load()[0]
    assert set(first["validated"]) & set(second["validated"]) == {"val"}
    assert second["best"] != first["best"]
    assert rows[-1]["step"] == 4
    assert rows[-1]["val"] == pytest.approx(second["best"])
    assert rows[-1].keys() - rows[0].keys() == {f"feature_h{h}_{n}" for h in (1, 3) for n in ("best", "mean", "copy_last")}


def test_what_a_run_says(tokens, tmp_path, caplog):
    caplog.set_level("INFO", "deltakern")
    train(tokens, tmp_path / "run", {"steps": 6, "cooldown": 0, "save_every": 3, "validate_every": 6})
    text = caplog.text
    assert re.search(
        r"run: 0\.0\d+ million parameters, \d+ clips to train on, \d+ clips to validate on; 6 steps of 8 clips, float32 on cpu", text
    )
    assert re.search(r"step 1 of 6: loss \d\.\d+, \S+ clips a second, \d+ s left\n", text)
    assert re.search(r"step 3 of 6: loss \d\.\d+, \S+ clips a second, \d+ s left, saved\n", text)
    assert re.search(r"step 6: validation, smooth-L1 0\.\d+\n +best +mean +copy last\n  1 frame ahead  .*\n  3 frames ahead .*\n", text)
    assert "6 of 6 steps, done" in text
    assert f"weights: {tmp_path / 'run/pytorch_model.bin'}" in text
    assert f"those with the least validation loss: {tmp_path / 'run/best/pytorch_model.bin'}" in text
    assert b"\r" not in (tmp_path / "run/metrics.csv").read_bytes()


def test_the_table_of_a_validation():
    found = {"val": 0.25, "h1": 0.2, "h1_copy_last": 0.4, "h3": 0.3, "h3_copy_last": 0.5}
    assert loop.validation_table(7, "log-cosh", found, 0.26).splitlines() == [
        "step 7: validation, log-cosh 0.25, the least so far 0.26",
        "                      model  copy last",
        "  1 frame ahead     0.20000    0.40000",
        "  3 frames ahead    0.30000    0.50000",
    ]


def test_durations_and_pace(monkeypatch):
    cases = {0: "0 s", 59.6: "1 min", 125: "2 min 5 s", 3600: "1 h", 3605: "1 h", 7500: "2 h 5 min", 100_000: "1 d 3 h", -1: "0 s"}
    assert {s: duration(s) for s in cases} == cases
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    pace = Pace(10, 30)
    assert pace.due()
    assert pace.left == "?"
    pace.advance(2)
    now[0] = 20.0
    assert not pace.due()
    assert pace.rate == 0.1
    assert pace.left == "1 min 20 s"
    now[0] = 30.0
    assert pace.due()
    assert not pace.due()
    assert [figure(x) for x in (0.004123, 3.14159, 99.94, 12345.6)] == ["0.00412", "3.14", "99.9", "12,346"]
    assert [counted(n, "clip") for n in (0, 1, 2)] == ["0 clips", "1 clip", "2 clips"]


def test_features_are_validated_on_videos(videos, tmp_path):
    """Stored tokens for training, the real tokenizer for rollouts in features: as the model's own evaluation gives them."""
    made = stored.tokenizer()
    good = [videos / f"{i}.mp4" for i in range(3)]
    tokenize(good, tmp_path / "store", made, TokenizeOptions(crops=3, sampling=stored.SMALL, progress=False))
    train(
        tmp_path / "store",
        tmp_path / "run",
        {"steps": 2, "cooldown": 0},
        tokenizer=made,
        val_fraction=0.0,
        val_videos=good[:2],
        val_stride=0.1,
    )
    (row,) = read_metrics(tmp_path / "run/validation.csv")
    assert row["val"] == pytest.approx((row["feature_h1_mean"] + row["feature_h3_mean"]) / 2)
    with torch.no_grad():
        clips = [world.middle_clip(path, 7, 0.1, 32).frames[None] for path in good[:2]]
        features = [made.features(frames) for frames in clips]
    by_hand = [nn.functional.smooth_l1_loss(f[:, 3:4].expand(-1, 3, -1, -1), f[:, 4:7], beta=0.1).item() for f in features]
    assert row["feature_h3_copy_last"] == pytest.approx(sum(by_hand) / 2, rel=1e-4)


def test_tensorboard_gets_what_the_csv_gets(tokens, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tokens, tmp_path, {"tensorboard": True, "steps": 4, "cooldown": 0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [(e.step, e.value) for e in events.Scalars("loss")]
    assert [s for s, _ in logged] == [1, 2, 3, 4]
    assert [v for _, v in logged] == pytest.approx([row[1] for row in curve(tmp_path)], rel=1e-6)
    assert "val" in events.Tags()["scalars"]


def test_a_torn_row_of_the_log_goes(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n2,0.4\n3,0.3\n4")
    Log(path, 2).add(3, loss=0.25)
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}, {"step": 3, "loss": 0.25}]


# DeltaTok


def test_deltatok_from_videos(videos, tmp_path, caplog):
    few = {"steps": 4, "cooldown": 0, "clip": 1e-2, "batch_size": 4, "save_every": 2, "validate_every": 2}
    arguments = {"sampling": PAIRS, "val_videos": [videos / "0.mp4"], "val_stride": 0.1}
    train_tok([videos], tmp_path / "one", stored.tokenizer(), options(**few), **arguments)
    assert "skipped broken.mp4" in caplog.text
    train_tok([videos], tmp_path / "two", stored.tokenizer(), options(**{**few, "steps": 2}), **arguments)
    train_tok([videos], tmp_path / "two", stored.tokenizer(), options(**few), workers=1, **arguments)
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    released = release_structure.DeltaTok(nn.Module.__new__(_Bare), 1, intermediate_size=48)
    assert weights(tmp_path / "one").keys() == released.state_dict().keys()
    rows = read_metrics(tmp_path / "one/validation.csv")
    assert set(rows[0]) == {"step", "val", "h1", "h1_copy_last", "h3", "h3_copy_last"}
    made = stored.tokenizer()
    checkpoint.load_into(made, tmp_path / "one")
    with torch.no_grad():
        clip = tok.middle_clip(videos / "0.mp4", 4, 0.1, 32)
        prediction, target, context = made(clip.frames[None], horizon=3)
    assert rows[-1]["h3"] == pytest.approx(release_structure.log_cosh(prediction, target).mean().item(), rel=1e-4)
    copied = release_structure.log_cosh(context[:, -1:].expand_as(target), target).mean().item()
    assert rows[-1]["h3_copy_last"] == pytest.approx(copied, rel=1e-4)


class _Bare(nn.Module):
    """A backbone of which only the sizes are asked."""

    hidden_size, num_heads, patch_size = 64, 1, 16

    def requires_grad_(self, wanted=True):
        nn.Module.__init__(self)
        return self


def test_broken_videos_are_replaced_and_all_broken_is_an_error(videos, tmp_path):
    clips = VideoClips(find_videos([videos]), PAIRS, seed=0)
    epoch = [clips.video(p)[0].name for p in range(4)]
    assert sorted(epoch) == ["0.mp4", "1.mp4", "2.mp4", "broken.mp4"]
    frames, times = clips[epoch.index("broken.mp4")]
    assert frames.shape == (2, 3, 32, 32)
    assert times[0] == 0
    assert all(torch.equal(a, b) for a, b in zip(clips[1], clips[1], strict=True))
    assert not torch.equal(clips[epoch.index("0.mp4")][0], clips[[clips.video(p)[0].name for p in range(4, 8)].index("0.mp4") + 4][0])
    with pytest.raises(ValueError, match="videos in a row cannot be read"):
        VideoClips(find_videos([videos / "broken.mp4"]), PAIRS, seed=0)[0]


def test_videos_are_held_out_by_name(videos, tmp_path):
    fraction = 0.6
    held = [v.name for v in find_videos([videos]) if tok.video_share(v.name) < fraction]
    assert 0 < len(held) < 4
    made = stored.tokenizer()
    train_tok([videos], tmp_path, made, options(steps=1, cooldown=0, batch_size=2), sampling=PAIRS, val_fraction=fraction, val_stride=0.1)
    with pytest.raises(ValueError, match="holds out all"):
        train_tok([videos / "0.mp4"], tmp_path / "x", made, options(), sampling=PAIRS, val_fraction=0.999)


def test_the_frozen_backbone_is_neither_trained_nor_saved(videos, tmp_path):
    made = stored.tokenizer()
    before = {k: v.clone() for k, v in made.backbone.state_dict().items()}
    train_tok([videos], tmp_path, made, options(steps=2, cooldown=0, batch_size=2), sampling=PAIRS)
    assert all(torch.equal(v, before[k]) for k, v in made.backbone.state_dict().items())
    assert not any(k.startswith("backbone.") for k in weights(tmp_path))


def test_tasks_refuse_what_does_not_fit(tokens):
    model = make_world(stored.manifest(width=24), stored.PREDICTOR)
    with pytest.raises(StoreError, match="tokens have 16 channels, the model takes 24"):
        WorldTask(model, TokenDataset(tokens))
    short = make_world(stored.manifest(), stored.PREDICTOR)
    with pytest.raises(ValueError, match="validation needs clips of 8"):
        WorldTask(short, TokenDataset(tokens), TokenDataset(tokens), context=8)
    assert WorldTask(short, TokenDataset(tokens), videos=[Drawn(torch.zeros(7, 3, 32, 32), torch.zeros(7))]).horizons == [1, 3]
    assert TokTask(stored.tokenizer(), VideoClips([], PAIRS, 0)).identity()["model"] == "DeltaTok"


def test_the_optimizer_sees_ordinary_parameters():
    """And so does an average of the weights: AveragedModel copies and updates without help."""
    made = make_world(stored.manifest(), stored.PREDICTOR)
    optimizer = make_optimizer(made, 1e-3, 0.4)
    average = torch.optim.swa_utils.AveragedModel(made, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    clips, times = torch.randn(2, 8, 16), torch.rand(2, 8).cumsum(1)
    before = made.predictor.head.weight.detach().clone()
    for _ in range(2):
        world.TokenObjective(made)(clips, times).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(made)
    after, mean = made.predictor.head.weight, average.module.predictor.head.weight
    assert not torch.equal(before, after)
    assert not torch.equal(mean, after)
    assert not checkpoint.load_into(made, average.module.state_dict()).unknown


# The commands


def test_the_commands_from_videos_to_a_trained_world(videos, tmp_path, capsys, caplog):
    """tokenize, train-world with the tokenizer checked, train-tok; each called again has nothing left to do."""
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from deltakern.cli import main

    dinov3, deltatok = stored.write_models(tmp_path / "models")
    models = ["--dinov3", dinov3, "--deltatok", deltatok]
    store, run = str(tmp_path / "store"), str(tmp_path / "run")
    make = ["tokenize", str(videos), "--out", store, "--crops", "3", "--size", "32", "--devices", "cpu", *models]
    assert main(make) == 0
    assert "9 clips written, 0 were there, 1 videos failed" in capsys.readouterr().out
    assert main(make) == 0
    assert "0 clips written, 9 were there" in capsys.readouterr().out
    small = ["--width", "32", "--layers", "1", "--heads", "2", "--candidates", "4", "--samples", "3"]
    short = ["--steps", "4", "--cooldown", "0", "--warmup", "1", "--batch-size", "4", "--device", "cpu", "--log-every", "1"]
    begin = ["train-world", store, "--out", run, *small, *short, *models, "--val-fraction", "0", "--val-video", str(videos / "0.mp4")]
    assert main(begin) == 0
    assert "4 of 4 steps, done" in caplog.text
    capsys.readouterr()
    assert [row["step"] for row in read_metrics(tmp_path / "run/validation.csv")] == [4]
    _, other = stored.write_models(tmp_path / "other", seed=1)
    assert main(["train-world", store, "--out", run, *small, *short, "--dinov3", dinov3, "--deltatok", other]) == 1
    assert "tokens of one tokenizer mean nothing to another" in capsys.readouterr().err
    assert main(["tokenize", str(videos / "broken.mp4"), "--out", str(tmp_path / "none"), "--devices", "cpu", *models]) == 1
    assert main(["tokenize", str(videos), "--out", store, "--part", "5/4", *models]) == 1
    assert "--part must be i/n" in capsys.readouterr().err
    tok_run = ["train-tok", str(videos), "--out", str(tmp_path / "tok"), "--dinov3", dinov3, "--init", deltatok, "--size", "32", *short]
    assert main(tok_run) == 0
    assert weights(tmp_path / "tok").keys() == checkpoint.read(deltatok).state_dict.keys()
