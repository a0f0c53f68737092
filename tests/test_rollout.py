"""``deltakern rollout``: the files and the page, from random weights and from weights in files."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open

import deltakern
from deltakern.cli import main
from deltakern.data import CLIP
from deltakern.data.video import frame_times
from deltakern.models import checkpoint
from deltakern.models.heads import RGBHead
from deltakern.rollout import Settings, load_world, pca_colours, read_frames, run

SMALL = ["--size", "32", "--context", "3", "--horizon", "2", "--samples", "4", "--show", "2", "--gap", "0.1"]


def _read(path):
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Options that name small weights in files, and the model that they are of."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    config = deltakern.DINOv3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
    backbone = deltakern.DINOv3(config=config)
    world = deltakern.DeltaWorld(deltakern.DeltaTok(backbone, 1, intermediate_size=96), (60,), 64, 1, 1, mlp_ratio=2).eval()
    (folder / "dinov3").mkdir()
    fields = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
    (folder / "dinov3" / "config.json").write_text(json.dumps(fields))
    checkpoint.save(backbone, folder / "dinov3" / "model.safetensors")
    checkpoint.save(world.tokenizer, folder / "deltatok.bin")
    checkpoint.save(world, folder / "deltaworld.safetensors")
    norm = backbone.backbone.norm
    statistics = (backbone.processor.image_mean, backbone.processor.image_std)
    head = RGBHead(64, norm.weight, norm.bias, *statistics, hidden_size=144, depth=1, num_heads=2, mlp_size=32, img_size=32)
    checkpoint.save(head, folder / "rgb.safetensors")
    options = {"dinov3": "dinov3", "deltatok": "deltatok.bin", "deltaworld": "deltaworld.safetensors", "rgb": "rgb.safetensors"}
    return {name: str(folder / file) for name, file in options.items()}, world


def test_random_weights(tmp_path, capsys):
    assert main(["rollout", str(CLIP), "--random-weights", *SMALL, "--out", str(tmp_path / "a")]) == 0
    assert "index.html" in capsys.readouterr().out
    tokens, metadata = _read(tmp_path / "a" / "tokens.safetensors")
    features, _ = _read(tmp_path / "a" / "features.safetensors")
    patches = features["last"].shape[0]
    assert {k: tuple(v.shape) for k, v in tokens.items()} == {"tokens": (4, 2, 128), "context": (3, 128), "timestamps": (5,)}
    assert {k: tuple(v.shape) for k, v in features.items()} == {"features": (2, 2, patches, 128), "indices": (2,), "last": (patches, 128)}
    assert metadata == {"video": CLIP.name, "seed": "0", "weights": "random"}
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["features.safetensors", "index.html", "tokens.safetensors"]
    page = (tmp_path / "a" / "index.html").read_text()
    assert "Random weights" in page
    assert page.count("<img") == 3 + 3 + 2 + 2 + 2 * 2  # context, truth: frames and features; two futures
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page must need nothing from elsewhere"
    # the same seed gives the same futures, for another number of them too
    assert main(["rollout", str(CLIP), "--random-weights", *SMALL, "--samples", "6", "--out", str(tmp_path / "b")]) == 0
    again, _ = _read(tmp_path / "b" / "tokens.safetensors")
    torch.testing.assert_close(again["tokens"][:4], tokens["tokens"], rtol=1e-4, atol=1e-5)


def test_weights_from_files_and_an_rgb_head(tmp_path, weights):
    options, world = weights
    settings = Settings(CLIP, tmp_path, context=3, horizon=2, samples=4, show=2, gap=0.1, size=32, seed=5, log=False, **options)
    loaded = load_world(settings).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in world.state_dict().items())
    futures = run(settings)
    clip, times = read_frames(settings)
    assert torch.equal(clip.timestamps, times)  # the bundled clip has the frames to predict as well
    relative = (times - times[0]).float()[None]
    direct = world.rollout(clip.frames[None, :3], relative, 2, 4, [0, 1], seed=5)
    torch.testing.assert_close(futures.tokens, direct.tokens, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(futures.features, direct.features, rtol=1e-4, atol=1e-5)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img") == 3 + 3 + 2 + 2 + 2 * (2 + 2)  # every future in pixels too
    assert options["deltaworld"] in page
    assert _read(tmp_path / "tokens.safetensors")[1]["weights"] == ", ".join(options[k] for k in ("dinov3", "deltatok", "deltaworld"))


def test_a_video_that_ends_before_the_truth(tmp_path):
    whole = read_frames(Settings(CLIP, random=True, size=32, gap=0.1))[1]
    end = frame_times(CLIP)[-1].item()
    assert end > whole[-1]
    settings = Settings(CLIP, tmp_path, context=2, horizon=3, samples=2, show=1, start=end - 0.15, gap=0.1, size=32, random=True, log=False)
    clip, times = read_frames(settings)
    assert len(clip.frames) == 2
    assert len(times) == 5
    run(settings)
    page = (tmp_path / "index.html").read_text()
    assert "Truth" not in page
    assert "components of context as" in page


def test_colours_are_fitted_on_what_is_known():
    known = torch.randn(2, 6, 8) * torch.tensor([9.0, 5.0, 3.0, *[0.01] * 5])
    colour = pca_colours(known, (2, 3))
    picture = colour(known[0])
    assert picture.shape == (3, 2, 3)
    assert picture.dtype == torch.uint8
    # the first component is the channel with most variance, whatever its sign
    assert abs(torch.corrcoef(torch.stack((picture[0].flatten().float(), known[0, :, 0])))[0, 1]) > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "facebook/dinov3-vitb16-pretrain-lvd1689m"),  # the released ones, which are not here
        (["--random-weights", "--rgb", "x", "--dinov3", "x"], "--random-weights comes without --dinov3, --rgb"),
        (["--random-weights", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["--random-weights", "--gap", "0"], "--gap must be positive seconds, got 0.0"),
        (["--random-weights", "--start", "1000"], "1000.000 s was asked for"),
        (["--dinov3", "nowhere.bin", "--deltatok", "x", "--deltaworld", "y"], "no such file or folder: nowhere.bin"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    assert main(["rollout", str(CLIP), "--out", str(out), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert not (out / "index.html").exists()
