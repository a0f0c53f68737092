"""The baseline of the benchmarks computes what the released code computes: the golden vectors, from the same state dicts."""

from __future__ import annotations

import sys
from pathlib import Path

import golden
import pytest
import torch
from compare import relative_rmse

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is in the repository, not in the package
from benchmarks import release_structure as release

LIMIT = 1e-5


def _close(value: torch.Tensor, truth: torch.Tensor) -> None:
    assert relative_rmse(value, truth) < LIMIT


@pytest.fixture(scope="module")
def backbone() -> release.DINOv3:
    tensors = golden.load("dinov3_backbone")
    sizes = {k: v for k, v in golden.meta("dinov3_backbone").items() if k not in ("frames", "features")}
    made = release.DINOv3(**sizes)
    made.load_state_dict({k: v for k, v in tensors.items() if k.startswith("backbone.")})
    return made


def _tokenizer(backbone, weights, variant, **kind) -> release.DeltaTok:
    made = release.DeltaTok(backbone, qk_norm_order=variant, intermediate_size=4 * backbone.hidden_size, **kind)
    missing, unexpected = made.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.startswith("backbone.") for key in missing)
    return made.eval()


def test_backbone(backbone):
    tensors = golden.load("dinov3_backbone")
    _close(backbone(tensors["frames"]), tensors["features"])


@pytest.mark.parametrize(
    ("name", "variant"),
    [("default", "post_rope"), ("default", "pre_rope"), ("plain", "post_rope"), ("nodelta", "post_rope")],
)
def test_tokenizer(backbone, name, variant):
    tensors = golden.load(f"deltatok_{name}", variant)
    config = golden.meta(f"deltatok_{name}", variant)["config"]
    tokenizer = _tokenizer(
        backbone,
        golden.under(tensors, "param."),
        variant,
        **{k: v for k, v in config.items() if k.startswith("use_") or k == "num_hidden_layers"},
    )
    rope = (tensors["rope_cos"], tensors["rope_sin"])
    for made, truth in zip(tokenizer._rope(torch.empty(3, 64, 96)), rope, strict=True):
        assert torch.equal(made, truth)
    tokenizer.zero_grad()
    z = tokenizer.encode(tensors["x"], tensors["y"], rope)
    prediction = tokenizer.decode(z, tensors["x"], rope)
    loss = release.log_cosh(prediction, tensors["y"]).mean()
    _close(z, tensors["z"])
    _close(prediction, tensors["y_hat"])
    _close(loss, tensors["loss"])
    _close(tokenizer.tokenize_offline(tensors["seq.first"], tensors["seq.y"], rope), tensors["seq.z"])
    loss.backward()
    norms = golden.meta(f"deltatok_{name}", variant)["grad_norms"]
    found = {k: p.grad.norm().item() for k, p in tokenizer.named_parameters() if p.grad is not None}
    assert set(found) == set(norms)
    for key, norm in norms.items():
        assert found[key] == pytest.approx(norm, rel=1e-4), key


@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_world(backbone, variant):
    tensors = golden.load("deltaworld", variant)
    tokenizer = _tokenizer(backbone, golden.under(tensors, "tokenizer."), variant, num_hidden_layers=1)
    world = release.DeltaWorld(
        tokenizer,
        predictor_hidden_size=128,
        predictor_num_hidden_layers=2,
        predictor_num_heads=2,
        num_samples_train=16,
        num_samples_eval=5,
    )
    world.predictor.load_state_dict(golden.under(tensors, "predictor."))
    z, _, _ = world.encode_frames(tensors["frames"])
    _close(z, tensors["z"])
    predicted, target, index, losses = world.train_on_tokens(z, tensors["timestamps"], release.smooth_l1, tensors["queries"])
    assert torch.equal(index, tensors["best"])
    _close(losses, tensors["candidate_losses"])
    _close(predicted, tensors["z_hat"])
    _close(target, tensors["z_tgt"])
    again, _ = world(tensors["frames"], tensors["timestamps"], queries=tensors["queries"])
    assert torch.equal(again, predicted)
    noise = torch.cat([tensors[f"rollout.query{step}"] for step in (0, 1)], 2)
    with torch.no_grad():
        features, tokens = world.rollout(tensors["frames"], tensors["timestamps"], 3, noise)
        alone = world.sample(z[:, :3], tensors["timestamps"], 2, noise)
    _close(features, tensors["rollout.preds"])
    assert torch.equal(tokens, alone)


@pytest.mark.parametrize("mode", ["plain", "bom"])
def test_dense_world(backbone, mode):
    tensors = golden.load("dinoworld")
    world = release.DINOWorld(
        backbone,
        predictor_hidden_size=128,
        predictor_num_hidden_layers=1,
        predictor_num_heads=2,
        use_bom=mode == "bom",
        num_samples_eval=3,
    )
    missing, unexpected = world.load_state_dict(golden.under(tensors, f"{mode}.param."), strict=False)
    assert not unexpected
    assert all(key.startswith("backbone.") for key in missing)
    frames, times = tensors["frames"], tensors["timestamps"]
    predicted, target = world(frames, times, queries=tensors.get(f"{mode}.queries"))
    _close(predicted, tensors[f"{mode}.y_hat"])
    _close(release.smooth_l1(predicted, target).mean(), tensors[f"{mode}.loss"])
    noise = torch.cat([tensors[f"bom.rollout.query{step}"] for step in (0, 1)], 2) if mode == "bom" else None
    with torch.no_grad():
        _close(world.rollout(frames, times, 2, noise), tensors[f"{mode}.rollout.preds"])


def test_released_names(backbone):
    layers = {"num_hidden_layers": 1, "intermediate_size": 512}
    for variant in golden.VARIANTS:
        tokenizer = release.DeltaTok(backbone, qk_norm_order=variant, **layers)
        own = [(k, tuple(v.shape)) for k, v in tokenizer.state_dict().items() if not k.startswith("backbone.")]
        assert sorted(own) == sorted(golden.state_dict_keys("deltatok", variant))
    predictor = release.Predictor(128, 128, 2, 2, (60,), 1e-5, 4)
    assert sorted((k, tuple(v.shape)) for k, v in predictor.state_dict().items()) == sorted(golden.state_dict_keys("predictor"))
